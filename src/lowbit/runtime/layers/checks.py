"""Checks of the operators' arguments: compiled loops do not check bounds, so arguments must be valid before they reach them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lowbit.errors import LayerError, SpecError
from lowbit.runtime.activation import ROWS
from lowbit.runtime.arguments import Epilogue, SignLayer, Window
from lowbit.runtime.cpu.bits import WORD, words_for


def check_packed_input(x: Tensor, layer: SignLayer[Tensor], groups: int, input_scaling: bool) -> None:
    """Raise SpecError where packed signs do not fit a layer, or the layer needs the float inputs."""
    channels = layer.in_channels
    if x.dim() != 4 or x.shape[3] != words_for(channels) or (groups > 1 and channels // groups % WORD):
        raise SpecError(
            f"packed signs of {channels} channels in {groups} groups must be int32 [N, H, W, {words_for(channels)}] with whole words for "
            f"each group, got {tuple(x.shape)}"
        )
    if layer.threshold is not None or layer.flip is not None or input_scaling:
        raise SpecError("packed signs have no threshold, flip or input scaling: these need float inputs")


def check_input(x: Tensor, in_channels: int, rank: int | None) -> None:
    """Raise SpecError where an input does not fit a layer.

    Args:
        x: The input; its channels are dimension 1 of an image, else the last one.
        in_channels: Number of input channels of the layer.
        rank: 4 for images; ``None`` for any number of dimensions.
    """
    if x.dtype != torch.float32:
        raise SpecError(f"a binary layer takes float32 inputs, got {x.dtype}")
    shape = x.shape
    if (rank is not None and len(shape) != rank) or not shape or shape[1 if rank else -1] != in_channels:
        raise SpecError(f"a binary layer of {in_channels} input channels got an input of shape {tuple(shape)}")


def check_layer(layer: SignLayer[Tensor], window: Window | None, epilogue: Epilogue[Tensor]) -> None:
    """Raise SpecError where the parts of a layer do not fit each other; linear layers have no window."""
    channels, groups, kernel = layer.in_channels, 1 if window is None else window.groups, () if window is None else window.kernel_size
    out = layer.words.shape[0] if layer.words.dim() else 0
    if groups < 1 or channels < 1 or channels % groups or out % groups:
        raise SpecError(f"{channels} input and {out} output channels cannot be divided into {groups} groups")
    expected = (out, *kernel, words_for(channels // groups))
    check_tensors(
        layer.words.device,
        ("packed weights", layer.words, expected, torch.int32),
        ("mask", layer.mask, expected, torch.int32),
        ("scale", epilogue.scale, (out,), torch.float32),
        ("bias", epilogue.bias, (out,), torch.float32),
        ("threshold", layer.threshold, (channels,), torch.float32),
        ("flip", layer.flip, (channels,), torch.bool),
        ("activation", epilogue.activation, (ROWS, out), torch.float32),
        ("out_threshold", epilogue.out_threshold, (out,), torch.float32),
        ("out_flip", epilogue.out_flip, (out,), torch.bool),
    )
    if epilogue.out_flip is not None and epilogue.out_threshold is None:
        raise SpecError("out_flip needs out_threshold")
    if window is None and (epilogue.input_scaling or epilogue.out_threshold is not None):
        raise SpecError("a linear layer has no input scaling and returns floats: leave out input_scaling and out_threshold")


def check_tensors(device: torch.device, *expected: tuple[str, Tensor | None, tuple[int, ...], torch.dtype]) -> None:
    """Raise SpecError where a tensor does not have the expected shape and type, or is not on ``device``."""
    for name, tensor, shape, dtype in expected:
        if tensor is not None and (tensor.shape != shape or tensor.dtype != dtype):
            raise SpecError(f"{name} must be {_word(dtype)} {shape}, got {_word(tensor.dtype)} {tuple(tensor.shape)}")
        if tensor is not None and tensor.device != device:
            raise SpecError(f"{name} must be on {device} with the packed weights, got {tensor.device}")


def check_codes(x: Tensor, codes: Tensor, groups: int, scale: Tensor, bias: Tensor | None, kernel: Sequence[int] | None) -> None:
    """Raise SpecError where an 8-bit layer does not fit its input; linear layers have no kernel size."""
    rank, out = 2 if kernel is None else 4, codes.shape[0] if codes.dim() else 0
    if codes.dtype != torch.int8 or codes.dim() != rank or not codes.numel():
        raise SpecError(f"codes must be int8 of {rank} dimensions and not empty, got {_word(codes.dtype)} {tuple(codes.shape)}")
    if kernel is not None and tuple(codes.shape[2:]) != tuple(kernel):
        raise SpecError(f"codes of kernel size {list(codes.shape[2:])} do not fit a window of {list(kernel)}")
    if groups < 1 or out % groups:
        raise SpecError(f"{out} output channels cannot be divided into {groups} groups")
    channels = codes.shape[1] * groups
    fits = x.dim() > 0 and x.shape[-1] == channels if kernel is None else x.dim() == 4 and x.shape[1] == channels
    if not x.is_floating_point() or not fits:
        raise SpecError(f"an 8-bit layer of {channels} input channels got an input of {_word(x.dtype)} {tuple(x.shape)}")
    check_tensors(
        codes.device, ("input", x, tuple(x.shape), x.dtype), ("scale", scale, (out,), torch.float32), ("bias", bias, (out,), torch.float32)
    )


def check_residual(residual: Tensor | None, x: Tensor) -> None:
    """Raise SpecError where the residual is not float32, or not on the device of the input."""
    if residual is not None and (residual.dtype != torch.float32 or residual.device != x.device):
        raise SpecError(f"residual must be float32 on {x.device}, got {_word(residual.dtype)} on {residual.device}")


def refuse_gradients(operator: str, *tensors: Tensor | None) -> None:
    """Raise LayerError where a gradient would have to flow through ``operator``."""
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        raise LayerError(
            f"{operator} has no derivative, and one of its tensors requires a gradient. Call it under torch.no_grad(); to train, use the "
            "network from lowbit.prepare and compile it afterwards."
        )


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
