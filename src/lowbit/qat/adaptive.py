"""The base class of methods that train one network for several widths, between which ``lowbit.set_bits`` switches."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from lowbit.inputs import map_tensors
from lowbit.network.bits import set_bits, switches_of
from lowbit.network.surgery.switchable_norm import SwitchableNorm, switch_norms
from lowbit.qat.attach.job import QatJob
from lowbit.qat.method import Measure, TrainingMethod
from lowbit.qat.run import TrainRun
from lowbit.qat.task import Batch, Output, Scores
from lowbit.spec import LayerBits, switch_name


@dataclass
class AdaptiveMethod(TrainingMethod):
    """Trains every switch of a network, by default all of them in every step, with their losses added.

    A subclass writes the quantizers: ``slot.widths`` are the widths that each needs, for ``SwitchableQuantizer`` or for a quantizer that
    shares its parameters. It may override ``switch_loss`` (distillation between switches), ``training_switches`` (sampling), ``insert_norms``
    (pairs of widths), or ``losses`` as a whole.
    """

    switching: ClassVar[Literal["network", "layer"] | None] = "network"

    def attach(self, job: QatJob) -> None:
        self.insert_norms(job)
        super().attach(job)

    def insert_norms(self, job: QatJob) -> None:
        """Give each batch norm a version for every switch, where there are several."""
        keys = [switch_name(switch) for switch in job.switches]
        if len(keys) > 1:
            switch_norms(job.model, lambda _, norm: SwitchableNorm(norm, keys))

    def training_switches(self, run: TrainRun) -> Iterable[LayerBits]:
        """The switches that a step trains, in their order; by default all of them, from the highest on."""
        return switches_of(run.model)

    def switch_loss(self, run: TrainRun, batch: Batch, output: Output, switch: LayerBits, higher: dict[LayerBits, Output]) -> Tensor:
        """The loss of one switch, by default the task's and the user's teacher's; ``higher`` has the outputs of the switches before it in this step."""
        return run.loss_of(output, batch)

    def losses(self, run: TrainRun, batch: Batch) -> Iterable[Tensor]:
        """One loss for each switch, the penalties in the first; the network is at its highest switch before and after."""
        seen: dict[LayerBits, Output] = {}
        for switch in self.training_switches(run):
            set_bits(run.model, switch)
            output = run.predict(batch)
            loss = self.switch_loss(run, batch, output, switch, seen)
            yield loss if seen else loss + run.penalty()
            seen[switch] = map_tensors(output, Tensor.detach)
        set_bits(run.model, switches_of(run.model)[0])

    def evaluate(self, run: TrainRun, measure: Measure) -> Scores:
        """The metrics of every switch by its name, ``accuracy 4/4``, and their means, which select the best network."""
        found: dict[str, Scores] = {}
        for switch in switches_of(run.model):
            set_bits(run.model, switch)
            found[switch_name(switch)] = measure()
        set_bits(run.model, switches_of(run.model)[0])
        return together(found)


def together(found: dict[str, Scores]) -> Scores:
    """Means of metrics over switches, and beside them those of each switch.

    >>> together({"8/8": Scores({"accuracy": 0.9}, "accuracy", 10), "2/2": Scores({"accuracy": 0.7}, "accuracy", 10)}).metrics
    {'accuracy': 0.8, 'accuracy 8/8': 0.9, 'accuracy 2/2': 0.7}
    """
    first = next(iter(found.values()))
    means = {name: sum(scores[name] for scores in found.values()) / len(found) for name in first.metrics}
    each = {f"{name} {switch}": value for switch, scores in found.items() for name, value in scores.metrics.items()}
    return Scores({**means, **(each if len(found) > 1 else {})}, first.metric_name, first.samples)
