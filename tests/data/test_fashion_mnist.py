from __future__ import annotations

import gzip
import hashlib
import io
import struct
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch

from lowbit.data import fashion_mnist
from lowbit.data.fashion_mnist import DEBIAN_FOLDER, SHA256, load_fashion_mnist
from lowbit.data.image_data import TensorImages
from lowbit.errors import DataError
from lowbit.files import without_downloads

IMAGES = bytes([0, 0, 8, 3]) + struct.pack(">3I", 2, 28, 28) + bytes(784) + bytes([255] * 784)
LABELS = bytes([0, 0, 8, 1]) + struct.pack(">I", 2) + bytes([9, 0])


def fill(folder: Path, images: bytes = IMAGES, labels: bytes = LABELS, prefix: str = "t10k") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
    (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(labels)
    return folder


def test_pixels_are_normalised_by_the_known_mean_and_std(tmp_path: Path) -> None:
    data = load_fashion_mnist(fill(tmp_path), "test")
    (black, first), (white, second) = data.dataset[0], data.dataset[1]
    assert (first, second, len(data), data.input_shape) == (9, 0, 2, (1, 28, 28))
    torch.testing.assert_close(black, torch.full((1, 28, 28), -0.2860 / 0.3530))
    torch.testing.assert_close(white, torch.full((1, 28, 28), (1 - 0.2860) / 0.3530))
    assert data.class_names[9] == "ankle boot"


def test_train_and_test_are_different_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"neither train-images-idx3-ubyte nor train-images-idx3-ubyte.gz. Three ways"):
        load_fashion_mnist(fill(tmp_path), "train")


def test_images_and_labels_of_different_number_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds 2 images, .* holds 1 labels"):
        load_fashion_mnist(fill(tmp_path, labels=bytes([0, 0, 8, 1, 0, 0, 0, 1, 5])), "test")


def test_a_label_outside_the_classes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="label 10, expected 0 to 9"):
        load_fashion_mnist(fill(tmp_path, labels=LABELS[:-1] + bytes([10])), "test")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no Debian package."""
    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", tmp_path / "absent")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "lowbit" / "fashion-mnist"


def serve(monkeypatch: pytest.MonkeyPatch, files: dict[str, bytes]) -> list[str]:
    asked: list[str] = []

    def urlopen(address: str, timeout: float) -> io.BytesIO:
        asked.append(address)
        return io.BytesIO(gzip.compress(files[address.rpartition("/")[2].removesuffix(".gz")]))

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    return asked


def test_files_are_downloaded_once_and_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"t10k-images-idx3-ubyte": IMAGES, "t10k-labels-idx1-ubyte": LABELS}
    monkeypatch.setattr(fashion_mnist, "SHA256", {name: hashlib.sha256(content).hexdigest() for name, content in files.items()})
    asked = serve(monkeypatch, files)
    for _ in range(2):
        assert [label for _, label in (load_fashion_mnist(None, "test").dataset[i] for i in range(2))] == [9, 0]
    assert len(asked) == 2
    assert sorted(path.name for path in cache.iterdir()) == sorted(files)


def test_a_dry_run_downloads_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fashion_mnist.urllib.request, "urlopen", lambda *_, **__: pytest.fail("nothing may be fetched"))
    with without_downloads(), pytest.raises(DataError, match="a dry run does not download it from http"):
        load_fashion_mnist(None, "test")


def test_a_download_with_another_content_is_not_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, {"t10k-images-idx3-ubyte": IMAGES})
    with pytest.raises(DataError, match=f"expected {SHA256['t10k-images-idx3-ubyte']}; it was not kept. Three ways"):
        load_fashion_mnist(None, "test")
    assert not cache.exists()


def test_without_a_network_the_error_says_the_three_ways(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def urlopen(address: str, timeout: float) -> io.BytesIO:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    with pytest.raises(DataError, match=r"no route to host.*fashion-mnist:FOLDER.*dataset-fashion-mnist.*network"):
        load_fashion_mnist(None, "test")


@pytest.mark.skipif(not DEBIAN_FOLDER.is_dir(), reason="apt-get install dataset-fashion-mnist")
def test_the_real_test_images_are_balanced_and_have_the_known_checksum() -> None:
    data = load_fashion_mnist(None, "test").dataset
    assert isinstance(data, TensorImages) and data.labels is not None
    assert torch.bincount(data.labels).tolist() == [1000] * 10
    content = gzip.decompress((DEBIAN_FOLDER / "t10k-images-idx3-ubyte.gz").read_bytes())
    assert hashlib.sha256(content).hexdigest() == SHA256["t10k-images-idx3-ubyte"]
    assert data.images.numpy().tobytes() == content[16:]
