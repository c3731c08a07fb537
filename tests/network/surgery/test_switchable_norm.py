"""Norms with statistics for each width, or for each pair of widths."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lowbit.errors import LayerError, SpecError
from lowbit.network.surgery.switchable_norm import SwitchableNorm, pair_key, switch_norms
from lowbit.spec import LayerBits

FOUR, TWO = LayerBits(4, 4), LayerBits(2, 2)


def float_norm() -> nn.BatchNorm1d:
    norm = nn.BatchNorm1d(3)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 2.0, 3.0]))
        norm.running_mean.fill_(0.5)  # type: ignore[union-attr]
    return norm


def test_every_key_starts_from_the_float_norm_and_goes_its_own_way() -> None:
    norm, x = SwitchableNorm(float_norm(), ["4/4", "2/2"]), torch.randn(8, 3)
    norm.select("2/2")
    by_hand = float_norm()
    assert torch.equal(norm(x), by_hand(x))
    other, mine = norm.norms["4/4"], norm.norms["2/2"]
    assert torch.equal(mine.running_mean, by_hand.running_mean)  # type: ignore[arg-type]
    assert other.running_mean.tolist() == [0.5] * 3 and int(other.num_batches_tracked) == 0  # type: ignore[union-attr, arg-type]
    norm(x).sum().backward()
    assert other.weight.grad is None and mine.weight.grad is not None


def test_the_switch_of_the_network_chooses() -> None:
    norm = SwitchableNorm(float_norm(), ["4/4", "2/2"])
    assert norm.choose({}, TWO) == "2/2" and norm.key == "4/4"
    with pytest.raises(SpecError, match=r"no norm for 8/8; there are those for 4/4, 2/2"):
        norm.choose({}, LayerBits(8, 8))
    with pytest.raises(SpecError, match="layers cannot differ"):
        norm.choose({"a": TWO}, None)


def test_the_widths_of_neighbours_choose_where_layers_are_named() -> None:
    norm = SwitchableNorm(float_norm(), [pair_key(a, b) for a in (4, 2) for b in (4, 2)], ("before", "behind"))
    assert norm.choose({"before": FOUR, "behind": TWO, "other": FOUR}, None) == "4>2"
    assert norm.choose({"before": TWO, "behind": TWO}, TWO) == "2>2"
    stem = SwitchableNorm(float_norm(), [pair_key(None, 4)], (None, "behind"))
    assert stem.choose({"behind": FOUR}, FOUR) == "float>4"
    with pytest.raises(SpecError, match="no norm for float>2"):
        stem.choose({"behind": TWO}, None)


def test_all_batch_norms_of_a_network_are_replaced_in_place() -> None:
    model = nn.Sequential(nn.Linear(3, 3), float_norm(), nn.Sequential(float_norm(), nn.LayerNorm(3)))
    expected = model.eval()(torch.ones(2, 3))
    made = switch_norms(model, lambda name, norm: SwitchableNorm(norm, ["4/4"]))
    assert list(made) == ["1", "2.0"] and model.get_submodule("2.0") is made["2.0"]
    assert torch.equal(model(torch.ones(2, 3)), expected) and not made["1"].training


def test_a_network_without_batch_norms_is_refused() -> None:
    with pytest.raises(LayerError, match="Sequential has no batch norm"):
        switch_norms(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), lambda _, norm: SwitchableNorm(norm, ["4/4"]))
