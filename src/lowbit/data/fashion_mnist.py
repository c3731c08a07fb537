"""Fashion-MNIST: 60,000 + 10,000 grey images of 28x28 pixels in 10 classes.

Source: Xiao et al. 2017, "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms".
"""

from __future__ import annotations

import gzip
import hashlib
import http.client
import os
import urllib.request
import zlib
from pathlib import Path

from lowbit.data.idx import read_idx
from lowbit.data.image_data import ImageData, Split, TensorImages, tensor_data
from lowbit.errors import DataError
from lowbit.files import may_download, replacing

ADDRESS = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
SHA256 = {  # of the unpacked files: the archives of different distributors differ in their gzip headers
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
MEAN, STD = (0.2860,), (0.3530,)
CLASS_NAMES = ("T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")


def load_fashion_mnist(root: Path | None, split: Split) -> ImageData:
    """Fashion-MNIST from ``root``, else from the Debian package's folder, else from a download kept in the user's cache.

    Raises:
        DataError: A file is missing, damaged, or does not fit the other one; nothing can be downloaded.
    """
    prefix = "t10k" if split == "test" else "train"
    folder = root if root is not None else (DEBIAN_FOLDER if DEBIAN_FOLDER.is_dir() else _cache())
    is_remote = root is None and folder != DEBIAN_FOLDER
    paths = [_file(folder, f"{prefix}-{kind}-ubyte", is_remote) for kind in ("images-idx3", "labels-idx1")]
    images, labels = read_idx(paths[0], dimensions=3), read_idx(paths[1], dimensions=1)
    if len(images) != len(labels):
        raise DataError(f"{paths[0]} holds {len(images)} images, {paths[1]} holds {len(labels)} labels; they must belong together")
    if not len(images):
        raise DataError(f"{paths[0]}: holds no image")
    if int(labels.max()) >= len(CLASS_NAMES):
        raise DataError(f"{paths[1]}: label {int(labels.max())}, expected 0 to {len(CLASS_NAMES) - 1}")
    dataset = TensorImages(images.unsqueeze(1), labels.long(), MEAN, STD)
    return tensor_data("fashion-mnist", dataset, len(CLASS_NAMES), CLASS_NAMES)


def _file(folder: Path, name: str, is_remote: bool) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    if not is_remote:
        raise DataError(f"fashion-mnist: {folder} has neither {name} nor {name}.gz. {_ways()}")
    return _download(name, folder)


def _download(name: str, folder: Path) -> Path:
    """Fetch ``name`` into ``folder``; a file whose checksum is wrong is never kept."""
    path, address = folder / name, f"{ADDRESS}{name}.gz"
    if not may_download():
        raise DataError(f"fashion-mnist: {name} is not in {folder}, and a dry run does not download it from {address}. {_ways()}")
    try:
        with urllib.request.urlopen(address, timeout=30) as response, gzip.GzipFile(fileobj=response) as unpacked:
            content = unpacked.read(2**27)
    except (OSError, EOFError, zlib.error, http.client.HTTPException) as error:
        raise DataError(f"fashion-mnist: downloading {address} failed ({error}). {_ways()}") from error
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256[name]:
        raise DataError(f"fashion-mnist: {address} unpacks to sha256 {found}, expected {SHA256[name]}; it was not kept. {_ways()}")
    with replacing(path) as temporary:
        folder.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
    return path


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lowbit" / "fashion-mnist"


def _ways() -> str:
    return (
        "Three ways to get it: put the four files into a folder and name it (fashion-mnist:FOLDER), "
        "install Debian's package (apt-get install dataset-fashion-mnist), or run once with a network so that it is downloaded."
    )
