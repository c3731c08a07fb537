"""Affine grids as pure functions: integer range, scale and zero point, rounding to codes and back.

Source: Jacob et al. 2018; Nagel et al. 2021, "A White Paper on Neural Network Quantization", section 2.
Rounding is half to even and divides by the scale, as ONNX's QuantizeLinear does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.quantizers.ranges.scale_search import SMALLEST_SCALE
from lowbit.surrogates import Surrogate, clipped_straight_through


def qrange(bit_width: int, *, signed: bool, narrow: bool = False) -> tuple[int, int]:
    """Integer range ``(qmin, qmax)``; ``narrow`` drops the lowest code so that the range is symmetric."""
    if signed:
        return -(2 ** (bit_width - 1)) + int(narrow), 2 ** (bit_width - 1) - 1
    return 0, 2**bit_width - 1


def affine_parameters(lo: Tensor, hi: Tensor, qmin: int, qmax: int, *, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scale and zero point that make ``[lo, hi]``, widened to contain 0, representable.

    Affine: ``scale = (hi - lo) / (qmax - qmin)``, ``zero_point = clamp(round(qmin - lo / scale), qmin, qmax)``.
    Symmetric: ``scale = max(|lo|, |hi|) / max(qmax, 1)``, ``zero_point = 0``.
    A range of no width (a dead channel) gets scale 1, so that nothing divides by zero and zeros stay zeros.

    Args:
        lo, hi: Bounds of equal shape, in tensor units.
        qmin, qmax: Integer range of the codes.
        symmetric: Whether the zero point is 0.

    Returns:
        ``(scale, zero_point)``, float32, shaped like ``lo``.

    Source: Nagel et al. 2021, section 2.2.
    """
    lo, hi = lo.float().clamp(max=0), hi.float().clamp(min=0)
    scale = torch.maximum(-lo, hi) / max(qmax, 1) if symmetric else (hi - lo) / (qmax - qmin)
    scale = torch.where(scale < SMALLEST_SCALE, torch.ones_like(scale), scale)
    zero_point = torch.zeros_like(scale) if symmetric else (qmin - lo / scale).round().clamp(qmin, qmax)
    return scale, zero_point


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    """Integer codes ``clamp(round(x / scale) + zero_point, qmin, qmax)`` as floats; ``scale`` broadcasts with ``x``."""
    return (x / scale).round_().add_(zero_point).clamp_(qmin, qmax)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """``(codes - zero_point) * scale``."""
    return (codes - zero_point) * scale


def fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, surrogate: Surrogate = clipped_straight_through
) -> Tensor:
    """Quantize and dequantize in float.

    Forward: ``(clamp(round(x / scale) + zero_point, qmin, qmax) - zero_point) * scale``.
    Backward: the surrogate's for the rounding; scale and zero point get the gradient of this expression.

    Args:
        x: Values of any shape.
        scale: Positive, broadcasts with ``x``.
        zero_point: Integer valued floats, broadcasts with ``x``.
        qmin, qmax: Integer range of the codes.
        surrogate: Backward rule of the rounding.

    Returns:
        Tensor shaped like ``x``, values on the grid.

    Source: Nagel et al. 2021, Eq. 4-7.
    """
    if not (torch.is_grad_enabled() and (x.requires_grad or scale.requires_grad or zero_point.requires_grad)):
        return quantize(x, scale, zero_point, qmin, qmax).sub_(zero_point).mul_(scale)
    return surrogate(x / scale, qmin - zero_point, qmax - zero_point) * scale
