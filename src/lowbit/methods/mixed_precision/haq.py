"""HAQ: an agent walks over the layers and learns which bits leave the most accuracy within a budget of the hardware.

Paper: Wang, Liu, Lin, Lin, Han, CVPR 2019, "HAQ: Hardware-Aware Automated Quantization with Mixed Precision". Section 3.1
    (observation), 3.2 (action, budget), 3.5 (reward), 3.6 (agent), 3.4 and 4.3 (linear and k-means quantizers). Authors' code: mit-han-lab/haq.
Symbols: O_k -> observation, a_k -> action, b_min and b_max -> the widths of ``SearchProblem.choices``, lambda -> 0.1 in ``reward``.
The walk and the agent are in ``lowbit.assignment``, the linear quantizers in ``haq_quantizers``.
Differs from the paper:
    - The first and the last layer are not walked over unless they are searched; in the paper the agent meets them and 8 bits are put in place
      of its choice.
    - The last number of an observation says which decision comes, and no episode knows of the one before it; see ``Environment`` for what
      the authors' code does.
    - Widths may be any, not only all from the least to the most; each has an equal share of the actions. Budgets may be several.
    - Networks are not fine-tuned by default (``finetune_epochs=0``; the paper: 1 epoch), so that unlabelled samples are enough. The accuracy
      then is that on the labelled data, or without labels the share of the float network's answers that stay the same. With the
      linear quantizer the authors' code takes the running accuracy of the fine-tuning epoch.
    - Bits that were measured before are not measured again.
    - Fine-tuning with k-means freezes clusters of all widths (the authors' code: up to 64 centroids) and knows no pruned weights.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from lowbit.assignment.costs import Assignment, policy_of
from lowbit.assignment.ddpg import DdpgAgent, DdpgSettings
from lowbit.assignment.environment import PARTS, Environment, code_cost, facts_of, share
from lowbit.assignment.episodes import EpisodeLog, run_episode
from lowbit.assignment.problem import Found, SearchMethod, SearchProblem
from lowbit.errors import CalibrationError, DataError, LayerError, LowbitError, SpecError
from lowbit.files import read_tensors, write_tensors
from lowbit.inputs import Inputs, tensors_of
from lowbit.measure.agreement import AgreementMeter, run_output
from lowbit.measure.outputs import device_of
from lowbit.methods.mixed_precision.haq_quantizers import HaqActivation, HaqWeight
from lowbit.network.bits import layer_quantizers, set_bits
from lowbit.network.insert import float_weight, quantized_weights
from lowbit.network.layers import evaluating
from lowbit.network.slot import Slot
from lowbit.network.unwrap import plain_copy
from lowbit.options import Above, AtLeast, Interval
from lowbit.post_training.pipeline import run
from lowbit.qat import QatJob
from lowbit.qat.task import Meter
from lowbit.quantizers import Quantizer
from lowbit.quantizers.base import disabled, replace_forward
from lowbit.quantizers.kmeans import KMeansQuantizer
from lowbit.registry import MethodInfo, register
from lowbit.spec import LayerBits, switch_name
from lowbit.workfolder import WorkFolder, open_work_folder, tensors_digest, weights_digest

STATE = "episodes.safetensors"


@register(
    MethodInfo(
        name="haq",
        title="HAQ: Hardware-Aware Automated Quantization with Mixed Precision",
        paper="Wang, Liu, Lin, Lin, Han, CVPR 2019",
        url="https://arxiv.org/abs/1811.08886",
        section="mixed_precision",
        axes=("assignment", "weight_quantizer", "activation_quantizer"),
        kind="search",
        weight_bits=range(1, 9),
        activation_bits=range(1, 9),
        needs=("calibration",),
        fidelity="partial",
        summary="an agent learns by reinforcement which bits of each layer leave the most accuracy within a budget",
        evidence="quantizers, calibration, walk, budget and updates of the agent checked against the authors' code; without fine-tuning by default",
    )
)
@dataclass
class Haq(DdpgSettings, SearchMethod):
    """Reinforcement learning over the bits of all layers.

    Attributes:
        weights: Quantizer of weights: ``linear`` (2 bits or more) or ``kmeans`` (codebooks, 1 bit or more).
        agent: ``ddpg``, or ``random``: bits are drawn evenly in all episodes, for comparison.
        episodes: Networks that are tried.
        memory_per_layer: Entries of the agent's memory for each layer.
        finetune_epochs: Passes of fine-tuning over the labelled data before a network is measured; the paper has 1.
        finetune_learning_rate: Learning rate of its first epoch (SGD, momentum 0.9, weight decay 4e-5).
        finetune_decay: Factor of the learning rate after each epoch.
        kmeans_iterations: Iterations of the k-means quantizer.
        initial_clip: The most that a clip level of inputs can be after calibration.
        tanh_weights: Squash weights by tanh before linear quantization.
        learns_clip: Whether fine-tuning changes the clip levels of inputs.
    """

    trial = MappingProxyType({"episodes": 12, "warmup": 4, "hidden": (16, 16)})

    weights: Literal["linear", "kmeans"] = "linear"
    agent: Literal["ddpg", "random"] = "ddpg"
    episodes: Annotated[int, AtLeast(1)] = 600
    memory_per_layer: Annotated[int, AtLeast(3)] = 128
    finetune_epochs: Annotated[int, AtLeast(0)] = 0
    finetune_learning_rate: Annotated[float, Above(0)] = 1e-3
    finetune_decay: Annotated[float, Interval(0, 1, closed="right")] = 0.8
    kmeans_iterations: Annotated[int, AtLeast(1)] = 3
    initial_clip: Annotated[float, Above(0)] = 6.0
    tanh_weights: bool = False
    learns_clip: bool = True

    def weight_quantizer(self, slot: Slot) -> Quantizer:
        """The quantizer of a weight."""
        if self.weights == "kmeans":
            return KMeansQuantizer(slot.bit_width, max_iterations=self.kmeans_iterations)
        return HaqWeight(slot.bit_width, tanh=self.tanh_weights)

    def activation_quantizer(self, slot: Slot) -> Quantizer:
        """The quantizer of what a layer reads."""
        return HaqActivation(slot.bit_width, is_signed=slot.is_signed, initial_clip=self.initial_clip, learns_clip=self.learns_clip)

    def search(self, problem: SearchProblem) -> Found:
        """The bits of the episode with the largest reward; the first of several."""
        if not problem.limits:
            raise SpecError("haq searches within a budget: pass budget=, such as 'size=10%', 'bops=8%' or 'latency=60%'.")
        network = _Network(problem, self)
        environment = self._environment(problem, network)
        settings = replace(self, warmup=self.episodes) if self.agent == "random" else self
        capacity = self.memory_per_layer * len(problem.layers)
        agent = DdpgAgent(environment.state_size, settings, problem.generator("agent"), capacity)
        folder = None if problem.work_dir is None else _open_folder(problem.work_dir / "haq", problem, self)
        log = EpisodeLog() if folder is None else _resume(folder, agent)
        done = len(log.rewards)
        with problem.progress.stage("episodes", total=self.episodes, done=done) as stage:
            for episode in range(done, self.episodes):
                log.add(run_episode(environment, agent, episode), environment)
                if folder is not None:
                    write_tensors(folder.path / STATE, agent.state(), asdict(log))
                stage.advance(note=f"accuracy {environment.accuracy:.2f}, best {log.accuracy:.2f}")
        if folder is not None:
            folder.mark_done()
        bits = {name: LayerBits(*own) for name, own in zip(problem.choices, log.bits, strict=True)}
        counts = {name: site.original.numel() for name, site in problem.layers.items()}
        facts = {
            "accuracy": log.accuracy,
            "float_accuracy": network.original,
            "share_of_float_codes": share(code_cost(counts, problem.choices), bits),
            "rewards": log.rewards,
        }
        return Found(bits, network.original - log.accuracy, facts=facts)

    def _environment(self, problem: SearchProblem, network: _Network) -> Environment:
        return Environment(
            facts_of(problem.model, problem.sample, problem.layers),
            problem.choices,
            [(problem.costs[kind], limit) for kind, limit in problem.limits.items()],
            measure=network.accuracy,
            original=network.original,
            first_action=1.0 if self.weights == "linear" else 4.0,
            actions="share" if self.weights == "linear" else "bits",
        )


def _open_folder(path: Path, problem: SearchProblem, method: Haq) -> WorkFolder:
    samples = [*problem.batches, *(problem.calibration or ())]
    settings = {
        "method": method.hyper_parameter_values(),
        "weights": weights_digest(problem.model),
        "samples": tensors_digest(tensors_of(samples)),
        "choices": {name: list(map(switch_name, widths)) for name, widths in problem.choices.items()},
        "fixed": {name: switch_name(bits) for name, bits in problem.fixed.items()},
        "limits": problem.limits,
        "seed": problem.seed,
    }
    return open_work_folder(path, settings, resume=True)


def _resume(folder: WorkFolder, agent: DdpgAgent) -> EpisodeLog:
    """The episodes that an earlier run has done, the agent being as it was behind them."""
    if not (folder.path / STATE).exists():
        return EpisodeLog()
    state, facts = read_tensors(folder.path / STATE)
    agent.load_state(state)
    return EpisodeLog(**facts)  # type: ignore[arg-type]


class _Network:
    """The network with quantizers that know all widths, measured at any bits.

    Attributes:
        original: Accuracy of the float network, in percent.
    """

    def __init__(self, problem: SearchProblem, method: Haq) -> None:
        self.problem, self.method = problem, method
        widths = {**problem.choices, **{name: (bits,) for name, bits in problem.fixed.items()}}
        parts = {name: [sorted({getattr(bits, part) for bits in own} - {None}) for part in PARTS] for name, own in widths.items()}
        highest = {name: LayerBits(*(max(part, default=None) for part in own)) for name, own in parts.items()}
        job = QatJob(plain_copy(problem.model), policy_of(highest), problem.sample, problem.seed)
        job.insert(method.weight_quantizer, method.activation_quantizer)
        self.model = job.model.to(device_of(problem.model)).eval()
        self._calibrate({name: dict(zip(PARTS, own, strict=True)) for name, own in parts.items()})
        set_bits(self.model, dict(problem.fixed))
        self._answers = None if problem.has_labels else self._float_answers()
        self.original = self._score(problem.model)
        self._known: dict[tuple[LayerBits, ...], float] = {}

    def accuracy(self, bits: Assignment) -> float:
        """Accuracy at these bits, in percent; fine-tuned first where the method says so."""
        key = tuple(bits.values())
        if key not in self._known:
            set_bits(self.model, dict(bits))
            self._known[key] = self._score(self._tuned() if self.method.finetune_epochs else self.model)
        return self._known[key]

    def _calibrate(self, widths: Mapping[str, Mapping[str, Sequence[int]]]) -> None:
        """Fit the grid of every width: of weights to themselves, of inputs to what the float network gives for the first samples."""
        layers = {name: found for name, found in layer_quantizers(self.model).items() if name in widths}
        seen = self._inputs_seen([found.activation for found in layers.values() if found.activation is not None])
        for name, found in layers.items():
            if found.weight is not None:
                values = float_weight(found.layer, found.parameter).detach()
                _fit(name, found.weight, widths[name]["weight"], values)
            if found.activation is not None and found.activation in seen:
                _fit(name, found.activation, widths[name]["activation"], seen[found.activation])

    def _inputs_seen(self, quantizers: Sequence[Quantizer]) -> dict[Quantizer, Tensor]:
        if not quantizers:
            return {}
        if self.problem.calibration is None:
            raise CalibrationError("haq clips what layers read by samples: pass calibration= or data=, or activation_bits=None.")
        seen: dict[Quantizer, list[Tensor]] = {quantizer: [] for quantizer in quantizers}

        def noting(quantizer: Quantizer) -> Callable[[Tensor], Tensor]:
            def note(x: Tensor) -> Tensor:
                seen[quantizer].append(x.detach().reshape(-1))
                return x

            return note

        weights = [site.quantizer for site in quantized_weights(self.model).values() if site.quantizer is not None]
        with disabled(weights), replace_forward({quantizer: noting(quantizer) for quantizer in quantizers}):
            run(self.model, self.problem.calibration.sample.to(device_of(self.model)))
        return {quantizer: torch.cat(values) for quantizer, values in seen.items() if values}

    def _tuned(self) -> nn.Module:
        """A copy that was trained on the labelled data."""
        batches = self.problem.need_labels("fine-tuning in haq")
        model, task, method = copy.deepcopy(self.model), self.problem.task, self.method
        for site in quantized_weights(model).values():
            if isinstance(site.quantizer, KMeansQuantizer):
                site.quantizer.freeze(site.original)
        optimizer = torch.optim.SGD(model.parameters(), method.finetune_learning_rate, momentum=0.9, weight_decay=4e-5)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, method.finetune_decay)
        quantizers = [module for module in model.modules() if isinstance(module, Quantizer)]
        generator = self.problem.generator("fine-tuning")
        model.train()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.problem.seed)
            for _ in range(method.finetune_epochs):
                for index in torch.randperm(len(batches), generator=generator).tolist():
                    optimizer.zero_grad()
                    task.loss(task.predict(model, batches[index]), batches[index]).backward()
                    optimizer.step()
                    for quantizer in quantizers:
                        quantizer.project()
                schedule.step()
        return model.eval()

    def _float_answers(self) -> list[Tensor]:
        batches = self.problem.need_batches("measuring networks in haq")
        with evaluating(self.problem.model):
            return [run_output(self.problem.model, Inputs.of(batch, self.problem.model)) for batch in batches]

    def _score(self, model: nn.Module) -> float:
        """The task's metric, larger being better, shares in percent; without labels the percentage of unchanged answers."""
        with evaluating(model):
            if self._answers is not None:
                return self._agreement(model, self._answers)
            meter = Meter(self.problem.task)
            for batch in self.problem.need_labels("measuring networks in haq"):
                meter.add(meter.task.predict(model, batch), batch)
        value = meter.scores().value * (1 if meter.task.higher_is_better else -1)
        if not math.isfinite(value):
            raise DataError(
                f"haq: {meter.task.metric_name} is {value}. Check the labelled data, or choose a task whose metric stays finite."
            )
        return 100 * value if meter.task.units.get(meter.task.metric_name) == "%" else value

    def _agreement(self, model: nn.Module, answers: Sequence[Tensor]) -> float:
        meter = AgreementMeter()
        for batch, answer in zip(self.problem.batches, answers, strict=True):
            inputs = Inputs.of(batch, self.problem.model)
            meter.add(answer, run_output(model, inputs), inputs.batch_size)
        same = meter.result().top1
        if same is None:
            raise DataError("haq: without labels networks are measured by the classes that they choose, and this one has none. Pass data=.")
        return 100 * same


def _fit(name: str, quantizer: Quantizer, widths: Iterable[int], values: Tensor) -> None:
    try:
        for bits in widths:
            quantizer.set_bit_width(bits)
            quantizer.initialize(values)
    except LowbitError as error:
        raise LayerError(f"layer {name!r}: {error}") from error
