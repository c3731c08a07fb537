from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lowbit.data.arrays import load_arrays
from lowbit.data.images import Preprocessing
from lowbit.errors import DataError


def test_floats_are_taken_as_they_are(tmp_path: Path) -> None:
    samples = np.array([[1.5, -2.0, 0.0], [4.0, 5.0, 6.0]])
    np.save(tmp_path / "a.npy", samples)
    data = load_arrays(tmp_path / "a.npy")
    assert (len(data), data.num_classes, data.input_shape) == (2, None, (3,))
    assert data.dataset[0].tolist() == [1.5, -2.0, 0.0]
    assert data.dataset[0].dtype == torch.float32


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 4, 5, 3)])
def test_bytes_become_planes_from_zero_to_one(tmp_path: Path, shape: tuple[int, ...]) -> None:
    pixels = np.full(shape, 51, np.uint8)
    np.savez(tmp_path / "a.npz", images=pixels, labels=np.array([4, 0]))
    data = load_arrays(tmp_path / "a.npz")
    image, label = data.dataset[0]
    assert (data.input_shape, data.num_classes, label) == ((3, 4, 5), 5, 4)
    torch.testing.assert_close(image, torch.full((3, 4, 5), 0.2))


def test_bytes_are_normalised_when_preprocessing_is_given(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.full((1, 2, 2), 255, np.uint8))
    data = load_arrays(tmp_path / "a.npy", Preprocessing(mean=(0.5,), std=(0.25,), grey=True))
    torch.testing.assert_close(data.dataset[0], torch.full((1, 2, 2), 2.0))
    with pytest.raises(DataError, match=r"1 channel\(s\), the preprocessing has mean and std for 3"):
        load_arrays(tmp_path / "a.npy", Preprocessing())


def test_channels_stay_with_their_pixels(tmp_path: Path) -> None:
    pixels = np.arange(24, dtype=np.uint8).reshape(1, 2, 4, 3)
    np.save(tmp_path / "a.npy", pixels)
    image = load_arrays(tmp_path / "a.npy").dataset[0]
    assert (image[2] * 255).round().tolist() == pixels[0, :, :, 2].tolist()


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"images": np.zeros((0, 3))}, "holds no sample"),
        ({"pictures": np.zeros((1, 3))}, "has the arrays pictures, expected one called images or x or samples"),
        ({"x": np.zeros((2, 3)), "y": np.array([0])}, r"labels are int64 \(1,\), expected 2 integers"),
        ({"x": np.zeros((2, 3)), "y": np.array([0.0, 1.0])}, "labels are float64"),
        ({"x": np.zeros((2, 3)), "y": np.array([0, -1])}, "integers from 0"),
        ({"x": np.array([[1.0, np.nan, np.inf]])}, "2 of 3 values are NaN or infinite"),
        ({"x": np.zeros((2, 3), np.int64)}, "samples are int64"),
        ({"x": np.zeros((2, 5, 4, 4), np.uint8)}, r"pixels of shape \(2, 5, 4, 4\)"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, arrays: dict[str, np.ndarray], words: str) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(DataError, match=words):
        load_arrays(tmp_path / "a.npz")


class Bomb:
    """Fails the test when something unpickles it."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return pytest.fail, ("a NumPy file ran code",)


@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_python_objects_are_never_unpickled(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    objects = np.array([Bomb()], dtype=object)
    np.save(path, objects) if suffix == "npy" else np.savez(path, images=objects)
    with pytest.raises(DataError, match="plain numbers"):
        load_arrays(path)


@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_truncated_files_are_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    np.save(path, np.zeros((9, 9))) if suffix == "npy" else np.savez(path, x=np.zeros((9, 9)))
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match="cannot be read as a NumPy file"):
        load_arrays(path)


def test_an_archive_that_unpacks_to_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowbit.data.arrays.MAX_BYTES", 1000)
    np.savez_compressed(tmp_path / "a.npz", x=np.zeros(1000))
    with pytest.raises(DataError, match="at most 1,000 are read"):
        load_arrays(tmp_path / "a.npz")
