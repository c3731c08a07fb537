"""CIFAR-10 and CIFAR-100 in their binary version: 32x32 colour images.

Layout: records of one label byte (CIFAR-100: coarse, then fine) and 3 x 32 x 32 pixel bytes, red plane first.
Source: Krizhevsky 2009, "Learning Multiple Layers of Features from Tiny Images".
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lowbit.data.image_data import ImageData, Split, TensorImages, tensor_data
from lowbit.errors import DataError

PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class CifarVersion:
    """File names and labels of one of the two versions.

    Attributes:
        label_bytes: In front of each image; the last one is the label.
        folder: The archive's name for its folder.
    """

    name: str
    num_classes: int
    label_bytes: int
    folder: str
    train_files: tuple[str, ...]
    test_files: tuple[str, ...]
    names_file: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


CIFAR10 = CifarVersion(
    "cifar10",
    10,
    1,
    "cifar-10-batches-bin",
    tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
    ("test_batch.bin",),
    "batches.meta.txt",
    (0.4914, 0.4822, 0.4465),
    (0.2470, 0.2435, 0.2616),
)
CIFAR100 = CifarVersion(
    "cifar100",
    100,
    2,
    "cifar-100-binary",
    ("train.bin",),
    ("test.bin",),
    "fine_label_names.txt",
    (0.5071, 0.4865, 0.4409),
    (0.2673, 0.2564, 0.2762),
)


def load_cifar(version: CifarVersion, root: Path | None, split: Split) -> ImageData:
    """The files of ``version`` in ``root`` or in the archive's folder inside it; DataError when one is missing or damaged."""
    if root is None:
        raise DataError(
            f"{version.name}: there is no folder. Unpack the binary version (https://www.cs.toronto.edu/~kriz/cifar.html) "
            f"and name its folder: {version.name}:FOLDER"
        )
    folder = root / version.folder if (root / version.folder).is_dir() else root
    files = version.test_files if split == "test" else version.train_files
    parts = [_read(folder / file, version) for file in files]
    images, labels = torch.cat([images for images, _ in parts]), torch.cat([labels for _, labels in parts])
    dataset = TensorImages(images, labels, version.mean, version.std)
    return tensor_data(version.name, dataset, version.num_classes, _class_names(folder, version))


def _read(path: Path, version: CifarVersion) -> tuple[Tensor, Tensor]:
    if not path.is_file():
        files = ", ".join(version.train_files + version.test_files)
        raise DataError(f"{version.name}: there is no file {path}; the folder must hold the binary version ({files})")
    record = version.label_bytes + PIXELS
    content = np.fromfile(path, np.uint8)
    if not len(content) or len(content) % record:
        raise DataError(
            f"{path}: {len(content):,} bytes is no whole number of records of {record} bytes; "
            f"the file is empty, truncated or no binary {version.name}"
        )
    records = torch.from_numpy(content.reshape(-1, record))
    labels = records[:, version.label_bytes - 1].long()
    if int(labels.max()) >= version.num_classes:
        raise DataError(f"{path}: label {int(labels.max())}, expected 0 to {version.num_classes - 1}; is it a file of another data set?")
    return records[:, version.label_bytes :].reshape(-1, 3, 32, 32), labels


def _class_names(folder: Path, version: CifarVersion) -> tuple[str, ...]:
    path = folder / version.names_file
    names = tuple(path.read_text(encoding="utf-8").split()) if path.is_file() else ()
    if names and len(names) != version.num_classes:
        raise DataError(f"{path}: {len(names)} names, expected {version.num_classes}")
    return names
