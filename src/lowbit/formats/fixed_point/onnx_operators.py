"""Operators on codes as ONNX defines them and ONNX Runtime computes them: rounding half to even, factors in float32.

Source: the ONNX operators QuantizeLinear, DequantizeLinear, DynamicQuantizeLinear, QLinearConv and QLinearMatMul, and what ONNX
Runtime's CPU kernels and graph optimizations make of them. ``lowbit.quantizers.affine`` holds the two linear ones for torch code types.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from lowbit.formats.fixed_point.operators import Sizes, accumulate_conv, accumulate_matmul
from lowbit.formats.fixed_point.requantize import along, make_requantizer
from lowbit.quantizers.affine import dequantize, qrange, quantize

NEAR_TIE = 1e-3  # in codes: nearer to a tie, a convolution in float may round the other way


def quantize_linear(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, axis: int = 1) -> Tensor:
    """QuantizeLinear: ``clamp(round_half_even(x / scale) + zero_point, qmin, qmax)``, divided in float32; int32.

    Args:
        x: Float values.
        scale: Positive, float32, ``()`` or one for each index of ``axis``.
        zero_point: Shaped like ``scale``.
        qmin, qmax: 0 and 255 for uint8, -128 and 127 for int8.
        axis: The axis of channels.

    >>> quantize_linear(torch.tensor([[0.125, 0.375]]), torch.tensor(0.25), torch.tensor(3), 0, 255)
    tensor([[3, 5]], dtype=torch.int32)
    """
    return quantize(x.float(), along(scale.float(), x, axis), along(zero_point, x, axis), qmin, qmax).int()


def dequantize_linear(codes: Tensor, scale: Tensor, zero_point: Tensor | int = 0, axis: int = 1) -> Tensor:
    """DequantizeLinear: ``(codes - zero_point) * scale`` in float32.

    Args:
        codes: Integers, int32 among them.
        scale: float32, ``()`` or one for each index of ``axis``.
        zero_point: Shaped like ``scale``.
        axis: The axis of channels.

    >>> dequantize_linear(torch.tensor([[3, 5]]), torch.tensor(0.25), torch.tensor(3))
    tensor([[0.0000, 0.5000]])
    """
    zero = along(torch.as_tensor(zero_point), codes, axis)
    return dequantize(codes.long(), along(scale.float(), codes, axis), zero.long())


def dynamic_quantize_linear(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """DynamicQuantizeLinear: codes of the range of ``x`` itself, widened to contain 0.

    ``S = (max - min) / 255`` in float32, ``Z = round_half_even(clamp(-min / S, 0, 255))``; ``S = 1`` for zeros alone.

    Returns:
        ``(codes, scale, zero_point)``, int32, float32 and int32; the last two ``()``.

    >>> dynamic_quantize_linear(torch.tensor([0.0, 25.5]))
    (tensor([  0, 255], dtype=torch.int32), tensor(0.1000), tensor(0, dtype=torch.int32))
    """
    qmin, qmax = qrange(8, signed=False)
    lo, hi = x.float().amin().clamp(max=0), x.float().amax().clamp(min=0)
    scale = (hi - lo) / (qmax - qmin)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    zero_point = (qmin - lo / scale).clamp(qmin, qmax).round().int()
    return quantize_linear(x, scale, zero_point, qmin, qmax), scale, zero_point


def qlinear_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    x_scale: Tensor,
    x_zero_point: int,
    w_scale: Tensor,
    w_zero_point: Tensor | int = 0,
    y_scale: Tensor,
    y_zero_point: int,
    qmin: int,
    qmax: int,
    stride: Sizes = 1,
    padding: Sizes = 0,
    dilation: Sizes = 1,
    groups: int = 1,
) -> Tensor:
    """QLinearConv: the exact accumulator, then ``OnnxRequantizer``; int32.

    Args:
        x: Codes ``[N, in, ...]``.
        weight: Codes ``[out, in / groups, ...]``.
        bias: Codes of scale ``x_scale w_scale``, ``[out]``, or ``None``.
        x_scale, x_zero_point, y_scale, y_zero_point: Of input and output; padding has the code ``x_zero_point``.
        w_scale, w_zero_point: One, or one for each output channel.
        qmin, qmax: Range of the output's codes.
        stride, padding, dilation, groups: As ``torch.nn.functional.conv2d`` takes them.

    Raises:
        SpecError: An accumulator overflows 32 bits.

    >>> scale = torch.tensor(0.5)
    >>> codes, weight = torch.tensor([[[1, 2, 5]]]), torch.tensor([[[3]]])
    >>> qlinear_conv(
    ...     codes, weight, None, x_scale=scale, x_zero_point=0, w_scale=scale, y_scale=scale, y_zero_point=0, qmin=0, qmax=7
    ... )
    tensor([[[2, 3, 7]]], dtype=torch.int32)
    """
    acc = accumulate_conv(
        x,
        weight,
        bias,
        x_zero_point=x_zero_point,
        w_zero_point=w_zero_point,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
    )
    return make_requantizer("onnx", x_scale, w_scale, y_scale, y_zero_point, qmin, qmax)(acc)


def qlinear_matmul(
    a: Tensor,
    b: Tensor,
    *,
    a_scale: Tensor,
    a_zero_point: int,
    b_scale: Tensor,
    b_zero_point: Tensor | int = 0,
    y_scale: Tensor,
    y_zero_point: int,
    qmin: int,
    qmax: int,
) -> Tensor:
    """QLinearMatMul: as ``qlinear_conv`` for a product of matrices, ``b_scale`` and ``b_zero_point`` one or one for each column; int32.

    >>> scale, a, b = torch.tensor(0.5), torch.tensor([[1, 2]]), torch.tensor([[3], [4]])
    >>> qlinear_matmul(a, b, a_scale=scale, a_zero_point=0, b_scale=scale, y_scale=scale, y_zero_point=1, qmin=0, qmax=255)
    tensor([[7]], dtype=torch.int32)
    """
    acc = accumulate_matmul(a, b, lhs_zero_point=a_zero_point, rhs_zero_point=b_zero_point)
    return make_requantizer("onnx", a_scale, b_scale, y_scale, y_zero_point, qmin, qmax)(acc, axis=-1)


def qdq_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    x_scale: Tensor,
    x_zero_point: int,
    w_scale: Tensor,
    bias_scale: Tensor,
    y_scale: Tensor,
    y_zero_point: int,
    qmin: int,
    qmax: int,
    stride: Sizes = 1,
    padding: Sizes = 0,
    relu: bool = False,
    optimized: bool = True,
) -> Tensor:
    """The codes that ONNX Runtime computes for DequantizeLinear, Conv, perhaps Relu, QuantizeLinear; int32.

    With its graph optimizations that becomes one QLinearConv, if the scale of the bias is ``x_scale w_scale`` and a Relu is followed by
    codes whose zero point is the lowest one: then clamping them is the Relu. Otherwise the convolution runs in float32 on the decoded
    values, and its sums are rounded.

    Args:
        x, weight, bias: Codes as in ``qlinear_conv``; the weight has zero point 0.
        bias_scale: ``()`` or ``[out]``.
        relu: Whether a Relu follows the convolution.
        optimized: Whether graph optimizations are on.

    >>> scale, codes = torch.tensor(0.5), torch.tensor([[[1, 2, 5]]])
    >>> scales = dict(x_scale=scale, w_scale=scale, bias_scale=scale * scale, y_scale=scale, x_zero_point=0, y_zero_point=0)
    >>> [qdq_conv(codes, torch.tensor([[[3]]]), torch.tensor([1]), qmin=0, qmax=7, optimized=on, **scales).tolist() for on in (True, False)]
    [[[[2, 4, 7]]], [[[2, 4, 7]]]]
    """
    if optimized and runs_in_integers(x_scale, w_scale, bias_scale, y_zero_point, qmin, relu=relu):
        return qlinear_conv(
            x,
            weight,
            bias,
            x_scale=x_scale,
            x_zero_point=x_zero_point,
            w_scale=w_scale,
            y_scale=y_scale,
            y_zero_point=y_zero_point,
            qmin=qmin,
            qmax=qmax,
            stride=stride,
            padding=padding,
        )
    convolution = (functional.conv1d, functional.conv2d, functional.conv3d)[weight.dim() - 3]
    z = convolution(
        dequantize_linear(x, x_scale, x_zero_point),
        dequantize_linear(weight, w_scale, axis=0),
        dequantize_linear(bias, bias_scale, axis=0),
        stride,
        padding,
    )
    return quantize_linear(z.relu() if relu else z, y_scale, torch.as_tensor(y_zero_point), qmin, qmax)


def runs_in_integers(x_scale: Tensor, w_scale: Tensor, bias_scale: Tensor, y_zero_point: int, qmin: int, *, relu: bool) -> bool:
    """Whether ONNX Runtime's optimizations make one QLinearConv of a convolution between DequantizeLinear and QuantizeLinear."""
    is_bias_exact = torch.allclose(bias_scale.float(), x_scale.float() * w_scale.float(), rtol=1e-6, atol=0.0)
    return is_bias_exact and (not relu or y_zero_point == qmin)


def is_far_from_ties(
    acc: Tensor, x_scale: Tensor, w_scale: Tensor, y_scale: Tensor, *, relu: bool = False, margin: float = NEAR_TIE, axis: int = 1
) -> Tensor:
    """Where a convolution in float must give the codes of the integer one: ``v = acc x_scale w_scale / y_scale`` lies ``margin`` or more
    from a tie, and is positive if a Relu follows; boolean, shaped like ``acc``.

    >>> is_far_from_ties(torch.tensor([[1, 2, 3]]), torch.tensor(0.5), torch.tensor(1.0), torch.tensor(1.0))
    tensor([[False,  True, False]])
    """
    x, w, y = (scale.double() for scale in (x_scale, w_scale, y_scale))
    v = acc.double() * along(x * w / y, acc, axis)
    is_far = (v - v.floor() - 0.5).abs() > margin
    return is_far & (v > 0) if relu else is_far
