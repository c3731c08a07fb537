"""PSNR and SSIM: by hand, and against scikit-image's SSIM where it is installed."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lowbit.errors import DataError
from lowbit.measure.picture_quality import BT601_256, luma, psnr, ssim, without_border


def picture(seed: int, height: int = 20, width: int = 16, channels: int = 3) -> Tensor:
    return torch.randint(0, 256, (1, channels, height, width), generator=torch.Generator().manual_seed(seed)).float()


def test_luma_runs_from_16_to_235() -> None:
    assert luma(torch.zeros(3, 1, 1)).item() == 16
    assert luma(torch.full((3, 1, 1), 255.0)).item() == pytest.approx(235)
    assert luma(torch.tensor([255.0, 0, 0]).view(3, 1, 1)).item() == pytest.approx(16 + 65.481)
    assert luma(torch.tensor([0, 0, 255.0]).view(3, 1, 1), BT601_256).item() == pytest.approx(16 + 255 * 25.064 / 256)


def test_psnr_of_a_known_error() -> None:
    original = picture(0)
    assert psnr(original + 5, original).item() == pytest.approx(20 * math.log10(255 / 5))


def test_equal_pictures_have_infinite_psnr_and_ssim_1() -> None:
    original = picture(0)
    assert psnr(original, original).item() == math.inf
    assert ssim(original, original).item() == pytest.approx(1, abs=1e-12)


def test_both_are_symmetric_and_measure_each_picture_alone() -> None:
    a, b = torch.cat([picture(0), picture(1)]), torch.cat([picture(2), picture(3)])
    for measure in (psnr, ssim):
        torch.testing.assert_close(measure(a, b), measure(b, a), rtol=0, atol=1e-12)
        torch.testing.assert_close(measure(a, b), torch.cat([measure(a[:1], b[:1]), measure(a[1:], b[1:])]), rtol=0, atol=1e-12)


def test_ssim_of_constant_pictures_compares_their_means() -> None:
    c1 = (0.01 * 255) ** 2
    x, y = torch.full((1, 1, 12, 12), 100.0), torch.full((1, 1, 12, 12), 110.0)
    assert ssim(x, y).item() == pytest.approx((2 * 100 * 110 + c1) / (100**2 + 110**2 + c1))


def test_ssim_is_that_of_scikit_image_where_the_window_lies_within() -> None:
    metrics = pytest.importorskip("skimage.metrics")
    x, y = picture(0, 24, 30, 1), (picture(0, 24, 30, 1) + 20 * picture(1, 24, 30, 1) / 255).clamp(0, 255)
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}
    assert ssim(x, y).item() == pytest.approx(
        metrics.structural_similarity(x[0, 0].double().numpy(), y[0, 0].double().numpy(), **options), abs=1e-12
    )


def test_what_is_too_small_is_an_error() -> None:
    with pytest.raises(DataError, match="has 10 x 11"):
        ssim(picture(0, 11, 10), picture(1, 11, 10))
    with pytest.raises(DataError, match="8 x 6 pixels has nothing left"):
        without_border(torch.zeros(3, 6, 8), 3)
    assert without_border(torch.zeros(3, 7, 8), 3).shape == (3, 1, 2)
