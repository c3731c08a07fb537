"""Batch norms with statistics and affine parameters of their own for each width, or for each pair of neighbours' widths.

Sources: Jin et al. 2020, "AdaBits", section 3.3 (one for each width of the network); Bulat, Tzimiropoulos 2021, "Bit-Mixer"
(one for each pair of widths of the layers before and behind).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import cast

from torch import Tensor, nn

from lowbit.errors import LayerError, SpecError
from lowbit.network.layers import BATCH_NORMS
from lowbit.spec import LayerBits, switch_name


class SwitchableNorm(nn.Module):
    """Several norms of one kind, of which one is selected; ``lowbit.set_bits`` does that.

    Args:
        norm: The norm that each key starts from as a copy.
        keys: Names, the first one selected: with ``layers`` those of ``pair_key``, else those of ``spec.switch_name``.
        layers: Names of the layers whose widths choose the norm, ``None`` for a neighbour in float; empty: the switch of the network does.

    Example:
        >>> norm = SwitchableNorm(nn.BatchNorm1d(2), ["8/8", "4/4"])
        >>> norm.select("4/4")
        >>> norm.current is norm.norms["4/4"], [name for name, _ in norm.named_parameters()]
        (True, ['norms.8/8.weight', 'norms.8/8.bias', 'norms.4/4.weight', 'norms.4/4.bias'])
    """

    def __init__(self, norm: nn.Module, keys: Sequence[str], layers: tuple[str | None, ...] = ()) -> None:
        super().__init__()
        self.norms = nn.ModuleDict({key: copy.deepcopy(norm) for key in keys})
        self.layers = layers
        self.key = keys[0]
        self.train(norm.training)

    @property
    def current(self) -> nn.Module:
        """The norm that is selected."""
        return self.norms[self.key]

    def share_affine(self) -> None:
        """Let all norms have the weight and bias of the first one, and statistics of their own."""
        first, *others = self.norms.values()
        for norm in others:
            norm.weight, norm.bias = first.weight, first.bias

    def choose(self, bits: Mapping[str, LayerBits], switch: LayerBits | None) -> str:
        """The key for a network whose layers have these bits, by name, under ``switch`` (``None``: each layer its own).

        Raises:
            SpecError: There is no norm for them; the message lists those there are.
        """
        if not self.layers and switch is None:
            raise SpecError("the norms belong to widths of the whole network, so that layers cannot differ. Set one width for all of them.")
        if self.layers:
            key = pair_key(*(None if name is None else bits[name].weight for name in self.layers))
        else:
            key = switch_name(cast(LayerBits, switch))
        if key not in self.norms:
            raise SpecError(f"there is no norm for {key}; there are those for {', '.join(self.norms)}. Choose one of these.")
        return key

    def select(self, choice: str) -> None:
        """Use the norm of this key from now on."""
        self.key = choice

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.current(x))

    def extra_repr(self) -> str:
        return f"key={self.key!r}"


def resting_norms(model: nn.Module) -> set[nn.Module]:
    """The norms of widths that are not selected; none that another width uses too."""
    switchable = [module for module in model.modules() if isinstance(module, SwitchableNorm)]
    return {norm for module in switchable for norm in module.norms.values()} - {module.current for module in switchable}


def pair_key(*widths: int | None) -> str:
    """``4>2``, ``float>4``: the key for layers of these widths, in the order in which they run.

    >>> pair_key(None, 4)
    'float>4'
    """
    return ">".join("float" if bits is None else str(bits) for bits in widths)


def switch_norms(model: nn.Module, make: Callable[[str, nn.Module], SwitchableNorm | None]) -> dict[str, SwitchableNorm]:
    """Replace every batch norm of ``model``, in place, by ``make(name, norm)``, unless that is ``None``; gives what was made, by name.

    Raises:
        LayerError: The network has no batch norm.
    """
    found = {name: module for name, module in model.named_modules() if isinstance(module, BATCH_NORMS)}
    if not found:
        raise LayerError(
            f"{type(model).__name__} has no batch norm, and widths differ in the statistics of activations, which each needs norms of its own "
            "for. Add batch norms, or train a network for each width."
        )
    made = {name: new for name, norm in found.items() if (new := make(name, norm)) is not None}
    for name, norm in made.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, norm)
    return made
