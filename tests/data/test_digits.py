from __future__ import annotations

import pytest
import torch

from lowbit.data.digits import load_digits
from lowbit.data.image_data import TensorImages

pytest.importorskip("sklearn", reason='pip install "lowbit[data]"')


def images_of(split: str) -> TensorImages:
    dataset = load_digits("test" if split == "test" else "train").dataset
    assert isinstance(dataset, TensorImages)
    return dataset


def test_the_division_is_fixed_and_covers_every_digit_once() -> None:
    from sklearn.datasets import load_digits as bundled

    train, test = images_of("train"), images_of("test")
    assert (len(train), len(test)) == (1197, 600)
    both = torch.cat([train.images, test.images]).flatten(1).tolist()
    assert sorted(both) == sorted(torch.from_numpy(bundled().data).to(torch.uint8).tolist())
    assert test.labels is not None
    assert test.labels[:8].tolist() == [5, 3, 9, 6, 1, 6, 0, 6]
    assert test.images.long().sum().item() == 186_916


def test_train_pixels_have_mean_zero_and_deviation_one() -> None:
    train = images_of("train")
    pixels = train.normalized(train.images)
    assert pixels.mean().item() == pytest.approx(0, abs=1e-3)
    assert pixels.std().item() == pytest.approx(1, abs=1e-3)
