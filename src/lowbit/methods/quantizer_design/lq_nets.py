"""LQ-Nets: levels are all sums of a few numbers learned by least squares, so that codes stay bit planes.

Paper: Zhang, Yang, Ye, Hua 2018, "LQ-Nets: Learned Quantization for Highly Accurate and Compact Deep Neural Networks", ECCV.
    Section 3.1 (Eq. 3-5, the quantizer), section 3.2 and algorithm 1 (quantization error minimization, moving average), section 3.3.
Symbols: v -> basis, b -> codes, B -> the codes of all elements, K -> bit_width.
Differs from the paper:
    - Bases start from the data (a few steps of the paper's alternation), which suits weights of any distribution; ``start`` selects others.
    - Bases of activations get the tiny pull towards the current basis that those of weights have, so that a bit that never varies does
      not make the least squares singular.
    - Where a layer's input can be negative, activations have the symmetric codes of weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from lowbit.options import Interval
from lowbit.qat import OptimizerSpec, Recipe, Slot, TrainingMethod, TrainRun
from lowbit.quantizers import Quantizer
from lowbit.quantizers.base import TableQuantizer
from lowbit.quantizers.codebook import nearest_level
from lowbit.quantizers.ops import mark_codebook
from lowbit.quantizers.qtensor import CodebookDecoder, QTensor
from lowbit.registry import MethodInfo, register
from lowbit.spec import Granularity
from lowbit.surrogates import pass_gradient

QUARTILE = 0.6745  # upper quartile of the standard normal
WEIGHT_PULL = 1e-4
ACTIVATION_PULL = 1e-9  # relative to the number of elements
START_STEPS = 20


def binary_codes(bit_width: int, *, signed: bool) -> Tensor:
    """All codes, ``[2**bit_width, bit_width]``, the first column changing fastest; of 0 and 1, with ``signed`` of -1 and 1."""
    index = torch.arange(2**bit_width).unsqueeze(1)
    bits = ((index >> torch.arange(bit_width)) & 1).float()
    return 2 * bits - 1 if signed else bits


def initial_activation_basis(bit_width: int) -> Tensor:
    """``2**j * 2 * 0.6745 / (2**K - 1)``, ``[K]``: uniform levels up to 1.349. Source: the authors' code."""
    basis: Tensor = torch.exp2(torch.arange(bit_width)) * 2 * QUARTILE / (2**bit_width - 1)
    return basis


def initial_weight_basis(bit_width: int, fan_out: int, channels: int) -> Tensor:
    """``2**j * 0.6745 sqrt(2 / fan_out) / 2**(K - 1)``, ``[K, channels]``. Source: the authors' code."""
    basis: Tensor = torch.exp2(torch.arange(bit_width)) * QUARTILE * math.sqrt(2 / fan_out) / 2 ** (bit_width - 1)
    return basis.unsqueeze(1).repeat(1, channels)


class LearnedBasis(TableQuantizer):
    """Levels are the sums ``codes . basis``, one basis for each scale of the granularity.

    Forward: the nearest level, the lower one midway. Backward: 1, for activations 0 above the top level (signed ones: beyond either
    end); the basis gets no gradient. In training every pass also gathers what ``update`` needs.
    Each bit-width has its own basis: a new one starts with even levels over the same range. Source: Eq. 3-5.

    Args:
        bit_width: 1 to 8.
        signed: Codes of -1 and 1 instead of 0 and 1.
        clips_gradient: Whether values beyond the levels get no gradient.
        granularity: Which elements share a basis.
        pull: Weight of the current basis in the least squares, per element if ``pull_by_element``.
        momentum: Momentum of the moving average.
        zero_debias: Divide the average by ``1 - momentum**t``, so that the first updates are not biased towards the start.
        from_shape: Start at the authors' constants; else fit the basis to the first data.
    """

    tables = ("basis", "accumulator")
    tables_by_width = ("basis", "accumulator", "updates")
    bit_widths = range(1, 9)

    def __init__(
        self,
        bit_width: int,
        *,
        signed: bool,
        clips_gradient: bool = False,
        granularity: Granularity | None = None,
        pull: float = WEIGHT_PULL,
        pull_by_element: bool = False,
        momentum: float = 0.9,
        zero_debias: bool = True,
        from_shape: bool = False,
    ) -> None:
        super().__init__(bit_width, granularity or Granularity.tensor())
        self.basis: Tensor  # [rows, bit_width]
        self.accumulator: Tensor
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self.updates: Tensor
        self.register_buffer("codes", binary_codes(bit_width, signed=signed), persistent=False)
        self.codes: Tensor
        self.signed, self.clips_gradient = signed, clips_gradient
        self.pull, self.pull_by_element, self.momentum, self.zero_debias = pull, pull_by_element, momentum, zero_debias
        self.from_shape = from_shape
        self._gathered: tuple[Tensor, Tensor] | None = None

    def set_basis(self, basis: Tensor) -> None:
        """Start at ``basis``, ``[rows, bit_width]``."""
        self._set_table("basis", basis)
        self._set_table("accumulator", torch.zeros_like(basis))
        self.updates.zero_()

    def resize(self) -> None:
        self.codes = binary_codes(self.bit_width, signed=self.signed).to(self.codes.device)
        self._gathered = None

    def carry_over(self, old_bits: int) -> None:
        shares = torch.exp2(torch.arange(self.bit_width, device=self.basis.device)) / (2**self.bit_width - 1)
        self.set_basis(self.basis.sum(1, keepdim=True) * shares)

    def initialize(self, x: Tensor) -> None:
        rows = self.granularity.flatten(x.detach().float())
        if self.from_shape and self.granularity.kind == "per_channel":
            fan_out = x.numel() // x.shape[1 - self.granularity.axis]
            self.set_basis(initial_weight_basis(self.bit_width, fan_out, len(rows)).T.to(x.device))
        elif self.from_shape:
            self.set_basis(initial_activation_basis(self.bit_width).unsqueeze(0).to(x.device))
        else:
            size = rows.abs().mean(1, keepdim=True)
            steps = torch.exp2(torch.arange(self.bit_width, device=x.device) + (1 if self.signed else 2)) / 2**self.bit_width
            self.set_basis(torch.where(size > 0, size, torch.ones_like(size)) * steps)
            for _ in range(START_STEPS):
                self._set_table("basis", self.solve(*self.statistics(rows)))

    def levels(self) -> tuple[Tensor, Tensor]:
        """Ascending levels ``[rows, 2**bit_width]`` and the code of each."""
        # no matrix product: autocast and TF32 would round the levels, and only in training
        levels, order = (self.basis.unsqueeze(1) * self.codes).sum(2).sort(dim=1)
        return levels, self.codes[order]

    def statistics(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """``B'B`` and ``B'x`` for each row of ``rows``, with codes under the current basis."""
        levels, codes = self.levels()
        return _normal_equations(rows, nearest_level(rows, levels), codes)

    def solve(self, gram: Tensor, moment: Tensor) -> Tensor:
        """The basis of least squared error: ``(B'B + e I)^-1 (B'x + e v)``; the current one where that is not finite."""
        pull = self.pull * (gram.diagonal(dim1=1, dim2=2).amax(1) if self.pull_by_element else torch.ones_like(gram[:, 0, 0]))
        pull = pull.clamp(min=1e-30).view(-1, 1)
        basis = self.basis.double()
        solved = torch.linalg.solve(gram + torch.diag_embed(pull.expand_as(basis)), moment + pull * basis)
        return torch.where(torch.isfinite(solved).all(1, keepdim=True), solved, basis).float()

    def average(self, new_basis: Tensor) -> None:
        """Move the basis towards ``new_basis``: ``a = m a + (1 - m) v``, divided by ``1 - m**t``; or plainly. Source: section 3.2."""
        self.updates += 1
        if self.zero_debias:
            self._set_table("accumulator", self.momentum * self.accumulator + (1 - self.momentum) * new_basis)
            self._set_table("basis", self.accumulator / (1 - self.momentum ** int(self.updates)))
        else:
            self._set_table("basis", self.momentum * self.basis + (1 - self.momentum) * new_basis)

    def update(self, run: TrainRun | None = None) -> None:
        """One step of the alternation with the statistics gathered since the last one, over all processes; none if no code was set."""
        gathered, self._gathered = self._gathered, None
        if gathered is None:  # a process whose layer rested has to take part in the averaging all the same
            moment = torch.zeros_like(self.basis, dtype=torch.float64)
            gathered = torch.diag_embed(moment), moment
        if run is not None:
            for statistic in gathered:
                run.reduce_mean(statistic)
        if bool(gathered[0].any()):
            self.average(self.solve(*gathered))

    def forward(self, x: Tensor) -> Tensor:
        levels, codes = self.levels()
        if torch.compiler.is_exporting() and not self.granularity.axes:
            row = levels[0]
            marked: Tensor = mark_codebook(x.float(), (row[1:] + row[:-1]) / 2, row)
            return marked.to(x.dtype)
        values = x.float()
        rows = self.granularity.flatten(values.detach())
        index = nearest_level(rows, levels)
        y = self.granularity.unflatten(levels.gather(1, index), x.shape)
        if self.training and torch.is_grad_enabled():
            gram, moment = _normal_equations(rows, index, codes)
            before = self._gathered
            self._gathered = (gram, moment) if before is None else (before[0] + gram, before[1] + moment)
        if self.clips_gradient:
            top = levels.amax()
            passes = (values <= top) & (values >= -top) if self.signed else values <= top
            values = values * passes
        return pass_gradient(values, y).to(x.dtype)

    @torch.no_grad()
    def encode(self, x: Tensor) -> QTensor:
        levels, _ = self.levels()
        rows = nearest_level(self.granularity.flatten(x.detach().float()), levels)
        codes = self.granularity.unflatten(rows, x.shape).to(torch.uint8)
        return QTensor(codes, CodebookDecoder(levels.contiguous(), self.granularity), self.bit_width)


def _normal_equations(rows: Tensor, index: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """``B'B`` ``[rows, K, K]`` and ``B'x`` ``[rows, K]`` of values with the codes ``codes[row, index]``; sums in float64."""
    count, levels, bits = codes.shape
    flat = index + torch.arange(count, device=rows.device).unsqueeze(1) * levels
    counts = torch.bincount(flat.flatten(), minlength=count * levels).view(count, levels).double()
    # bit by bit: a weighted bincount takes more memory, and gives another sum in each run on a GPU
    moments = [(rows * codes[:, :, bit].gather(1, index)).sum(1, dtype=torch.float64) for bit in range(bits)]
    return torch.einsum("rl,rli,rlj->rij", counts, codes.double(), codes.double()), torch.stack(moments, 1)


@register(
    MethodInfo(
        name="lq_nets",
        title="LQ-Nets: Learned Quantization for Highly Accurate and Compact Deep Neural Networks",
        paper="Zhang, Yang, Ye, Hua, ECCV 2018",
        url="https://arxiv.org/abs/1807.10029",
        section="quantizer_design",
        axes=("weight_quantizer", "activation_quantizer"),
        kind="training",
        weight_bits=range(1, 9),
        activation_bits=range(1, 9),
        needs=("labels",),
        fidelity="exact",
        summary="learned levels that stay sums of bit planes, fitted by least squares in every step",
        evidence="checked against the authors' code",
        margin_points=60,
    )
)
@dataclass
class LqNets(TrainingMethod):
    """Learned bases.

    Attributes:
        start: ``data``: bases fitted to the weights and the first batch; ``paper``: fixed by the shape, for training from scratch.
        momentum: Momentum of the moving average of bases.
        zero_debias: Correct the bias of the moving average towards its start, as the authors' code does.
    """

    ends = "float"

    start: Literal["data", "paper"] = "data"
    momentum: Annotated[float, Interval(0, 1, closed="left")] = 0.9
    zero_debias: bool = True

    def default_recipe(self) -> Recipe:
        """VGG-small on CIFAR-10."""
        return Recipe(400, 100, OptimizerSpec(learning_rate=0.02, weight_decay=5e-4, schedule="step", milestones=(0.2, 0.4, 0.75)))

    def weight_quantizer(self, slot: Slot) -> Quantizer:
        granularity = Granularity.channel(slot.channel_axis)
        return LearnedBasis(
            slot.bit_width, signed=True, granularity=granularity, momentum=self.momentum, zero_debias=self.zero_debias,
            from_shape=self.start == "paper",
        )  # fmt: skip

    def activation_quantizer(self, slot: Slot) -> Quantizer:
        return LearnedBasis(
            slot.bit_width, signed=slot.is_signed, clips_gradient=True, pull=ACTIVATION_PULL, pull_by_element=True,
            momentum=self.momentum, zero_debias=self.zero_debias, from_shape=self.start == "paper",
        )  # fmt: skip

    def after_step(self, run: TrainRun) -> None:
        for quantizer in run.quantizers():
            if isinstance(quantizer, LearnedBasis):
                quantizer.update(run)
