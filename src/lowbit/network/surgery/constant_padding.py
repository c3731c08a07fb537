"""Convolutions whose padding is a step of its own: another constant than zero behind the quantizer of the input, or zeros before it."""

from __future__ import annotations

from typing import Any

from torch import nn

from lowbit.network.calls import Call, input_of, with_input
from lowbit.network.insert import set_input_transform
from lowbit.network.layers import CONVOLUTIONS

PADDING = "input_padding"  # the submodule that pads
_PADS: tuple[Any, ...] = (nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d)


def pad_with(layer: nn.Module, value: float) -> bool:
    """Let the convolution ``layer`` pad its input with ``value`` from now on; whether it pads with zeros until now.

    A submodule pads what the input quantizer gives, and the convolution itself pads no more. Call it once the quantizer is in place.

    >>> import torch
    >>> conv = nn.Conv1d(1, 1, 3, padding=1, bias=False)
    >>> _ = nn.init.ones_(conv.weight)
    >>> pad_with(conv, -0.5), conv(torch.ones(1, 1, 3)).tolist()
    (True, [[[1.5, 3.0, 1.5]]])
    """
    pad = _take_padding(layer, value)
    if pad is not None:
        setattr(layer, PADDING, pad)
        layer.register_forward_pre_hook(_pad, with_kwargs=True)
    return pad is not None


def pad_first(layer: nn.Module) -> bool:
    """Let the convolution ``layer`` pad its input with zeros before the quantizer of its input sees it; whether it pads with zeros.

    What it pads then lies on the quantizer's grid, which need not have a level at 0.

    >>> import torch
    >>> conv = nn.Conv1d(1, 1, 3, padding=1)
    >>> pad_first(conv), conv.padding, conv(torch.ones(1, 1, 3)).shape
    (True, (0,), torch.Size([1, 1, 3]))
    """
    pad = _take_padding(layer, 0.0)
    if pad is not None:
        set_input_transform(layer, pad)
    return pad is not None


def _take_padding(layer: nn.Module, value: float) -> nn.Module | None:
    """A module that pads with ``value`` as the convolution does with zeros, which pads no more; ``None`` where it does not."""
    if not isinstance(layer, CONVOLUTIONS) or layer.padding_mode != "zeros":
        return None
    pads = _pads(layer)
    if not any(pads):
        return None
    layer.padding = (0,) * len(layer.kernel_size)
    pad: nn.Module = _PADS[len(layer.kernel_size) - 1](pads, value)
    return pad


def _pads(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> tuple[int, ...]:
    """Elements before and behind, the last dimension first."""
    sides: list[tuple[int, int]] = []
    for dim, (size, dilation) in enumerate(zip(layer.kernel_size, layer.dilation, strict=True)):
        if layer.padding == "same":
            total = dilation * (size - 1)
            sides.append((total // 2, total - total // 2))
        else:
            one = 0 if isinstance(layer.padding, str) else layer.padding[dim]
            sides.append((one, one))
    return tuple(count for side in reversed(sides) for count in side)


def _pad(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    return with_input(args, kwargs, getattr(layer, PADDING)(input_of(args, kwargs)))
