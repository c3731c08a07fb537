from __future__ import annotations

import torch
from torch import Generator
from torch.nn import functional

from lowbit.data.augment import flip, pad_crop


def test_each_image_is_a_window_of_its_padded_self() -> None:
    images = torch.arange(1.0, 1 + 64 * 2 * 3 * 4).reshape(64, 2, 3, 4)
    shifted = pad_crop(images, 1, Generator().manual_seed(0), fill=-7.0)
    padded = functional.pad(images, [1] * 4, value=-7.0)
    offsets = set()
    for before, after in zip(padded, shifted, strict=True):
        fits = [(y, x) for y in range(3) for x in range(3) if torch.equal(before[:, y : y + 3, x : x + 4], after)]
        assert len(fits) == 1
        offsets.update(fits)
    assert len(offsets) == 9  # every shift occurs


def test_no_padding_changes_nothing() -> None:
    images = torch.randn(3, 1, 5, 5)
    assert torch.equal(pad_crop(images, 0, Generator()), images)


def test_about_half_of_the_images_are_mirrored_whole() -> None:
    images = torch.arange(3.0).expand(1000, 2, 2, 3)
    flipped = flip(images, Generator().manual_seed(0))
    mirrored = flipped[:, 0, 0, 0] == 2
    assert 450 < mirrored.sum().item() < 550
    assert torch.equal(flipped[mirrored], images[mirrored].flip(3))
    assert torch.equal(flipped[~mirrored], images[~mirrored])


def test_the_same_seed_gives_the_same_pictures() -> None:
    images = torch.randn(8, 1, 6, 6)
    first, second, other = (flip(pad_crop(images, 2, g), g) for g in (Generator().manual_seed(seed) for seed in (1, 1, 2)))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
