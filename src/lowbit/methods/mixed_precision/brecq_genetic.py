"""BRECQ, mixed precision: a genetic search over the errors at the outputs of blocks, with the interaction of 2-bit layers within a block.

Paper: Li, Gong, Tan, Yang, Hu, Zhang, Yu, Wang, Gu 2021, "BRECQ: Pushing the Limit of Post-Training Quantization by Block
    Reconstruction", ICLR. Section 3.4 (mixed precision, genetic search), section 3.3 (Fisher weights).
Symbols: c -> bits, H(c) <= delta -> the budget, G -> gradient, z -> a block's output.
Differs from the paper:
    - Candidates are reconstructed in 200 iterations for each block instead of 20000, see ``iterations``.
    - G is drawn so that its mean square is the diagonal of the Fisher information at a block's output, see ``drawn_residual``; the released
      program takes the gradient of a divergence from the float network, whose gradient is 0 in that network.
    - Errors are summed over a block's output instead of averaged over its positions, so that those of different blocks add up to one
      second-order estimate of the loss increase.
    - In blocks of more than ``joint_layers`` layers only pairs of 2-bit layers are measured together.
    - A child that was there before is drawn again, as one that is beyond the budget. The number of parents is not in the paper.
    - Weights whose layers do not run exactly once are measured at the network's output.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from lowbit.assignment.activations import searched_inputs
from lowbit.assignment.costs import Assignment, policy_of
from lowbit.assignment.genetic import Individual, evolve
from lowbit.assignment.parallel import LossOf, losses, seeded
from lowbit.assignment.problem import Found, SearchMethod, SearchProblem
from lowbit.assignment.solve import solve
from lowbit.errors import LayerError, SpecError
from lowbit.measure.agreement import has_classes
from lowbit.measure.outputs import class_dimension, output_tensor
from lowbit.measure.sensitivity import QuantizedLayer, quantized_in
from lowbit.methods.post_training.brecq import Brecq
from lowbit.network.insert import weight_sites
from lowbit.network.layers import evaluating
from lowbit.network.taps import tapped
from lowbit.network.unwrap import plain_copy
from lowbit.options import AtLeast, Interval
from lowbit.post_training.pipeline import PtqJob
from lowbit.post_training.reconstruction.units import block_units, plan_units
from lowbit.qat.task import Batch
from lowbit.qat.tasks import MultiLabel, Regression
from lowbit.registry import MethodInfo, register
from lowbit.spec import LayerBits
from lowbit.workfolder import tensors_digest

JOINT_BITS = 2  # 4 and 8 bits hardly hurt, so that their interaction needs no measurement
NETWORK = ""  # the unit that is the whole network

LossKind = Literal["fisher", "mse"]
Joint = Mapping[tuple[str, ...], float]  # loss of layers at 2 bits together, less the sum of their losses alone


@dataclass(frozen=True)
class Calibrated:
    """The network with what its weights are at each width.

    Attributes:
        model: The float network, batch norms folded.
        weights: The quantized weight by layer and width.
        units: Searched layers by the module at whose output their errors are measured, in the order in which they run.
    """

    model: nn.Module
    weights: Mapping[str, Mapping[int, Tensor]]
    units: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Prediction:
    """The loss of any bits: ``sum_l diagonal[l][c_l]`` and, for each block, what its 2-bit layers add together.

    Attributes:
        diagonal: Loss of each layer alone at each width.
        joint: Interaction of layers of one block at 2 bits.
        blocks: Layers of each block.
    """

    diagonal: Mapping[str, Mapping[LayerBits, float]]
    joint: Joint
    blocks: Sequence[tuple[str, ...]]

    def __call__(self, bits: Assignment) -> float:
        return sum(self.diagonal[name][width] for name, width in bits.items()) + sum(
            self._interaction(block, bits) for block in self.blocks
        )

    def _interaction(self, block: tuple[str, ...], bits: Assignment) -> float:
        low = tuple(name for name in block if bits[name].weight == JOINT_BITS)
        if len(low) < 2:
            return 0.0
        if low in self.joint:
            return self.joint[low]
        return sum(self.joint[pair] for pair in itertools.combinations(low, 2))


def drawn_residual(problem: SearchProblem, output: Tensor, generator: torch.Generator) -> Tensor:
    """A random vector with the mean and the covariance of the gradient of ``-log p(y | output)`` over answers ``y`` of the network itself.

    For classes, ``p = softmax(output)``, that is ``diag(p) - p p^T``, the covariance of ``sqrt(p) e - p (sqrt(p) . e)`` with ``e`` standard normal;
    answers that are drawn would be the likeliest one nearly always, and tell nothing. For labels of their own it is
    ``sqrt(p (1 - p)) e`` with ``p = sigmoid(output)``, for any other value ``e``.
    """
    values = output.detach().float()
    drawn = torch.randn(values.shape, generator=generator).to(values)
    if isinstance(problem.task, MultiLabel):
        p = values.sigmoid()
        return (p * (1 - p)).sqrt() * drawn
    if isinstance(problem.task, Regression) or not has_classes(values):
        return drawn
    axis = class_dimension(values)
    p = values.softmax(axis)
    root = p.sqrt() * drawn
    return root - p * root.sum(axis, keepdim=True)


def unit_output(problem: SearchProblem, unit: str, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """``(z, G)``: output of a unit of the float network, and ``drawn_residual`` carried back to it, each sample on its own."""
    caught: list[Tensor] = []

    def catch(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
        caught.append(output.detach().requires_grad_())
        return caught[0].clone()  # the network may change it in place

    with evaluating(problem.model):
        if unit == NETWORK:
            output = output_tensor(problem.task.predict(problem.model, batch))
            return output, drawn_residual(problem, output, generator)
        handle = problem.model.get_submodule(unit).register_forward_hook(catch)
        try:
            with torch.enable_grad():
                output = output_tensor(problem.task.predict(problem.model, batch))
                residual = drawn_residual(problem, output, generator)
                (gradient,) = torch.autograd.grad(output, caught[0], residual.to(output), allow_unused=True)
        finally:
            handle.remove()
    return caught[0].detach(), torch.zeros_like(caught[0]) if gradient is None else gradient


def unit_errors(problem: SearchProblem, calibrated: Calibrated, loss: LossKind) -> LossOf:
    """The function that gives the loss of layers of one unit: the error ``D`` of the unit's output with these layers alone quantized.

    ``fisher``: ``1/2 sum (D G)**2``, the second-order increase of the loss of one sample under the diagonal Fisher information; ``mse``: the
    mean of ``D**2``. Both on average over samples.

    Source: section 3.3, Eq. 10.
    """
    unit_of = {name: unit for unit, names in calibrated.units.items() for name in names}
    input_at = searched_inputs(problem)
    held: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def float_outputs(unit: str) -> list[tuple[Tensor, Tensor]]:
        if unit not in held:
            held.clear()  # units come one after the other, and the outputs of all would fill the memory
            generator = problem.generator(f"gradients {unit}")
            with seeded(problem, unit):
                held[unit] = [unit_output(problem, unit, batch, generator) for batch in problem.batches]
        return held[unit]

    def layer(name: str, bits: LayerBits) -> QuantizedLayer:
        return QuantizedLayer(None if bits.weight is None else calibrated.weights[name][bits.weight], input_at(name, bits))

    def error(assignment: Assignment) -> float:
        (unit,) = {unit_of[name] for name in assignment}
        expected, total, count = float_outputs(unit), 0.0, 0
        quantized = {name: layer(name, bits) for name, bits in assignment.items()}
        with evaluating(problem.model), quantized_in(problem.model, quantized), tapped(problem.model, [unit], copies=True) as outputs:
            for batch, (wanted, gradient) in zip(problem.batches, expected, strict=True):
                problem.task.predict(problem.model, batch)
                squares = (outputs[unit].double() - wanted.double()).square()
                if loss == "fisher":
                    squares = squares * gradient.double().square() / 2
                total += float(squares.sum())
                count += len(wanted) if loss == "fisher" else wanted.numel()
        return total / count

    return error


@register(
    MethodInfo(
        name="brecq_genetic",
        title="BRECQ: Pushing the Limit of Post-Training Quantization by Block Reconstruction (mixed precision)",
        paper="Li, Gong, Tan, Yang, Hu, Zhang, Yu, Wang, Gu, ICLR 2021",
        url="https://arxiv.org/abs/2102.05426",
        section="mixed_precision",
        axes=("assignment",),
        kind="search",
        weight_bits=range(2, 9),
        activation_bits=range(1, 9),
        needs=("calibration",),
        fidelity="partial",
        summary="a genetic search over errors at the outputs of blocks, with what 2-bit layers of a block do to each other",
        evidence="follows the paper; the authors' search was never released; candidates are reconstructed in fewer iterations",
    )
)
@dataclass
class BrecqGenetic(SearchMethod):
    """Genetic search over the table of block errors.

    Attributes:
        reconstruct: Calibrate the network at each uniform width by block reconstruction before errors are measured, as in the paper. Without it
            weights are rounded to nearest on BRECQ's grids, which takes seconds, but overrates what 2 bits lose: such a table is for
            networks that will be rounded to nearest, and ``loss="mse"`` ranks them better then.
        iterations: Steps of that reconstruction for each block. The paper takes 20000, with which the search lasts as long as one
            ``lowbit quantize --method brecq`` for each width; the default is enough to tell layers apart, and ``brecq`` learns the roundings of
            the network found anew.
        loss: Error at a block's output: ``fisher``, weighted by the squared gradient of the loss (the paper's), or ``mse``.
        blocks: Patterns of the modules that are blocks, for example ``layer*.*``; default: blocks found in the network.
        joint_layers: Blocks of at most so many searched layers are measured with every set of their layers at 2 bits, larger ones with
            every pair.
        population: Individuals of a generation.
        generations: Number of generations.
        mutation: Probability that a layer's width is drawn anew in a mutated child.
        parents: How many of the best individuals so far have children (top-k).
    """

    trial = MappingProxyType({"iterations": 20})

    reconstruct: bool = True
    iterations: Annotated[int, AtLeast(1)] = 200
    loss: LossKind = "fisher"
    blocks: tuple[str, ...] = ()
    joint_layers: Annotated[int, AtLeast(2)] = 4
    population: Annotated[int, AtLeast(2)] = 50
    generations: Annotated[int, AtLeast(1)] = 100
    mutation: Annotated[float, Interval(0, 1, closed="right")] = 0.1
    parents: Annotated[int, AtLeast(1)] = 50

    def search(self, problem: SearchProblem) -> Found:
        if not problem.limits:
            raise SpecError(f"{self.info.name} looks for one network within a budget: pass budget=, such as budget='size=10%'.")
        problem.need_batches(self.info.name)
        widths = _weight_widths(problem)
        if not widths or widths[0] not in self.info.weight_bits:
            raise SpecError(f"{self.info.name} supports 2 to 8 weight bits, got candidates {widths or 'in float alone'}. Choose others.")
        prediction = self.predict(problem)
        bits, history = self.evolve(problem, prediction)
        interactions = {" + ".join(names): value for names, value in prediction.joint.items()}
        return Found(
            bits,
            prediction(bits),
            sensitivity=prediction.diagonal,
            facts={"interactions": interactions, "best of each generation": history},
        )

    def predict(self, problem: SearchProblem) -> Prediction:
        """Measure the table: each layer alone at each width, and the 2-bit layers of a block together."""
        calibrated = self.calibrate(problem)
        sites = weight_sites(calibrated.model)
        folded = replace(problem, model=calibrated.model, layers={name: sites[name] for name in problem.layers})
        low = {name: bits for name, widths in problem.choices.items() for bits in reversed(widths) if bits.weight == JOINT_BITS}
        blocks, settings = [], list[Assignment]()  # unit by unit, so that each is run in float once
        for unit, names in calibrated.units.items():
            settings += [{name: bits} for name in names for bits in problem.choices[name]]
            blocks.append(tuple(name for name in names if name in low and unit != NETWORK))
            settings += [{name: low[name] for name in together} for together in self._joint(blocks[-1])]
        weights = tensors_digest(weight for widths in calibrated.weights.values() for weight in widths.values())
        facts: dict[str, object] = {"loss": self.loss, "weights": weights, "units": calibrated.units}
        measure = partial(unit_errors, calibrated=calibrated, loss=self.loss)
        found = list(zip(settings, losses(folded, settings, measure, name="brecq sensitivity", facts=facts), strict=True))
        diagonal: dict[str, dict[LayerBits, float]] = {name: {} for name in problem.choices}
        for assignment, loss in found:
            for name, bits in assignment.items() if len(assignment) == 1 else ():
                diagonal[name][bits] = loss
        joint = {
            tuple(assignment): loss - sum(diagonal[name][bits] for name, bits in assignment.items())
            for assignment, loss in found
            if len(assignment) > 1
        }
        return Prediction(diagonal, joint, blocks)

    def _joint(self, block: tuple[str, ...]) -> list[tuple[str, ...]]:
        """The sets of layers of ``block`` that are measured together."""
        sizes = range(2, len(block) + 1) if len(block) <= self.joint_layers else (2,)
        return [names for size in sizes for names in itertools.combinations(block, size)]

    def calibrate(self, problem: SearchProblem) -> Calibrated:
        """The weights at each width, and where their errors are measured."""
        weights: dict[str, dict[int, Tensor]] = {name: {} for name in problem.choices}
        for width in _weight_widths(problem):
            job = self._quantized(problem, width)
            for name, choices in problem.choices.items():
                if width in {bits.weight for bits in choices}:
                    site = job.weights[name]
                    weights[name][width] = getattr(site.layer, site.parameter).detach().clone()
        return Calibrated(job.reference, weights, self._units(problem, job))

    def _quantized(self, problem: SearchProblem, width: int) -> PtqJob:
        """The network with all weights at one width."""
        brecq = Brecq(iterations=self.iterations, blocks=self.blocks, activation_iterations=0)
        policy = policy_of(
            {name: LayerBits(bits.weight, None) for name, bits in problem.fixed.items()}
            | dict.fromkeys(problem.choices, LayerBits(width, None))
        )
        folder = None if problem.work_dir is None else problem.work_dir / f"brecq_{width}_bits"
        with seeded(problem, f"brecq {width}"):
            job = PtqJob(
                plain_copy(problem.model).eval(),
                policy,
                problem.sample,
                problem.seed,
                problem.progress,
                calibration=problem.calibration,
                work_dir=folder,
            )
            if self.reconstruct:
                brecq.quantize(job)
            else:
                job.fold()
                job.insert_weights(brecq.weight_quantizer)
        return job

    def _units(self, problem: SearchProblem, job: PtqJob) -> dict[str, tuple[str, ...]]:
        """Searched layers by their block, or themselves; the network where neither runs exactly once and gives one tensor."""
        try:
            planned = plan_units(job, block_units(job, self.blocks), use_activations=False)
        except LayerError:  # no layer runs exactly once
            planned = []
        units = {unit.name: tuple(name for name in unit.layers if name in problem.choices) for unit in planned}
        inside = {name for names in units.values() for name in names}
        units[NETWORK] = tuple(name for name in problem.choices if name not in inside)
        return {unit: names for unit, names in units.items() if names}

    def evolve(self, problem: SearchProblem, prediction: Prediction) -> tuple[dict[str, LayerBits], list[float]]:
        """The best bits that the genetic search finds within the budget, and the loss of the best after each generation."""
        names = list(problem.choices)

        def bits_of(choices: Individual) -> dict[str, LayerBits]:
            return {name: problem.choices[name][choice] for name, choice in zip(names, choices, strict=True)}

        found = evolve(
            lambda choices: prediction(bits_of(choices)),
            [len(problem.choices[name]) for name in names],
            lambda choices: problem.fits(bits_of(choices)),
            _feasible(problem, names),
            population=self.population,
            generations=self.generations,
            mutation=self.mutation,
            parents=self.parents,
            generator=problem.generator("genetic search"),
        )
        return bits_of(found.best), list(found.losses)


def _weight_widths(problem: SearchProblem) -> list[int]:
    """Every width that some weight may have, from the lowest on."""
    return sorted({bits.weight for widths in problem.choices.values() for bits in widths if bits.weight is not None})


def _feasible(problem: SearchProblem, names: Sequence[str]) -> Individual:
    """The choices within every limit that cost least of the first kind; SpecError where there are none."""
    rows = {kind: [[problem.costs[kind].table[name][bits] for bits in problem.choices[name]] for name in names] for kind in problem.limits}
    limits = [problem.limits[kind] - problem.costs[kind].fixed for kind in problem.limits]
    return solve(rows[problem.main], list(rows.values()), limits, names=[f"{kind} of the searched layers" for kind in rows])
