"""Tolerances for exported files: distances from the network in quantization steps, and the effect of rounded biases."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence

import torch
from torch import Tensor, fx

from lowbit.formats.onnx.integer_grid import integer_grid
from lowbit.formats.program.constants import constant_of
from lowbit.formats.program.program import Program

ours = torch.ops.lowbit
# operators that neither amplify differences nor mix channels, and those that do not amplify differences
_KEEPING = frozenset({
    "relu", "hardtanh", "clamp", "clamp_min", "leaky_relu", "elu", "gelu", "silu", "hardswish", "sigmoid", "hardsigmoid", "tanh",
    "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool2d", "adaptive_avg_pool2d", "add", "sub", "clone", "pad",
})  # fmt: skip
_MIXING = frozenset({
    "mean", "cat", "view", "reshape", "flatten", "permute", "transpose", "squeeze", "unsqueeze", "slice", "select", "expand",
})  # fmt: skip


def is_quantizer(node: fx.Node) -> bool:
    """Whether a node of a program is an activation quantizer."""
    return node.target in (ours.fake_quantize_affine.default, ours.fake_quantize_grid.default, ours.fake_quantize_codebook.default)


def is_rounding(node: fx.Node) -> bool:
    """Whether a node of a program rounds to whole numbers: to the codes of a grid that each input has of its own."""
    return node.target is torch.ops.aten.round.default


def excess_of(node: fx.Node, x: Tensor, tables: Sequence[Tensor], theirs: Tensor) -> tuple[float, float]:
    """How far the levels ``theirs`` are from valid results of the quantizer ``node`` for ``x``.

    Args:
        node: The quantizer, or a rounding.
        x: Its input.
        tables: Its tensor arguments after ``x``.
        theirs: Levels that a file computed for ``x``.

    Returns:
        ``(excess, step)``: twice the largest distance, in steps, of a value from the range that rounds to its level, or, for a value
        in ``theirs`` that is not a level, of that value from the nearest level; and the step in units of ``x``.
    """
    if is_rounding(node):
        return _largest(2 * torch.maximum((x - theirs).abs() - 0.5, (theirs - theirs.round()).abs())), 1.0
    if node.target is ours.fake_quantize_codebook.default:
        return _codebook_excess(x, tables[0], tables[1], theirs)
    if node.target is ours.fake_quantize_grid.default:
        lower, step, scale, zero_point = tables
        position = (x - lower) / step
    else:
        step, zero_point = tables
        scale, position = step, x / step + zero_point
    qmin, qmax = (value for value in node.args if isinstance(value, int))
    code = theirs / scale + zero_point
    distance = torch.maximum((position.clamp(qmin, qmax) - code).abs() - 0.5, (code - code.round()).abs())
    return _largest(2 * distance), float(step)


def _codebook_excess(x: Tensor, boundaries: Tensor, levels: Tensor, theirs: Tensor) -> tuple[float, float]:
    gaps = (boundaries if len(boundaries) > 1 else levels).diff()
    step = float(gaps[gaps > 0].min()) if bool((gaps > 0).any()) else 1.0
    upper = torch.searchsorted((levels[1:] + levels[:-1]) / 2, theirs.contiguous())
    level = levels[upper]
    ends = torch.cat([boundaries.new_tensor([-math.inf]), boundaries, boundaries.new_tensor([math.inf])])
    # neighbouring codes with the same level cover both ranges
    lowest, highest = (ends[torch.searchsorted(levels.contiguous(), level, right=right)] for right in (False, True))
    outside = torch.maximum(lowest - x, x - highest).clamp(min=0)
    return _largest(2 * torch.maximum(outside, (theirs - level).abs()) / step), step


def _largest(distances: Tensor) -> float:
    """The largest distance, at least 0; infinite if any is NaN."""
    largest = float(distances.max()) if distances.numel() else 0.0
    return math.inf if math.isnan(largest) else max(largest, 0.0)


def accumulator_step(program: Program, node: fx.Node) -> float:
    """Size of one step of the integer accumulators at ``node``, summed over the layers since the preceding quantizers.

    Steps are followed through batch norms, products with constants, and operators that do not amplify differences; before any other
    operator, layers are computed in float with exact biases.
    """
    parameters = program.exported.graph_signature.inputs_to_parameters
    total, one = 0.0, torch.ones((), dtype=torch.float64)
    pending = [(source, one) for source in _sources(node)[:1]] if is_quantizer(node) else [(node, one)]
    seen = {source for source, _ in pending}
    for reader, gain in pending:  # grows during the loop during the loop
        for name in (parameters.get(source.name, "") for source in reader.all_input_nodes):
            grid = integer_grid(program.weights[name]) if name in program.weights else None
            if grid is not None:
                total += _largest_scale(program, reader) * _largest_product(grid.scale.double(), gain)
        further = _gain(program, reader, gain)
        fresh = [source for source in _sources(reader) if further is not None and source not in seen]
        seen.update(fresh)
        pending += [(source, further) for source in fresh if further is not None]
    return total


def _sources(node: fx.Node) -> list[fx.Node]:
    return [source for source in node.all_input_nodes if source.op == "call_function" and not is_quantizer(source)]


def _gain(program: Program, node: fx.Node, gain: Tensor) -> Tensor | None:
    """Gain at the input of ``node`` given ``gain`` at its output, a scalar or one number for each channel; ``None`` if unknown."""
    name = _operator(node)
    if name in _KEEPING or node.target is operator.getitem:
        return gain
    if name in _MIXING:
        return gain.max()
    if name in ("mul", "div"):
        values = [arg if isinstance(arg, (int, float)) else None for arg in node.args]
        constants = [
            constant_of(program.exported, arg) if isinstance(arg, fx.Node) else value for arg, value in zip(node.args, values, strict=False)
        ]
        constant = next((value for value in constants if value is not None), None)
        if constant is None or (name == "div" and constants[1] is None):
            return None
        factor = torch.as_tensor(constant).double().abs()
        factor = factor.max() if name == "mul" else 1 / factor.min()
        return gain * factor
    if name == "_native_batch_norm_legit_no_training":
        gamma, variance = (constant_of(program.exported, arg) if isinstance(arg, fx.Node) else None for arg in (node.args[1], node.args[4]))
        if variance is None:
            return None
        factor = (variance.double() + float(node.args[6])).rsqrt()  # type: ignore[arg-type]
        return _product(gain, factor if gamma is None else factor * gamma.double().abs())
    return None


def _product(a: Tensor, b: Tensor) -> Tensor:
    return a * b if a.dim() == 0 or b.dim() == 0 or a.shape == b.shape else a.max() * b.max()


def _largest_product(scale: Tensor, gain: Tensor) -> float:
    return float(_product(scale, gain).max())


def _largest_scale(program: Program, layer: fx.Node) -> float:
    """The largest scale of the quantizers that precede ``layer``."""
    found = []
    for quantizer in (source for step in since_quantizers(layer) for source in step.all_input_nodes if is_quantizer(source)):
        place = 3 if quantizer.target is ours.fake_quantize_grid.default else 1
        scale = quantizer.args[place]
        value = constant_of(program.exported, scale) if isinstance(scale, fx.Node) else None
        if value is not None and quantizer.target is not ours.fake_quantize_codebook.default:
            found.append(float(value.detach().abs().max()))
    return max(found, default=0.0)


def since_quantizers(node: fx.Node) -> list[fx.Node]:
    """``node`` (or its input, if it is a quantizer) and everything it is computed from, back to the preceding quantizers; nearest first."""
    found = _sources(node)[:1] if is_quantizer(node) else [node]
    for reader in found:  # grows during the loop during the loop
        found += [source for source in _sources(reader) if source not in found]
    return found


def _operator(node: fx.Node) -> str:
    """``relu`` for ``aten.relu.default``."""
    return str(node.target).split(".")[1] if str(node.target).count(".") == 2 else ""
