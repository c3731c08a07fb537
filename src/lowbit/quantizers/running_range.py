"""Asymmetric quantization between the smallest and the largest value: of a weight as it is, of activations as they were in training.

Source: Cai et al. 2020, "ZeroQ", as in the program that its authors published (``AsymmetricQuantFunction``, ``QuantAct``); the other ranges of
activations as in the program of Zhang et al. 2021, "Diversifying Sample Generation for Accurate Data-Free Quantization".
Symbols: k -> bit_width, S -> 1 / scale, Z -> -zero_point, x_min and x_max -> lower and upper.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal

import torch
from torch import Tensor

from lowbit.errors import SpecError
from lowbit.quantizers.affine import qrange, quantize
from lowbit.quantizers.base import TableQuantizer
from lowbit.quantizers.ops import mark_affine
from lowbit.quantizers.qtensor import AffineDecoder, QTensor, code_dtype
from lowbit.spec import Granularity
from lowbit.surrogates.base import pass_gradient

SMALLEST_WIDTH = 1e-8  # of a range
SHRINKS = 80  # ranges that ``mse`` compares, each a hundredth of the batch's range narrower than the one before

RangeKind = Literal["minmax", "ema", "perc", "mse"]


class MinMaxQuantizer(TableQuantizer):
    """A quantizer whose grid spans a range, which need not contain 0.

    ``S = (2**k - 1) / max(upper - lower, 1e-8)``, ``Z = round(S lower) + 2**(k - 1)``, code ``q = clamp(round(S x - Z), -2**(k - 1), 2**(k - 1) - 1)``,
    ``y = (q + Z) (1 / S)``. Symmetric: ``S = (2**(k - 1) - 1) / max(|lower|, |upper|, 1e-8)``, ``Z = 0``.
    Backward: exactly the gradient of ``y``, also where codes are clipped; nothing through the range.

    Args:
        bit_width: 1 to 8; symmetric 2 to 8.
        granularity: Which elements share a range.
        symmetric: Whether 0 is in the middle of the codes.
    """

    tables: tuple[str, ...] = ()

    def __init__(self, bit_width: int, granularity: Granularity, *, symmetric: bool = False) -> None:
        self.symmetric = symmetric
        super().__init__(bit_width, granularity)
        if symmetric and bit_width == 1:
            raise SpecError("a symmetric grid needs at least 2 bits: one bit has no level beside 0. Use symmetric=False.")

    @property
    def bit_widths(self) -> range:
        return range(1 + self.symmetric, 9)

    @abstractmethod
    def range_of(self, view: Tensor) -> tuple[Tensor, Tensor]:
        """``(lower, upper)`` for values that are already ``granularity.broadcast``, of the shape ``granularity.scale_shape``."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            view = self.granularity.broadcast(x.detach().float())
            codes, decoder = self._encoded(view, *self.range_of(view))
            y = self.granularity.restore((codes - decoder.zero_point) * decoder.scale, x.shape)
        return pass_gradient(x, y.to(x.dtype))

    @torch.no_grad()
    def encode(self, x: Tensor) -> QTensor:
        view = self.granularity.broadcast(x.detach().float())
        codes, decoder = self._encoded(view, *self.range_of(view))
        return QTensor(self.granularity.restore(codes, x.shape).to(code_dtype(-1)), decoder, self.bit_width)

    def per_unit(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """``(S, Z)``: how many codes a unit has, and which code 0 would have, negated."""
        qmin, qmax = qrange(self.bit_width, signed=True)
        if self.symmetric:
            codes = qmax / torch.maximum(lower.abs(), upper.abs()).clamp(min=SMALLEST_WIDTH)
            return codes, torch.zeros_like(codes)
        codes = (qmax - qmin) / (upper - lower).clamp(min=SMALLEST_WIDTH)
        return codes, (codes * lower).round() - qmin

    def _encoded(self, view: Tensor, lower: Tensor, upper: Tensor) -> tuple[Tensor, AffineDecoder]:
        """Codes as floats, shaped like ``view``, and what decodes them."""
        per_unit, offset = self.per_unit(lower, upper)
        return self.codes_of(view, per_unit, offset), AffineDecoder(1 / per_unit, -offset, self.granularity)

    def codes_of(self, view: Tensor, per_unit: Tensor, offset: Tensor) -> Tensor:
        """Codes as floats."""
        return (per_unit * view - offset).round_().clamp_(*qrange(self.bit_width, signed=True))

    def extra_repr(self) -> str:
        return f"bit_width={self.bit_width}, {'symmetric' if self.symmetric else 'asymmetric'}, {self.granularity}"


class MinMaxWeightQuantizer(MinMaxQuantizer):
    """Weights between the smallest and the largest of each channel, found anew in every pass: nothing is stored.

    The grid is that of ``MinMaxQuantizer``.

    >>> import torch
    >>> from lowbit.quantizers.running_range import MinMaxWeightQuantizer
    >>> MinMaxWeightQuantizer(2)(torch.tensor([[1.0, 1.9, 2.4, 4.0], [0.0, 0.0, 0.0, 0.0]]))
    tensor([[1., 2., 2., 4.],
            [0., 0., 0., 0.]])
    """

    def __init__(self, bit_width: int, granularity: Granularity | None = None, *, symmetric: bool = False) -> None:
        super().__init__(bit_width, granularity or Granularity.channel(), symmetric=symmetric)

    def initialize(self, x: Tensor) -> None:
        """Nothing to set."""

    def range_of(self, view: Tensor) -> tuple[Tensor, Tensor]:
        axes, keeps = self.granularity.shared_axes(view), bool(self.granularity.axes)
        return (view.amin(axes, keepdim=keeps), view.amax(axes, keepdim=keeps)) if axes else (view, view)


class RunningRangeQuantizer(MinMaxQuantizer):
    """Activations, per tensor, over a range that batches widen in training and that stays in evaluation.

    The grid is that of ``MinMaxQuantizer``, but ``q = clamp(round(x / (1 / S)) - Z, ...)``, as in exported networks: rounding differs halfway
    between two codes alone, where pooled values often lie. In training each batch moves the range first:

    - ``minmax``: ``lower <- min(lower, min x)``, ``upper <- max(upper, max x)``;
    - ``ema``: the same with the mean over the samples of their smallest and of their largest values (the name is the program's);
    - ``perc``: the same with the percentiles ``100 - p`` and ``p`` of the whole batch, linearly interpolated;
    - ``mse``: ``lower <- min x``, ``upper <- max x - s (max x - min x) / 100`` with the first ``s`` of 0 to 79 that makes ``||x - y||`` smallest.

    The first three start at 0, so that 0 stays within the range. All bit-widths have one range.

    Where the range is empty, as before the first batch, that of the batch is used, in evaluation as well. An exported network
    has none but the stored range: what was 0 whenever it was seen stays 0 there.

    Args:
        bit_width: 1 to 8; symmetric 2 to 8.
        kind: How batches move the range.
        percentile: ``p`` of ``perc``, 50 to 100.
        symmetric: Whether 0 is in the middle of the codes.

    >>> import torch
    >>> from lowbit.quantizers.running_range import RunningRangeQuantizer
    >>> quantizer = RunningRangeQuantizer(2)
    >>> _ = quantizer(torch.tensor([0.0, 3.0])), quantizer.eval()
    >>> quantizer(torch.tensor([0.4, 0.9, 7.0])), quantizer.upper
    (tensor([0., 1., 3.]), tensor(3.))
    """

    tables = ("lower", "upper")

    def __init__(self, bit_width: int, *, kind: RangeKind = "minmax", percentile: float = 99.999, symmetric: bool = False) -> None:
        super().__init__(bit_width, Granularity.tensor(), symmetric=symmetric)
        if not 50 <= percentile <= 100:
            raise SpecError(f"percentile must be from 50 to 100, got {percentile}")
        self.lower: Tensor
        self.upper: Tensor
        self.kind, self.percentile = kind, percentile
        self.forget()

    @property
    def is_initialized(self) -> bool:
        return bool(self.lower != self.upper)

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Take the range of ``x`` alone."""
        self.forget()
        self.observe(x)

    def forget(self) -> None:
        """Start at an empty range again."""
        for name in self.tables:
            self._set_table(name, torch.zeros_like(getattr(self, name)))

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Move the range as a batch of training does; nothing where ``x`` has no element."""
        if x.numel() == 0:
            return
        x = x.detach().float()
        if self.kind == "mse":
            lower, upper = self._least_error(x)
        else:
            lower, upper = self._extremes(x)
            lower, upper = torch.minimum(self.lower, lower), torch.maximum(self.upper, upper)
        self.lower.copy_(lower)
        self.upper.copy_(upper)

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_exporting():
            per_unit, offset = self.per_unit(self.lower, self.upper)
            marked: Tensor = mark_affine(x.float(), 1 / per_unit, -offset, *qrange(self.bit_width, signed=True))
            return marked if marked.dtype == x.dtype else marked.to(x.dtype)
        if self.training:
            self.observe(x)
        return super().forward(x)

    def codes_of(self, view: Tensor, per_unit: Tensor, offset: Tensor) -> Tensor:
        return quantize(view, 1 / per_unit, -offset, *qrange(self.bit_width, signed=True))

    def range_of(self, view: Tensor) -> tuple[Tensor, Tensor]:
        if view.numel() == 0:
            return self.lower, self.upper
        is_empty = self.lower == self.upper
        return torch.where(is_empty, view.amin(), self.lower), torch.where(is_empty, view.amax(), self.upper)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.kind}{f' {self.percentile}' if self.kind == 'perc' else ''}"

    def _extremes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.kind == "perc":
            return quantile(x, 1 - self.percentile / 100), quantile(x, self.percentile / 100)
        if self.kind == "ema" and x.dim() > 1:
            rows = x.flatten(1)
            return rows.amin(1).mean(), rows.amax(1).mean()
        return x.amin(), x.amax()

    def _least_error(self, x: Tensor) -> tuple[Tensor, Tensor]:
        lower, upper = x.amin(), x.amax()
        ends = [upper - shrink * 0.01 * (upper - lower) for shrink in range(SHRINKS)]
        errors = []
        for end in ends:
            codes, decoder = self._encoded(x, lower, end)
            errors.append((decoder.decode(codes) - x).norm())
        return lower, ends[int(torch.stack(errors).argmin())]


def quantile(x: Tensor, share: float) -> Tensor:
    """The ``share`` (0 to 1) quantile of all values, linearly interpolated; shape ``()``. ``torch.quantile`` takes 16 million values at most.

    >>> quantile(torch.tensor([3.0, 0.0, 1.0]), 0.75)
    tensor(2.)
    """
    values = x.flatten()
    place = share * (len(values) - 1)
    below = int(place)
    low, high = (values.kthvalue(min(index, len(values) - 1) + 1).values for index in (below, below + 1))
    return torch.lerp(low, high, place - below)
