"""Layers whose weights and inputs have affine grids of at most 8 bits, computed by oneDNN's 8-bit kernels, which torch ships with.

Sums of products of codes are exact. Where the processor's 8-bit products could saturate, or torch has no such kernels, the codes are
multiplied in float32, which is exact up to rounding.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.weak import WeakTensorKeyDictionary

from lowbit.errors import SpecError
from lowbit.formats.onnx.sessions import saturates
from lowbit.runtime.arguments import Affine, Window
from lowbit.runtime.cpu.target import target_loops
from lowbit.runtime.kept import version_of
from lowbit.runtime.layers.checks import check_codes
from lowbit.runtime.layers.operator import register_operator

MOST_PAIR = 2**15 - 1  # sum of two products that a register of 16 bits holds


@dataclass(frozen=True)
class InputGrid:
    """``code = clamp(round((x - lower) / step) + shift, qmin, qmax)`` stands for ``(code - zero_point) * scale``; codes fit a byte."""

    lower: float
    step: float
    shift: float
    zero_point: float
    scale: float
    qmin: int
    qmax: int

    def encode(self, x: Tensor) -> Tensor:
        """uint8 ``code - qmin``, computed exactly as the quantizers do."""
        codes = x.sub(self.lower).div_(self.step) if self.lower else x.div(self.step)
        codes.round_()
        if self.shift != self.qmin:  # both are integers, whose sum float32 represents exactly
            codes.add_(self.shift - self.qmin)
        return codes.clamp_(0, self.qmax - self.qmin).to(torch.uint8)

    @property
    def zero_code(self) -> int:
        """The byte that represents 0."""
        return int(self.zero_point) - self.qmin


def _empty_conv2d(x: Tensor, codes: Tensor, grid: Sequence[float], window: Window, epilogue: Affine[Tensor]) -> Tensor:
    rows, columns = window.output_size(x.shape[2:])
    out = codes.shape[0]
    return torch.empty_strided(
        (x.shape[0], out, rows, columns), (rows * columns * out, 1, columns * out, out), dtype=torch.float32, device=x.device
    )


@register_operator(_empty_conv2d)
def int8_conv2d(x: Tensor, codes: Tensor, grid: Sequence[float], window: Window, epilogue: Affine[Tensor]) -> Tensor:
    """``y = scale * input_scale * sum((code(x) - zero_point) * codes) + bias``.

    Args:
        x: ``[N, in_channels, H, W]`` float32; channels-last is fastest.
        codes: int8 ``[out, in_channels / groups, kernel height, kernel width]``.
        grid: The values of an ``InputGrid``.
        window: Geometry of the convolution; its kernel size is that of ``codes``, its ``pad_value`` 0.
        epilogue: Its scale is the weight's.

    Returns:
        ``[N, out, rows, columns]`` float32, channels-last.

    Raises:
        SpecError: An argument has the wrong type or shape, the grid does not fit a byte, or the image is smaller than the kernel.

        >>> grid = [0.0, 0.5, 0.0, 0.0, 0.5, 0.0, 255.0]
        >>> int8_conv2d(torch.full((1, 1, 1, 2), 1.3), torch.full((1, 1, 1, 1), 3, dtype=torch.int8), grid, Window((1, 1)), Affine(torch.ones(1)))
        tensor([[[[4.5000, 4.5000]]]])
    """
    inputs = input_grid(grid)
    _check_conv2d(x, codes, window, epilogue)
    if x.device.type != "cpu" or not x.numel():
        return int8_conv2d_reference(x, codes, grid, window, epilogue)
    scale, pads = epilogue.scale, (window.stride, window.padding, window.dilation, window.groups)
    key = (version_of(codes), inputs, window.numbers, window.groups, tuple(x.shape[1:]))
    known = _prepacked.get(codes)
    if known is None or known[0] != key:
        packed = None
        if are_multiplied_exactly(codes, inputs):
            packed = torch.ops.onednn.qconv_prepack(codes, scale, inputs.scale, inputs.zero_code, *pads, list(x.shape))
        known = _prepacked[codes] = (key, packed, torch.zeros(len(scale), dtype=torch.int64))
    _, packed, zero_points = known
    if packed is None:
        return int8_conv2d_reference(x, codes, grid, window, epilogue)
    encoded = _codes(x, inputs)
    y: Tensor = torch.ops.onednn.qconv2d_pointwise(
        encoded, inputs.scale, inputs.zero_code, packed, scale, zero_points, epilogue.bias, *pads, 1.0, 0, torch.float32, "none", [], "",
    )  # fmt: skip
    return y


def int8_conv2d_reference(x: Tensor, codes: Tensor, grid: Sequence[float], window: Window, epilogue: Affine[Tensor]) -> Tensor:
    """``int8_conv2d`` computed as a float convolution of the codes."""
    _check_conv2d(x, codes, window, epilogue)
    inputs = input_grid(grid)
    centred = inputs.encode(x).float() - inputs.zero_code
    settings = tuple(window.stride), tuple(window.padding), tuple(window.dilation), window.groups
    y = functional.conv2d(centred, codes.float(), None, *settings) * (epilogue.scale * inputs.scale).reshape(-1, 1, 1)
    return (y if epilogue.bias is None else y + epilogue.bias.reshape(-1, 1, 1)).contiguous(memory_format=torch.channels_last)


def _check_conv2d(x: Tensor, codes: Tensor, window: Window, epilogue: Affine[Tensor]) -> None:
    window.check_zero_padding()
    check_codes(x, codes, window.groups, epilogue.scale, epilogue.bias, window.kernel_size)
    window.output_size(x.shape[2:])


def _empty_linear(x: Tensor, codes: Tensor, grid: Sequence[float], epilogue: Affine[Tensor]) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]), dtype=torch.float32)


@register_operator(_empty_linear)
def int8_linear(x: Tensor, codes: Tensor, grid: Sequence[float], epilogue: Affine[Tensor]) -> Tensor:
    """``int8_conv2d`` for ``x`` ``[..., in_features]`` and ``codes`` ``[out, in_features]``; returns ``[..., out]``."""
    inputs = input_grid(grid)
    check_codes(x, codes, 1, epilogue.scale, epilogue.bias, None)
    if x.device.type != "cpu" or not x.numel():
        return int8_linear_reference(x, codes, grid, epilogue)
    key = version_of(codes), inputs
    known = _prepacked.get(codes)
    if known is None or known[0] != key:
        packed = torch.ops.onednn.qlinear_prepack(codes, None) if are_multiplied_exactly(codes, inputs) else None
        known = _prepacked[codes] = (key, packed, torch.zeros(len(epilogue.scale), dtype=torch.int64))
    _, packed, zero_points = known
    if packed is None:
        return int8_linear_reference(x, codes, grid, epilogue)
    encoded = _codes(x.reshape(-1, x.shape[-1]), inputs)
    y: Tensor = torch.ops.onednn.qlinear_pointwise(
        encoded, inputs.scale, inputs.zero_code, packed, epilogue.scale, zero_points, epilogue.bias, 1.0, 0, torch.float32, "none", [], "",
    )  # fmt: skip
    return y.reshape(*x.shape[:-1], codes.shape[0])


def int8_linear_reference(x: Tensor, codes: Tensor, grid: Sequence[float], epilogue: Affine[Tensor]) -> Tensor:
    """``int8_linear`` computed as a float product of the codes."""
    inputs = input_grid(grid)
    check_codes(x, codes, 1, epilogue.scale, epilogue.bias, None)
    y = functional.linear(inputs.encode(x).float() - inputs.zero_code, codes.float()) * (epilogue.scale * inputs.scale)
    return y if epilogue.bias is None else y + epilogue.bias


def _codes(x: Tensor, grid: InputGrid) -> Tensor:
    """``grid.encode(x)``, of images channels-last."""
    loops, is_image = target_loops("image_loops"), x.dim() == 4
    order = torch.channels_last if is_image else torch.contiguous_format
    if loops is None or x.dtype != torch.float32:
        return grid.encode(x.contiguous(memory_format=order))
    x, codes = x.detach().resolve_neg(), torch.empty(x.shape, dtype=torch.uint8, memory_format=order)
    places = codes.permute(0, 2, 3, 1) if is_image else codes
    if is_image and not x.is_contiguous(memory_format=order):
        pixels, places = x.contiguous().flatten(2), places.flatten(1, 2)
    else:  # in the order of the codes: as if all were one image of one channel
        pixels, places = (x.permute(0, 2, 3, 1) if is_image else x).reshape(1, 1, -1).contiguous(), places.view(1, -1, 1)
    loops.encode(pixels.numpy(), places.numpy(), grid.lower, grid.step, grid.shift - grid.qmin, grid.qmax - grid.qmin)
    return codes


@functools.cache
def has_exact_kernels(largest_input: int = 255, largest_weight: int = 128) -> bool:
    """Whether torch has 8-bit kernels for this processor whose sums of products are exact.

    Without VNNI, x86 processors add products of inputs and weights in pairs that saturate at 16 bits. No pair of weights of up to 7 bits, or
    of inputs of up to 7 bits, gets there.

    Args:
        largest_input: Largest byte of the inputs, 0 to 255.
        largest_weight: Largest magnitude of a weight's code, 0 to 128.
    """
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.onednn, "qconv2d_pointwise"):
        return False
    return not saturates() or 2 * largest_input * largest_weight <= MOST_PAIR


def are_multiplied_exactly(codes: Tensor, inputs: InputGrid) -> bool:
    """Whether the kernels are exact for these int8 weights and any inputs on this grid."""
    return has_exact_kernels(inputs.qmax - inputs.qmin, max(-int(codes.min()), int(codes.max())))


@functools.lru_cache(256)
def _cached_grid(values: tuple[float, ...]) -> InputGrid:
    if len(values) != 7 or not all(map(math.isfinite, values)):
        raise SpecError(f"the grid of an input must be 7 finite numbers, got {list(values)}")
    lower, step, shift, zero_point, scale, qmin, qmax = values
    if step == 0 or not 0 <= qmax - qmin <= 255 or not qmin <= zero_point <= qmax or max(abs(qmin), abs(qmax)) > 255:
        raise SpecError(
            f"the codes of an input must fit a byte, with steps other than 0 and 0 among them, got step {step}, codes {qmin} to {qmax}, "
            f"zero point {zero_point}"
        )
    return InputGrid(lower, step, shift, zero_point, scale, int(qmin), int(qmax))


def input_grid(values: Sequence[float]) -> InputGrid:
    """The grid with the values that were passed to an operator."""
    return _cached_grid(tuple(values))


_prepacked = WeakTensorKeyDictionary()  # codes -> (arguments that determine the layout, codes in oneDNN's layout, zero points)
