"""What the binary operators refuse: compiled loops read what they are told to, so nothing that does not fit may reach them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lowbit.errors import LayerError, SpecError
from lowbit.runtime.activation import ROWS
from lowbit.runtime.cpu.bits import WORD, words_for


def check_packed_input(x: Tensor, in_channels: int, groups: int, *others: object) -> None:
    """SpecError where packed signs do not fit a layer, or what needs numbers is asked of them too."""
    if x.dim() != 4 or x.shape[3] != words_for(in_channels) or (groups > 1 and in_channels // groups % WORD):
        raise SpecError(
            f"packed signs of {in_channels} channels in {groups} groups must be int32 [N, H, W, {words_for(in_channels)}] with whole words for "
            f"each group, got {tuple(x.shape)}"
        )
    if any(other is not None and other is not False for other in others):
        raise SpecError("packed signs have no threshold, flip or input scaling: these need the numbers")


def check_input(x: Tensor, in_channels: int, rank: int | None) -> None:
    """SpecError where an input does not fit a layer.

    Args:
        x: Channels are dimension 1 of an image, else the last one.
        in_channels: Of the layer.
        rank: 4 for images; ``None`` where any number of dimensions will do.
    """
    if x.dtype != torch.float32:
        raise SpecError(f"a binary layer takes float32 inputs, got {x.dtype}")
    if (rank is not None and x.dim() != rank) or not x.dim() or x.shape[1 if rank else -1] != in_channels:
        raise SpecError(f"a binary layer of {in_channels} input channels got an input of shape {tuple(x.shape)}")


def check_layer(
    words: Tensor,
    mask: Tensor | None,
    scale: Tensor,
    bias: Tensor | None,
    in_channels: int,
    groups: int,
    kernel_size: Sequence[int] | None,
    pad_value: int,
    threshold: Tensor | None,
    flip: Tensor | None,
    activation: Tensor | None = None,
    out_threshold: Tensor | None = None,
    out_flip: Tensor | None = None,
) -> None:
    """SpecError where the parts of a layer do not fit each other; ``kernel_size`` is ``None`` for linear layers."""
    out = words.shape[0] if words.dim() else 0
    if groups < 1 or in_channels < 1 or in_channels % groups or out % groups:
        raise SpecError(f"{in_channels} input and {out} output channels cannot be divided into {groups} groups")
    expected = (out, *(kernel_size or ()), words_for(in_channels // groups))
    for name, tensor, shape, dtype in (
        ("packed weights", words, expected, torch.int32),
        ("mask", mask, expected, torch.int32),
        ("scale", scale, (out,), torch.float32),
        ("bias", bias, (out,), torch.float32),
        ("threshold", threshold, (in_channels,), torch.float32),
        ("flip", flip, (in_channels,), torch.bool),
        ("activation", activation, (ROWS, out), torch.float32),
        ("out_threshold", out_threshold, (out,), torch.float32),
        ("out_flip", out_flip, (out,), torch.bool),
    ):
        if tensor is not None and (tensor.shape != shape or tensor.dtype != dtype):
            raise SpecError(f"{name} must be {_word(dtype)} {shape}, got {_word(tensor.dtype)} {tuple(tensor.shape)}")
        if tensor is not None and tensor.device != words.device:
            raise SpecError(f"{name} must be on {words.device} with the packed weights, got {tensor.device}")
    if out_flip is not None and out_threshold is None:
        raise SpecError("out_flip needs out_threshold")
    if pad_value not in (-1, 0, 1):
        raise SpecError(f"pad_value must be -1, 0 or 1, got {pad_value}")


def check_window(kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]) -> None:
    """SpecError unless each has a vertical and a horizontal number, padding of at least 0 and the others of at least 1."""
    for name, pair, least in (("kernel_size", kernel_size, 1), ("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        if len(pair) != 2 or min(pair) < least:
            raise SpecError(f"{name} must be two whole numbers of at least {least}, got {list(pair)}")


def check_residual(residual: Tensor | None, x: Tensor) -> None:
    """SpecError where what is added is not float32, or on another device than the input."""
    if residual is not None and (residual.dtype != torch.float32 or residual.device != x.device):
        raise SpecError(f"residual must be float32 on {x.device}, got {_word(residual.dtype)} on {residual.device}")


def refuse_gradients(operator: str, *tensors: Tensor | None) -> None:
    """LayerError where a gradient would be expected to flow through ``operator``."""
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        raise LayerError(
            f"{operator} has no derivative, and one of its tensors requires a gradient. Call it under torch.no_grad(); to train, use the "
            "network from lowbit.prepare and compile it afterwards."
        )


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
