"""Layers with low-bit weights and inputs on the kernels of binary layers: one product of signs for each pair of bits.

An input code ``c`` with bits ``b_p`` equals ``sum 2**p (s_p + 1) / 2`` with signs ``s_p = 2 b_p - 1``, and an integer weight equals
``sum 2**q t_q`` with ``t_q`` in {-1, 0, +1}. So ``2 sum (c - z) w = sum 2**(p + q) sum s_p t_q + (2**planes - 1 - 2 z) sum w``: sums
over a window, which the binary kernels count, plus a constant for each output channel. Source: Zhou et al. 2016, "DoReFa-Net", section 2.1,
here with signs.

Each function has a torch reference with the same signature. Both compute the same integers.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from lowbit.errors import SpecError
from lowbit.runtime.arguments import POINT, Affine, Epilogue, PlanesLayer, SignLayer, Window
from lowbit.runtime.cpu.bits import pack_signs, unpack_weight
from lowbit.runtime.cpu.target import active_target, processor_features
from lowbit.runtime.layers.binary import compiled_loops
from lowbit.runtime.layers.checks import check_input, check_layer, refuse_gradients
from lowbit.runtime.layers.int8 import InputGrid, has_exact_kernels
from lowbit.runtime.layers.operator import register_operator
from lowbit.runtime.layers.prepared import Array, PreparedLayer, filled_limits, keep_layer, known_layer
from lowbit.runtime.thresholds import sign_threshold

MOST_LEVELS = 15  # thresholds of the inputs: codes of 4 bits
MOST_WEIGHT = 3  # in magnitude: 2 bits


def choose_kernel(weight_bits: int, activation_bits: int) -> tuple[Literal["planes", "int8", "float"], str]:
    """The fastest kernel for layers of these bit-widths on this processor, and the reason.

    Bit planes cost as much as a binary layer times the number of pairs of bits. Measured by benchmarks/bit_planes.py on the 3x3
    convolutions of ResNet-18 against the faster of oneDNN's and ONNX Runtime's 8-bit ones.

    Args:
        weight_bits: 1 to 8; 1 for weights of -1, 0 and +1 too.
        activation_bits: 1 to 8.

    Raises:
        SpecError: Other bits.
    """
    for name, bits in (("weight_bits", weight_bits), ("activation_bits", activation_bits)):
        if not 1 <= bits <= 8:
            raise SpecError(f"{name} must be 1 to 8, got {bits}")
    pairs, (most, why) = weight_bits * activation_bits, most_pairs()
    if pairs <= most and weight_bits <= 2 and activation_bits <= 4:
        return "planes", f"{pairs} of at most {most} pairs of bits: {why}"
    reason = f"{pairs} pairs of bits, more than {most}: {why}"
    if has_exact_kernels(2**activation_bits - 1, 2 ** (weight_bits - 1)):
        return "int8", reason
    return "float", f"{reason}; an ONNX file runs it in integers"


@functools.cache
def most_pairs() -> tuple[int, str]:
    """The largest number of pairs of bits for which planes are fastest on this processor, and the reason."""
    target = active_target()[0]
    if compiled_loops() is None:
        return 0, "there are no compiled kernels here"
    if has_exact_kernels(127) and not has_exact_kernels():
        return 2, "8-bit products without VNNI take as long as three pairs of bits"
    if not has_exact_kernels():
        return 2, "the alternative is float32, as torch has no exact 8-bit kernels for this processor"
    if "amx-int8" in processor_features():
        return 1, "this processor multiplies 8-bit matrices (AMX) as fast as it counts two pairs of bits"
    if target.form == "lookup":
        return 1, "looking up bits takes as long as 8-bit products from two pairs on"
    return 2, "8-bit products take as long as three pairs of bits"


def pack_planes(weight: Tensor, groups: int = 1) -> tuple[Tensor, Tensor | None]:
    """Pack the bits of integer weights into words.

    Where all weights are odd, bits are -1 and +1 (``2 q - (2**planes - 1)`` with ``q = 0, 1, ...``); else they are the binary digits of the
    magnitude with the sign of the weight, and need a mask.

    Args:
        weight: ``[out, in / groups, kernel height, kernel width]`` or ``[out, in]``, integers from -3 to 3.
        groups: Number of groups; ``out`` must be a multiple of it.

    Returns:
        int32 ``[planes, out, kernel height, kernel width, words]`` or ``[planes, out, words]`` with ``words = ceil(in / groups / 32)``, the
        lowest bit first, and a mask of the same shape, ``None`` where no digit is zero.

    Raises:
        SpecError: Values out of range, or an unsupported shape.
    """
    if weight.dim() not in (2, 4) or weight.shape[0] % groups:
        raise SpecError(
            f"a weight in planes needs a shape [out, in] or [out, in / groups, h, w], got {tuple(weight.shape)} and {groups} groups"
        )
    values = weight.round().long()
    if not bool((weight == values).all()) or not bool((values.abs() <= MOST_WEIGHT).all()):
        raise SpecError(f"a weight in planes must hold whole numbers from -{MOST_WEIGHT} to {MOST_WEIGHT}; divide it by its scale first")
    count = max(int(values.abs().max()) if values.numel() else 1, 1).bit_length()
    is_odd = bool((values % 2 != 0).all())
    source = (values + 2**count - 1) // 2 if is_odd else values.abs()
    bits = torch.stack([(source >> plane) & 1 for plane in range(count)]).movedim(2, -1)
    if is_odd:
        return pack_signs(bits * 2 - 1), None
    signs = bits * values.sign().movedim(1, -1)
    return pack_signs(signs), pack_signs(bits * 2 - 1)


def unpack_planes(words: Tensor, mask: Tensor | None, count: int) -> Tensor:
    """The inverse of ``pack_planes``: float32 integers, with ``count`` channels along the last dimension."""
    digits = unpack_weight(words, mask, count)
    return torch.stack([digits[plane] * 2**plane for plane in range(len(digits))]).sum(0)


def input_thresholds(grid: InputGrid) -> Tensor:
    """Exact thresholds of ``grid``, float32 ``[levels, 1]``: the code of an input is the number of thresholds it reaches."""

    def threshold(level: int) -> Tensor:
        return sign_threshold(lambda x: grid.encode(x).float() - level - 0.5, 1)[0]

    return torch.stack([threshold(level) for level in range(grid.qmax - grid.qmin)])


def planes_conv2d_reference(x: Tensor, layer: PlanesLayer[Tensor], window: Window, epilogue: Affine[Tensor]) -> Tensor:
    """``planes_conv2d`` computed as a float convolution of the codes."""
    top, left = window.padding
    codes = functional.pad(_codes(x, layer.thresholds[:, :, None, None]) - layer.zero_code, (left, left, top, top))
    weight = unpack_planes(layer.words, layer.mask, layer.in_channels // window.groups).movedim(-1, 1)
    # with one channel, torch can mistake one memory format for the other
    codes, weight = (tensor.clone(memory_format=torch.contiguous_format) for tensor in (codes, weight))
    y = functional.conv2d(codes, weight, None, tuple(window.stride), 0, tuple(window.dilation), window.groups).round()
    y = y * epilogue.scale.reshape(-1, 1, 1)
    return (y if epilogue.bias is None else y + epilogue.bias.reshape(-1, 1, 1)).contiguous(memory_format=torch.channels_last)


def planes_linear_reference(x: Tensor, layer: PlanesLayer[Tensor], epilogue: Affine[Tensor]) -> Tensor:
    """``planes_linear`` computed as a float product of the codes."""
    weight = unpack_planes(layer.words, layer.mask, layer.in_channels)
    y = functional.linear(_codes(x, layer.thresholds) - layer.zero_code, weight).round() * epilogue.scale
    return y if epilogue.bias is None else y + epilogue.bias


def _codes(x: Tensor, thresholds: Tensor) -> Tensor:
    codes = torch.zeros_like(x)
    for threshold in thresholds:
        codes += x >= threshold
    return codes


def _empty_conv2d(x: Tensor, layer: PlanesLayer[Tensor], window: Window, epilogue: Affine[Tensor]) -> Tensor:
    rows, columns = window.output_size(x.shape[2:])
    return x.new_empty((x.shape[0], rows, columns, layer.words.shape[1])).permute(0, 3, 1, 2)


def _empty_linear(x: Tensor, layer: PlanesLayer[Tensor], epilogue: Affine[Tensor]) -> Tensor:
    return x.new_empty((*x.shape[:-1], layer.words.shape[1]))


@register_operator(_empty_conv2d)
def planes_conv2d(x: Tensor, layer: PlanesLayer[Tensor], window: Window, epilogue: Affine[Tensor]) -> Tensor:
    """``y = scale * sum((code(x) - zero_code) w) + bias`` over the window; ``code(x)`` is the number of thresholds that ``x`` reaches.

    The sums are exact. Padding counts as ``zero_code``, NaN as code 0.

    Args:
        x: ``[N, in_channels, H, W]`` float32; channels-last is fastest.
        layer: The weight, and the thresholds that encode ``x``.
        window: Geometry of the convolution; its ``pad_value`` is 0.
        epilogue: Its scale is the product of the scales of weight and input.

    Returns:
        ``[N, out, rows, columns]`` float32, channels-last.

    Raises:
        SpecError: An argument has the wrong type or shape, or the image is smaller than the kernel.
        LayerError: A gradient is required; the operator has no derivative.

        >>> words, mask = pack_planes(torch.full((1, 1, 1, 1), 3.0))
        >>> layer = PlanesLayer(words, 1, torch.tensor([[0.5], [1.5]]), 0, mask)
        >>> planes_conv2d(torch.tensor([[[[0.2, 1.0, 9.0]]]]), layer, Window((1, 1)), Affine(torch.ones(1)))
        tensor([[[[0., 3., 6.]]]])
    """
    refuse_gradients("planes_conv2d", x, epilogue.scale, epilogue.bias)
    loops = compiled_loops() if x.device.type == "cpu" and x.numel() else None
    prepared = None if loops is None else known_layer(layer, window, epilogue)
    if prepared is None:
        window.check_zero_padding()
        _check(layer, window, epilogue)
    check_input(x, layer.in_channels, 4)
    if loops is None:
        return planes_conv2d_reference(x, layer, window, epilogue)
    if prepared is None:
        prepared = keep_layer(PreparedPlanes(loops, layer, window, epilogue))
    plan = prepared.plan(x.shape[0], *x.shape[2:])
    y = plan.empty_output()
    plan.run(x.contiguous(memory_format=torch.channels_last).resolve_neg(), y, None, None)
    return y


@register_operator(_empty_linear)
def planes_linear(x: Tensor, layer: PlanesLayer[Tensor], epilogue: Affine[Tensor]) -> Tensor:
    """``planes_conv2d`` for ``x`` ``[..., in_channels]`` and weights ``[out, in_channels]``; returns ``[..., out]``."""
    refuse_gradients("planes_linear", x, epilogue.scale, epilogue.bias)
    loops = compiled_loops() if x.device.type == "cpu" and x.numel() else None
    prepared = None if loops is None else known_layer(layer, POINT, epilogue)
    if prepared is None:
        _check(layer, None, epilogue)
    check_input(x, layer.in_channels, None)
    if loops is None:
        return planes_linear_reference(x, layer, epilogue)
    if prepared is None:
        prepared = keep_layer(PreparedPlanes(loops, layer, POINT, epilogue))
    y = _empty_linear(x, layer, epilogue)
    prepared.plan(1, 1, y.numel() // y.shape[-1]).run(x.contiguous().resolve_neg(), y, None, None)
    return y


class PreparedPlanes(PreparedLayer):
    """A layer of several bits in the form that the kernels read; see ``PreparedLayer``."""

    def __init__(self, loops: ModuleType, layer: PlanesLayer[Tensor], window: Window, epilogue: Affine[Tensor]) -> None:
        signs = SignLayer(layer.words, layer.in_channels, layer.mask, layer.thresholds)
        super().__init__(loops, signs, window, Epilogue(epilogue.scale, epilogue.bias))
        self.made_of(layer, window, epilogue)
        self.zero_code, self.planes = layer.zero_code, len(self.packing[0]).bit_length()
        factors = 2 ** torch.arange(len(layer.words), dtype=torch.int32)[:, None]
        magnitudes, sums = (
            (torch.from_numpy(part).view(len(factors), -1) * factors).sum(0)
            for part in (self.total, self.missing.sum((0, 1), dtype=np.int32))
        )
        highest = 2**self.planes - 1
        self.total = (highest * magnitudes + (highest - 2 * self.zero_code) * sums).int().numpy()
        self.border = 0  # the image already includes the padding
        self.finishing = self.in_tiles(epilogue.scale / 2), *self.finishing[1:]  # sums are doubled
        self.ones = np.zeros((1, 1, 1, self.groups, self.words), loops.IMAGE)
        zeros, flip = torch.zeros(1, self.channels), np.zeros_like(self.packing[1])
        limits = filled_limits(zeros, self.groups)
        size = {"IMAGES": 1, "HEIGHT": 1, "WIDTH": 1, "CHANNELS": self.channels, "GROUPS": self.groups, "WORDS": self.words}
        table = loops.table_of(**size, INPUT_BITS=1, LEVELS=1, THRESHOLD=limits, FLIP=flip, IMAGE=self.ones)
        loops.pack(table, zeros.data_ptr(), 0, 1)

    def empty_image(self, n: int, height: int, width: int) -> Array:
        """Allocate an image for each bit, padded with the bits of ``zero_code``."""
        image = super().empty_image(n, height, width)
        top, left = self.window.padding
        for plane in range(self.planes if top or left else 0):
            if self.zero_code >> plane & 1:
                padded = image[plane * n : (plane + 1) * n]
                padded[:] = self.ones
                padded[:, top : top + height, left : left + width] = 0
        return image


def _check(layer: PlanesLayer[Tensor], window: Window | None, epilogue: Affine[Tensor]) -> None:
    """Raise SpecError where the parts of a layer do not fit each other; linear layers have no window."""
    words, mask, thresholds = layer.tensors
    assert words is not None
    assert thresholds is not None
    if words.dim() != (3 if window is None else 5) or not 1 <= len(words) <= 2 or (mask is not None and mask.shape != words.shape):
        masks = "" if mask is None else f" and a mask of {tuple(mask.shape)}"
        raise SpecError(f"weights must be 1 or 2 planes of words as pack_planes gives them, got {tuple(words.shape)}{masks}")
    plane = SignLayer(words[0], layer.in_channels, None if mask is None else mask[0])
    check_layer(plane, window, Epilogue(epilogue.scale, epilogue.bias))
    shape = tuple(thresholds.shape)
    is_table = thresholds.dim() == 2 and 1 <= shape[0] <= MOST_LEVELS and shape[1] in (1, layer.in_channels)
    if not is_table or thresholds.dtype != torch.float32:
        raise SpecError(f"thresholds must be float32 [1..{MOST_LEVELS}, 1 or {layer.in_channels}], got {thresholds.dtype} {shape}")
    if thresholds.device != words.device:
        raise SpecError(f"thresholds must be on {words.device} with the packed weights, got {thresholds.device}")
    if bool(thresholds.isnan().any()) or not bool((thresholds.diff(dim=0) >= 0).all()):
        raise SpecError("thresholds must ascend in each channel")
    if not 0 <= layer.zero_code <= shape[0]:
        raise SpecError(f"zero_code must lie in 0..{shape[0]}, the codes of {shape[0]} thresholds, got {layer.zero_code}")
