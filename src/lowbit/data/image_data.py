"""What every data suite provides: a data set and the facts about it."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lowbit.data.augment import SMALLEST_AUGMENTED, Augmentation, BatchChange
from lowbit.data.images import Preprocessing
from lowbit.errors import SpecError

Split = Literal["train", "test", "calibration"]
Sample = Tensor | tuple[Tensor, int] | tuple[Tensor, Tensor]


@dataclass(frozen=True)
class ImageData:
    """A data set of normalised images and what a program needs to know about it.

    Attributes:
        name: What the user calls it.
        dataset: Samples ``(image, label)``, or ``image`` alone where there are no labels; images are float32.
        num_classes: None without labels.
        input_shape: ``(channels, height, width)`` of a sample.
        mean, std: Per channel, of pixels in 0..1; the samples are ``(pixel - mean) / std``.
        class_names: By label; empty where unknown.
        ignored: How many files of the folder were no images.
        skipped: Images that could not be decoded and were left out.
        preprocessing: How a picture becomes a sample like these; None where the samples are no square pictures.
    """

    name: str
    dataset: Dataset[Sample]
    num_classes: int | None
    input_shape: tuple[int, ...]
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    class_names: tuple[str, ...] = ()
    ignored: int = 0
    skipped: tuple[Path, ...] = ()
    preprocessing: Preprocessing | None = None

    def __len__(self) -> int:
        return len(cast(Sized, self.dataset))

    @property
    def has_targets(self) -> bool:
        """Whether samples hold what a network should learn, such as labels."""
        return self.num_classes is not None

    @property
    def largest_batch(self) -> int | None:
        """The most samples that can be put together in a batch; None where any number can."""
        return None

    @property
    def fixed(self) -> Dataset[Sample]:
        """The samples as a network reads them, all of one shape, where a batch of them is looked at and not trained on."""
        return self.dataset

    def augmentation(self, name: str) -> BatchChange | None:
        """The random changes called ``name`` of training batches; ``auto`` shifts and mirrors pictures of 28 pixels and more.

        Raises:
            SpecError: The samples are no pictures.
        """
        are_pictures = len(self.input_shape) == 3 and len(self.mean) == self.input_shape[0]
        if name == "none" or (name == "auto" and (not are_pictures or min(self.input_shape[1:]) < SMALLEST_AUGMENTED)):
            return None
        if not are_pictures:
            raise SpecError(f"augment {name!r} works on pictures of lowbit.data. Use 'none', and change samples in your data set.")
        black = tuple(-mean / std for mean, std in zip(self.mean, self.std, strict=True))
        return Augmentation(min(self.input_shape[1:]) // 8, name != "crop", black)


class TensorImages(Dataset[Sample]):
    """Images held in memory as bytes, normalised when they are asked for.

    Attributes:
        images: uint8 ``[N, C, H, W]``, 0 to ``white``.
        labels: int64 ``[N]`` or None.
        mean, std: Per channel, of pixels in 0..1.
        white: The largest value of a pixel.
    """

    def __init__(self, images: Tensor, labels: Tensor | None, mean: Sequence[float], std: Sequence[float], *, white: int = 255) -> None:
        self.images, self.labels, self.white = images, labels, white
        self.mean, self.std = tuple(mean), tuple(std)
        self._mean, self._std = (torch.tensor(values, dtype=torch.float32).view(-1, 1, 1) for values in (mean, std))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        image = self.normalized(self.images[index])
        return image if self.labels is None else (image, int(self.labels[index]))

    def normalized(self, images: Tensor) -> Tensor:
        """``(pixel / white - mean) / std`` in float32 for one image or a batch, on the device of ``images``."""
        return (images.float() / self.white - self._mean.to(images.device)) / self._std.to(images.device)


def tensor_data(name: str, dataset: TensorImages, num_classes: int | None, class_names: Sequence[str] = ()) -> ImageData:
    """Images in memory, with the preprocessing that makes such samples of pictures of any size."""
    channels, height, width = dataset.images.shape[1:]
    mean, std = dataset.mean, dataset.std
    preprocessing = Preprocessing(height, 1.0, mean, std, grey=channels == 1) if height == width and channels in (1, 3) else None
    shape = (channels, height, width)
    return ImageData(name, dataset, num_classes, shape, mean, std, tuple(class_names), preprocessing=preprocessing)
