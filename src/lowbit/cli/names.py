"""Names that the shell completes, read from the sources without importing them: importing them would take torch, and seconds."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).parents[1]
PROCEDURE = "procedure"  # of training methods, those that are one


def method_names(kind: str | None = None) -> list[str]:
    """Registered methods, of one kind or all."""
    return sorted({name for name, of in _methods() if kind in (None, of) or (kind == "training" and of == PROCEDURE)})


def procedure_names() -> list[str]:
    """Methods that the quantizers of others can go through: those of classes that derive from ``Procedure``."""
    return sorted(name for name, of in _methods() if of == PROCEDURE)


def model_names() -> list[str]:
    """Built-in networks."""
    return _keys("models/loading.py", "BUILT_IN")


def data_names() -> list[str]:
    """Data suites, those of super-resolution last."""
    return [*_keys("data/loading.py", "SUITES"), *_keys("data/upscaling.py", "UPSCALING_SUITES")]


def surrogate_names() -> list[str]:
    """Gradient surrogates."""
    return _keys("surrogates/__init__.py", "SURROGATES")


@cache
def _methods() -> set[tuple[str, str]]:
    """Each method with its kind, or with each of them: keywords of every ``MethodInfo(...)`` below ``methods/``."""
    found = set()
    for path in (SOURCE / "methods").rglob("*.py"):
        for statement in ast.parse(path.read_text(encoding="utf-8")).body:
            if not isinstance(statement, ast.ClassDef):
                continue
            for node in (node for decorator in statement.decorator_list for node in ast.walk(decorator)):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "MethodInfo":
                    facts = {word.arg: word.value.value for word in node.keywords if isinstance(word.value, ast.Constant)}
                    is_procedure = any(isinstance(base, ast.Name) and base.id == "Procedure" for base in statement.bases)
                    found.add((str(facts["name"]), PROCEDURE if is_procedure else str(facts["kind"])))
    return found


def _keys(path: str, name: str) -> list[str]:
    """The keys of the dictionary ``name`` that a file defines at its top."""
    for node in ast.parse((SOURCE / path).read_text(encoding="utf-8")).body:
        target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0] if isinstance(node, ast.Assign) else None
        value = node.value if isinstance(node, (ast.AnnAssign, ast.Assign)) else None
        if isinstance(target, ast.Name) and target.id == name and isinstance(value, ast.Dict):
            return [str(key.value) for key in value.keys if isinstance(key, ast.Constant)]
    raise LookupError(f"{path} defines no dictionary {name}")
