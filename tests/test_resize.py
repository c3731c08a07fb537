"""Bicubic resizing: weights worked out by hand, and other programs where they compute the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from lowbit.errors import DataError
from lowbit.resize import crop_to_multiple, cubic, enlarge, imresize, resize_matrix, round_pixels, shrink


def picture(height: int, width: int) -> Tensor:
    return torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_the_kernel_has_the_values_of_its_polynomials() -> None:
    assert cubic(torch.tensor([0.0, 1.0, -1.0, 1.5, 2.0, 2.5])).tolist() == [1, 0, 0, -0.0625, 0, 0]


def test_halving_stretches_the_kernel_to_eight_taps() -> None:
    row = resize_matrix(16, 0.5)[3]
    taps = [-0.01171875, -0.03515625, 0.11328125, 0.43359375]
    assert row[3:11].tolist() == [*taps, *taps[::-1]]
    assert row.sum() == 1


def test_beyond_an_edge_the_edge_pixel_comes_twice() -> None:
    assert resize_matrix(8, 0.5)[0].tolist() == [
        0.43359375 + 0.11328125,
        0.43359375 - 0.03515625,
        0.11328125 - 0.01171875,
        -0.03515625,
        -0.01171875,
        0,
        0,
        0,
    ]


@pytest.mark.parametrize("length", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("scale", [1 / 4, 1 / 3, 1 / 2, 2, 3, 4])
def test_a_constant_picture_stays_constant(length: int, scale: float) -> None:
    assert resize_matrix(length, scale).sum(1).sub(1).abs().max() < 1e-12


@pytest.mark.parametrize(("length", "scale", "out"), [(5, 0.5, 3), (7, 1 / 3, 3), (5, 3, 15)])
def test_lengths_are_rounded_up(length: int, scale: float, out: int) -> None:
    assert resize_matrix(length, scale).shape == (out, length)


@pytest.mark.parametrize("scale", [1 / 4, 1 / 3, 1 / 2, 2, 3, 4])
def test_equals_interpolation_of_torch_with_mirrored_edges(scale: float) -> None:
    x = picture(24, 36).double()[None] / 255
    margin = round(4 / scale) if scale < 1 else 4
    padded = torch.from_numpy(np.pad(x.numpy(), ((0, 0), (0, 0), (margin, margin), (margin, margin)), mode="symmetric"))
    size = [round(side * scale) for side in padded.shape[-2:]]
    expected = functional.interpolate(padded, size, mode="bicubic", antialias=True, align_corners=False)
    cut = round(margin * scale)
    torch.testing.assert_close(imresize(x, scale), expected[..., cut:-cut, cut:-cut], rtol=0, atol=1e-6)


def test_equals_pillow_within_the_picture() -> None:
    plane = picture(40, 40)[0]
    expected = np.asarray(Image.fromarray(plane.numpy().astype(np.float32)).resize((20, 20), Image.Resampling.BICUBIC))
    assert (imresize(plane, 0.5)[2:-2, 2:-2] - torch.from_numpy(expected.copy())[2:-2, 2:-2]).abs().max() < 1e-4


def test_pixels_are_clipped_and_rounded_half_to_even() -> None:
    assert round_pixels(torch.tensor([-0.6, 0.5, 1.5, 2.5, 255.4, 256])).tolist() == [0, 0, 2, 2, 255, 255]


def test_small_pictures_are_bytes_of_the_right_size() -> None:
    small = shrink(picture(12, 18), 3)
    assert small.dtype == torch.uint8
    assert small.shape == (3, 4, 6)
    assert enlarge(small, 3).shape == (3, 12, 18)


def test_pictures_are_cropped_to_a_multiple_of_the_scale() -> None:
    assert crop_to_multiple(picture(7, 11), 3).shape == (3, 6, 9)
    with pytest.raises(DataError, match="11 x 1 pixels is smaller than the scale 2"):
        crop_to_multiple(picture(1, 11), 2)
