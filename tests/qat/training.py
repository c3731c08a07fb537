"""A small task and short trainings for the tests of the trainer."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import lowbit
from lowbit.progress import Progress, Stage
from lowbit.qat import OptimizerSpec, Recipe

RECIPE = Recipe(epochs=3, batch_size=16, optimizer=OptimizerSpec(learning_rate=0.05))


class Killed(BaseException):
    """Ends a training at once, as a kill does: nothing of lowbit catches it."""


def network(*, norm: bool = True) -> nn.Module:
    """A convolution, a depthwise one and a classifier for ``[N, 2, 6, 6]`` and 3 classes."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(2, 8, 3, padding=1, bias=not norm), nn.BatchNorm2d(8) if norm else nn.Identity(), nn.ReLU()]
    layers += [nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))


@functools.cache
def data(count: int = 80, seed: int = 1) -> TensorDataset:
    """Samples of three noisy patterns."""
    patterns = torch.randn(3, 2, 6, 6, generator=torch.Generator().manual_seed(9))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (count,), generator=generator)
    return TensorDataset(patterns[labels] + 0.5 * torch.randn(count, 2, 6, 6, generator=generator), labels)


def train(model: nn.Module | None = None, **arguments: object) -> nn.Module:
    """``lowbit.train`` on the small task, with learned step sizes at 3 bits unless told otherwise."""
    given: dict[str, object] = {"weight_bits": 3, "activation_bits": 3, "recipe": RECIPE, "tensorboard": False, **arguments}
    training_data = given.pop("data", data())
    return lowbit.train(model or network(), training_data, **given)  # type: ignore[arg-type]


class Killing(Progress):
    """Progress of a training that is killed behind the optimizer step ``step``."""

    def __init__(self, step: int) -> None:
        super().__init__(quiet=True)
        self._step = step

    def stage(self, name: str, total: float, *, done: int = 0):  # type: ignore[no-untyped-def]
        killing = self._step

        class Deadly(Stage):
            def advance(self, amount: float = 1, note: str = "") -> None:
                super().advance(amount, note)
                if self.done == killing:
                    raise Killed

        class Context:
            def __enter__(self) -> Stage:
                return Deadly(name, total, None, None, None, done)

            def __exit__(self, *_: object) -> None: ...

        return Context()


def killed(step: int, out: Path, **arguments: object) -> None:
    """The same training, killed behind an optimizer step."""
    try:
        train(out=out, progress=Killing(step), **arguments)
    except Killed:
        return
    raise AssertionError(f"the training ended before step {step}")


def state(model: nn.Module) -> dict[str, Tensor]:
    """Everything a network holds, buffers that are not saved with it included."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


def assert_same(first: nn.Module, second: nn.Module) -> None:
    """Two networks hold the same bits."""
    a, b = state(first), state(second)
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name].nan_to_num(7.25), b[name].nan_to_num(7.25))]
    assert not different
