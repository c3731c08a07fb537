"""A quantizer with parameters of its own for each width."""

from __future__ import annotations

import copy

import pytest
import torch

from lowbit.errors import SpecError
from lowbit.quantizers import LearnedScaleQuantizer
from lowbit.quantizers.switchable import SwitchableQuantizer

X = torch.linspace(-0.5, 2.0, 101)


def quantizer() -> SwitchableQuantizer:
    made = SwitchableQuantizer((8, 4, 2), lambda bits: LearnedScaleQuantizer(bits, signed=False))
    made.initialize(X)
    return made


def test_each_width_is_the_quantizer_that_was_made_for_it() -> None:
    switchable = quantizer()
    for bits in (4, 2, 8):
        alone = LearnedScaleQuantizer(bits, signed=False)
        alone.initialize(X)
        switchable.set_bit_width(bits)
        assert torch.equal(switchable(X), alone(X)) and torch.equal(switchable.encode(X).decode(), alone(X))
        assert switchable.encode(X).bit_width == switchable.bits == bits


def test_only_the_selected_width_gets_a_gradient() -> None:
    switchable = quantizer()
    switchable.set_bit_width(4)
    switchable(X).sum().backward()
    assert [parameter.grad is not None for parameter in switchable.parameters()] == [False, True, False]


def test_there_and_back_changes_nothing_and_copies_keep_every_width() -> None:
    switchable = quantizer()
    found = {}
    for bits in (8, 2, 4, 8, 4, 2):
        switchable.set_bit_width(bits)
        assert torch.equal(found.setdefault(bits, switchable(X)), switchable(X))
    copied = copy.deepcopy(switchable)
    copied.set_bit_width(8)
    assert torch.equal(copied(X), found[8]) and torch.equal(switchable(X), found[2])
    switchable.set_bit_width(None)
    assert torch.equal(switchable(X), X)


def test_other_widths_are_refused_with_those_there_are() -> None:
    with pytest.raises(SpecError, match="SwitchableQuantizer has bit-widths 8, 4, 2, got 3"):
        quantizer().set_bit_width(3)
