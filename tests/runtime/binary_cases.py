"""Arguments of binary convolutions to compare kernels with the reference on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from lowbit.runtime.activation import Activation
from lowbit.runtime.layers.binary import pack_conv_weight

pair = st.integers(1, 3)
Pair = tuple[int, int]
Draw = Callable[[Any], Any]


def signs(shape: tuple[int, ...], generator: torch.Generator, *, has_zero: bool = False) -> Tensor:
    values = torch.randint(0, 3 if has_zero else 2, shape, generator=generator).float()
    return values - 1 if has_zero else 2 * values - 1


def any_window(draw: Draw) -> tuple[tuple[int, int, int], tuple[Pair, Pair, Pair, Pair], list[int]]:
    """Groups with input and output channels of each; kernel, stride, padding and dilation; the size of an image that they fit."""
    channels = draw(st.sampled_from([1, 1, 2, 3])), draw(st.integers(1, 70)), draw(st.integers(1, 40))
    kernel, stride, dilation = (draw(st.tuples(pair, pair)) for _ in range(3))
    padding = draw(st.tuples(st.integers(0, 3), st.integers(0, 3)))
    least = [max(d * (k - 1) + 1 - 2 * p, 1) for d, k, p in zip(dilation, kernel, padding, strict=True)]
    return channels, (kernel, stride, padding, dilation), [n + draw(st.integers(0, 8)) for n in least]


def any_convolution(data: st.DataObject) -> tuple[Any, ...]:
    """Arguments of ``binary_conv2d`` up to ``flip``, whose scale is 1: its output are the integers."""
    draw = data.draw
    (groups, inputs, outputs), (kernel, stride, padding, dilation), size = any_window(draw)
    pad_value, has_zero = draw(st.sampled_from([-1, 0, 1])), draw(st.booleans())
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(draw(st.integers(1, 3)), groups * inputs, *size, generator=generator)
    if draw(st.booleans()):
        x = x.contiguous(memory_format=torch.channels_last)
    threshold = torch.randn(groups * inputs, generator=generator) if draw(st.booleans()) else None
    flip = torch.rand(groups * inputs, generator=generator) > 0.5 if draw(st.booleans()) else None
    weight = signs((groups * outputs, inputs, *kernel), generator, has_zero=has_zero)
    return (
        x, *pack_conv_weight(weight, groups), torch.ones(groups * outputs), None, groups * inputs, kernel, stride, padding, dilation, groups,
        pad_value, threshold, flip,
    )  # fmt: skip


def any_activation(data: st.DataObject, channels: int) -> Tensor | None:
    """The table of an activation for each channel, or none."""
    if data.draw(st.booleans()):
        return None
    before, slope, after, low = torch.randn(4, channels, generator=torch.Generator().manual_seed(channels))
    return Activation(before, slope, after, 3 * low if data.draw(st.booleans()) else None, 6.0).table(channels)
