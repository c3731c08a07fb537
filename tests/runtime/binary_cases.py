"""Arguments of binary convolutions to compare kernels with the reference on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from lowbit.runtime.activation import Activation
from lowbit.runtime.arguments import Epilogue, SignLayer, Window
from lowbit.runtime.layers.binary import pack_conv_weight

pair = st.integers(1, 3)
Pair = tuple[int, int]
Draw = Callable[[Any], Any]


def signs(shape: tuple[int, ...], generator: torch.Generator, *, has_zero: bool = False) -> Tensor:
    values = torch.randint(0, 3 if has_zero else 2, shape, generator=generator).float()
    return values - 1 if has_zero else 2 * values - 1


def any_window(draw: Draw, pad_values: tuple[int, ...] = (0,)) -> tuple[tuple[int, int], Window, list[int]]:
    """Input and output channels of each group, a window, and the size of an image that it fits."""
    groups, *channels = draw(st.sampled_from([1, 1, 2, 3])), draw(st.integers(1, 70)), draw(st.integers(1, 40))
    kernel, stride, dilation = (draw(st.tuples(pair, pair)) for _ in range(3))
    padding = draw(st.tuples(st.integers(0, 3), st.integers(0, 3)))
    least = [max(d * (k - 1) + 1 - 2 * p, 1) for d, k, p in zip(dilation, kernel, padding, strict=True)]
    size = [n + draw(st.integers(0, 8)) for n in least]
    return (channels[0], channels[1]), Window(kernel, stride, padding, dilation, groups, draw(st.sampled_from(pad_values))), size


Convolution = tuple[Tensor, SignLayer[Tensor], Window, Epilogue[Tensor]]


def any_convolution(data: st.DataObject) -> Convolution:
    """Arguments of ``binary_conv2d`` whose scale is 1: its outputs are the integers."""
    draw = data.draw
    (inputs, outputs), window, size = any_window(draw, (-1, 0, 1))
    has_zero = draw(st.booleans())
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    channels, out = window.groups * inputs, window.groups * outputs
    x = torch.randn(draw(st.integers(1, 3)), channels, *size, generator=generator)
    if draw(st.booleans()):
        x = x.contiguous(memory_format=torch.channels_last)
    threshold = torch.randn(channels, generator=generator) if draw(st.booleans()) else None
    flip = torch.rand(channels, generator=generator) > 0.5 if draw(st.booleans()) else None
    weight = signs((out, inputs, *window.kernel_size), generator, has_zero=has_zero)
    return x, sign_layer(weight, window.groups, threshold, flip), window, Epilogue(torch.ones(out))


def sign_layer(weight: Tensor, groups: int = 1, threshold: Tensor | None = None, flip: Tensor | None = None) -> SignLayer[Tensor]:
    """A layer of these weights of -1, 0 and +1."""
    words, mask = pack_conv_weight(weight, groups)
    return SignLayer(words, weight.shape[1] * groups, mask, threshold, flip)


def any_activation(data: st.DataObject, channels: int) -> Tensor | None:
    """The table of an activation for each channel, or none."""
    if data.draw(st.booleans()):
        return None
    before, slope, after, low = torch.randn(4, channels, generator=torch.Generator().manual_seed(channels))
    return Activation(before, slope, after, 3 * low if data.draw(st.booleans()) else None, 6.0).table(channels)
