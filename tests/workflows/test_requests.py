from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from lowbit.cli.request import make_policy, make_settings
from lowbit.errors import SpecError, UnknownNameError
from lowbit.spec import LayerBits

LAYER = nn.Linear(2, 2)


def test_bits_that_are_not_given_are_eight() -> None:
    policy = make_policy(None, None, None)
    assert policy.bits_for("a", LAYER) == LayerBits(8, 8)
    assert policy.bits_for("a", LAYER, position="first") == LayerBits(8, 8)


def test_first_and_last_layer_get_at_least_eight_bits_unless_told_otherwise() -> None:
    assert make_policy(None, "2", "4").bits_for("a", LAYER, position="last") == LayerBits(8, 8)
    assert make_policy(None, "2", "4", first_last="6").bits_for("a", LAYER, position="first") == LayerBits(6, 6)
    assert make_policy(None, "2", "4", first_last="same").bits_for("a", LAYER, position="first") == LayerBits(2, 4)


def test_float_is_a_bit_width() -> None:
    assert make_policy(None, "4", "float").bits_for("a", LAYER) == LayerBits(4, None)


def test_only_leaves_all_other_layers_in_float_and_keep_wins_over_it() -> None:
    policy = make_policy(None, "4", "8", only=["body.*"], keep=["body.3"])
    assert policy.bits_for("body.1", LAYER) == LayerBits(4, 8)
    assert policy.bits_for("body.3", LAYER) == LayerBits(None, None)
    assert policy.bits_for("head", LAYER, position="last") == LayerBits(None, None)


def test_a_policy_file_is_read_and_other_bits_beside_it_are_an_error(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    make_policy(None, "3", "5").to_yaml(path)
    assert make_policy(path, None, None, keep=["head"]).bits_for("head", LAYER) == LayerBits(None, None)
    assert make_policy(path, None, None).bits_for("body", LAYER) == LayerBits(3, 5)
    with pytest.raises(SpecError, match="leave out --weight-bits"):
        make_policy(path, "3", None)


@pytest.mark.parametrize("bits", ["0", "9", "-1", "four", "2.5"])
def test_bits_out_of_range_name_the_option(bits: str) -> None:
    with pytest.raises(SpecError, match="--weight-bits"):
        make_policy(None, bits, None)


def test_settings_come_from_shortcuts_and_pairs() -> None:
    settings = make_settings("round_to_nearest", {"weight_observer": "min_max", "iterations": None}, ["fold_batch_norm=no"])
    assert settings == {"weight_observer": "min_max", "fold_batch_norm": "no"}


def test_an_unknown_method_or_setting_names_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'round_to_nearest'"):
        make_settings("round_to_nearst", {}, None)
    with pytest.raises(UnknownNameError, match="Did you mean 'weight_observer'"):
        make_settings("round_to_nearest", {}, ["weight_obsever=mse"])


def test_a_setting_of_other_methods_names_them() -> None:
    with pytest.raises(UnknownNameError, match=r"Methods that have it: .*adaround"):
        make_settings("round_to_nearest", {"iterations": 10}, None)


def test_a_setting_of_the_wrong_type_says_what_is_allowed() -> None:
    with pytest.raises(SpecError, match="fold_batch_norm must be bool, got 'perhaps'"):
        make_settings("round_to_nearest", {}, ["fold_batch_norm=perhaps"])


def test_a_setting_given_in_two_ways_is_an_error() -> None:
    with pytest.raises(SpecError, match="weight_observer was given as an option of its own too"):
        make_settings("round_to_nearest", {"weight_observer": "mse"}, ["weight_observer=min_max"])
