"""Uniform quantization: evenly spaced levels, symmetric or affine, per tensor, per channel or per group.

Source: Jacob et al. 2018 (affine grid), Nagel et al. 2021, "A White Paper on Neural Network Quantization", section 2.
Rounding is half to even and divides by the scale, as ONNX's QuantizeLinear does.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lowbit.errors import SpecError
from lowbit.quantizers.base import TableQuantizer
from lowbit.quantizers.ops import fake_quantize_affine
from lowbit.quantizers.qtensor import AffineDecoder, QTensor, code_dtype
from lowbit.quantizers.ranges.observers import MinMaxObserver, Observer
from lowbit.spec import Granularity
from lowbit.surrogates import Surrogate, clipped_straight_through, straight_through

SMALLEST_SCALE = 1e-20  # below it a division by the scale overflows float32


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


def fake_quantize_offset(x: Tensor, scale: Tensor, offset: Tensor, qmin: int, qmax: int, surrogate: Surrogate = straight_through) -> Tensor:
    """Quantize and dequantize on levels that start at a real number: 0 need not be one of them.

    Forward: ``clamp(round((x - offset) / scale), qmin, qmax) * scale + offset``.
    Backward: the surrogate's for the rounding; scale and offset get the gradient of this expression.

    Args:
        x: Values of any shape.
        scale: Positive, broadcasts with ``x``.
        offset: What the code 0 stands for, broadcasts with ``x``.
        qmin, qmax: Integer range of the codes.
        surrogate: Backward rule of the rounding.

    Source: Bhalgat et al. 2020, "LSQ+", Eq. 3-4.
    """
    return surrogate((x - offset) / scale, qmin, qmax) * scale + offset


class UniformQuantizer(TableQuantizer):
    """Evenly spaced levels with a fixed ``scale`` and ``zero_point``.

    Forward: ``(clamp(round(x / scale) + zero_point, qmin, qmax) - zero_point) * scale``.

    Args:
        bit_width: 1 to 8; codes are ``-2**(b-1) .. 2**(b-1) - 1`` when signed, else ``0 .. 2**b - 1``.
        signed: Whether codes can be negative.
        symmetric: Whether the zero point is fixed at 0.
        granularity: Which elements share a scale.
        observer: Chooses the range from data; min-max when left out.
        surrogate: Backward rule of the rounding.
    """

    tables = ("scale", "zero_point")

    def __init__(
        self,
        bit_width: int,
        *,
        signed: bool,
        symmetric: bool,
        granularity: Granularity | None = None,
        observer: Observer | None = None,
        surrogate: Surrogate = clipped_straight_through,
    ) -> None:
        granularity = granularity or Granularity.tensor()
        super().__init__(bit_width, granularity)
        if symmetric and signed and bit_width == 1:
            raise SpecError("a symmetric signed grid needs at least 2 bits; use BinaryQuantizer for 1 bit")
        self.scale: Tensor
        self.zero_point: Tensor
        self.qmin, self.qmax = qrange(bit_width, signed=signed)
        self.symmetric = symmetric
        self.observer = observer or MinMaxObserver(granularity)
        self.surrogate = surrogate
        self.is_calibrating = False

    def learn_scale(self) -> None:
        """Make the scale a trainable parameter (it is a buffer otherwise)."""
        scale = self.scale
        del self.scale
        self.scale = nn.Parameter(scale.detach().clone())

    def set_parameters(self, scale: Tensor, zero_point: Tensor | None = None) -> None:
        """Fix the grid; both must broadcast with ``granularity.broadcast(x)``."""
        if not (bool(torch.isfinite(scale).all()) and bool((scale > 0).all())):
            raise SpecError(f"scale must be positive and finite, got values from {scale.min().item():.3g} to {scale.max().item():.3g}")
        self._set_table("scale", scale)
        self._set_table("zero_point", torch.zeros_like(scale) if zero_point is None else zero_point)

    def initialize(self, x: Tensor) -> None:
        """Let the observer choose scale and zero point for ``x`` alone."""
        self.observer.reset()
        self.observer.observe(x.detach(), is_all=True)
        self._take_observed(self.granularity.scale_shape(x))

    def start_calibration(self) -> None:
        """From now on ``forward`` only shows its input to the observer and returns it unchanged."""
        self.observer.reset()
        self.is_calibrating = True

    def finish_calibration(self) -> None:
        """Set the grid from what the observer saw."""
        self.is_calibrating = False
        self._take_observed(())

    def _take_observed(self, shape: tuple[int, ...]) -> None:
        scale, zero_point = self.observer.parameters(self.qmin, self.qmax, symmetric=self.symmetric)
        self.set_parameters(scale.reshape(shape), zero_point.reshape(shape))

    def forward(self, x: Tensor) -> Tensor:
        if self.is_calibrating:
            self.observer.observe(x.detach())
            return x
        if torch.compiler.is_exporting() and self.granularity.kind == "per_tensor":
            marked: Tensor = fake_quantize_affine(x, self.scale, self.zero_point, self.qmin, self.qmax)
            return marked
        view = self.granularity.broadcast(x.float())  # a grid needs float32 even where the network computes in half
        y = fake_quantize(view, self.scale, self.zero_point, self.qmin, self.qmax, self.surrogate)
        return self.granularity.restore(y, x.shape).to(x.dtype)

    def encode(self, x: Tensor) -> QTensor:
        view = self.granularity.broadcast(x.detach().float())
        scale, zero_point = self.scale.detach(), self.zero_point.detach()
        codes = self.granularity.restore(quantize(view, scale, zero_point, self.qmin, self.qmax), x.shape)
        return QTensor(codes.to(code_dtype(self.qmin)), AffineDecoder(scale, zero_point, self.granularity), self.bit_width)

    def extra_repr(self) -> str:
        return (
            f"bit_width={self.bit_width}, codes {self.qmin}..{self.qmax}, {'symmetric' if self.symmetric else 'affine'}, {self.granularity}"
        )
