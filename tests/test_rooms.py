"""Imports run downwards: the order of the rooms stands here once, and is held against the syntax trees of all files."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import lowbit

SOURCE = Path(__file__).parent.parent / "src" / "lowbit"
# From the bottom up. Rooms of one line do not import each other, but for those after the arrow: they may read what stands before it.
ORDER = (
    ("errors", "lazy"),
    ("reading",),
    ("autograd", "files", "plugins", "progress", "resize", "spec"),
    ("executors", "plotting"),
    ("registry", "inputs"),
    ("options", "workfolder"),
    ("surrogates",),
    ("quantizers",),
    ("network",),
    ("data", "models"),
    ("provenance",),
    ("measure",),
    ("formats",),
    ("runtime",),
    ("qat", "post_training"),
    ("assignment", "synthesis"),
    ("methods",),
    ("comparison",),
    ("report",),
    ("workflows",),
    ("pages",),
    ("testing",),
    ("cli",),
    ("__main__", ""),
)
# The same within a room.
WINGS = {
    "formats": (("program",), ("packed", "onnx"), ("fixed_point",), ("checks",)),
    "runtime": (
        ("arguments", "activation", "thresholds", "kept"),
        ("cpu",),
        ("cuda",),
        ("layers",),
        ("lowering",),
        ("pieces", "profile"),
        ("compile",),
    ),
}
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}


def modules(source: Path) -> dict[str, Path]:
    """Every module below ``source`` by its dotted name within the package; the package itself is ``""``."""
    found = {}
    for path in sorted(source.rglob("*.py")):
        parts = path.relative_to(source).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(tree: ast.AST, known: set[str]) -> Iterator[str]:
    """Modules of the package that a file imports anywhere in it, within functions and for type checkers too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.removeprefix("lowbit").lstrip(".") for alias in node.names if alias.name.split(".")[0] == "lowbit")
        elif isinstance(node, ast.ImportFrom) and node.module is not None and node.module.split(".")[0] == "lowbit":
            base = node.module.removeprefix("lowbit").lstrip(".")
            for alias in node.names:
                inner = f"{base}.{alias.name}".lstrip(".")
                yield inner if inner in known else base


def graph(source: Path) -> dict[str, set[str]]:
    """For each module the modules that it imports."""
    known = modules(source)
    return {name: {other for other in imported(ast.parse(path.read_text()), set(known)) if other != name} for name, path in known.items()}


def upward(imports: dict[str, set[str]]) -> list[str]:
    """Imports that do not run downwards between rooms."""
    wrong = []
    for name, others in imports.items():
        room = name.split(".")[0]
        for other in others:
            below = other.split(".")[0]
            if room != below and LEVEL[below] >= LEVEL[room]:
                wrong.append(f"{name} imports {other}")
    return sorted(wrong)


def upward_within(room: str, imports: dict[str, set[str]]) -> list[str]:
    """Imports between wings of a room that do not run downwards; the package itself imports nothing of the room."""
    level = {wing: index for index, wings in enumerate(WINGS[room]) for wing in wings} | {"": -1}
    wrong = []
    for name, others in imports.items():
        for other in others:
            if name.split(".")[0] == other.split(".")[0] == room:
                above, below = ([*module.split("."), ""][1] for module in (name, other))
                if above != below and level[below] >= level[above]:
                    wrong.append(f"{name} imports {other}")
    return sorted(wrong)


def circles(imports: dict[str, set[str]]) -> list[list[str]]:
    """Modules that import each other, directly or through others."""
    reached = {name: set(others) for name, others in imports.items()}
    for middle in imports:  # Warshall's closure
        for name in imports:
            if middle in reached[name]:
                reached[name] |= reached[middle]
    rings = {tuple(sorted(other for other in imports if other in reached[name] and name in reached[other])) for name in imports}
    return [list(ring) for ring in sorted(rings) if ring]


def test_every_room_has_its_place_in_the_order() -> None:
    assert {name.split(".")[0] for name in modules(SOURCE)} == set(LEVEL)


def test_imports_run_downwards() -> None:
    assert upward(graph(SOURCE)) == []


@pytest.mark.parametrize("room", WINGS)
def test_imports_run_downwards_between_wings(room: str) -> None:
    assert {name.split(".")[1] for name in modules(SOURCE) if name.startswith(f"{room}.")} == {
        wing for wings in WINGS[room] for wing in wings
    }
    assert upward_within(room, graph(SOURCE)) == []


def test_an_import_upwards_between_wings_would_be_found() -> None:
    imports = {
        "runtime.cpu.bits": {"runtime.layers.binary", "errors"},
        "runtime": {"runtime.cpu"},
        "runtime.layers.binary": {"runtime.kept"},
    }
    assert upward_within("runtime", imports) == ["runtime imports runtime.cpu", "runtime.cpu.bits imports runtime.layers.binary"]


def test_no_benchmarks_import_each_other() -> None:
    folder = Path(__file__).parent.parent / "benchmarks"
    names = {path.stem: path for path in folder.glob("*.py")}
    imports = {}
    for name, path in names.items():
        nodes = list(ast.walk(ast.parse(path.read_text())))
        found = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        found |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
        imports[name] = found & set(names)
    assert circles(imports) == []


def test_no_files_import_each_other() -> None:
    assert circles(graph(SOURCE)) == []


def test_no_package_has_the_name_of_a_public_function() -> None:
    packages = {name for name, path in modules(SOURCE).items() if path.name == "__init__.py" and name}
    assert packages.isdisjoint(lowbit.__all__)


def test_an_import_upwards_and_a_circle_would_be_found(tmp_path: Path) -> None:
    for name, text in {
        "spec.py": "def f():\n    from lowbit.network import table",
        "network/__init__.py": "",
        "network/table.py": "from lowbit.network.job import x",
        "network/job.py": "import lowbit.network.table",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    found = graph(tmp_path)
    assert upward(found) == ["spec imports network.table"]
    assert circles(found) == [["network.job", "network.table"]]


@pytest.mark.parametrize("names", [("quantizers", "network"), ("formats", "runtime"), ("methods", "workflows")])
def test_the_order_is_that_of_the_plan(names: tuple[str, str]) -> None:
    assert LEVEL[names[0]] < LEVEL[names[1]]
