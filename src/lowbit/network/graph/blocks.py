"""Which parts of a network belong together: residual blocks, repeated blocks, or what the user names."""

from __future__ import annotations

import fnmatch
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from lowbit.errors import SpecError
from lowbit.network.graph.dataflow import Dataflow
from lowbit.network.layers import quantizable_layers

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
SHOWN = 12  # names listed in an error


@dataclass(frozen=True)
class Block:
    """A block, or a layer outside of all blocks.

    Attributes:
        name: The module.
        layers: Its convolutions and linear layers, in definition order.
        kind: Kind of the unit.
    """

    name: str
    layers: tuple[str, ...]
    kind: Literal["block", "layer"]


def find_blocks(model: nn.Module, dataflow: Dataflow | None, patterns: Sequence[str] | None = None) -> list[Block]:
    """The network's blocks and the layers between them, in definition order; every layer is in exactly one unit.

    With ``patterns`` the blocks are the outermost modules whose names match one of them. Else they are the innermost modules that
    add a shortcut, with every module of the same class, or that stands where such modules stand (``blocks.2.0`` beside
    ``blocks.2.1``). Without a shortcut, or without the dataflow, they are the modules of at least two layers whose class occurs
    several times. The network itself and plain containers (``nn.Sequential``) are no blocks unless a pattern names them.

    Args:
        model: Any network.
        dataflow: Dataflow of the network; ``None`` if it cannot be captured.
        patterns: Shell patterns of module names.

    Raises:
        SpecError: A pattern matches no module that holds a layer.
    """
    layers = list(quantizable_layers(model))
    held = {
        name: tuple(layer for layer in layers if _is_inside(layer, name))
        for name, _ in model.named_modules()
        if name and name not in layers
    }
    held = {name: inside for name, inside in held.items() if inside}
    if patterns:
        chosen = _named(held, patterns)
    else:
        chosen = _residual(model, dataflow, held) if dataflow is not None else set()
        chosen = chosen or _repeated(model, held)
    of_layer = {layer: block for block in chosen for layer in held[block]}
    names = dict.fromkeys(of_layer.get(layer, layer) for layer in layers)
    return [Block(name, held[name], "block") if name in chosen else Block(name, (name,), "layer") for name in names]


def residual_layers(model: nn.Module, dataflow: Dataflow) -> set[str]:
    """The layers inside of residual blocks: of modules that add a shortcut, and of those like them; not of the network as a whole."""
    held = {name: [layer for layer in quantizable_layers(model) if _is_inside(layer, name)] for name, _ in model.named_modules() if name}
    inside = {name: tuple(layers) for name, layers in held.items() if layers}
    return {layer for block in _residual(model, dataflow, inside) for layer in inside[block]}


def _named(held: dict[str, tuple[str, ...]], patterns: Sequence[str]) -> set[str]:
    for pattern in patterns:
        if not fnmatch.filter(held, pattern):
            listed = ", ".join(list(held)[:SHOWN]) + (", ..." if len(held) > SHOWN else "")
            raise SpecError(f"blocks: {pattern!r} matches no module that holds layers; the network has: {listed or 'none'}")
    matching = {name for name in held if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)}
    return {name for name in matching if not any(outer in matching for outer in _ancestors(name))}


def _residual(model: nn.Module, dataflow: Dataflow, held: dict[str, tuple[str, ...]]) -> set[str]:
    adding = set()
    for node in dataflow.nodes:
        operands = [dataflow[name] for name in node.inputs if dataflow[name].is_activation and len(dataflow[name].shape) >= 2]
        if node.op == "add" and len(operands) >= 2:
            adding |= set([name for name in (node.owner, *_ancestors(node.owner)) if name in held][:1])
    adding = {name for name in _innermost(adding) if not isinstance(model.get_submodule(name), CONTAINERS)}
    classes = {type(model.get_submodule(name)) for name in adding}
    places = {_place(name) for name in adding}
    alike = {
        name for name, inside in held.items() if type(model.get_submodule(name)) in classes or (_place(name) in places and len(inside) >= 2)
    }
    return _innermost(adding | {name for name in alike if not any(_is_inside(name, block) for block in adding)})


def _repeated(model: nn.Module, held: dict[str, tuple[str, ...]]) -> set[str]:
    """Modules whose class occurs most often among the modules around and inside them; the outer one among equals."""
    candidates = {name for name, inside in held.items() if len(inside) >= 2 and not isinstance(model.get_submodule(name), CONTAINERS)}
    count = Counter(type(model.get_submodule(name)) for name in candidates)
    often = {name: count[type(model.get_submodule(name))] for name in candidates}
    often = {name: times for name, times in often.items() if times >= 2}

    def wins(name: str) -> bool:
        outer = all(often[other] < often[name] for other in _ancestors(name) if other in often)
        return outer and all(often[other] <= often[name] for other in often if _is_inside(other, name))

    return {name for name in often if wins(name)}


def _innermost(names: set[str]) -> set[str]:
    return {name for name in names if not any(_is_inside(other, name) for other in names)}


def _is_inside(name: str, outer: str) -> bool:
    return name.startswith(f"{outer}.")


def _ancestors(name: str) -> Iterator[str]:
    """Names of the modules around ``name``, innermost first, without the network itself."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _place(name: str) -> str:
    """The name with every number replaced: where a module stands."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)
