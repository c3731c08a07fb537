"""Scales and zero points from ranges, and codes from real values, as gemmlowp and TensorFlow Lite find them.

They round ties away from zero; ONNX and the quantizers of this library round them to even (``lowbit.quantizers.affine``).

Source: Jacob et al. 2018, sections 2.1 and 3.1; gemmlowp, ``doc/quantization_example.cc``; TensorFlow Lite,
``ChooseQuantizationParams`` and ``AffineQuantize``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.errors import SpecError
from lowbit.formats.fixed_point.requantize import INT32_MAX, INT32_MIN, round_half_away


def widened(lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
    """The range ``[lo, hi]`` widened to contain 0."""
    return lo.clamp(max=0), hi.clamp(min=0)


def choose_qparams(lo: Tensor, hi: Tensor, qmin: int, qmax: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point of a range, as TensorFlow Lite chooses them.

    ``S = (hi - lo) / (qmax - qmin)``; ``Z`` is ``qmin - lo / S`` rounded half away from zero and clamped to the codes, or
    ``qmax - hi / S`` where that has the smaller rounding error: ``|qmax| + |hi / S| <= |qmin| + |lo / S|``. Ranges of no width get
    ``S = 0`` and ``Z = 0``.

    Args:
        lo, hi: Bounds of equal shape, ``lo <= 0 <= hi``; computed in float64.
        qmin, qmax: Range of the codes: 0 and 255, -128 and 127, or -127 and 127 for narrow weights.

    Returns:
        ``(scale, zero_point)``, float64 and int64, shaped like ``lo``.

    >>> choose_qparams(torch.tensor(-1.0), torch.tensor(1.0), 0, 255)
    (tensor(0.0078, dtype=torch.float64), tensor(128))
    """
    if not bool(((lo <= 0) & (hi >= 0)).all()):
        raise SpecError("ranges must contain 0: widen them by widened(lo, hi)")
    lo, hi = lo.double(), hi.double()
    scale = (hi - lo) / (qmax - qmin)
    is_empty = scale == 0
    step = torch.where(is_empty, 1.0, scale)
    by_lo, by_hi = qmin - lo / step, qmax - hi / step
    is_better = abs(qmin) + (lo / step).abs() < abs(qmax) + (hi / step).abs()
    zero_point = round_half_away(torch.where(is_better, by_lo, by_hi).clamp(qmin, qmax))
    return scale, torch.where(is_empty, 0.0, zero_point).long()


def choose_qparams_gemmlowp(lo: Tensor, hi: Tensor, qmin: int = 0, qmax: int = 255) -> tuple[Tensor, Tensor]:
    """Scale and zero point of a range, as the paper and gemmlowp's example choose them.

    The range is widened to contain 0. ``S = (hi - lo) / (qmax - qmin)`` in float32, then in float64
    ``Z = round_half_away(qmin - lo / S)`` clamped to the codes. Ranges of no width get ``S = 0`` and ``Z = 0``.

    Args:
        lo, hi: Bounds of equal shape, float32.
        qmin, qmax: Range of the codes.

    Returns:
        ``(scale, zero_point)``, float64 and int64, shaped like ``lo``.

    >>> choose_qparams_gemmlowp(torch.tensor(-1.0), torch.tensor(1.0))
    (tensor(0.0078, dtype=torch.float64), tensor(127))
    """
    lo, hi = widened(lo.float(), hi.float())
    scale = ((hi - lo) / (qmax - qmin)).double()
    is_empty = scale == 0
    zero_point = round_half_away((qmin - lo.double() / torch.where(is_empty, 1.0, scale)).clamp(qmin, qmax))
    return scale, torch.where(is_empty, 0.0, zero_point).long()


def nudged_range(lo: Tensor, hi: Tensor, qmin: int, qmax: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The range nearest to ``[lo, hi]`` in which 0 is a code, for training.

    ``scale = (hi - lo) / (qmax - qmin)``, ``zero_point = round_half_away(qmin - lo / scale)`` clamped to the codes,
    ``nudged = (code - zero_point) * scale`` for the first and the last code; float32. Ranges of no width get scale 1, so that zeros
    stay zeros.

    Args:
        lo, hi: Bounds of equal shape, ``lo <= hi``.
        qmin, qmax: Range of the codes.

    Returns:
        ``(nudged_lo, nudged_hi, scale, zero_point)``, float32, shaped like ``lo``.

    Source: Jacob et al. 2018, section 3.1; TensorFlow's ``FakeQuantWithMinMaxVars``.

    >>> [round(t.item(), 4) for t in nudged_range(torch.tensor(-1.01), torch.tensor(2.0), 0, 3)]
    [-1.0033, 2.0067, 1.0033, 1.0]
    """
    lo, hi = lo.float(), hi.float()
    scale = (hi - lo) / (qmax - qmin)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    zero_point = round_half_away((qmin - lo / scale).clamp(qmin, qmax))
    return (qmin - zero_point) * scale, (qmax - zero_point) * scale, scale, zero_point


def quantize_half_away(x: Tensor, scale: Tensor | float, zero_point: Tensor | int, qmin: int, qmax: int) -> Tensor:
    """Codes ``clamp(round_half_away(x / scale) + zero_point, qmin, qmax)``, divided in float32; int32.

    Args:
        x: Real values.
        scale: Positive, broadcasts with ``x``.
        zero_point: Broadcasts with ``x``.
        qmin, qmax: Range of the codes.

    Source: TensorFlow Lite, ``AffineQuantize``.

    >>> quantize_half_away(torch.tensor([-0.125, 0.125, 0.375, 100.0]), 0.25, -3, -128, 127)
    tensor([ -4,  -2,  -1, 127], dtype=torch.int32)
    """
    steps = x.float() / torch.as_tensor(scale, dtype=torch.float32, device=x.device)
    rounded = round_half_away(steps.clamp(INT32_MIN, INT32_MAX))  # infinite values are far ones
    return (rounded + zero_point).clamp(qmin, qmax).int()


def activation_codes(
    scale: float, zero_point: int, qmin: int, qmax: int, *, lower: float | None = None, upper: float | None = None
) -> tuple[int, int]:
    """The codes that a fused activation leaves: those of ``lower`` and ``upper`` where it clips.

    Args:
        scale, zero_point: Of the output.
        qmin, qmax: Range of the output's codes.
        lower, upper: Where the activation clips: 0 and ``None`` for ReLU, 0 and 6 for ReLU6.

    Source: TensorFlow Lite, ``CalculateActivationRangeQuantized``.

    >>> activation_codes(0.05, -28, -128, 127, lower=0.0, upper=6.0)
    (-28, 92)
    """
    ends = [
        default if end is None else int(quantize_half_away(torch.tensor(end), scale, zero_point, qmin, qmax))
        for end, default in ((lower, qmin), (upper, qmax))
    ]
    return ends[0], ends[1]


def quantize_bias(bias: Tensor, acc_scale: Tensor) -> Tensor:
    """Codes of a bias on the grid of the accumulator: ``round_half_away(bias / (S_x S_w))`` clamped to 32 bits, int64.

    Args:
        bias: ``[channels]``.
        acc_scale: ``requantize.accumulator_scale``, ``()`` or ``[channels]``.

    Source: Jacob et al. 2018, Eq. 11; TensorFlow Lite's converter.

    >>> quantize_bias(torch.tensor([0.5, -0.3]), torch.tensor([0.01, 0.2]))
    tensor([50, -2])
    """
    return round_half_away(bias.double() / acc_scale.double()).clamp(INT32_MIN, INT32_MAX).long()


def unsigned_scale(x: Tensor, bit_width: int) -> Tensor:
    """Scale of activations without a zero point, as HAWQ-V3 chooses it behind a ReLU: ``(max - min) / (2**b - 1)``, float32, ``()``.

    Codes are ``0 .. 2**b - 1``. Activations that are all equal get scale 1.

    Source: Yao et al. 2021, ``asymmetric_linear_quantization_params`` of its code.

    >>> unsigned_scale(torch.tensor([0.0, 1.5]), 4)
    tensor(0.1000)
    """
    scale = (x.float().amax() - x.float().amin()) / (2**bit_width - 1)
    return torch.where(scale > 0, scale, torch.ones_like(scale))
