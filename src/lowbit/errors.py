"""The errors lowbit raises.

Each is a ``LowbitError`` and also the built-in error that fits, so callers can catch either. A message names the place
(layer, file, option), the value that came, what is allowed, and what to do next.
"""

from __future__ import annotations

import difflib
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path

_CLONE = Path(__file__).parents[2]  # where this is no installed package


class LowbitError(Exception):
    """Base of every error that lowbit raises on purpose."""


class SpecError(LowbitError, ValueError):
    """An option, bit-width, granularity or policy that is not allowed."""


class LayerError(LowbitError, ValueError):
    """A named layer cannot be quantized as asked."""


class UnknownNameError(LowbitError, LookupError):
    """A method, model, data set or observer that does not exist."""


class CalibrationError(LowbitError, ValueError):
    """Calibration data that is empty, not finite, or does not fit the model."""


class NotFiniteError(CalibrationError):
    """Values that a quantizer is to be set up from are NaN or infinite."""


class DataError(LowbitError, ValueError):
    """A data file or folder that cannot be read."""


class GraphError(LowbitError, RuntimeError):
    """The model's dataflow cannot be captured; names the line that blocks."""


class FileFormatError(LowbitError, ValueError):
    """A file that is corrupt, truncated, tampered with, of another version, or not safe to load."""


class OutputError(LowbitError, OSError):
    """A result cannot be written (no permission, full disk)."""


class ParityError(LowbitError, RuntimeError):
    """An exported file does not compute what the quantized network computes."""


class LoopError(LowbitError, RuntimeError):
    """A training loop calls its hooks in the wrong order, or steps an optimizer that does not hold the network's parameters."""


class StateError(LowbitError, TypeError):
    """A run holds something that checkpoints cannot save, so that it could not be resumed."""


class DivergedError(LowbitError, ArithmeticError):
    """Training came to values that are not finite."""


class MissingExtraError(LowbitError, ImportError):
    """An optional package is needed and not installed."""


def unknown_name(kind: str, name: str, known: Iterable[str], hint: str = "") -> UnknownNameError:
    """The error for ``name`` not being among ``known``; suggests the nearest one."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    suggestion = f" Did you mean {near[0]!r}?" if near else f" Known: {', '.join(names)}."
    return UnknownNameError(f"unknown {kind} {name!r}.{suggestion}{' ' + hint if hint else ''}")


def missing_extra(package: str, extra: str, purpose: str) -> MissingExtraError:
    """The error for an optional ``package`` that ``purpose`` needs; says how to install it."""
    return MissingExtraError(f"{purpose} needs {package}, which is not installed. Install it with: {install_command(extra)}")


def install_command(extra: str) -> str:
    """The command that installs the optional parts called ``extra``: from PyPI, or into the environment of a clone."""
    constraints = _CLONE / "constraints.txt"
    if not constraints.is_file():
        return f'pip install "lowbit[{extra}]"'
    return f"{shlex.quote(sys.executable)} -m pip install -c {shlex.quote(str(constraints))} -e {shlex.quote(f'{_CLONE}[{extra}]')}"
