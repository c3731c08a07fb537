from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lowbit.data import SUITES, Preprocessing, TensorImages, load_data, loader
from lowbit.errors import DataError, SpecError, UnknownNameError


@pytest.fixture
def numbers(tmp_path: Path) -> Path:
    """Ten samples that are their own index, labelled in order."""
    np.savez(tmp_path / "a.npz", x=np.arange(10.0)[:, None], y=np.arange(10))
    return tmp_path / "a.npz"


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown data 'fashion-mnis'. Did you mean 'fashion-mnist'\?"):
        load_data("fashion-mnis")


def test_a_suite_takes_its_folder_after_a_colon_or_as_root(tmp_path: Path) -> None:
    (tmp_path / "test_batch.bin").write_bytes(bytes([7]) + bytes(3072))
    assert load_data(f"cifar10:{tmp_path}", split="test").dataset[0][1] == 7
    assert load_data("cifar10", root=tmp_path, split="test").dataset[0][1] == 7


def test_every_suite_says_what_it_is_and_where_it_comes_from() -> None:
    assert list(SUITES) == ["digits", "fashion-mnist", "cifar10", "cifar100"]
    assert all(suite.summary and suite.places for suite in SUITES.values())


def test_digits_take_no_folder_and_suites_no_preprocessing(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="takes no folder"):
        load_data("digits", root=tmp_path)
    with pytest.raises(SpecError, match="has its own preprocessing"):
        load_data("digits", preprocessing=Preprocessing())


def test_an_unknown_split_is_refused(numbers: Path) -> None:
    with pytest.raises(SpecError, match="split 'val', expected one of train, test, calibration"):
        load_data(str(numbers), split="val")  # type: ignore[arg-type]


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("1,2")
    with pytest.raises(DataError, match=r"expected a folder of pictures or a \.npy/\.npz file"):
        load_data(str(tmp_path / "a.csv"))


def test_a_folder_is_preprocessed_as_for_imagenet_unless_told(tmp_path: Path) -> None:
    Image.new("RGB", (30, 20), (255, 0, 0)).save(tmp_path / "a.png")
    image = load_data(str(tmp_path)).dataset[0]
    assert image.shape == (3, 224, 224)
    assert image[:, 0, 0].tolist() == pytest.approx([(1 - 0.485) / 0.229, -0.456 / 0.224, -0.406 / 0.225], rel=1e-5)
    small = load_data(str(tmp_path), preprocessing=Preprocessing(size=8)).dataset[0]
    assert small.shape == (3, 8, 8)


def test_calibration_is_the_training_samples_in_a_fixed_random_order(numbers: Path) -> None:
    orders = []
    for _ in range(2):
        dataset = load_data(str(numbers), split="calibration").dataset
        orders.append([dataset[index][1] for index in range(10)])
    assert orders[0] == orders[1]
    assert orders[0] != list(range(10))
    assert sorted(orders[0]) == list(range(10))


def test_a_loader_keeps_images_with_labels_and_order(numbers: Path) -> None:
    batches = list(loader(load_data(str(numbers)), 4))
    assert [len(images) for images, _ in batches] == [4, 4, 2]
    assert torch.cat([images for images, _ in batches]).flatten().tolist() == list(range(10))
    assert torch.cat([labels for _, labels in batches]).tolist() == list(range(10))


def test_a_loader_shuffles_the_same_way_for_the_same_seed(numbers: Path) -> None:
    data = load_data(str(numbers))
    orders = [[int(x) for images, _ in loader(data, 3, shuffle=True, seed=seed) for x in images] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == list(range(10))


def test_a_batch_size_below_one_is_refused(numbers: Path) -> None:
    with pytest.raises(SpecError, match="batch_size 0"):
        loader(load_data(str(numbers)), 0)


def test_idx_files_of_another_size_state_their_own_shape(tmp_path: Path) -> None:
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(bytes([0, 0, 8, 3]) + struct.pack(">3I", 1, 5, 4) + bytes(20))
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(bytes([0, 0, 8, 1]) + struct.pack(">I", 1) + bytes([3]))
    assert load_data(f"fashion-mnist:{tmp_path}", split="test").input_shape == (1, 5, 4)


def test_the_preprocessing_of_a_suite_makes_the_same_samples_of_pictures() -> None:
    data = load_data("digits", split="test")
    assert data.preprocessing == Preprocessing(size=8, crop_fraction=1.0, mean=data.mean, std=data.std, grey=True)
    images = data.dataset
    assert isinstance(images, TensorImages)
    picture = Image.fromarray((images.images[0, 0].numpy().astype(int) * 255 // 16).astype(np.uint8))
    torch.testing.assert_close(data.preprocessing(picture), data.dataset[0][0], atol=0.05, rtol=0)  # 8 bits there, 4 here
    assert len(load_data("digits", split="test", preprocessing=data.preprocessing)) == 600  # its own may be named


def test_arrays_have_a_preprocessing_where_they_are_square_pictures(tmp_path: Path) -> None:
    np.savez(tmp_path / "square.npz", images=np.zeros((2, 6, 6, 3), np.uint8))
    np.savez(tmp_path / "wide.npz", images=np.zeros((2, 6, 8), np.uint8))
    asked = Preprocessing(mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))
    found = load_data(str(tmp_path / "square.npz"), preprocessing=asked).preprocessing
    assert found == Preprocessing(size=6, crop_fraction=1.0, mean=asked.mean, std=asked.std)
    assert load_data(str(tmp_path / "wide.npz")).preprocessing is None
