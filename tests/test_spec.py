from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from lowbit.errors import SpecError
from lowbit.spec import BitPolicy, Granularity, LayerBits, parse_bits


@pytest.mark.parametrize(
    "granularity",
    [
        Granularity.tensor(), Granularity.channel(0), Granularity.channel(1), Granularity.group(6), Granularity.group(4, axis=1),
        Granularity.over(0, 1), Granularity.over(3, 1), Granularity.over(0, -2), Granularity.over(0, 1, 2, 3), Granularity.channel(-1),
    ],
    ids=str,
)  # fmt: skip
def test_broadcast_and_flatten_are_undone_by_their_inverses(granularity: Granularity) -> None:
    x = torch.arange(8 * 4 * 3 * 3, dtype=torch.float32).reshape(8, 4, 3, 3)
    assert torch.equal(granularity.restore(granularity.broadcast(x), x.shape), x)
    assert torch.equal(granularity.unflatten(granularity.flatten(x), x.shape), x)


def test_rows_of_flatten_follow_the_scale_in_order() -> None:
    x = torch.arange(2 * 3 * 4, dtype=torch.float32).reshape(2, 3, 4)
    granularity = Granularity.channel(1)
    means = granularity.flatten(x).mean(1)
    assert means.reshape(granularity.scale_shape(x)).shape == (1, 3, 1)
    assert means[1].item() == x[:, 1].mean().item()


@pytest.mark.parametrize("axes", [(0, 1), (1, 0), (-3, 1), (2,), (), (0, 1, 2)], ids=str)
def test_one_scale_for_each_combination_of_indices(axes: tuple[int, ...]) -> None:
    x = torch.randn(2, 3, 4)
    granularity = Granularity.over(*axes)
    scale = granularity.flatten(x.abs()).amax(1).reshape(granularity.scale_shape(x))
    kept = {axis % 3 for axis in axes}
    others = tuple(axis for axis in range(3) if axis not in kept)
    expected = x.abs().amax(others, keepdim=bool(axes)) if others else x.abs()
    assert torch.equal(scale, expected) and granularity.shared_axes(x) == others
    assert torch.equal((granularity.broadcast(x) / scale).abs().amax(), torch.tensor(1.0))


def test_tensor_and_channel_are_cases_of_axes() -> None:
    assert Granularity.over() == Granularity.tensor() and Granularity.over(1) == Granularity.channel(1)
    kinds = [granularity.kind for granularity in (Granularity.over(), Granularity.over(1), Granularity.over(0, 1), Granularity.group(4))]
    assert kinds == ["per_tensor", "per_channel", "per_axes", "per_group"]
    assert Granularity.over(-1, 0).counted_from_zero(4) == Granularity.over(3, 0)


@pytest.mark.parametrize(
    "granularity",
    [Granularity.tensor(), Granularity.channel(1), Granularity.group(64, 1), Granularity.over(0, 1), Granularity.over(0, -1)],
    ids=str,
)
def test_text_gives_the_granularity_back(granularity: Granularity) -> None:
    assert Granularity.parse(str(granularity), granularity.axis) == granularity


@pytest.mark.parametrize("text", ["per_sample", "axes:", "axes:0,a", "axes:0,0", "group:0", "group:x", ""])
def test_text_that_is_no_granularity_is_refused(text: str) -> None:
    with pytest.raises(SpecError, match=r"axes must differ|group size must be|Allowed: per_tensor, per_channel, group:SIZE"):
        Granularity.parse(text)


def test_groups_lie_within_one_axis() -> None:
    with pytest.raises(SpecError, match="groups lie within the indices of one axis"):
        Granularity((0, 1), 4)


def test_a_group_size_that_does_not_divide_is_refused() -> None:
    with pytest.raises(SpecError, match="does not divide the 36 weights"):
        Granularity.group(5).broadcast(torch.zeros(8, 4, 3, 3))


def test_first_and_last_layer_keep_eight_bits_and_later_rules_win() -> None:
    layer = nn.Linear(2, 2)
    policy = (
        BitPolicy.uniform(2, 4)
        .with_rule(match="layer1.*", weight=3)
        .with_rule(type="Linear", activation="float")
        .with_rule(match="layer1.0", weight=5)
    )
    assert policy.bits_for("stem", nn.Conv2d(1, 1, 1), position="first") == LayerBits(8, 8)
    assert policy.bits_for("stem", nn.Conv2d(1, 1, 1)) == LayerBits(2, 4)
    assert policy.bits_for("layer1.1", layer) == LayerBits(3, None)
    assert policy.bits_for("layer1.0", layer) == LayerBits(5, None)


def test_a_policy_survives_its_yaml_file(tmp_path: Path) -> None:
    policy = BitPolicy.uniform(4, None).with_rule(match="a.*", weight=8).keep_float("head")
    policy = replace(policy, order=("b", "a"), network={"model": "x", "preprocessing": {"size": [8, 8]}})
    policy.to_yaml(tmp_path / "policy.yaml")
    found = BitPolicy.from_yaml(tmp_path / "policy.yaml")
    assert found == policy and found.network == policy.network
    found.to_yaml(tmp_path / "again.yaml")
    assert (tmp_path / "again.yaml").read_text() == (tmp_path / "policy.yaml").read_text()


@pytest.mark.parametrize(
    "text", ["rules: 3", "default: {weight: 9}", "rules: [{match: a, type: b}]", "surprise: 1", "a: [", "rules: [{match: a, bits: 3}]"]
)
def test_a_broken_policy_file_names_the_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(SpecError):
        BitPolicy.from_yaml(path)


def test_a_rule_that_matches_nothing_lists_the_layers() -> None:
    with pytest.raises(SpecError, match=r"matches no layer\. The model has: stem, head"):
        BitPolicy().with_rule(match="conv*", weight=2).check({"stem": nn.Linear(1, 1), "head": nn.Linear(1, 1)})


@pytest.mark.parametrize("bits", [0, 9, -1, 2.5, "two", True])
def test_bits_out_of_range_are_refused(bits: object) -> None:
    with pytest.raises(SpecError, match="1 to 8"):
        parse_bits(bits, "weight_bits")


def test_thirty_two_bits_mean_float() -> None:
    assert parse_bits("32", "w") is None and parse_bits("float", "w") is None and parse_bits("4", "w") == 4


def test_outputs_have_bits_of_their_own_which_rules_change_alone() -> None:
    layer = nn.Linear(2, 2)
    policy = BitPolicy.uniform(2, 4, 3).with_rule(match="a", output=6).with_rule(match="b", output="float").keep_float("c")
    assert policy.bits_for("x", layer, position="last") == LayerBits(8, 8, 8)
    assert [policy.bits_for(name, layer) for name in "xabc"] == [
        LayerBits(2, 4, 3), LayerBits(2, 4, 6), LayerBits(2, 4), LayerBits(None, None),
    ]  # fmt: skip


def test_outputs_and_merges_survive_the_file_and_are_not_written_where_nothing_is_said(tmp_path: Path) -> None:
    for policy in (
        BitPolicy.uniform(4, 8, 8, merge_bits=8).with_rule(match="a", output=5),
        BitPolicy.uniform(4, 8).with_merges("float"),
        BitPolicy.uniform(4, 8).with_rule(match="a", output="float"),
    ):
        policy.to_yaml(tmp_path / "policy.yaml")
        assert BitPolicy.from_yaml(tmp_path / "policy.yaml") == policy
    assert BitPolicy.uniform(4, None).to_dict() == {
        "default": {"weight": 4, "activation": "float"}, "first_last": {"weight": 8, "activation": "float"}, "rules": [],
    }  # fmt: skip


def test_a_policy_file_of_before_outputs_and_merges_is_read_as_it_was_meant(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text("default: {weight: 4, activation: 8}\nfirst_last: null\nrules: [{match: head, weight: 8}]\n")
    assert BitPolicy.from_yaml(path) == BitPolicy(LayerBits(4, 8)).with_rule(match="head", weight=8)


def test_merges_keep_what_was_said_unless_something_is_said() -> None:
    policy = BitPolicy().with_merges(6)
    assert (
        policy.with_merges(None).merges == 6 and policy.with_merges("float").merges == "float" and policy.with_merges(32).merges == "float"
    )
    with pytest.raises(SpecError, match="merge_bits: bit_width must be a whole number from 1 to 8, got 9"):
        policy.with_merges(9)
