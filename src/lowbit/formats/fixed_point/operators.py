"""Operators on codes: convolutions, products, sums, pools and concatenations in integers.

They follow gemmlowp and TensorFlow Lite, and HAWQ-V3 where a docstring says so. Tensors are laid out as in torch, channels second.
Products are summed in float64, where sums of integers below ``2**53`` are exact; accumulators that overflow 32 bits are an error, as
kernels leave their result undefined.

Source: Jacob et al. 2018, sections 2.2-2.4 and appendix A; TensorFlow Lite, ``reference/integer_ops``; Yao et al. 2021, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor
from torch.nn import functional

from lowbit.errors import SpecError
from lowbit.formats.fixed_point.requantize import (
    INT32_MAX,
    INT32_MIN,
    FixedPointRequantizer,
    Requantizer,
    Rounding,
    along,
    quantize_multiplier,
)

Sizes = int | tuple[int, ...]  # one for all dimensions, or one for each
ADD_SHIFT = 20  # bits by which inputs of an addition are shifted to the left, so that rescaling them loses none
_CONVOLUTIONS = (functional.conv1d, functional.conv2d, functional.conv3d)
_MAX_POOLS = (functional.max_pool1d, functional.max_pool2d, functional.max_pool3d)


def accumulate_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    x_zero_point: int = 0,
    w_zero_point: Tensor | int = 0,
    stride: Sizes = 1,
    padding: Sizes = 0,
    dilation: Sizes = 1,
    groups: int = 1,
) -> Tensor:
    """The accumulator ``bias + sum (q_w - Z_w) (q_x - Z_x)`` of a convolution; padding contributes real zeros.

    Args:
        x: Codes ``[N, in, ...]`` of one, two or three spatial dimensions.
        weight: Codes ``[out, in / groups, ...]``.
        bias: Codes of scale ``S_x S_w`` and zero point 0, ``[out]``.
        x_zero_point: Zero point of the input.
        w_zero_point: One zero point, or one for each output channel.
        stride, padding, dilation, groups: As ``torch.nn.functional.conv2d`` takes them.

    Returns:
        int64, every value within 32 bits.

    Raises:
        SpecError: An accumulator overflows 32 bits.

    >>> accumulate_conv(torch.tensor([[[1, 2, 3]]]), torch.tensor([[[1, 1, 1]]]), x_zero_point=1, padding=1)
    tensor([[[1, 3, 3]]])
    """
    zero = along(torch.as_tensor(w_zero_point), weight, 0)
    operator = _CONVOLUTIONS[weight.dim() - 3]
    acc = operator(x.double() - x_zero_point, weight.double() - zero, None, stride, padding, dilation, groups)
    return _checked(acc if bias is None else acc + along(bias, acc, 1))


def accumulate_matmul(
    lhs: Tensor, rhs: Tensor, bias: Tensor | None = None, *, lhs_zero_point: Tensor | int = 0, rhs_zero_point: Tensor | int = 0
) -> Tensor:
    """The accumulator ``(lhs - Z_l) @ (rhs - Z_r) + bias`` of a product of matrices of codes.

    Args:
        lhs: Codes ``[..., rows, depth]``.
        rhs: Codes ``[..., depth, columns]``.
        bias: ``[columns]`` or ``None``.
        lhs_zero_point, rhs_zero_point: Broadcast with the codes.

    Returns:
        int64, every value within 32 bits.

    Raises:
        SpecError: An accumulator overflows 32 bits.

    >>> accumulate_matmul(torch.tensor([[3, 4]]), torch.tensor([[1], [2]]), lhs_zero_point=1)
    tensor([[8]])
    """
    acc = (lhs.double() - lhs_zero_point) @ (rhs.double() - rhs_zero_point)
    return _checked(acc if bias is None else acc + bias)


def add_fixed_point(
    a: Tensor,
    b: Tensor,
    scales: Sequence[float],
    zero_points: Sequence[int],
    qmin: int,
    qmax: int,
    *,
    left_shift: int = ADD_SHIFT,
    rounding: Rounding = "double",
) -> Tensor:
    """The codes of a sum: ``sum_i ((q_i - Z_i) << L) S_i / T``, times ``T / (2**L S_y)``, with ``T = 2 max(S_1, S_2)``.

    Args:
        a, b: Codes of one shape.
        scales: ``S_1``, ``S_2`` and ``S_y``.
        zero_points: ``Z_1``, ``Z_2`` and ``Z_y``.
        qmin, qmax: Range of the output's codes.
        left_shift: ``L``.
        rounding: How often each of the three products is rounded.

    Returns:
        int32.

    Source: Jacob et al. 2018, appendix A.2; TensorFlow Lite, ``integer_ops/add.h``.

    >>> add_fixed_point(torch.tensor([10]), torch.tensor([20]), (0.5, 0.25, 0.5), (0, 0, 1), -128, 127)
    tensor([21], dtype=torch.int32)
    """
    twice = 2 * max(scales[0], scales[1])
    total = sum(
        _factor(scale / twice, rounding).rescale((codes.long() - zero) << left_shift)
        for codes, scale, zero in zip((a, b), scales[:2], zero_points[:2], strict=True)
    )
    assert isinstance(total, Tensor)
    return _factor(twice / (2**left_shift * scales[2]), rounding, zero_points[2], qmin, qmax)(total)


def add_dyadic(branches: Sequence[tuple[Tensor, Requantizer]], axis: int = 1) -> Tensor:
    """The codes of a sum of accumulators, each rescaled to the scale of the output and rounded: ``sum round(acc_i m_i / 2**e_i)``.

    There is no clamp: the sums are intermediate values of 16 bits.

    Args:
        branches: An accumulator and the requantizer of its scale to the output's, for each branch.
        axis: The axis of channels.

    Returns:
        int32.

    Source: Yao et al. 2021, section 3.2.
    """
    return torch.stack([requantizer.rescale(acc, axis) for acc, requantizer in branches]).sum(0).int()


def average_pool(
    x: Tensor,
    kernel_size: Sizes,
    stride: Sizes | None = None,
    padding: Sizes = 0,
    *,
    qmin: int = -128,
    qmax: int = 127,
) -> Tensor:
    """Mean of codes, ``(sum +- count / 2) / count`` truncated: ties away from zero; padding does not count.

    Args:
        x: Codes ``[N, C, ...]``; the output has their scale and zero point.
        kernel_size, stride, padding: As ``torch.nn.functional.avg_pool2d`` takes them.
        qmin, qmax: Range of the output's codes.

    Returns:
        int32.

    Source: TensorFlow Lite, ``integer_ops/pooling.h``.

    >>> average_pool(torch.tensor([[[1, 2, -1, -2]]]), 2)
    tensor([[[ 2, -2]]], dtype=torch.int32)
    """
    total, count = _sum_pool(x, kernel_size, stride, padding)
    half = torch.div(count, 2, rounding_mode="trunc")
    return torch.div(total + torch.where(total > 0, half, -half), count, rounding_mode="trunc").clamp(qmin, qmax).int()


def average_pool_truncated(
    x: Tensor,
    kernel_size: Sizes,
    stride: Sizes | None = None,
    padding: Sizes = 0,
    *,
    eps: float = 0.01,
) -> Tensor:
    """Mean of codes as HAWQ-V3 takes it, ``trunc(mean + eps)``: toward zero, also for negative means.

    Args:
        x: Codes ``[N, C, ...]``; the output has their scale.
        kernel_size, stride, padding: As ``torch.nn.functional.avg_pool2d`` takes them; padding does not count.
        eps: What is added to the mean; a fraction with a denominator of at most 1,000, so that it is exact in integers.

    Returns:
        int32.

    Source: Yao et al. 2021, ``QuantAveragePool2d`` of its code.

    >>> average_pool_truncated(torch.tensor([[[1, 2, -1, -2]]]), 2)
    tensor([[[ 1, -1]]], dtype=torch.int32)
    """
    total, count = _sum_pool(x, kernel_size, stride, padding)
    share = Fraction(eps).limit_denominator(1000)
    return torch.div(total * share.denominator + share.numerator * count, share.denominator * count, rounding_mode="trunc").int()


def max_pool(x: Tensor, kernel_size: Sizes, stride: Sizes | None = None, padding: Sizes = 0) -> Tensor:
    """Largest codes; int32. Padding is never among them.

    >>> max_pool(torch.tensor([[[-5, -7, -9]]]), 2, 2, 1)
    tensor([[[-5, -7]]], dtype=torch.int32)
    """
    return _MAX_POOLS[x.dim() - 3](x.double(), kernel_size, stride, padding).int()


def concatenate(codes: Sequence[Tensor], scales: Sequence[float], zero_points: Sequence[int], axis: int = 1) -> Tensor:
    """Codes side by side, which all must share one scale and zero point.

    Raises:
        SpecError: They do not.

    Source: Jacob et al. 2018, appendix A.3.

    >>> concatenate([torch.tensor([[1]]), torch.tensor([[2]])], (0.5, 0.5), (0, 0))
    tensor([[1, 2]])
    """
    if len({*scales}) > 1 or len({*zero_points}) > 1:
        raise SpecError(
            f"parts of a concatenation must share scale and zero point, got scales {', '.join(f'{scale:g}' for scale in scales)} and zero "
            f"points {', '.join(map(str, zero_points))}. Quantize them by one quantizer."
        )
    return torch.cat(list(codes), axis)


def _factor(multiplier: float, rounding: Rounding, zero_point: int = 0, qmin: int = INT32_MIN, qmax: int = INT32_MAX) -> Requantizer:
    """Multiplication by a real number in fixed point."""
    fixed, shift = quantize_multiplier(torch.tensor(multiplier, dtype=torch.float64), rounding=rounding)
    return FixedPointRequantizer(zero_point, qmin, qmax, fixed, shift, rounding)


def _sum_pool(x: Tensor, kernel_size: Sizes, stride: Sizes | None, padding: Sizes) -> tuple[Tensor, Tensor]:
    """Sums over windows, and how many codes are in each, int64; padding does not count."""
    dims = x.dim() - 2
    kernel, step, margin = (
        [value] * dims if isinstance(value, int) else list(value) for value in (kernel_size, stride or kernel_size, padding)
    )
    window = torch.ones(x.shape[1], 1, *kernel, dtype=torch.float64, device=x.device)

    def over_windows(values: Tensor) -> Tensor:
        return _CONVOLUTIONS[dims - 1](values, window, None, step, margin, 1, x.shape[1]).long()

    return over_windows(x.double()), over_windows(torch.ones_like(x[:1], dtype=torch.float64))


def _checked(acc: Tensor) -> Tensor:
    """Whole floats as int64; SpecError where one overflows 32 bits."""
    if acc.numel() and bool((acc.abs() > INT32_MAX).any()):
        raise SpecError(
            f"an accumulator of {acc.abs().max().item():.0f} overflows 32 bits. Use fewer bits, or split the sum: with 8-bit weights and "
            "activations it may have 66,000 products."
        )
    return acc.long()
