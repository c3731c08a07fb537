"""Samples from NumPy files: ``.npy`` holds samples, ``.npz`` samples and labels."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lowbit.data.image_data import ImageData, Sample, TensorImages, tensor_data
from lowbit.data.images import Preprocessing
from lowbit.errors import DataError
from lowbit.reading import check_readable

SAMPLE_KEYS, LABEL_KEYS = ("images", "x", "samples"), ("labels", "y")
MAX_BYTES = 2**32  # a small .npz can unpack to any size


class PreparedSamples(Dataset[Sample]):
    """Tensors that are passed on as they are."""

    def __init__(self, samples: Tensor, labels: Tensor | None) -> None:
        self.samples, self.labels = samples, labels

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index] if self.labels is None else (self.samples[index], int(self.labels[index]))


def load_arrays(path: Path, preprocessing: Preprocessing | None = None) -> ImageData:
    """Samples and labels from ``path``.

    An ``.npz`` holds ``images`` (or ``x``, ``samples``) and, where there are any, ``labels`` (or ``y``); a ``.npy`` holds samples.
    Floating-point arrays of any shape ``[N, ...]`` are taken as they are. Bytes ``[N, H, W]``, ``[N, H, W, C]`` or ``[N, C, H, W]``
    with 1 or 3 channels become 0..1, normalised with the mean and std of ``preprocessing`` where that is given. Sizes stay as they are.

    Raises:
        DataError: Not a NumPy file, Python objects in it, an unknown layout, values that are not finite, labels that do not fit.
    """
    samples, labels = _read(path)
    if len(samples) == 0:
        raise DataError(f"{path}: holds no sample")
    num_classes = None
    if labels is not None:
        if labels.shape != (len(samples),) or labels.dtype.kind not in "iu" or labels.min() < 0:
            raise DataError(f"{path}: labels are {labels.dtype} {labels.shape}, expected {len(samples)} integers from 0")
        num_classes = int(labels.max()) + 1
    classes = None if labels is None else torch.from_numpy(labels.astype(np.int64))
    if samples.dtype == np.uint8:
        images = torch.from_numpy(_planes(samples, path))
        channels = images.shape[1]
        mean, std = ((0.0,) * channels, (1.0,) * channels) if preprocessing is None else (preprocessing.mean, preprocessing.std)
        if len(mean) != channels:
            raise DataError(f"{path}: images have {channels} channel(s), the preprocessing has mean and std for {len(mean)}")
        return tensor_data(path.name, TensorImages(images, classes, mean, std), num_classes)
    if samples.dtype.kind != "f":
        raise DataError(f"{path}: samples are {samples.dtype}, expected uint8 pixels or floating-point samples")
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite and is refused below
        tensor = torch.from_numpy(samples.astype(np.float32))
    if not torch.isfinite(tensor).all():
        bad = int((~torch.isfinite(tensor)).sum())
        raise DataError(f"{path}: {bad:,} of {tensor.numel():,} values are NaN or infinite. Remove these samples.")
    return ImageData(path.name, PreparedSamples(tensor, classes), num_classes, tuple(tensor.shape[1:]))


def _read(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    check_readable(path, max_bytes=MAX_BYTES)
    try:
        if path.suffix == ".npy":
            return np.atleast_1d(np.load(path, allow_pickle=False)), None
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
        if unpacked > MAX_BYTES:
            raise DataError(f"{path}: unpacks to {unpacked:,} bytes, at most {MAX_BYTES:,} are read")
        with np.load(path, allow_pickle=False) as arrays:
            keys = [next((key for key in known if key in arrays), None) for known in (SAMPLE_KEYS, LABEL_KEYS)]
            if keys[0] is None:
                raise DataError(f"{path}: has the arrays {', '.join(arrays)}, expected one called {' or '.join(SAMPLE_KEYS)}")
            return np.atleast_1d(arrays[keys[0]]), None if keys[1] is None else arrays[keys[1]]
    except DataError:
        raise
    except Exception as error:  # a damaged file can make the reader stumble in any way
        raise DataError(f"{path}: cannot be read as a NumPy file of plain numbers ({error})") from error


def _planes(images: np.ndarray, path: Path) -> np.ndarray:
    """Pixels as ``[N, C, H, W]``."""
    if images.ndim == 3:
        return images[:, None]
    if images.ndim == 4 and images.shape[3] in (1, 3):
        return np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    if images.ndim == 4 and images.shape[1] in (1, 3):
        return images
    raise DataError(f"{path}: pixels of shape {images.shape}, expected [N, H, W], [N, H, W, C] or [N, C, H, W] with 1 or 3 channels")
