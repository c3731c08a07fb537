"""Uniform quantization: evenly spaced levels, symmetric or affine, per tensor, per channel or per group.

Source: Jacob et al. 2018 (affine grid), Nagel et al. 2021, "A White Paper on Neural Network Quantization", section 2.
Rounding is half to even and divides by the scale, as ONNX's QuantizeLinear does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lowbit.errors import CalibrationError, SpecError
from lowbit.quantizers.affine import fake_quantize, qrange, quantize
from lowbit.quantizers.base import TableQuantizer, replace_forward
from lowbit.quantizers.ops import mark_affine
from lowbit.quantizers.qtensor import AffineDecoder, QTensor, code_dtype
from lowbit.quantizers.ranges.observers import MinMaxObserver, Observer
from lowbit.spec import Granularity
from lowbit.surrogates import Surrogate, clipped_straight_through


class UniformQuantizer(TableQuantizer):
    """Evenly spaced levels with a fixed ``scale`` and ``zero_point``.

    Forward: ``(clamp(round(x / scale) + zero_point, qmin, qmax) - zero_point) * scale``.
    Each bit-width has its own scale and zero point: a new one gets what the observer chooses for it from what it saw. It covers the
    same range where the scale is learned, and where the observer saw nothing or finds no scale for so few codes.

    Args:
        bit_width: 1 to 8; codes are ``-2**(b-1) .. 2**(b-1) - 1`` when signed, else ``0 .. 2**b - 1``.
        signed: Whether codes can be negative.
        symmetric: Whether the zero point is fixed at 0.
        granularity: Which elements share a scale.
        observer: Chooses the range from data; default: min-max.
        surrogate: Backward rule of the rounding.
    """

    tables = tables_by_width = ("scale", "zero_point")

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
        self.signed, self.symmetric = signed, symmetric
        self.resize()
        self.observer = observer or MinMaxObserver(granularity)
        self.surrogate = surrogate

    @property
    def bit_widths(self) -> Sequence[int]:
        return range(2 if self.symmetric and self.signed else 1, 9)

    def resize(self) -> None:
        self.qmin, self.qmax = qrange(self.bit_width, signed=self.signed)

    def carry_over(self, old_bits: int) -> None:
        if self.observer.lo is not None and not isinstance(self.scale, nn.Parameter):
            found, _ = self.observer.parameters(self.qmin, self.qmax, symmetric=self.symmetric)
            if bool(torch.isfinite(found).all()):
                self.take_observed()
                return
        scale, zero_point = self.scale.detach(), self.zero_point.detach()
        qmin, qmax = qrange(old_bits, signed=self.signed)
        if self.symmetric:
            self.set_parameters(scale * max(qmax, 1) / max(self.qmax, 1))
        else:
            lower, new_scale = (qmin - zero_point) * scale, scale * (qmax - qmin) / (self.qmax - self.qmin)
            self.set_parameters(new_scale, (self.qmin - lower / new_scale).round())

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
        self.observer.observe(x, is_all=True)
        self.take_observed(self.granularity.scale_shape(x))

    def take_observed(self, shape: tuple[int, ...] | None = None) -> None:
        """Set the grid from what the observer saw; CalibrationError where it saw nothing.

        Args:
            shape: Shape of the scale; default: the current one, ``()`` before there is one.
        """
        shape = tuple(self.scale.shape) if shape is None else shape
        scale, zero_point = self.observer.parameters(self.qmin, self.qmax, symmetric=self.symmetric)
        self.set_parameters(scale.reshape(shape), zero_point.reshape(shape))

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_exporting() and not self.granularity.axes:
            marked: Tensor = mark_affine(x.float(), self.scale, self.zero_point, self.qmin, self.qmax)
            return marked if marked.dtype == x.dtype else marked.to(x.dtype)
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


@contextmanager
def observing(quantizers: Mapping[str, UniformQuantizer]) -> Iterator[None]:
    """Within the context values pass these quantizers, and their observers see them; ``take_observed`` then sets the grids.

    Raises:
        CalibrationError: A value is NaN or infinite; names the quantizer.
    """

    def showing(name: str, quantizer: UniformQuantizer) -> Callable[[Tensor], Tensor]:
        def show(x: Tensor) -> Tensor:
            try:
                quantizer.observer.observe(x)
            except CalibrationError as error:
                raise CalibrationError(f"activation {name!r}: {error}") from error
            return x

        return show

    for quantizer in quantizers.values():
        quantizer.observer.reset()
    with replace_forward({quantizer: showing(name, quantizer) for name, quantizer in quantizers.items()}):
        yield
