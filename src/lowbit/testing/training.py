"""Training methods on the tiny task of the laws: prepared networks, and a short fine-tuning of the trained one."""

from __future__ import annotations

import copy
import functools

from torch import Tensor, nn

from lowbit.qat import Classification, GivenNetworks, OptimizerSpec, Recipe, TrainRun
from lowbit.qat.prepare import method_of, prepare
from lowbit.registry import MethodInfo, find_method
from lowbit.testing import tiny
from lowbit.testing.checks import MethodRef

STEPS, EPOCHS = 10, 6


def facts(method: MethodRef) -> MethodInfo:
    """What is known of the method."""
    return find_method(method, "training")


def few_bits(method: MethodRef) -> tuple[int, int | None]:
    """Two bits of weights and four of activations, or what the method has nearest to it."""
    info = facts(method)
    weight_bits = 2 if 2 in info.weight_bits else info.weight_bits[0]
    return weight_bits, None if info.activation_bits is None else 4 if 4 in info.activation_bits else info.activation_bits[0]


def ready(
    method: MethodRef, model: nn.Module, sample: Tensor, *, weight_bits: int | None = None, activation_bits: int | None = None
) -> nn.Module:
    """``model`` with the method's quantizers at these bits; default: at few bits."""
    few = few_bits(method)
    bits = few if weight_bits is None else (weight_bits, activation_bits)
    return prepare(model, method=method, weight_bits=bits[0], activation_bits=bits[1], sample=sample, seed=3)


@functools.cache
def _prepared(method: MethodRef, weight_bits: int | None, activation_bits: int | None) -> nn.Module:
    return ready(method, tiny.trained(), tiny.calibration(), weight_bits=weight_bits, activation_bits=activation_bits)


def prepared(method: MethodRef, weight_bits: int | None = None, activation_bits: int | None = None) -> nn.Module:
    """The trained network with the method's quantizers, initialized; a copy, in evaluation mode."""
    return copy.deepcopy(_prepared(method, weight_bits, activation_bits)).eval()


def batch(step: int) -> tuple[Tensor, Tensor]:
    """The training batch of a step."""
    return tiny.samples(64, seed=5000 + step)


def run_of(model: nn.Module, *, epochs: int = EPOCHS, learning_rate: float = 0.02, float_network: nn.Module | None = None) -> TrainRun:
    """A run over ``epochs`` epochs of ``STEPS`` steps; ``float_network`` is what was prepared, the trained network by default."""
    recipe = Recipe(epochs, optimizer=OptimizerSpec(learning_rate=learning_rate), seed=4)
    batches = functools.partial(lambda count: [batch(step) for step in range(count)])
    given = GivenNetworks(float_network=tiny.trained() if float_network is None else float_network)
    return TrainRun(model, method_of(model), Classification(), recipe, STEPS, given=given, batches=batches)


def one_step(run: TrainRun) -> Tensor:
    """One step, with all its turns; gives the loss of the first."""
    losses = []
    for _ in run.phase.turns:
        run.before_step()
        loss = run.loss(batch(run.step))
        loss.backward()
        run.after_backward()
        run.optimizer_step()
        run.after_step()
        losses.append(loss.detach())
    return losses[0]


def train(model: nn.Module, *, epochs: int = EPOCHS) -> nn.Module:
    """``model`` after a short run, in evaluation mode."""
    model.train()
    run = run_of(model, epochs=epochs)
    for _ in run.each_epoch():
        for _ in range(STEPS):
            one_step(run)
    return model.eval()


@functools.cache
def _trained(method: MethodRef) -> nn.Module:
    return train(copy.deepcopy(_prepared(method, None, None)))


def trained(method: MethodRef) -> nn.Module:
    """The network after a short run at few bits; a copy, in evaluation mode."""
    return copy.deepcopy(_trained(method))


def accuracy(model: nn.Module) -> float:
    """Percent of held-out images that are classified rightly."""
    images, labels = tiny.samples(1024, seed=2)
    return 100 * float((tiny.outputs(model, images).argmax(1) == labels).float().mean())
