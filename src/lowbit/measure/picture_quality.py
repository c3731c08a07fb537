"""How close a picture is to the original: PSNR and SSIM, on luma or on colours.

Source: Wang, Bovik, Sheikh, Simoncelli 2004, "Image Quality Assessment: From Error Visibility to Structural Similarity" (SSIM); ITU-R BT.601
(luma). Borders and rounding as benchmarks of super-resolution have them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from lowbit.errors import DataError

PEAK = 255.0
BT601 = (65.481 / 255, 128.553 / 255, 24.966 / 255)  # red, green, blue: luma of 16 to 235 from pixels in 0 to 255
BT601_256 = (65.738 / 256, 129.057 / 256, 25.064 / 256)  # the same for 8-bit arithmetic; what EDSR's program uses
WINDOW, SIGMA = 11, 1.5  # of SSIM's Gaussian window, in pixels


def luma(pixels: Tensor, weights: tuple[float, float, float] = BT601) -> Tensor:
    """``16 + sum(weight * colour)``, not rounded: float64 ``[..., 1, H, W]`` from RGB ``[..., 3, H, W]`` in 0 to 255.

    >>> luma(torch.full((3, 1, 1), 255)).item()
    235.0
    """
    factors = torch.tensor(weights, dtype=torch.float64, device=pixels.device).view(3, 1, 1)
    return 16 + (pixels.double() * factors).sum(-3, keepdim=True)


def without_border(pixels: Tensor, border: int) -> Tensor:
    """``[..., H, W]`` without ``border`` pixels on each side; DataError where nothing is left."""
    height, width = pixels.shape[-2:]
    if min(height, width) <= 2 * border:
        raise DataError(f"a picture of {width} x {height} pixels has nothing left without a border of {border} pixels")
    return pixels[..., border : height - border, border : width - border]


def psnr(pictures: Tensor, originals: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each picture: ``10 log10(255**2 / mean squared difference)`` in dB, infinite where there is none.

    Args:
        pictures: ``[N, C, H, W]`` in 0 to 255.
        originals: The same shape.

    Returns:
        float64 ``[N]``.

    Example:
        >>> psnr(torch.zeros(2, 1, 1, 2), torch.tensor([[[[0.0, 0.0]]], [[[255.0, 0.0]]]])).tolist()
        [inf, 3.010299956639812]
    """
    squares = (pictures.double() - originals.double()).square().flatten(1).mean(1)
    return 10 * torch.log10(PEAK**2 / squares)


def ssim(pictures: Tensor, originals: Tensor) -> Tensor:
    """Structural similarity of each picture.

    Mean over pixels and channels of ``(2 m1 m2 + C1)(2 s12 + C2) / ((m1**2 + m2**2 + C1)(s1 + s2 + C2))`` with means ``m``, variances
    ``s = E[x**2] - m**2`` and covariance ``s12`` under a Gaussian window of 11x11 pixels and sigma 1.5 that lies within the picture, ``C1 = (0.01 * 255)**2``,
    ``C2 = (0.03 * 255)**2``.

    Args:
        pictures: ``[N, C, H, W]`` in 0 to 255, H and W at least 11.
        originals: The same shape.

    Returns:
        float64 ``[N]``, 1 where a picture equals its original.

    Raises:
        DataError: A picture is smaller than the window.

    Source: Wang et al. 2004, Eq. 13.
    """
    if min(pictures.shape[-2:]) < WINDOW:
        raise DataError(
            f"SSIM looks at {WINDOW} x {WINDOW} pixels; a picture without its border has {pictures.shape[-1]} x {pictures.shape[-2]}"
        )
    x, y = pictures.double(), originals.double()
    blurred = [_blur(part) for part in (x, y, x * x, y * y, x * y)]
    mean_x, mean_y = blurred[:2]
    variance_x, variance_y, covariance = blurred[2] - mean_x**2, blurred[3] - mean_y**2, blurred[4] - mean_x * mean_y
    c1, c2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2
    similar = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return (similar / ((mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2))).flatten(1).mean(1)


def _blur(x: Tensor) -> Tensor:
    """Weighted means under the window, where it lies within ``[N, C, H, W]``."""
    offsets = torch.arange(WINDOW, dtype=torch.float64, device=x.device) - WINDOW // 2
    weights = torch.exp(-offsets.square() / (2 * SIGMA**2))
    weights = weights / math.fsum(weights.tolist())
    planes = x.flatten(0, 1).unsqueeze(1)
    planes = functional.conv2d(functional.conv2d(planes, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))
    return planes.view(*x.shape[:2], *planes.shape[-2:])
