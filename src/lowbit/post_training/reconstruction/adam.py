"""Adam on mini-batches drawn at random from cached samples; it can stop anywhere and resume bit for bit."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


class ResumableAdam:
    """``iterations`` steps of Adam (default betas, no weight decay) over ``parameters``.

    Each step draws ``batch_size`` of ``samples`` without replacement; all of them when there are no more. With ``is_annealed`` the
    learning rate follows ``lr / 2 * (1 + cos(pi t / T))`` down to 0.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        *,
        learning_rate: float,
        iterations: int,
        samples: int,
        batch_size: int,
        seed: int,
        is_annealed: bool = False,
    ) -> None:
        self.parameters = dict(parameters)
        self.iteration, self.iterations = 0, iterations
        self.is_settled = False
        self._learning_rate, self._is_annealed = learning_rate, is_annealed
        self._samples, self._batch_size = samples, batch_size
        self._generator = torch.Generator().manual_seed(seed)
        self._optimizer = torch.optim.Adam(list(self.parameters.values()), learning_rate, fused=True)

    @property
    def is_finished(self) -> bool:
        """Whether every step has been taken, or ``is_settled`` says that the remaining ones would change nothing."""
        return self.is_settled or self.iteration >= self.iterations

    def step(self, loss: Callable[[Tensor], Tensor]) -> None:
        """One step on ``loss(indices of the samples)``."""
        index = torch.randperm(self._samples, generator=self._generator)[: self._batch_size]
        if self._is_annealed:
            self._optimizer.param_groups[0]["lr"] = self._learning_rate / 2 * (1 + math.cos(math.pi * self.iteration / self.iterations))
        parameters = list(self.parameters.values())
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss(index), parameters, allow_unused=True), strict=True):
            parameter.grad = gradient
        self._optimizer.step()
        self.iteration += 1

    def state(self) -> dict[str, Tensor]:
        """Everything that the remaining steps depend on except ``iteration``."""
        tensors = {"rng": self._generator.get_state()}
        for name, parameter in self.parameters.items():
            tensors[f"value.{name}"] = parameter
            tensors |= {
                f"{moment}.{name}": self._optimizer.state[parameter][moment] for moment in _MOMENTS if parameter in self._optimizer.state
            }
        return tensors

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor], iteration: int) -> None:
        """Resume from ``state()`` taken at ``iteration``."""
        self.iteration = iteration
        self._generator.set_state(tensors["rng"])
        for name, parameter in self.parameters.items():
            parameter.copy_(tensors[f"value.{name}"])
            if f"step.{name}" in tensors:
                moments = {moment: torch.empty_like(parameter).copy_(tensors[f"{moment}.{name}"]) for moment in _MOMENTS[1:]}
                self._optimizer.state[parameter] = {"step": tensors[f"step.{name}"].to(parameter.device), **moments}
