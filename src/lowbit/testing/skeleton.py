"""A package with a method of its own, to start from: written by ``lowbit methods new``, it keeps the laws as it is."""

from __future__ import annotations

import keyword
from pathlib import Path
from typing import Literal

import jinja2

from lowbit.errors import OutputError, SpecError
from lowbit.files import write_text
from lowbit.registry import list_methods

SkeletonKind = Literal["training", "post_training"]


def skeleton(name: str, kind: SkeletonKind = "training") -> dict[str, str]:
    """The files of a package that brings the method ``name``, by their path in its folder.

    Raises:
        SpecError: ``name`` is no lower-case Python name, or a method of this kind has it.
    """
    if not name.isidentifier() or keyword.iskeyword(name) or name != name.lower():
        raise SpecError(f"the name of a method must be a lower-case Python name such as my_method, got {name!r}")
    if name in {info.name for info in list_methods(kind=kind)}:
        raise SpecError(f"a {kind} method called {name!r} is registered already. Choose another name.")
    words = {
        "name": name,
        "module": f"lowbit_{name}",
        "cls": "".join(part.capitalize() for part in name.split("_")),
        "title": name.replace("_", " ").strip().capitalize(),
        "laws": "TRAINING_LAWS" if kind == "training" else "POST_TRAINING_LAWS",
    }
    loader = jinja2.PackageLoader("lowbit.testing", "templates")
    templates = jinja2.Environment(loader=loader, keep_trailing_newline=True, undefined=jinja2.StrictUndefined, autoescape=False)
    files = {"pyproject.toml": "pyproject.toml", f"lowbit_{name}.py": f"{kind}.py", f"tests/test_{name}.py": "test.py"}
    return {path: templates.get_template(f"{template}.jinja").render(words) for path, template in files.items()}


def write_skeleton(name: str, kind: SkeletonKind = "training", folder: Path | str | None = None) -> Path:
    """Write ``skeleton(name, kind)`` into ``folder``, which must not exist or be empty; gives the folder.

    Args:
        name: The method's name.
        kind: What the method does.
        folder: Default: ``lowbit_<name>`` in the current one.

    Raises:
        SpecError: As ``skeleton``.
        OutputError: The folder holds files, or cannot be written.
    """
    files = skeleton(name, kind)
    folder = Path(f"lowbit_{name}" if folder is None else folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise OutputError(f"{folder} holds files already. Name an empty folder or a new one.")
        for path, text in files.items():
            (folder / path).parent.mkdir(exist_ok=True)
            write_text(folder / path, text)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"cannot write to {folder}: {error.strerror}") from error
    return folder
