"""What networks for super-resolution share: enlarging by convolution and pixel shuffle, by bicubic interpolation, and the mean colour."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from lowbit.errors import SpecError
from lowbit.resize import SUPPORT, resize_matrix

SCALES = (2, 3, 4)
MEAN_COLOUR = (0.4488, 0.4371, 0.4040)  # of DIV2K's training pictures, red, green, blue, of pixels in 0 to 1


def check_scale(scale: int) -> None:
    """SpecError where a network cannot enlarge by ``scale``."""
    if scale not in SCALES:
        raise SpecError(f"scale={scale!r}: networks for super-resolution enlarge by {', '.join(map(str, SCALES))}")


def stages(scale: int) -> tuple[int, ...]:
    """The factors of the pixel shuffles that enlarge by ``scale`` one after the other: 4 is twice 2."""
    return (2, 2) if scale == 4 else (scale,)


def upsampler(scale: int, in_channels: int, out_channels: int) -> list[nn.Module]:
    """For each stage a 3x3 convolution to ``out_channels * factor**2`` channels and a pixel shuffle.

    Channel ``c * factor**2 + i * factor + j`` goes to row ``i`` and column ``j`` of the ``factor`` x ``factor`` pixels.
    """
    layers: list[nn.Module] = []
    for factor in stages(scale):
        layers += [nn.Conv2d(in_channels, out_channels * factor**2, 3, padding=1), nn.PixelShuffle(factor)]
        in_channels = out_channels
    return layers


class MeanShift(nn.Module):
    """Adds ``sign`` times the mean colour to pixels in 0 to 255, ``[N, 3, H, W]``."""

    shift: Tensor

    def __init__(self, sign: int) -> None:
        super().__init__()
        self.register_buffer("shift", sign * 255 * torch.tensor(MEAN_COLOUR).view(1, 3, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift


class Bicubic(nn.Module):
    """Enlarges ``[N, 3, H, W]`` bicubically, as ``lowbit.resize.imresize`` does, by a fixed convolution and a pixel shuffle.

    H and W are at least 2. There is nothing in it to train or to quantize.
    """

    kernel: Tensor

    def __init__(self, scale: int) -> None:
        super().__init__()
        self.scale = scale
        around = SUPPORT // 2  # pixels on each side that count
        axis = resize_matrix(4 * around + 1, scale)[2 * around * scale : (2 * around + 1) * scale, around : 3 * around + 1]
        kernel = torch.einsum("iy,jx->ijyx", axis, axis).flatten(0, 1)
        self.register_buffer("kernel", kernel.float().unsqueeze(1).repeat(3, 1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        for dim in (2, 3):
            size = x.shape[dim]
            edges = [x.narrow(dim, start, 1) for start in (1, 0, size - 1, size - 2)]  # mirrored, the edge pixel included
            x = torch.cat([*edges[:2], x, *edges[2:]], dim)
        return functional.pixel_shuffle(functional.conv2d(x, self.kernel, groups=3), self.scale)
