"""Max pooling of images in the memory format that low-bit layers read and write."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from lowbit.runtime.arguments import Window
from lowbit.runtime.cpu.target import target_loops
from lowbit.runtime.layers.operator import register_operator


def _empty_max_pool2d(x: Tensor, window: Window) -> Tensor:
    rows, columns = window.output_size(x.shape[2:])
    n, channels = x.shape[:2]
    strides = (rows * columns * channels, 1, columns * channels, channels)
    return torch.empty_strided((n, channels, rows, columns), strides, dtype=x.dtype, device=x.device)


@register_operator(_empty_max_pool2d)
def max_pool2d(x: Tensor, window: Window) -> Tensor:
    """The largest value of each channel in each window, NaN where there is one; places outside the image do not count.

    Args:
        x: ``[N, C, H, W]``; fastest is float32, channels-last, of a multiple of 64 channels: other inputs are pooled by torch.
        window: Geometry of the pooling.

    Returns:
        ``[N, C, rows, columns]``, channels-last.

    Raises:
        SpecError: The image is smaller than the kernel.

        >>> max_pool2d(torch.arange(6.0).view(1, 1, 2, 3), Window((2, 2))).tolist()
        [[[[4.0, 5.0]]]]
    """
    loops = target_loops("image_loops") if x.is_cpu and x.dtype == torch.float32 and x.numel() else None
    has_gradient = torch.is_grad_enabled() and x.requires_grad
    if loops is None or has_gradient or x.shape[1] % (loops.VECTOR * loops.AT_ONCE):
        y = functional.max_pool2d(x, tuple(window.kernel_size), tuple(window.stride), tuple(window.padding), tuple(window.dilation))
        return y.contiguous(memory_format=torch.channels_last)
    y = _empty_max_pool2d(x, window)
    pixels = x.detach().contiguous(memory_format=torch.channels_last).resolve_neg().permute(0, 2, 3, 1)
    loops.max_pool(pixels.numpy(), y.permute(0, 2, 3, 1).numpy(), window.numbers)
    return y
