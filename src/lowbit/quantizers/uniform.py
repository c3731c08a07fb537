"""Uniform quantization: evenly spaced levels, symmetric or affine, per tensor, per channel or per group.

Source: Jacob et al. 2018 (affine grid), Nagel et al. 2021, "A White Paper on Neural Network Quantization", section 2.
Rounding is half to even and divides by the scale, as ONNX's QuantizeLinear does.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lowbit.errors import SpecError
from lowbit.quantizers.affine import fake_quantize, qrange, quantize
from lowbit.quantizers.base import TableQuantizer
from lowbit.quantizers.ops import fake_quantize_affine
from lowbit.quantizers.qtensor import AffineDecoder, QTensor, code_dtype
from lowbit.quantizers.ranges.observers import MinMaxObserver, Observer
from lowbit.spec import Granularity
from lowbit.surrogates import Surrogate, clipped_straight_through


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
