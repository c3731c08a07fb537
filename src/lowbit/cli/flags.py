"""Names of settings on the command line, and translation of the library's errors into them."""

from __future__ import annotations

import dataclasses
import re
from functools import cache

from lowbit.options import settings_of
from lowbit.workflows import requests, suite
from lowbit.workflows.request import Request

_SHORT = {"method": "-m", "weight_bits": "-w", "activation_bits": "-a", "options": "-o", "learning_rate": "--lr"}
_LONG = {
    "options": "option",
    "procedure_options": "procedure-option",
    "then_options": "then-option",
    "calibration_options": "calibration-option",
    "data_options": "data-option",
    "model_options": "model-option",
    "teacher_options": "teacher-option",
    "kind": "optimizer",
}
_OFF = {"resume": "--fresh"}


def flag_of(name: str) -> str:
    """``weight_bits`` as ``--weight-bits``."""
    return f"--{_LONG.get(name, name.replace('_', '-'))}"


def flags_of(name: str) -> list[str]:
    """All ways to write the option of a setting."""
    return [flag_of(name), *([_SHORT[name]] if name in _SHORT else [])]


def off_flag_of(name: str) -> str:
    """The option that switches a setting off."""
    return _OFF.get(name, f"--no-{name.replace('_', '-')}")


def in_flags(text: str) -> str:
    """``text`` with settings as options: what Python and files write ``weight_bits=4`` is ``--weight-bits 4``.

    Text about a file keeps its names, as do names in quotes.

    >>> in_flags("pass weight_bits=4, resume=False, or name some with data=.")
    'pass --weight-bits 4, --fresh, or name some with --data.'
    """
    if re.match(r"\S+\.ya?ml: ", text):
        return text
    names = "|".join(sorted(_names(), key=len, reverse=True))
    before = r"(?<![\w'\"./=-])"
    text = re.sub(rf"{before}({names})=('[^']*'|[^\s,;()']*[^\s,;().:'])?", _assignment, text)
    underscored = "|".join(name for name in sorted(_names(), key=len, reverse=True) if "_" in name)
    return re.sub(rf"{before}({underscored})(?![\w'\"/=-])", lambda found: flag_of(found[1]), text)


def _assignment(found: re.Match[str]) -> str:
    name, value = found[1], (found[2] or "").strip("'")
    if value == "False":
        return off_flag_of(name)
    return flag_of(name) if value in ("", "True") else f"{flag_of(name)} {value}"


@cache
def _names() -> frozenset[str]:
    """Settings of all requests."""
    found: set[str] = set()
    pending = [kind for kind in (*vars(requests).values(), *vars(suite).values()) if isinstance(kind, type) and issubclass(kind, Request)]
    while pending:
        for name, setting in settings_of(pending.pop()).items():
            if dataclasses.is_dataclass(setting.type):
                pending.append(setting.type)  # type: ignore[arg-type]
            else:
                found.add(name)
    return frozenset(found - {"kind"})
