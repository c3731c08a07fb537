"""Companion networks: further networks that a method trains with, beside the prepared one. They are never exported."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import nn

from lowbit.errors import SpecError
from lowbit.qat.recipe import Role

Mode = Literal["follow", "eval", "train"]
RoleOf = Callable[[str, nn.Parameter, nn.Module], Role]


@dataclass(frozen=True)
class Companion:
    """A network that takes part in training beside the prepared one: a teacher, a float twin, a meta network, a side branch, a generator.

    It is trained in the phases whose ``optimizers`` name one of its roles, and frozen in all others.

    Attributes:
        network: The network itself; it belongs to the run.
        mode: ``follow``: in training mode in the phases that train it, while the prepared network is not being evaluated; ``eval`` or
            ``train``: always in that mode.
        role: Gives the role of a parameter below the companion's own, by its name, the parameter, and the module that holds it:
            ``weights`` becomes ``teacher.weights``. ``None``: all parameters have the companion's name as their role.
        is_saved: Whether checkpoints hold it. Without, it has to be the same again whenever a run is resumed.
    """

    network: nn.Module
    mode: Mode = "follow"
    role: RoleOf | None = None
    is_saved: bool = True


@dataclass(frozen=True)
class GivenNetworks:
    """What companions are made from.

    Attributes:
        teacher: The user's teacher, or ``None``.
        float_network: The network that was prepared, as it was before, or ``None``.
    """

    teacher: nn.Module | None = None
    float_network: nn.Module | None = None

    def float_twin(self) -> nn.Module:
        """A copy of the float network; SpecError where none was given."""
        if self.float_network is None:
            raise SpecError("the method trains beside a float twin of the network: pass float_network=, what lowbit.prepare was given.")
        return copy.deepcopy(self.float_network)


Companions = Mapping[str, Companion]
