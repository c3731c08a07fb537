"""Compares the codes of an integer network with those of the float simulation, operation by operation on equal input codes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn

from lowbit.formats.checks.parity import FOLLOWED_SAMPLES, Parity, compare_outputs, graph_arguments
from lowbit.formats.fixed_point.network import IntegerNetwork
from lowbit.formats.onnx.grid import Grid
from lowbit.formats.program.program import Program
from lowbit.inputs import Inputs

EQUAL_CODES = 0.99  # of the codes of a correct integer network; measured are 99.99 %


@dataclass(frozen=True)
class OperationCodes:
    """The codes of one operation.

    Attributes:
        layer: The module that computes them.
        name: Name of the buffer.
        codes: How many were compared.
        equal: How many are equal.
        farthest: Largest difference.
    """

    layer: str
    name: str
    codes: int
    equal: int
    farthest: int


@dataclass(frozen=True)
class CodeComparison:
    """The codes of all operations, each on the input codes of the simulation."""

    operations: tuple[OperationCodes, ...]

    @property
    def share(self) -> float:
        """Fraction of equal codes."""
        return sum(operation.equal for operation in self.operations) / max(sum(operation.codes for operation in self.operations), 1)

    @property
    def farthest(self) -> int:
        """Largest difference of a code."""
        return max((operation.farthest for operation in self.operations), default=0)

    @property
    def worst(self) -> OperationCodes:
        """The operation with the largest difference, or of those the one with the smallest share of equal codes."""
        return max(self.operations, key=lambda operation: (operation.farthest, 1 - operation.equal / max(operation.codes, 1)))

    def __str__(self) -> str:
        shown = math.floor(self.share * 1e5) / 1e3  # rounded down: 100 % are all of them
        return f"{shown:.3f}% of codes equal those of the simulation in float; the largest difference is {self.farthest}"


def compare_codes(program: Program, network: IntegerNetwork, inputs: Inputs) -> CodeComparison:
    """Feed every operation of ``network`` the codes of the simulation in float, and compare what it computes with the simulation's codes.

    Args:
        program: What the network was compiled from.
        network: The integer network.
        inputs: Inputs of one call.
    """
    simulation = _Recorder(program)
    with torch.no_grad():
        simulation.run(*graph_arguments(program, inputs))
    graph = network.graph
    buffers = {operation.target.name: operation for operation in graph.operations}
    wanted = {
        name: _codes(simulation.seen[name], operation.target.grid)
        for name, operation in buffers.items()
        if name in simulation.seen and simulation.seen[name].shape[1:] == operation.target.shape
    }
    (x,) = inputs.tensors
    found = network.all_codes(network.quantize(x.float()), wanted)
    results = []
    for name, codes in wanted.items():
        difference = (found[name] - codes).abs()
        results.append(
            OperationCodes(
                buffers[name].layer, name, codes.numel(), int((difference == 0).sum()), int(difference.max()) if codes.numel() else 0
            )
        )
    return CodeComparison(tuple(results))


def check_integer_parity(model: nn.Module, program: Program, network: IntegerNetwork) -> tuple[Parity, CodeComparison]:
    """Compare an integer network with the quantized one: the outputs, and on a few samples the codes of each operation.

    Rounding in integers can change a code by one; where none is farther off, and most are equal, the network is right.
    """

    def run(inputs: Inputs) -> list[Tensor]:
        return [network(inputs.tensors[0].float())]

    parity, inputs = compare_outputs(model, program, run), program.sample
    if program.is_batch_dynamic and inputs.batch_size > FOLLOWED_SAMPLES:
        inputs = inputs.take(0, FOLLOWED_SAMPLES)
    codes = compare_codes(program, network, inputs)
    is_right = codes.farthest <= 1 and codes.share >= EQUAL_CODES
    passed = is_right and parity.has_equal_answers
    worst = codes.worst
    place = None if passed else f"layer {worst.layer!r}, which is off by up to {worst.farthest} codes ({codes})"
    return replace(parity, passed=passed, diverging=place, changed_codes=1 - codes.share, is_within_ties=is_right), codes


def _codes(values: Tensor, grid: Grid) -> Tensor:
    """The codes that values are decoded from; for the output, which need not be on its grid, the nearest ones."""
    return ((values.double() / float(grid.scale)).round() + grid.zero_point).clamp(grid.lo, grid.hi).int()


class _Recorder(fx.Interpreter):
    """Runs a program and keeps what its nodes compute."""

    def __init__(self, program: Program) -> None:
        super().__init__(program.exported.graph_module)
        self.seen: dict[str, Tensor] = {}

    def run_node(self, node: fx.Node) -> object:
        result = super().run_node(node)
        if isinstance(result, Tensor) and result.is_floating_point() and result.dim() > 0:
            self.seen[node.name] = result
        return result
