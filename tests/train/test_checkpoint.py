"""A stopped training goes on to the same bits; nothing that was saved is lost."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from tests.train.training import RECIPE, assert_same, killed, network, train

from lowbit.registry import MethodInfo, list_methods

METHODS = list_methods(kind="training")


def bits_of(info: MethodInfo) -> dict[str, int | None]:
    """Few bits that the method supports."""
    activations = info.activation_bits
    return {
        "weight_bits": info.weight_bits[min(1, len(info.weight_bits) - 1)],
        "activation_bits": None if activations is None else activations[0],
    }


@pytest.mark.parametrize("info", METHODS, ids=lambda info: info.name)
def test_every_method_goes_on_to_the_same_bits_after_a_kill(info: MethodInfo, tmp_path: Path) -> None:
    settings = {"method": info.name, "recipe": RECIPE, **bits_of(info)}
    whole = train(**settings)
    killed(8, tmp_path, save_every="7", **settings)  # saved in the middle of the second epoch, killed a step later
    assert_same(train(out=tmp_path, save_every="7", **settings), whole)
