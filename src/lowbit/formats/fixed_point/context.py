"""What is known while a program is turned into an integer graph: the values of its nodes, and the operations so far."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx

from lowbit.errors import LayerError
from lowbit.formats.fixed_point.graph import Buffer, Operation
from lowbit.formats.fixed_point.values import Codes, FromInput, Source, Unquantized, Value, sizes_of
from lowbit.formats.onnx.grid import Grid
from lowbit.formats.program.operators import operator_name
from lowbit.formats.program.program import Program, module_paths
from lowbit.network.insert import INPUT, OUTPUT

_OPEN_BATCH = 2  # samples of the index tensors that movements are tried on, where the batch is open


def kind_of(node: fx.Node) -> str:
    """Name of the node's operator: ``conv2d``, ``fake_quantize_affine``."""
    name = operator_name(node.target) or str(node.target)
    return name.split(".")[1] if "." in name else name


class Context(ABC):
    """Values and operations of a program that is being lowered.

    Attributes:
        program: The program.
        values: What each node so far gives: codes, values that are still to be quantized, several of them, constants, or sizes.
        operations: The operations so far.
        batch: Samples of an index tensor.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.values: dict[fx.Node, object] = {}
        self.operations: list[Operation] = []
        self.batch = _OPEN_BATCH if program.is_batch_dynamic else program.sample.batch_size
        self._paths = module_paths(program)

    @abstractmethod
    def quantize(self, value: Value, grid: Grid, name: str) -> Codes:
        """The codes of ``value`` on ``grid``, computed by a new operation where there is none yet."""

    def layer(self, node: fx.Node) -> str:
        """The module that a node belongs to; the one that holds it, for a quantizer."""
        path = self._paths.get(node.name) or node.name
        holder, _, last = path.rpartition(".")
        return holder if holder and last in (INPUT, OUTPUT) else path

    def refused(self, node: fx.Node, why: str) -> LayerError:
        """The error for a node without an integer form."""
        return LayerError(f"layer {self.layer(node)!r} ({kind_of(node)}): {why}. In an integer network everything is computed in integers.")

    def value(self, node: fx.Node, index: int) -> Value:
        """The argument ``index`` of a node, which must come from the network's input."""
        argument = node.args[index]
        value = self.values.get(argument) if isinstance(argument, fx.Node) else None
        if not isinstance(value, (Codes, Unquantized)):
            raise self.refused(node, "what it reads is not computed from the network's input")
        return value

    def codes(self, node: fx.Node, index: int) -> Buffer:
        """The argument ``index`` of a node, which must be codes or become codes without rounding."""
        return self.settled(node, self.value(node, index))

    def settled(self, node: fx.Node, value: Value) -> Buffer:
        """The codes of ``value`` for its reader ``node``; LayerError if it is still float."""
        if isinstance(value, Codes):
            return value.buffer
        grid = value.natural_grid
        if grid is None and isinstance(value, Unquantized) and isinstance(value.source, FromInput):
            raise self.refused(
                node,
                f"it reads float values, the network's input {value.source.name!r}: quantize the inputs of layers (activation_bits=8); what else is "
                "done to the input belongs before the call, or behind the first layer",
            )
        if grid is None:
            raise self.refused(
                node,
                f"it reads float values, the result of {value.last!r}: quantize the inputs of layers (activation_bits=8), and what is added, "
                "concatenated or pooled (merge_bits=8)",
            )
        return self.quantize(value, grid, value.last).buffer

    def result(self, node: fx.Node, source: Source) -> Unquantized:
        """What ``source`` computes at ``node``, to be quantized."""
        return Unquantized(source, node.name, sizes_of(node), last=node.name)

    def constant(self, node: fx.Node, index: int) -> Tensor | None:
        """The argument ``index`` of a node, which must be constant or left out."""
        argument = node.args[index] if len(node.args) > index else None
        value = self.values.get(argument) if isinstance(argument, fx.Node) else None
        if argument is not None and not isinstance(value, Tensor):
            raise self.refused(node, "one of its parameters is computed from the input")
        return None if value is None else cast(Tensor, value).detach()

    def arguments(self, node: fx.Node, stand_in: Tensor | None = None) -> list[Any]:
        """The arguments of a node with sizes and constants in their places; for tensors of the network ``stand_in``, or empty ones."""

        def held(source: fx.Node) -> Any:
            value = self.values[source]
            if isinstance(value, (Codes, Unquantized)):
                return torch.empty((self.batch, *value.moved_shape), device="meta") if stand_in is None else stand_in
            return value

        return [_mapped(argument, held) for argument in cast(Sequence[object], node.args)]


def _mapped(argument: object, held: Any) -> Any:
    if isinstance(argument, fx.Node):
        return held(argument)
    if isinstance(argument, (list, tuple)):
        return [_mapped(item, held) for item in argument]
    return argument
