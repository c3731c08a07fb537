"""Describes how a network's outputs are nested, in plain JSON values.

``null``, ``{"tensor": 3}`` (the third tensor), ``{"value": 0.5}``, ``{"tuple": [...]}``, ``{"list": [...]}`` or
``{"dict": [[key, ...], ...]}``. Other mappings and dataclasses are described as dictionaries, and named tuples as tuples,
because a file must not name classes to instantiate.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from lowbit.errors import FileFormatError, GraphError

Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]

DEEPEST = 32  # levels of nesting; real outputs have two or three


def flatten(output: object, leaves: list[Tensor | torch.SymInt]) -> Json:
    """Append the tensors of ``output`` to ``leaves`` and return the nesting; GraphError for a type that cannot be described."""
    if isinstance(output, (Tensor, torch.SymInt)):
        leaves.append(output)
        return {"tensor": len(leaves) - 1}
    if output is None:
        return None
    if isinstance(output, (bool, int, float, str)):
        return {"value": output}
    if isinstance(output, Mapping):
        for key in output:
            if not isinstance(key, (str, int)):
                raise GraphError(f"the model returns a dict with the key {key!r} ({type(key).__name__}). Allowed: text, whole numbers.")
        return {"dict": [[key, flatten(value, leaves)] for key, value in output.items()]}
    if dataclasses.is_dataclass(output):
        return flatten({field.name: getattr(output, field.name) for field in dataclasses.fields(output)}, leaves)
    if isinstance(output, (list, tuple)):
        return {"tuple" if isinstance(output, tuple) else "list": [flatten(value, leaves) for value in output]}
    raise GraphError(
        f"the model returns a {type(output).__name__}, which cannot be stored. "
        "Allowed: tensors, numbers, text and None, in tuples, lists, dictionaries and dataclasses."
    )


def output_names(structure: Json) -> list[str | None]:
    """A name for each tensor: the keys of dictionaries and ``out0``, ``out1`` ... for members of tuples and lists; ``None`` for a single tensor.

    Example:
        >>> leaves: list[torch.Tensor | torch.SymInt] = []
        >>> output_names(flatten({"scores": torch.zeros(1), "boxes": (torch.zeros(1), torch.zeros(1))}, leaves))
        ['scores', 'boxes.out0', 'boxes.out1']
    """
    if not isinstance(structure, dict):
        return []
    ((kind, content),) = structure.items()
    if kind == "tensor":
        return [None]
    if not isinstance(content, list):
        return []
    pairs = (
        cast(list[tuple[object, Json]], content) if kind == "dict" else [(f"out{index}", member) for index, member in enumerate(content)]
    )
    return [str(key) if inner is None else f"{key}.{inner}" for key, member in pairs for inner in output_names(member)]


def restore(structure: Json, leaves: Sequence[object]) -> object:
    """The inverse of ``flatten``."""
    if structure is None:
        return None
    assert isinstance(structure, dict)
    ((kind, content),) = structure.items()
    if kind == "tensor":
        return leaves[cast(int, content)]
    if kind == "value":
        return content
    assert isinstance(content, list)
    if kind == "dict":
        return {key: restore(value, leaves) for key, value in cast(list[tuple[str | int, Json]], content)}
    values = [restore(value, leaves) for value in content]
    return tuple(values) if kind == "tuple" else values


def check_structure(structure: object, leaves: int, depth: int = 0) -> None:
    """Raise FileFormatError unless ``restore`` can rebuild ``structure`` from this number of leaves."""
    if structure is None:
        return
    if depth > DEEPEST:
        raise FileFormatError(f"output structure: nested deeper than {DEEPEST} levels")
    kind, content = next(iter(structure.items())) if isinstance(structure, dict) and len(structure) == 1 else (None, None)
    if kind == "tensor" and isinstance(content, int) and not isinstance(content, bool) and 0 <= content < leaves:
        return
    if kind == "value" and isinstance(content, (bool, int, float, str)):
        return
    if kind in ("tuple", "list") and isinstance(content, list):
        for value in content:
            check_structure(value, leaves, depth + 1)
        return
    if kind == "dict" and isinstance(content, list):
        for item in content:
            if not (isinstance(item, list) and len(item) == 2 and isinstance(item[0], (str, int))):
                raise FileFormatError("output structure: a dictionary must be a list of [key, value] pairs")
            check_structure(item[1], leaves, depth + 1)
        return
    raise FileFormatError(f"output structure: cannot understand {str(structure)[:80]}")
