"""ProxQuant: a proximal step pulls weights to their quantized values, ever more strongly; no gradient passes a quantizer.

Paper: Bai, Wang, Liberty 2019, "ProxQuant: Quantized Neural Networks via Proximal Operators", ICLR.
    Section 3.1 (algorithm 1), section 3.2 (W-shaped regularizers and their proximal maps, Eq. 6-9), section 3.3 (homotopy).
Symbols: lambda -> strength, R -> the regularizer of each kind, theta -> the float weights.
Differs from the paper:
    - The strength is spread over the run's epochs so that it grows linearly and adds up to ``pull``, which suits
      runs of any length. ``reg_rate`` selects the authors' schedule, learning rate x ``reg_rate`` x epoch.
    - A weight of exactly 0 is stored as +1, and so is a residual of 0 in bit planes, so that results are reproducible; the authors draw a
      random sign.
    - When weights are frozen their levels are frozen too, because quantizing quantized weights again would in general move them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from lowbit.options import AtLeast, Interval
from lowbit.qat import OptimizerSpec, Phase, Recipe, Slot, TrainingMethod, TrainRun
from lowbit.qat.recipe import Role
from lowbit.quantizers import LearnedScaleQuantizer, Quantizer
from lowbit.quantizers.base import TableQuantizer
from lowbit.quantizers.codebook import nearest_level
from lowbit.quantizers.qtensor import BinaryDecoder, CodebookDecoder, QTensor
from lowbit.registry import MethodInfo, register
from lowbit.spec import BitPolicy, Granularity, LayerBits
from lowbit.surrogates import pass_gradient

Kind = Literal["binary", "ternary", "mean", "median"]
REFINEMENTS = 3  # rounds of the alternating quantizer
TERNARY_THRESHOLD = 0.7  # times mean |w|
DRAWN = "drawn"  # the role of weights that are pulled to quantized values and finally frozen
_EPSILON = 1e-6


def prox_binary(weight: Tensor, strength: float) -> Tensor:
    """Soft threshold towards the sign: ``sign(w) (1 + sign(|w| - 1) max(||w| - 1| - strength, 0))``; 0 stays 0. Source: Eq. 7."""
    distance = weight.abs() - 1
    return weight.sign() * (1 + distance.sign() * (distance.abs() - strength).clamp(min=0))


def ternary(weight: Tensor) -> Tensor:
    """0 where ``|w| < 0.7 mean|w|``, else the mean of the weights of that sign beyond it."""
    low, high, threshold = _ternary_levels(weight)
    return torch.where(weight >= threshold, high, torch.where(weight <= -threshold, low, torch.zeros_like(weight)))


def _ternary_levels(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    threshold = TERNARY_THRESHOLD * weight.abs().mean()
    threshold = torch.where(threshold > 0, threshold, torch.ones_like(threshold))
    above, below = weight >= threshold, weight <= -threshold
    high = (weight * above).sum() / above.sum().clamp(min=1)
    low = (weight * below).sum() / below.sum().clamp(min=1)
    return low, high, threshold


def prox_towards(weight: Tensor, target: Tensor, strength: float) -> Tensor:
    """``(w + strength target) / (1 + strength)``: the proximal map of half the squared distance to ``target``."""
    return (weight + strength * target) / (1 + strength)


def prox_median(weight: Tensor, bit_width: int, strength: float, *, by_row: bool = True) -> Tensor:
    """Soft threshold towards ``greedy_median``: ``q + sign(w - q) max(|w - q| - strength, 0)``."""
    target, _ = greedy_median(weight, bit_width, by_row=by_row)
    distance = weight - target
    return target + distance.sign() * (distance.abs() - strength).clamp(min=0)


def prox_mean(weight: Tensor, bit_width: int, strength: float, *, by_row: bool = True, rounds: int = 1) -> Tensor:
    """``rounds`` times: quantize the current point by alternation, then step from ``weight`` towards the result."""
    point = weight
    for _ in range(rounds):
        point = prox_towards(weight, alternating(point, bit_width, by_row=by_row).values, strength)
    return point


@dataclass(frozen=True)
class BitPlanes:
    """``values = norm_rate * sum_i alphas[:, i] planes[i]``, planes of -1 and 1; ``alphas`` has one row, or one for each row of the matrix."""

    values: Tensor
    alphas: Tensor
    planes: Tensor


def _signs(x: Tensor) -> Tensor:
    return torch.where(x >= 0, 1.0, -1.0)


def _average(x: Tensor, by_row: bool) -> Tensor:
    return x.mean(1, keepdim=True) if by_row else x.mean().reshape(1, 1)


def _lower_median(x: Tensor, by_row: bool) -> Tensor:
    return x.median(1, keepdim=True).values if by_row else x.median().reshape(1, 1)


def greedy_median(weight: Tensor, bit_width: int, *, by_row: bool = True) -> tuple[Tensor, Tensor]:
    """Bit planes by the sign of the residual, each times the (lower) median of its magnitude; values and ``[bits, rows or 1]``."""
    residual, alphas = weight, []
    for _ in range(bit_width):
        alphas.append(_lower_median(residual.abs(), by_row))
        residual = residual - alphas[-1] * _signs(residual)
    return weight - residual, torch.cat(alphas, 1).T


def alternating(weight: Tensor, bit_width: int, *, by_row: bool = True, rounds: int = REFINEMENTS, norm_rate: float = 1.0) -> BitPlanes:
    """A matrix as a sum of bit planes: a greedy start, then magnitudes by least squares and planes in turn.

    Args:
        weight: ``[rows, columns]``.
        bit_width: Number of planes.
        by_row: Magnitudes for each row; else for the whole matrix.
        rounds: 1 is the greedy start alone.
        norm_rate: Multiplies the values, and leaves the magnitudes as they are.

    Source: section 4.2; Xu et al. 2018, "Alternating Multi-bit Quantization for Recurrent Neural Networks".
    """
    residual, planes, alphas = weight, [], []
    for _ in range(bit_width):
        planes.append(_signs(residual))
        alphas.append(_average(residual.abs(), by_row))
        residual = residual - alphas[-1] * planes[-1]
    plane, alpha = torch.stack(planes), torch.cat(alphas, 1)
    for _ in range(rounds - 1 if bit_width > 1 else 0):
        alpha = _least_squares(weight, plane, alpha, by_row).abs().sort(dim=1, descending=True).values
        plane = _assign(weight, alpha, greedy=bit_width <= (3 if by_row else 4))
    values = torch.einsum("kij,ik->ij", plane, alpha.expand(len(weight), -1))
    return BitPlanes(values * norm_rate, alpha, plane)


def _least_squares(weight: Tensor, planes: Tensor, alphas: Tensor, by_row: bool) -> Tensor:
    """Magnitudes of least squared error, by conjugate gradients, which also handle a row without residual."""
    if by_row:
        gram, moment = torch.einsum("kij,lij->ikl", planes, planes), torch.einsum("kij,ij->ik", planes, weight)
    else:
        gram, moment = torch.einsum("kij,lij->kl", planes, planes).unsqueeze(0), torch.einsum("kij,ij->k", planes, weight).unsqueeze(0)
        # by the pseudo-inverse, as planes may be equal
        solved = (torch.linalg.pinv(gram.double(), hermitian=True) @ moment.double().unsqueeze(2)).squeeze(2)
        found: Tensor = solved.to(weight.dtype)
        return found
    point = alphas
    residual = moment - torch.einsum("ikl,il->ik", gram, point)
    direction = residual
    for _ in range(alphas.shape[1]):
        image = torch.einsum("ikl,il->ik", gram, direction)
        size = residual.square().sum(1, keepdim=True)
        step = size / ((direction * image).sum(1, keepdim=True) + _EPSILON)
        point, residual = point + step * direction, residual - step * image
        direction = residual + residual.square().sum(1, keepdim=True) / (size + _EPSILON) * direction
    return point


def _assign(weight: Tensor, alphas: Tensor, *, greedy: bool) -> Tensor:
    """The planes for given magnitudes: by the sign of the residual, or those of the nearest sum."""
    if greedy:
        residual, planes = weight, []
        for index in range(alphas.shape[1]):
            planes.append(_signs(residual))
            residual = residual - alphas[:, index : index + 1] * planes[-1]
        return torch.stack(planes)
    levels, codes = _sums(alphas)
    levels = levels.expand(len(weight), -1).contiguous()
    nearest = nearest_level(weight, levels)
    chosen = codes.expand(len(weight), -1, -1).gather(1, nearest.unsqueeze(2).expand(-1, -1, alphas.shape[1]))
    return chosen.permute(2, 0, 1)


def _sums(alphas: Tensor) -> tuple[Tensor, Tensor]:
    """All sums ``+-a_1 +-a_2 ...`` of each row, ascending, and the signs of each."""
    bits = alphas.shape[1]
    index = torch.arange(2**bits, device=alphas.device).unsqueeze(1)
    signs = 2 * ((index >> torch.arange(bits, device=alphas.device)) & 1).to(alphas.dtype) - 1
    levels, order = (alphas @ signs.T).sort(dim=1)
    return levels, signs[order]


class ProxQuantizer(TableQuantizer):
    """Passes weights through in training; hard-quantized values in evaluation.

    Forward, in training: ``x``, or while ``lazy_strength`` is a number, ``x`` after the proximal map of that strength. In evaluation:
    ``+-1`` (``binary``), three values (``ternary``), sums of bit planes (``mean``: by the alternating quantizer, ``median``: by the greedy
    one); after ``freeze`` the nearest of the levels found then. Backward: 1.

    Args:
        bit_width: 1 for ``binary``, 2 for ``ternary``, else the number of planes.
        kind: Kind of quantized values.
        granularity: Which weights share magnitudes; binary and ternary ones are per tensor.

    Sums of planes may have any bit-width; each has its own frozen levels, none where it is new.
    """

    tables = tables_by_width = ("levels",)

    def __init__(self, bit_width: int, kind: Kind, granularity: Granularity) -> None:
        super().__init__(bit_width, Granularity.tensor() if kind in ("binary", "ternary") else granularity)
        self.kind: Kind = kind
        self.levels: Tensor  # [rows, 2**bit_width] once frozen
        self._set_table("levels", torch.empty(0))
        self.lazy_strength: float | None = None

    @property
    def bit_widths(self) -> Sequence[int]:
        return (self.bit_width,) if self.kind in ("binary", "ternary") else range(1, 9)

    def carry_over(self, old_bits: int) -> None:
        self._set_table("levels", torch.empty(0))

    def initialize(self, x: Tensor) -> None:
        """Unfreeze the levels; there is nothing else to set."""
        self._set_table("levels", torch.empty(0))

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.lazy_strength is not None:
            return pass_gradient(x, self.proximal(x.detach(), self.lazy_strength))
        return x if self.training else self.encode(x).decode().to(x.dtype)

    def proximal(self, x: Tensor, strength: float) -> Tensor:
        """The proximal map of the regularizer, then clipped to ``[-1, 1]``; computed in float32."""
        dtype, x = x.dtype, x.float()
        if self.kind == "binary":
            moved = prox_binary(x, strength)
        elif self.kind == "ternary":
            moved = prox_towards(x, ternary(x), strength)
        else:
            rows = self.granularity.flatten(x)
            near = prox_mean if self.kind == "mean" else prox_median
            moved = self.granularity.unflatten(near(rows, self.bit_width, strength), x.shape)
        return moved.clamp(-1, 1).to(dtype)

    @torch.no_grad()
    def freeze(self, x: Tensor) -> Tensor:
        """Freeze the levels of ``x``; returns the quantized values, which evaluation leaves unchanged."""
        encoded = self.encode(x)
        if isinstance(encoded.decoder, CodebookDecoder):
            self._set_table("levels", encoded.decoder.levels)
        return encoded.decode().to(x.dtype)

    @torch.no_grad()
    def encode(self, x: Tensor) -> QTensor:
        values = x.detach().float()
        if self.kind == "binary":
            return QTensor((values >= 0).to(torch.uint8), BinaryDecoder(values.new_ones(()), self.granularity), 1)
        if self.levels.numel():
            nearest = nearest_level(self.granularity.flatten(values), self.levels)
            codes = self.granularity.unflatten(nearest, x.shape).to(torch.uint8)
            return QTensor(codes, CodebookDecoder(self.levels, self.granularity), self.bit_width)
        if self.kind == "ternary":
            low, high, threshold = _ternary_levels(values)
            codes = (values > -threshold).to(torch.uint8) + (values >= threshold).to(torch.uint8)
            return QTensor(codes, CodebookDecoder(torch.stack([low, torch.zeros_like(low), high, high]).unsqueeze(0), self.granularity), 2)
        rows = self.granularity.flatten(values)
        if self.kind == "mean":
            found = alternating(rows, self.bit_width)
            alphas, planes = found.alphas, found.planes
        else:
            alphas = greedy_median(rows, self.bit_width)[1].T
            planes = _assign(rows, alphas, greedy=True)
        levels, signs = _sums(alphas)
        weights = torch.exp2(torch.arange(self.bit_width, device=x.device))
        wanted = torch.einsum("kij,k->ij", (planes > 0).float(), weights).long()
        places = torch.einsum("ilk,k->il", (signs > 0).float(), weights).long()
        codes = places.argsort(dim=1).gather(1, wanted)
        return QTensor(
            self.granularity.unflatten(codes, x.shape).to(torch.uint8), CodebookDecoder(levels, self.granularity), self.bit_width
        )


@register(
    MethodInfo(
        name="proxquant",
        title="ProxQuant: Quantized Neural Networks via Proximal Operators",
        paper="Bai, Wang, Liberty, ICLR 2019",
        url="https://arxiv.org/abs/1810.00861",
        section="gradients",
        axes=("weight_quantizer", "procedure"),
        kind="training",
        weight_bits=range(1, 9),
        activation_bits=None,
        needs=("labels", "pretrained"),
        fidelity="exact",
        summary="float weights drawn to quantized values by a proximal step that grows, then frozen",
        evidence="checked against the authors' code",
        margin_points=55,
    )
)
@dataclass
class ProxQuant(TrainingMethod):
    """Proximal steps towards quantized weights.

    1 bit is binary: exactly +-1, so a batch norm has to follow each layer. 2 bits are ternary, more are sums of bit planes.

    Attributes:
        two_bits: Meaning of 2 bits: ``ternary``, or two bit planes (``mean`` or ``median``).
        planes: How bit planes are found: ``mean`` (alternating, squared distance) or ``median`` (greedy, absolute distance).
        pull: Combined effect of all proximal steps, whatever the number of epochs: 1 moves a binary or ``median`` weight by 1, and
            leaves ``exp(-pull)`` of the distance of a ternary or ``mean`` weight. ``none``: 1.5 and 5.
        reg_rate: Use the authors' schedule instead: learning rate x ``reg_rate`` x epoch, 1e-4 in the paper's 300 epochs of Adam at
            0.01.
        frozen_share: Share of the epochs that train the rest of the network with the quantized weights frozen.
        freeze_epoch: Freeze after this many epochs; overrides the share.
        lazy: Apply the proximal map to the forward pass only; stored weights are just clipped to ``[-1, 1]``. This is the paper's lazy
            counterpart, which equals BinaryConnect once the map reaches the sign.
        renew_optimizer: Reset the optimizer's averages at the start of every epoch, as the authors' code does.
    """

    allows_procedure = False  # the strength of its pull is spread over the one phase before weights are frozen

    two_bits: Literal["ternary", "mean", "median"] = "ternary"
    planes: Literal["mean", "median"] = "mean"
    pull: Annotated[float | None, AtLeast(0)] = None
    reg_rate: Annotated[float | None, AtLeast(0)] = None
    frozen_share: Annotated[float, Interval(0, 1, closed="left")] = 1 / 3
    freeze_epoch: Annotated[int | None, AtLeast(1)] = None
    lazy: bool = False
    renew_optimizer: bool = False

    def default_policy(self, bits: LayerBits) -> BitPolicy:
        """Ternary networks keep the first and the last layer in float; all others quantize them too."""
        return BitPolicy(bits, LayerBits(None, None) if bits.weight == 2 and self.two_bits == "ternary" else None)

    def default_recipe(self) -> Recipe:
        """Binary ResNets on CIFAR-10."""
        return Recipe(300, 128, OptimizerSpec("adam", 0.01, weight_decay=0.0, schedule="constant"))

    def weight_quantizer(self, slot: Slot) -> Quantizer:
        kind: Kind = "binary" if slot.bit_width == 1 else self.two_bits if slot.bit_width == 2 else self.planes
        return ProxQuantizer(slot.bit_width, kind, Granularity.channel(slot.channel_axis))

    def activation_quantizer(self, slot: Slot) -> Quantizer:
        return LearnedScaleQuantizer(slot.bit_width, signed=False, learn_offset=slot.is_signed, is_batched=True)

    def role(self, name: str, parameter: nn.Parameter, owner: nn.Module) -> Role:
        role = super().role(name, parameter, owner)
        return DRAWN if role == "weights" and any(isinstance(module, ProxQuantizer) for module in owner.modules()) else role

    def optimizers(self, recipe: Recipe) -> Mapping[Role, OptimizerSpec]:
        return {**super().optimizers(recipe), DRAWN: recipe.optimizer}

    def phases(self, recipe: Recipe) -> list[Phase]:
        optimizers = self.optimizers(recipe)
        frozen = round(recipe.epochs * self.frozen_share) if self.freeze_epoch is None else max(recipe.epochs - self.freeze_epoch, 0)
        frozen = max(min(frozen, recipe.epochs - 1), 0)
        pulling = Phase("prox", recipe.epochs - frozen, optimizers, recipe.clip_norm, self.renew_optimizer)
        rest = {role: spec for role, spec in optimizers.items() if role != DRAWN}
        return [pulling, Phase("frozen", frozen, rest, recipe.clip_norm, self.renew_optimizer)] if frozen else [pulling]

    @torch.no_grad()
    def start_phase(self, run: TrainRun) -> None:
        if run.phase.name == "frozen":
            for weight, quantizer in self._weights(run):
                quantizer.lazy_strength = None
                weight.copy_(quantizer.freeze(weight))

    def before_step(self, run: TrainRun) -> None:
        if self.lazy and run.phase.name == "prox":
            for _, quantizer in self._weights(run):
                quantizer.lazy_strength = self.strength(run, quantizer.kind)

    @torch.no_grad()
    def after_step(self, run: TrainRun) -> None:
        if run.phase.name == "prox":
            for weight, quantizer in self._weights(run):  # without strength the map is the clipping alone
                weight.copy_(quantizer.proximal(weight, 0.0 if self.lazy else self.strength(run, quantizer.kind)))

    def strength(self, run: TrainRun, kind: Kind) -> float:
        """Strength of the current step's proximal map: ``k / (1 + .. + n)`` of the whole pull in the ``k``-th of ``n`` steps.

        Maps of the squared distance leave ``1 / (1 + strength)`` of it, so shares add up with ``exp(share) - 1``.
        """
        if self.reg_rate is not None:
            return run.learning_rate * self.reg_rate * run.epochs_done
        steps = max(run.phase.epochs * run.steps_per_epoch, 1)
        is_absolute = kind in ("binary", "median")
        pull = self.pull if self.pull is not None else 1.5 if is_absolute else 5.0
        share = pull * 2 * (run.step + 1) / (steps * (steps + 1))
        return share if is_absolute else math.expm1(min(share, 50.0))  # nothing is left

    @staticmethod
    def _weights(run: TrainRun) -> list[tuple[Tensor, ProxQuantizer]]:
        found: list[tuple[Tensor, ProxQuantizer]] = []
        for site in run.trained_weights():
            if isinstance(site.quantizer, ProxQuantizer):
                found.append((site.original, site.quantizer))
        return found
