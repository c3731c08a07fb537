"""Source files behind a method: its docstring in parts, where its equations are, and a digest of everything that its pictures run."""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lowbit.errors import SpecError
from lowbit.registry import MethodInfo

PACKAGE = Path(__file__).parent.parent
IN_REPOSITORY = "src/lowbit/"  # how paths of the package begin
PARTS = ("Paper", "Symbols", "Differs from the paper", "Authors' code")
EQUATION_ROOMS = ("methods", "quantizers", "surrogates", "post_training", "synthesis", "qat", "measure", "network", "assignment", "formats")
ALWAYS = ("lowbit.pages", "lowbit.plotting", "lowbit.workflows")  # what pictures and examples of every method run through


@dataclass(frozen=True)
class ModuleText:
    """The docstring of a method's module.

    Attributes:
        idea: Its first sentence, and what stands outside of the other parts.
        paper: The papers and the sections used.
        symbols: How the paper's symbols are called.
        differences: What differs from the paper, one item each.
        rest: Other parts by their heading.
    """

    idea: str = ""
    paper: str = ""
    symbols: str = ""
    differences: tuple[str, ...] = ()
    rest: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Equation:
    """A function or class that names its source.

    Attributes:
        source: Equation or section, as its docstring says it.
        name: Qualified name.
        path: File, as ``shown_path`` gives it.
        line: Line of its definition, from 1.
    """

    source: str
    name: str
    path: str
    line: int


def source_file(info: MethodInfo) -> Path:
    """The file of the method's class; SpecError where it has none, as in a notebook."""
    assert info.method is not None
    try:
        return Path(inspect.getsourcefile(info.method) or "").resolve(strict=True)
    except (TypeError, OSError) as error:
        raise SpecError(f"method {info.name!r}: {info.method.__qualname__} has no source file. Write the class into a file.") from error


def module_text(text: str) -> ModuleText:
    """The parts of a module's docstring.

    >>> found = module_text("Rounds.\\n\\nPaper: A 2020.\\nDiffers from the paper:\\n- one\\n  thing.\\n- another")
    >>> found.idea, found.paper, found.differences
    ('Rounds.', 'A 2020.', ('one thing.', 'another'))
    """
    parts: dict[str, list[str]] = {"": []}
    heading = ""
    for index, line in enumerate(inspect.cleandoc(text).splitlines()):  # the first line begins with the method's name
        found = re.match(rf"({'|'.join(PARTS)}|[A-Z][a-z]+): ?(.*)$", line) if index else None
        if found is not None:
            heading = found[1]
            line = found[2]
        elif not line or not line.startswith((" ", "-")):
            heading = ""
        parts.setdefault(heading, []).append(line)
    joined = {name: " ".join(" ".join(lines).split()) for name, lines in parts.items()}
    items = re.split(r"^\s*- ", "\n".join(parts.get("Differs from the paper", [])), flags=re.MULTILINE)
    differences = tuple(" ".join(item.split()) for item in items if item.strip())
    rest = {name: words for name, words in joined.items() if name and name not in ("Paper", "Symbols", "Differs from the paper")}
    return ModuleText(joined[""], joined.get("Paper", ""), joined.get("Symbols", ""), differences, rest)


def equations(info: MethodInfo) -> list[Equation]:
    """Functions and classes of the method's file that name their source, then those that it imports."""
    path = source_file(info)
    own = list(_equations_in(path, None))
    imported: list[Equation] = []
    for module, names in _imports(path):
        file = _file_of(module)
        if file is not None and module.split(".")[1:2] and module.split(".")[1] in EQUATION_ROOMS:
            imported += _equations_in(file, names)
    return list(dict.fromkeys([*own, *imported]))


def digest_of(info: MethodInfo) -> str:
    """A digest of the method's file and of every file of lowbit that it, or what draws pictures, imports."""
    found: set[Path] = set()
    waiting = [source_file(info), *(path for name in ALWAYS for path in _files_of(name))]
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            waiting += [file for module, _ in _imports(path) if (file := _file_of(module)) is not None]
    total = hashlib.sha256()
    for path in sorted(found):
        total.update(file_digest(path).encode())
    return total.hexdigest()[:16]


def file_digest(path: Path) -> str:
    """A digest of one file."""
    return _digest_at(path, path.stat().st_mtime_ns)


@functools.cache
def _digest_at(path: Path, _changed: int) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def shown_path(path: Path) -> str:
    """``path`` as a repository has it, ``src/lowbit/...``; the name alone of a file outside of the package."""
    return f"src/{path.relative_to(PACKAGE.parent)}" if path.is_relative_to(PACKAGE) else path.name


def _files_of(module: str) -> Sequence[Path]:
    file = _file_of(module)
    if file is None:
        return ()
    return sorted(file.parent.glob("*.py")) if file.name == "__init__.py" else [file]


def _file_of(module: str) -> Path | None:
    """The file of a module of lowbit; ``None`` for any other."""
    if module.split(".")[0] != "lowbit":
        return None
    base = PACKAGE.joinpath(*module.split(".")[1:])
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()), None)


@functools.cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def _imports(path: Path) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Modules of lowbit that a file imports anywhere in it, with the names it takes; through packages to where names are defined."""
    found: list[tuple[str, tuple[str, ...]]] = []
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lowbit":
            for alias in node.names:
                module = node.module or ""
                inner = f"{module}.{alias.name}"
                if _file_of(inner) is not None:
                    found.append((inner, ()))
                else:
                    found.append((_origin(module, alias.name), (alias.name,)))
    return tuple(dict.fromkeys(found))


def _origin(module: str, name: str) -> str:
    """The module that defines ``name``, where a package only passes it on."""
    file = _file_of(module)
    if file is None or file.name != "__init__.py":
        return module
    for node in ast.walk(_tree(file)):
        if isinstance(node, ast.ImportFrom) and node.module and any((alias.asname or alias.name) == name for alias in node.names):
            return _origin(node.module, name)
    return module


def _source_in(docstring: str | None) -> str:
    """What a docstring names as its source; empty where it names none."""
    found = re.search(r"(?:Source|Paper): (.+?)(?:\n\s*\n|\n\w+:|$)", docstring or "", flags=re.DOTALL)
    return "" if found is None else " ".join(found[1].split()).rstrip(".")


def _equations_in(path: Path, names: Sequence[str] | None) -> Iterator[Equation]:
    """Those of all definitions, or of ``names``; a class without a source of its own has that of its module."""
    of_module = "" if "methods" in path.parts else _source_in(ast.get_docstring(_tree(path)))

    def walk(nodes: Sequence[ast.stmt], prefix: str) -> Iterator[Equation]:
        for node in nodes:
            if not isinstance(node, ast.FunctionDef | ast.ClassDef):
                continue
            name = f"{prefix}{node.name}"
            if prefix == "" and names is not None and node.name not in names:
                continue
            said = _source_in(ast.get_docstring(node)) or (
                of_module if names is not None and prefix == "" and isinstance(node, ast.ClassDef) else ""
            )
            if said:
                yield Equation(said, name, shown_path(path), node.lineno)
            if isinstance(node, ast.ClassDef):
                yield from walk(node.body, f"{name}.")

    yield from walk(_tree(path).body, "")
