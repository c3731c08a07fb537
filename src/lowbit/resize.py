"""Bicubic resizing as in MATLAB's ``imresize``, with antialiasing: what super-resolution takes its low-resolution pictures from.

Source: Keys 1981, "Cubic Convolution Interpolation for Digital Image Processing", with a = -1/2; antialiasing and edges as in MATLAB.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lowbit.errors import DataError

SUPPORT = 4  # input pixels that the kernel spans where it is not stretched
WHITE = 255  # pixels are 0 to 255


def cubic(t: Tensor) -> Tensor:
    """Keys' kernel: ``1.5|t|**3 - 2.5|t|**2 + 1`` up to 1, ``-0.5|t|**3 + 2.5|t|**2 - 4|t| + 2`` up to 2, else 0.

    >>> cubic(torch.tensor([0.0, 0.5, -1.5, 2.0]))
    tensor([ 1.0000,  0.5625, -0.0625,  0.0000])
    """
    distance = t.abs()
    near = (1.5 * distance - 2.5) * distance.square() + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    return torch.where(distance <= 1, near, torch.where(distance <= 2, far, 0.0))


def resize_matrix(length: int, scale: float, *, antialiasing: bool = True) -> Tensor:
    """The matrix ``[ceil(length * scale), length]`` that resizes one axis, float64; each row sums to 1.

    Pixel ``k`` (from 1) of the result lies at ``u = k / scale + (1 - 1 / scale) / 2``. Input ``i`` counts with ``h(u - i)``; where the axis
    shrinks and ``antialiasing`` is on, with ``scale * h(scale * (u - i))``. Beyond an edge the input is mirrored, the edge pixel included.

    >>> resize_matrix(4, 0.5, antialiasing=False)
    tensor([[ 0.5000,  0.5625, -0.0625,  0.0000],
            [ 0.0000, -0.0625,  0.5625,  0.5000]], dtype=torch.float64)
    """
    stretch = scale if antialiasing and scale < 1 else 1.0
    out_length = math.ceil(length * scale)
    centre = torch.arange(1, out_length + 1, dtype=torch.float64) / scale + 0.5 * (1 - 1 / scale)
    first = (centre - SUPPORT / stretch / 2).floor()
    taps = first[:, None] + torch.arange(math.ceil(SUPPORT / stretch) + 2)
    weights = cubic(stretch * (centre[:, None] - taps))
    weights = weights / weights.sum(1, keepdim=True)
    mirrored = (taps.long() - 1) % (2 * length)
    inside = torch.minimum(mirrored, 2 * length - 1 - mirrored)
    return torch.zeros(out_length, length, dtype=torch.float64).scatter_add_(1, inside, weights)


def imresize(pixels: Tensor, scale: float, *, antialiasing: bool = True) -> Tensor:
    """``pixels`` resized bicubically by ``scale``, neither clipped nor rounded.

    Args:
        pixels: ``[..., H, W]`` of any type; the units stay.
        scale: Above 1 enlarges, below 1 shrinks.
        antialiasing: Stretches the kernel where the picture shrinks.

    Returns:
        float64 ``[..., ceil(H * scale), ceil(W * scale)]``: rows first, then columns, see ``resize_matrix``.

    Example:
        >>> imresize(torch.arange(16).view(1, 4, 4), 0.5).round(decimals=2)
        tensor([[[ 2.3000,  4.3800],
                 [10.6200, 12.7000]]], dtype=torch.float64)
    """
    height, width = pixels.shape[-2:]
    rows, columns = (resize_matrix(length, scale, antialiasing=antialiasing) for length in (height, width))
    return rows.to(pixels.device) @ pixels.double() @ columns.T.to(pixels.device)


def round_pixels(pixels: Tensor) -> Tensor:
    """Values within 0 to 255, rounded half to even, as they are in a picture of 8 bits; the type stays.

    >>> round_pixels(torch.tensor([-3.0, 0.5, 1.5, 300.0]))
    tensor([  0.,   0.,   2., 255.])
    """
    return pixels.clamp(0, WHITE).round()


def crop_to_multiple(picture: Tensor, scale: int) -> Tensor:
    """The upper left part of ``[..., H, W]`` whose sides are multiples of ``scale``; DataError where nothing is left."""
    height, width = (side - side % scale for side in picture.shape[-2:])
    if not height or not width:
        raise DataError(f"a picture of {picture.shape[-1]} x {picture.shape[-2]} pixels is smaller than the scale {scale}")
    return picture[..., :height, :width]


def shrink(picture: Tensor, scale: int) -> Tensor:
    """The low-resolution picture that belongs to a high-resolution one: shrunk ``scale`` times, clipped and rounded to 8 bits.

    Args:
        picture: uint8 ``[..., H, W]``, both sides multiples of ``scale``.
        scale: 1 or more.

    Returns:
        uint8 ``[..., H / scale, W / scale]``.
    """
    return round_pixels(imresize(picture, 1 / scale)).to(torch.uint8)


def enlarge(picture: Tensor, scale: int) -> Tensor:
    """``[..., H, W]`` of pixels in 0 to 255, enlarged ``scale`` times, clipped and rounded: what super-resolution has to beat."""
    return round_pixels(imresize(picture, scale))
