"""Methods that train other networks beside the prepared one: a teacher that learns along, and a generator in turn with the network."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor, nn

import lowbit
from lowbit.methods.quantizer_design.lsq import Lsq
from lowbit.qat import Companion, GivenNetworks, OptimizerSpec, Phase, Recipe, TrainingMethod, TrainRun, Turn
from lowbit.qat.task import Batch

NETWORK, GENERATOR = Turn("network", ("weights", "quantizers", "others")), Turn("generator", ("generator",))


@dataclass
class Mutual(Lsq):
    """First the network alone; then a teacher learns from it as it does from the teacher, each by a backward pass of its own."""

    alone: int = 1

    def companions(self, model: nn.Module, given: GivenNetworks) -> Mapping[str, Companion]:
        return {"teacher": Companion(given.teacher or given.float_twin())}

    def phases(self, recipe: Recipe) -> list[Phase]:
        own = self.optimizers(recipe)
        teacher = OptimizerSpec("sgd", 0.01, momentum=0.5, weight_decay=0.0, schedule="linear")
        together = Phase("together", recipe.epochs - self.alone, {**own, "teacher": teacher}, recipe.clip_norm)
        return [Phase("alone", self.alone, own, recipe.clip_norm), together] if self.alone else [together]

    def losses(self, run: TrainRun, batch: Batch) -> Iterable[Tensor]:
        output = run.task.predict(run.model if run.wrapped is None else run.wrapped, batch)
        target = run.task.predict(run.networks["teacher"], batch)
        yield run.task.loss(output, batch) + run.task.distillation_loss(output, target.detach())
        if run.phase.name == "together":
            yield run.task.loss(target, batch) + run.task.distillation_loss(target, output.detach())


class Generator(nn.Module):
    """Pictures from noise."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.linear, self.norm, self.shape = nn.Linear(4, torch.Size(shape).numel()), nn.BatchNorm1d(torch.Size(shape).numel()), shape

    def forward(self, z: Tensor) -> Tensor:
        return self.norm(self.linear(z)).reshape(-1, *self.shape)


@dataclass
class Adversarial(Lsq):
    """A generator looks for inputs on which the network differs from its float twin; the network, in two turns of three, learns to agree."""

    shape: tuple[int, ...] = (2, 6, 6)

    def companions(self, model: nn.Module, given: GivenNetworks) -> Mapping[str, Companion]:
        return {"twin": Companion(given.float_twin()), "generator": Companion(Generator(self.shape))}

    def phases(self, recipe: Recipe) -> list[Phase]:
        generator = OptimizerSpec("adam", 0.01, weight_decay=0.0, betas=(0.5, 0.9))
        optimizers = {**self.optimizers(recipe), "generator": generator}
        return [Phase("adversarial", recipe.epochs, optimizers, turns=(NETWORK, NETWORK, GENERATOR))]

    def losses(self, run: TrainRun, batch: Batch) -> Iterable[Tensor]:
        images = run.networks["generator"](torch.randn(8, 4, generator=run.generator))
        is_networks = run.turn.name == "network"
        images = images.detach() if is_networks else images
        gap = (run.model(images) - run.networks["twin"](images)).abs().mean()
        yield gap if is_networks else -gap


@contextlib.contextmanager
def method_in_place(make: Callable[[], TrainingMethod]) -> Iterator[None]:
    """Within the context ``lowbit.train`` trains with the method of ``make``, which has the quantizers of the registered one."""
    names = inspect.unwrap(inspect.unwrap(lowbit.train).__globals__["train_network"]).__globals__
    prepare = names["prepare"]

    def prepare_with(model: nn.Module, **options: object) -> nn.Module:
        prepared = prepare(model, **options)
        prepared.lowbit_method = make()
        return prepared

    with mock.patch.dict(names, {"prepare": prepare_with}):
        yield
