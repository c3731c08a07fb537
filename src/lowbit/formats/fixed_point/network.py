"""``lowbit.compile_integer``: a quantized network in which nothing between its input's codes and its output's is floating point."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Tensor, nn

from lowbit.errors import DataError, SpecError
from lowbit.formats.fixed_point.constants import Arithmetic
from lowbit.formats.fixed_point.graph import QMAX, QMIN, IntegerGraph
from lowbit.formats.fixed_point.interpret import Memory, run
from lowbit.formats.fixed_point.lowering import lower
from lowbit.formats.fixed_point.requantize import RequantizerKind, Rounding
from lowbit.formats.onnx.grid import Grid
from lowbit.formats.program.program import Program, export_program
from lowbit.inputs import Inputs, check_values
from lowbit.network.bits import WidthLike, set_bits, switches_of
from lowbit.network.layers import evaluating
from lowbit.spec import switch_name


class IntegerNetwork(nn.Module):
    """A network of integers, run on torch's.

    ``forward`` takes and returns float values, as the network that it was compiled from: the input is quantized, the codes of the output
    are decoded, and all between is done by ``run`` on int32 tensors. Products are summed in float64, where integers of this size are exact.

    Attributes:
        graph: Its operations.
        arithmetic: How accumulators become codes.

    Example:
        >>> import torch, lowbit
        >>> inputs = torch.rand(32, 8)
        >>> quantized = lowbit.quantize(torch.nn.Linear(8, 4), method="round_to_nearest", calibration=inputs)
        >>> integer = lowbit.compile_integer(quantized, sample=inputs)
        >>> codes = integer.run(integer.quantize(inputs))
        >>> codes.dtype, torch.equal(integer.dequantize(codes), integer(inputs))
        (torch.int8, True)
    """

    def __init__(self, graph: IntegerGraph, arithmetic: Arithmetic) -> None:
        super().__init__()
        self.graph, self.arithmetic = graph, arithmetic

    def quantize(self, x: Tensor) -> Tensor:
        """The codes of an input, int8: ``clamp(round_half_even(x / scale) + zero_point)``.

        Raises:
            DataError: Another shape, or NaN.
        """
        grid = self.graph.input.grid
        self._check_shape(x)
        if bool(torch.isnan(x).any()):
            raise DataError("the input holds NaN, for which there is no code. Look for it before the call.")
        return quantize_to(grid, x).to(torch.int8)

    def dequantize(self, codes: Tensor) -> Tensor:
        """The values of codes of the output, float32."""
        grid = self.graph.output.grid
        return (codes.float() - grid.zero_point) * torch.tensor(grid.scale)

    def run(self, codes: Tensor) -> Tensor:
        """The output's codes for those of the input, int8 ``[batch, ...]`` both.

        Raises:
            DataError: Another shape, or numbers that are no codes of 8 bits.
        """
        self._check_shape(codes)
        if codes.dtype == torch.bool or codes.is_floating_point() or codes.is_complex():
            raise DataError(
                f"codes are whole numbers, got {str(codes.dtype).removeprefix('torch.')}. network.quantize(x) gives those of x."
            )
        if codes.numel() and not QMIN <= int(codes.min()) <= int(codes.max()) <= QMAX:
            raise DataError(f"codes are numbers from {QMIN} to {QMAX}, got {int(codes.min())} to {int(codes.max())}")
        return self.all_codes(codes)[self.graph.output.name].to(torch.int8)

    def all_codes(self, codes: Tensor, given: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The codes of every buffer by name, int32 ``[batch, ...]``.

        Args:
            codes: Of the input.
            given: Codes by the name of a buffer, which later operations read in place of its own.
        """
        memory, found = Memory(), {self.graph.input.name: codes.int()}
        memory.write(self.graph.input, codes)
        for operation in self.graph.operations:
            run(operation, memory, self.arithmetic)
            found[operation.target.name] = memory.read(operation.target).clone()
            if given is not None and operation.target.name in given:
                memory.write(operation.target, given[operation.target.name])
        found[self.graph.output.name] = memory.read(self.graph.output)
        return found

    def forward(self, x: Tensor) -> Tensor:
        return self.dequantize(self.run(self.quantize(x)))

    def _check_shape(self, x: Tensor) -> None:
        if tuple(x.shape[1:]) != self.graph.input.shape or x.dim() == 0:
            raise DataError(f"the network takes [batch, {', '.join(map(str, self.graph.input.shape))}], got {list(x.shape)}")

    def extra_repr(self) -> str:
        return f"{len(self.graph.operations)} operations on codes, {self.arithmetic.kind}"


def quantize_to(grid: Grid, x: Tensor) -> Tensor:
    """The codes of values on a grid, int32."""
    steps = (x.detach().float() - torch.tensor(np.float32(grid.shift))) / torch.tensor(grid.step)
    return (steps.round() + grid.origin).clamp(grid.lo, grid.hi).int()


def compile_program(
    program: Program, model: nn.Module, requantizer: RequantizerKind = "fixed_point", *, rounding: Rounding = "double"
) -> IntegerNetwork:
    """``compile_integer`` of a network that was exported already."""
    arithmetic, inputs = Arithmetic(requantizer, rounding), program.sample
    with evaluating(model):
        output = model(*inputs.args, **inputs.kwargs)
    bounds = (float(output.min()), float(output.max())) if isinstance(output, Tensor) and output.numel() else (0.0, 0.0)
    return IntegerNetwork(lower(program, bounds, as_onnx=requantizer == "onnx"), arithmetic).eval()


def compile_integer(
    model: nn.Module,
    requantizer: RequantizerKind = "fixed_point",
    *,
    sample: object,
    rounding: Rounding = "double",
    bits: WidthLike = None,
) -> IntegerNetwork:
    """Compile a quantized network into one that computes with integers alone, as chips without floating point do.

    Weights and activations become int8 codes, biases int32, and what lies between two quantizers one operation: a convolution or linear
    layer, with the batch norm, ReLU or clip behind it, a sum, a concatenation or a pool. The result is the reference for the C file that
    ``lowbit.export`` writes.

    Args:
        model: A quantized network, its weights and activations on evenly spaced levels of up to 8 bits; it is not changed.
        requantizer: How sums of products become codes: ``fixed_point`` (multiplied by a 32-bit number, then shifted, as in TensorFlow
            Lite), ``dyadic`` (HAWQ-V3), or ``onnx`` (multiplied in float32, as ONNX Runtime does with the file that ``lowbit.export``
            writes: the one that is not integer, to compare with).
        sample: Inputs of one call, real ones if possible: the output of a network whose last layer is not quantized gets 8 bits over the range
            that it has on them.
        rounding: For ``fixed_point``: ``double`` rounds products twice, as the paper, gemmlowp and TensorFlow Lite do; ``single`` once. As
            accumulators are finer than codes by far, the two differ for a few codes in a million.
        bits: The width to compile, of a network that switches between several (``lowbit.set_bits``).

    Returns:
        A module in evaluation mode. Its ``run`` maps codes to codes.

    Raises:
        CalibrationError: A sample that holds nothing, or NaN or infinity.
        SpecError: An unknown requantizer or rounding, or several widths of which ``bits`` chooses none.
        GraphError: The network cannot be exported, or has several inputs or outputs.
        LayerError: A layer or an operation has no integer form; names it and says what to do.

    Example:
        >>> import torch, lowbit
        >>> images = torch.rand(32, 1, 8, 8)
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(144, 3))
        >>> quantized = lowbit.quantize(model, method="round_to_nearest", calibration=images)
        >>> integer = lowbit.compile_integer(quantized, sample=images)
        >>> integer.run(integer.quantize(images)).dtype, torch.allclose(integer(images), quantized(images), atol=0.02)
        (torch.int8, True)
    """
    Arithmetic(requantizer, rounding)
    model = copy.deepcopy(model).cpu().float()
    if bits is not None:
        set_bits(model, bits)
    elif len(switches_of(model)) > 1:
        held = ", ".join(switch_name(switch) for switch in switches_of(model))
        raise SpecError(f"the network switches between the widths {held}, and an integer network has one. Choose it with bits=.")
    inputs = check_values(Inputs.of(sample, model), "sample").to("cpu").map(lambda t: t.float() if t.is_floating_point() else t)
    return compile_program(export_program(model, inputs), model, requantizer, rounding=rounding)
