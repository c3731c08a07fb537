"""LBQ, also called OMSE: scales of least squared error, two low-bit tensors for the layers that need them, scales tuned on the logits.

Paper: Choukroun, Kravchik, Yang, Kisilev 2019, "Low-bit Quantization of Neural Networks for Efficient Inference", ICCV Workshops.
    Section 3 (MMSE scale), section 4 (one scale per kernel; several tensors for key layers), section 5 (scale refinement).
Symbols: alpha -> scale, T~ -> codes, tau -> threshold on |T - T^|**2 / |T|**2.
Differs from the paper:
    - The threshold tau is normalised, and at most a given share of the layers become key layers, because the paper does not give its
      absolute tau and the authors published no code.
    - The refinement moves the logarithm of each scale, which keeps it positive.
    - Activation statistics come from one pass with quantized weights, the values that the exported network sees.
    - Activations stay single tensors; only weights are split.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lowbit.inputs import Inputs
from lowbit.measure.outputs import output_tensor, pieces
from lowbit.network.insert import float_weight, quantization_enabled, set_weight_quantizer, weight_quantizer
from lowbit.network.layers import output_channel_axis
from lowbit.options import Above, AtLeast, Interval
from lowbit.post_training.pipeline import PostTrainingMethod, PtqJob, run
from lowbit.post_training.reconstruction.resume import RunState, fingerprint
from lowbit.quantizers import SumQuantizer, UniformQuantizer
from lowbit.quantizers.qtensor import AffineDecoder, QTensor, SumDecoder
from lowbit.quantizers.ranges.scale_search import SMALLEST_SCALE, mmse_scale
from lowbit.registry import MethodInfo, register
from lowbit.spec import Granularity

OUTER_CANDIDATES, INNER_CANDIDATES = 48, 64  # candidates of the first and the second scale of a dual tensor
POLISH_ROUNDS = 10
ELEMENTS = 1 << 22  # residuals searched together; bounds the memory


def nearest_sum(x: Tensor, first: Tensor, second: Tensor, qmin: int, qmax: int) -> tuple[Tensor, Tensor]:
    """Codes ``(c1, c2)`` that minimise ``|x - first c1 - second c2|``, as floats shaped like ``x``.

    For each ``c2`` the best ``c1`` is ``clamp(round((x - second c2) / first), qmin, qmax)``; all ``c2`` are tried, 0 first, so that
    equal errors keep the smaller correction.

    Args:
        x: Values.
        first, second: Positive scales that broadcast with ``x``.
        qmin, qmax: Integer range of both codes.
    """
    best = torch.full_like(x, float("inf"))
    codes = (torch.zeros_like(x), torch.zeros_like(x))
    for correction in sorted(range(qmin, qmax + 1), key=abs):
        rest = x - second * correction
        main = (rest / first).round_().clamp_(qmin, qmax)
        error = (rest - main * first).abs_()
        is_better = error < best
        best = torch.where(is_better, error, best)
        codes = (torch.where(is_better, main, codes[0]), codes[1].masked_fill(is_better, correction))
    return codes


def dual_scales(rows: Tensor, qmin: int, qmax: int) -> tuple[Tensor, Tensor]:
    """Two scales for which ``alpha_1 c_1 + alpha_2 c_2`` comes closest to each row.

    For each candidate of ``alpha_1`` the residual ``T - alpha_1 clamp(round(T / alpha_1))`` gets its own scale of least error; the
    best pair is then polished: assign both codes, solve the 2x2 least squares for both scales, repeat while the error falls.

    Args:
        rows: ``[rows, elements]``.
        qmin, qmax: Integer range of both codes, signed.

    Returns:
        ``(scales, error)``: float32 ``[2, rows]`` and the squared error summed over each row, float64 ``[rows]``; the error is never
        above that of one tensor.

    Source: Choukroun et al. 2019, section 4.2 (nested search).
    """
    chunks = torch.split(rows, max(1, ELEMENTS // (OUTER_CANDIDATES * max(1, rows.shape[1]))))
    found = [_polish(chunk, _nested_search(chunk, qmin, qmax), qmin, qmax) for chunk in chunks]
    return torch.cat([scales for scales, _ in found], 1), torch.cat([error for _, error in found])


def _nested_search(rows: Tensor, qmin: int, qmax: int) -> Tensor:
    """The best pair of scales, ``[2, rows]``, with the first on a grid from half the scale of a single tensor to one that clips nothing."""
    single, _ = mmse_scale(rows, qmin, qmax)
    lowest, highest = single / 2, torch.maximum(1.1 * rows.abs().amax(1).float() / qmax, single)
    steps = torch.linspace(0, 1, OUTER_CANDIDATES - 1, device=rows.device)
    first = torch.cat([single[:, None], lowest[:, None] * (highest / lowest)[:, None] ** steps], 1)  # [rows, candidates]
    x = rows.float()[:, None, :]
    residual = x - first[..., None] * (x / first[..., None]).round_().clamp_(qmin, qmax)
    second, error = mmse_scale(residual.flatten(0, 1), qmin, qmax, candidates=INNER_CANDIDATES)
    best = error.reshape(first.shape).argmin(1, keepdim=True)
    return torch.cat([first.gather(1, best), second.reshape(first.shape).gather(1, best)], 1).T


def _polish(rows: Tensor, scales: Tensor, qmin: int, qmax: int) -> tuple[Tensor, Tensor]:
    x = rows.double()
    best, best_error = scales.double(), torch.full((len(rows),), float("inf"), dtype=torch.float64, device=rows.device)
    trial = best
    for _ in range(POLISH_ROUNDS):
        c1, c2 = nearest_sum(x, trial[0, :, None], trial[1, :, None], qmin, qmax)
        error = (x - trial[0, :, None] * c1 - trial[1, :, None] * c2).square().sum(1)
        is_better = error < best_error * (1 - 1e-9)
        best, best_error = torch.where(is_better, trial, best), torch.where(is_better, error, best_error)
        if not bool(is_better.any()):
            break
        a, b, c = (c1 * c1).sum(1), (c1 * c2).sum(1), (c2 * c2).sum(1)
        u, v = (x * c1).sum(1), (x * c2).sum(1)
        determinant = a * c - b * b
        is_solvable = determinant > 1e-9 * a * c
        safe = torch.where(is_solvable, determinant, 1.0)
        solved = torch.stack([(c * u - b * v) / safe, (a * v - b * u) / safe])
        trial = torch.where(is_solvable & (solved > SMALLEST_SCALE).all(0), solved, best)
    return best.float(), best_error


class DualQuantizer(SumQuantizer):
    """Two uniform tensors of equal bit-width whose scales are searched together, each value rounded to its nearest sum."""

    def __init__(self, bit_width: int, granularity: Granularity) -> None:
        super().__init__([UniformQuantizer(bit_width, signed=True, symmetric=True, granularity=granularity) for _ in range(2)])

    def uniform_parts(self) -> tuple[UniformQuantizer, UniformQuantizer]:
        """The quantizers of the main tensor and of the correction."""
        first, second = self.parts
        assert isinstance(first, UniformQuantizer) and isinstance(second, UniformQuantizer)
        return first, second

    def initialize(self, x: Tensor) -> None:
        parts = self.uniform_parts()
        scales, _ = dual_scales(self.granularity.flatten(x.detach().float()), parts[0].qmin, parts[0].qmax)
        for part, scale in zip(parts, scales, strict=True):
            part.set_parameters(scale.reshape(self.granularity.scale_shape(x)))

    def encode(self, x: Tensor) -> QTensor:
        first, second = self.uniform_parts()
        view = self.granularity.broadcast(x.detach().float())
        codes = nearest_sum(view, first.scale.detach(), second.scale.detach(), first.qmin, first.qmax)
        restored = torch.stack([self.granularity.restore(c, x.shape) for c in codes]).to(torch.int8)
        decoders = tuple(AffineDecoder(part.scale.detach(), part.zero_point.detach(), self.granularity) for part in (first, second))
        return QTensor(restored, SumDecoder(decoders, self.granularity), self.bit_width)


@torch.no_grad()
def relative_error(weight: Tensor, quantized: Tensor) -> float:
    """``|T - T^|**2 / |T|**2``; 0 for a tensor of zeros."""
    energy = weight.double().square().sum()
    return float((weight - quantized).double().square().sum() / energy) if energy > 0 else 0.0


def key_layers(errors: dict[str, float], tau: float, share: float) -> list[str]:
    """The layers whose relative error exceeds ``tau``, worst first, at most the fraction ``share`` of all layers (rounded up)."""
    above = sorted((name for name, error in errors.items() if error > tau), key=lambda name: -errors[name])
    return above[: math.ceil(share * len(errors))]


class FrozenCodes:
    """A quantized weight as trainable scales times fixed codes: ``sum_k alpha_k exp(shift_k) codes_k``."""

    def __init__(self, layer: nn.Module) -> None:
        quantizer = weight_quantizer(layer)
        assert isinstance(quantizer, (UniformQuantizer, DualQuantizer))
        self.original, self.granularity = float_weight(layer), quantizer.granularity
        self.parts = quantizer.uniform_parts() if isinstance(quantizer, DualQuantizer) else (quantizer,)
        codes = quantizer.encode(self.original).codes
        each = codes if isinstance(quantizer, DualQuantizer) else codes.unsqueeze(0)
        self.codes = [self.granularity.broadcast(c).to(part.scale.dtype) for c, part in zip(each, self.parts, strict=True)]
        self.scales = [part.scale.detach().clone() for part in self.parts]
        self.shifts = [torch.zeros_like(scale, requires_grad=True) for scale in self.scales]

    def weight(self) -> Tensor:
        """The float weight, differentiable with respect to the shifts."""
        parts = [scale * shift.exp() * codes for scale, shift, codes in zip(self.scales, self.shifts, self.codes, strict=True)]
        return self.granularity.restore(torch.stack(parts).sum(0), self.original.shape)

    @torch.no_grad()
    def store(self) -> None:
        """Give the quantizers the tuned scales, and the layer the float weight that they encode to the same codes."""
        for part, scale, shift in zip(self.parts, self.scales, self.shifts, strict=True):
            part.set_parameters(scale * shift.exp())
        self.original.copy_(self.weight())


class ScaleRefinement:
    """Tunes all weight scales so that the network's outputs come closest to the float network's; codes stay unchanged.

    Minimises ``mean |f(x) - f_alpha(x)|**2`` over the samples by Adam. As ``W^ = alpha W~``, the gradient of ``alpha`` is
    ``<dL/dW^, W~>``. The scales with the smallest loss over all samples are kept, which may be the initial ones.

    Source: Choukroun et al. 2019, section 5.
    """

    def __init__(self, model: nn.Module, layers: dict[str, nn.Module], learning_rate: float) -> None:
        users = [float_weight(layer) for layer in layers.values()]
        # a weight shared by several layers would need one scale for all of them, so it keeps its scale
        self.frozen = {name: FrozenCodes(layer) for name, layer in layers.items() if sum(w is float_weight(layer) for w in users) == 1}
        self.model = model
        self.shifts = [shift for frozen in self.frozen.values() for shift in frozen.shifts]
        self.optimizer = torch.optim.Adam(self.shifts or [torch.zeros(())], lr=learning_rate)
        self.best, self.kept = float("inf"), [shift.detach().clone() for shift in self.shifts]

    def loss(self, inputs: Inputs, target: Tensor) -> Tensor:
        """``|f(x) - f_alpha(x)|**2`` summed over the outputs, averaged over the samples."""
        weights = {f"{name}.parametrizations.weight.original".lstrip("."): frozen.weight() for name, frozen in self.frozen.items()}
        with quantization_enabled(self.model, weights=False, activations=False):
            output = functional_call(self.model, weights, inputs.args, dict(inputs.kwargs), tie_weights=False)
        return (output_tensor(output) - target).square().sum() / len(target)

    def step(self, inputs: Inputs, target: Tensor) -> None:
        """One Adam step."""
        gradients = torch.autograd.grad(self.loss(inputs, target), self.shifts, allow_unused=True)
        for shift, gradient in zip(self.shifts, gradients, strict=True):
            shift.grad = gradient
        self.optimizer.step()

    @torch.no_grad()
    def keep_if_better(self, batches: list[tuple[Inputs, Tensor]]) -> None:
        """Remember the current scales if their loss over all samples is the smallest so far."""
        total = sum(float(self.loss(inputs, target)) * len(target) for inputs, target in batches)
        if total < self.best:
            self.best, self.kept = total, [shift.detach().clone() for shift in self.shifts]

    def store(self) -> None:
        """Give all layers the remembered scales."""
        with torch.no_grad():
            for shift, kept in zip(self.shifts, self.kept, strict=True):
                shift.copy_(kept)
        for frozen in self.frozen.values():
            frozen.store()

    def save(self, state: RunState, epoch: int) -> None:
        """Keep everything that the epochs after ``epoch`` depend on."""
        tensors: dict[str, Tensor] = {}
        for index, (shift, kept) in enumerate(zip(self.shifts, self.kept, strict=True)):
            tensors |= {f"{index}.shift": shift, f"{index}.kept": kept}
            tensors |= {f"{index}.adam.{name}": value for name, value in self.optimizer.state[shift].items()}
        state.save("scales", tensors, {"epoch": epoch, "best": self.best})

    def restore(self, state: RunState) -> int:
        """Resume from what ``save`` kept; returns the number of epochs already done."""
        found = state.load("scales")
        if found is None:
            return 0
        tensors, facts = found
        with torch.no_grad():
            for index, shift in enumerate(self.shifts):
                shift.copy_(tensors[f"{index}.shift"])
                self.kept[index].copy_(tensors[f"{index}.kept"])
                prefix = f"{index}.adam."
                of_adam = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
                # the step count stays on the processor, where Adam keeps it
                self.optimizer.state[shift] = {name: value if name == "step" else value.to(shift.device) for name, value in of_adam.items()}
        self.best = float(facts["best"])
        return int(facts["epoch"])


@register(
    MethodInfo(
        name="lbq",
        title="Low-bit Quantization of Neural Networks for Efficient Inference",
        paper="Choukroun, Kravchik, Yang, Kisilev, ICCV Workshops 2019",
        url="https://arxiv.org/abs/1902.06822",
        section="post_training",
        axes=("weight_quantizer", "activation_quantizer", "reconstruction"),
        kind="post_training",
        weight_bits=range(2, 9),
        activation_bits=range(1, 9),
        needs=("calibration",),
        fidelity="equations",
        summary="scales of least squared error, two tensors for key layers, scales tuned on the logits",
        evidence="some details are not published and there is no official code; the scale search agrees with two independent programs",
        margin_db=6.0,
    )
)
@dataclass
class Lbq(PostTrainingMethod):
    """Scales of least squared error, dual tensors, scale refinement.

    Attributes:
        fold_batch_norm: Fold batch norms into the layers before them first.
        tau: Threshold of the weight error ``|T - T^|**2 / |T|**2`` above which a layer is a key layer. It then gets two weight tensors
            of the requested bit-width, so it is stored and computed twice. ``inf``: no key layers.
        key_share: Largest share of the layers that become key layers.
        epochs: Passes over the calibration data that tune the scales; 0: no tuning.
        learning_rate: Adam learning rate of the logarithms of the scales.
        batch_size: Samples per step.
    """

    weight_observer: str = "omse"
    activation_observer: str = "omse"
    fold_batch_norm: bool = True
    tau: Annotated[float, Interval(0)] = 0.01
    key_share: Annotated[float, Interval(0, 1)] = 0.1
    epochs: Annotated[int, AtLeast(0)] = 10
    learning_rate: Annotated[float, Above(0)] = 4e-3
    batch_size: Annotated[int, AtLeast(1)] = 32

    def quantize(self, job: PtqJob) -> None:
        if self.fold_batch_norm:
            job.fold()
        job.insert_weights(self.weight_quantizer)
        self._split_key_layers(job)
        job.remark_others("rounded to nearest in one tensor, as only convolutions and linear layers are refined")
        if self.epochs:
            self._refine(job)
        job.insert_activations(self)
        job.calibrate_activations()

    def _split_key_layers(self, job: PtqJob) -> None:
        errors = {name: relative_error(float_weight(layer).detach(), cast(Tensor, layer.weight)) for name, layer in job.layers.items()}
        chosen = key_layers(errors, self.tau, self.key_share)
        with job.progress.stage("dual tensors", total=len(chosen)) as stage:
            for name in chosen:
                layer = job.layers[name]
                bit_width = cast(int, job.bits(name).weight)
                quantizer = DualQuantizer(bit_width, Granularity.parse(self.weight_granularity, output_channel_axis(layer)))
                quantizer.initialize(float_weight(layer))
                set_weight_quantizer(layer, quantizer)
                job.table.note(f"{name}: two {bit_width}-bit weight tensors; one alone loses {errors[name]:.1%} of the weight's energy")
                stage.advance(note=name)

    def _refine(self, job: PtqJob) -> None:
        calibration = job.need_calibration("tuning the scales")
        refinement = ScaleRefinement(job.model, job.layers, self.learning_rate)
        if not refinement.shifts:
            return
        batches = [(piece, output_tensor(run(job.reference, piece))) for inputs in calibration for piece in pieces(inputs, self.batch_size)]
        facts = {"learning_rate": self.learning_rate, "batch_size": self.batch_size, "seed": job.seed}
        named = [*job.model.state_dict().items(), *((f"target {index}", target) for index, (_, target) in enumerate(batches))]
        state = RunState(None if job.work_dir is None else job.work_dir / "scales", fingerprint(named, facts))
        done = refinement.restore(state)
        if not done:
            refinement.keep_if_better(batches)
        with job.progress.stage("tuning scales", total=self.epochs * len(batches)) as stage:
            stage.advance(done * len(batches))
            for epoch in range(done, self.epochs):
                order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(job.seed + epoch))
                for index in order.tolist():
                    refinement.step(*batches[index])
                    stage.advance(note=f"distance {refinement.best:.3g}")
                refinement.keep_if_better(batches)
                refinement.save(state, epoch + 1)
        refinement.store()
