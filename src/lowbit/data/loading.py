"""Data by name, from a folder of pictures, or from a NumPy file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import torch
from torch import Generator
from torch.utils.data import DataLoader, Subset

from lowbit.data.arrays import load_arrays
from lowbit.data.cifar import CIFAR10, CIFAR100, load_cifar
from lowbit.data.digits import load_digits
from lowbit.data.fashion_mnist import DEBIAN_FOLDER, load_fashion_mnist
from lowbit.data.folders import load_folder
from lowbit.data.image_data import ImageData, Sample, Split
from lowbit.data.images import Preprocessing
from lowbit.data.upscaling import UPSCALING_SUITES
from lowbit.errors import DataError, SpecError, install_command, unknown_name


@dataclass(frozen=True)
class DataSuite:
    """A named data set.

    Attributes:
        summary: What it is, in one line.
        places: Where its files are looked for, and how to get them.
        load: From a folder (or None) and a split.
    """

    summary: str
    places: str
    load: Callable[[Path | None, Split], ImageData]


def _digits(root: Path | None, split: Split) -> ImageData:
    if root is not None:
        raise SpecError(f"digits comes with scikit-learn and takes no folder, got {root}. Write digits alone.")
    return load_digits(split)


_CIFAR_PLACES = "the folder named with it; https://www.cs.toronto.edu/~kriz/cifar.html, binary version"
SUITES: dict[str, DataSuite] = {
    "digits": DataSuite(
        "1,797 grey digits of 8x8 pixels in 10 classes, the embedded default", f"part of scikit-learn ({install_command('data')})", _digits
    ),
    "fashion-mnist": DataSuite(
        "70,000 grey images of 28x28 pixels in 10 classes",
        f"the folder named with it, else {DEBIAN_FOLDER} (apt-get install dataset-fashion-mnist), else downloaded (30 MB) and kept",
        load_fashion_mnist,
    ),
    "cifar10": DataSuite(
        "60,000 colour images of 32x32 pixels in 10 classes", _CIFAR_PLACES, lambda root, split: load_cifar(CIFAR10, root, split)
    ),
    "cifar100": DataSuite(
        "60,000 colour images of 32x32 pixels in 100 classes", _CIFAR_PLACES, lambda root, split: load_cifar(CIFAR100, root, split)
    ),
}


def load_data(
    spec: str, *, root: Path | None = None, split: Split = "train", preprocessing: Preprocessing | None = None, strict: bool = True
) -> ImageData:
    """The data that ``spec`` names.

    Args:
        spec: A name of ``SUITES``, ``NAME:FOLDER`` with the folder of its files, a folder of pictures (with a sub-folder per class,
            or flat and without labels), or a ``.npy`` / ``.npz`` file.
        root: The folder of a named suite's files, as in ``NAME:FOLDER``.
        split: ``"train"``, ``"test"``, or ``"calibration"``: the training samples in a fixed random order, so that the first few are
            a fair sample.
        preprocessing: For pictures in a folder (default: as for ImageNet) and bytes in NumPy files; the named suites have their own.
        strict: False leaves out pictures that cannot be decoded, see ``load_folder``.

    Raises:
        UnknownNameError: Neither a suite nor a path.
        DataError: Files are missing, damaged, or do not fit each other.
        SpecError: An option that is not allowed.
    """
    if split not in get_args(Split):
        raise SpecError(f"split {split!r}, expected one of {', '.join(get_args(Split))}")
    name, _, folder = spec.partition(":")
    if name in SUITES:
        data = SUITES[name].load(Path(folder) if folder else root, split)
        if preprocessing is not None and preprocessing != data.preprocessing:
            raise SpecError(f"{name} has its own preprocessing ({data.preprocessing}), asked for is {preprocessing}; leave the option out")
    else:
        data = _from_path(Path(spec), split, preprocessing, strict)
    if split == "calibration":
        order = torch.randperm(len(data), generator=Generator().manual_seed(0)).tolist()
        data = replace(data, dataset=Subset(data.dataset, order))
    return data


def is_suite(spec: str | None) -> bool:
    """Whether ``spec`` names a suite, with or without a folder."""
    return spec is not None and (spec.partition(":")[0] in SUITES or spec in UPSCALING_SUITES)


def loader(data: ImageData, batch_size: int = 64, *, shuffle: bool = False, seed: int = 0) -> DataLoader[Sample]:
    """Batches of ``data``; the same seed shuffles the same way."""
    if batch_size < 1:
        raise SpecError(f"batch_size {batch_size}, expected 1 or more")
    batch_size = min(batch_size, data.largest_batch or batch_size)
    return DataLoader(data.dataset, batch_size, shuffle=shuffle, generator=Generator().manual_seed(seed))


def _from_path(path: Path, split: Split, preprocessing: Preprocessing | None, strict: bool) -> ImageData:
    try:
        path.stat()
    except FileNotFoundError:
        raise unknown_name(
            "data", str(path), SUITES, "Or NAME:FOLDER, a folder of pictures, a .npy or .npz file; there is no such path."
        ) from None
    except OSError as error:  # a name that is too long, a folder that must not be read
        raise DataError(f"{str(path)[:100]}: {error.strerror}") from error
    if path.is_dir():
        return load_folder(path, split, preprocessing or Preprocessing(), strict=strict)
    if path.suffix in (".npy", ".npz"):
        return load_arrays(path, preprocessing)
    raise DataError(f"{path}: expected a folder of pictures or a .npy/.npz file")
