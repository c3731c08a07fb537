"""Convolutions that pad with a constant."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional

from lowbit.network.surgery.constant_padding import pad_with


@pytest.mark.parametrize(
    ("conv", "pads"),
    [
        (nn.Conv1d(2, 4, 3, padding=2), (2, 2)),
        (nn.Conv2d(2, 4, (3, 5), padding=(1, 2), stride=2), (2, 2, 1, 1)),
        (nn.Conv2d(2, 4, (2, 3), padding="same"), (1, 1, 0, 1)),
        (nn.Conv3d(2, 2, 3, padding=(0, 1, 2), groups=2), (2, 2, 1, 1, 0, 0)),
    ],
)
def test_the_input_is_padded_and_the_layer_pads_no_more(conv: nn.Conv2d, pads: tuple[int, ...]) -> None:
    x = torch.randn(2, 2, *(7,) * len(conv.kernel_size))
    plain = copy.deepcopy(conv)
    plain.padding = (0,) * len(conv.kernel_size)
    assert pad_with(conv, -0.375)
    torch.testing.assert_close(conv(x), plain(functional.pad(x, pads, value=-0.375)))
    torch.testing.assert_close(pickle.loads(pickle.dumps(copy.deepcopy(conv)))(x), conv(x))
    assert conv.state_dict().keys() == plain.state_dict().keys()


def test_padding_with_zero_changes_nothing() -> None:
    conv, x = nn.Conv2d(2, 4, 3, padding=1), torch.randn(2, 2, 7, 7)
    before = conv(x)
    assert pad_with(conv, 0.0)
    torch.testing.assert_close(conv(x), before)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(1, 1, 3),
        nn.Conv2d(1, 1, 3, padding="valid"),
        nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect"),
        nn.Linear(2, 2),
        nn.ConvTranspose2d(1, 1, 3, padding=1),
    ],
)
def test_layers_that_do_not_pad_with_zeros_are_left_alone(layer: nn.Module) -> None:
    assert not pad_with(layer, 1.0) and not layer._forward_pre_hooks
