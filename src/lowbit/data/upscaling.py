"""Pictures for super-resolution: pairs of a small picture and its original, whole to measure on, in patches to train on and to calibrate with.

Pixels are floats in 0 to 255, RGB. Small pictures are made of their originals by ``lowbit.resize.shrink`` where they are not given.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Generator, Tensor
from torch.utils.data import Dataset, Subset

from lowbit.data.folders import folders_in, pictures_beside, split_folder
from lowbit.data.image_data import ImageData, Sample, Split
from lowbit.data.images import SUFFIXES, colour_planes, read_picture
from lowbit.data.photographs import INSTALL, photographs
from lowbit.errors import DataError, SpecError, install_command, missing_extra, unknown_name
from lowbit.resize import crop_to_multiple, shrink

HIGH, LOW = ("hr", "high"), ("lr", "low")  # sub-folders of originals and of small pictures
PATCHES, FEWEST_SAMPLES = 16, 256  # patches of each picture in an epoch; of all together there are at least as many as this
KEPT_BYTES = 2**30  # of decoded pictures in memory
SHOWN = 3  # names in a message
Pair = tuple[Tensor, Tensor]


class Picture(Protocol):
    """A picture that is read when it is needed."""

    @property
    def name(self) -> str:
        """What messages call it."""

    def read(self) -> Tensor:
        """uint8 ``[3, H, W]``."""


@dataclass(frozen=True)
class PictureFile:
    """A picture in a file."""

    path: Path

    @property
    def name(self) -> str:
        """Its path."""
        return str(self.path)

    def read(self) -> Tensor:
        """uint8 ``[3, H, W]``; DataError where it cannot be decoded, or has several frames."""
        return colour_planes(read_picture(self.path, one_frame=True))


@dataclass(frozen=True)
class PictureInMemory:
    """A picture that is there already, uint8 ``[3, H, W]``."""

    name: str
    pixels: Tensor

    def read(self) -> Tensor:
        """The pixels."""
        return self.pixels


class PicturePairs(Dataset[Pair]):
    """Whole pictures ``(small, original)``, each the one or the other way round ``repeats`` times in an epoch.

    Originals are cropped so that both sides are multiples of the scale. Decoded pictures are kept as bytes, as many as ``KEPT_BYTES`` hold.

    Args:
        originals: The pictures.
        scale: How many times larger an original is.
        small: As many small pictures. Default: made of the originals.
        repeats: How often each pair comes.
        as_bytes: uint8 instead of float32.
    """

    def __init__(
        self, originals: Sequence[Picture], scale: int, small: Sequence[Picture] | None = None, *, repeats: int = 1, as_bytes: bool = False
    ) -> None:
        self.originals, self.scale, self.small, self.repeats = list(originals), scale, small, repeats
        self.as_bytes = as_bytes
        self._kept: dict[int, Pair] = {}

    def __len__(self) -> int:
        return len(self.originals) * self.repeats

    def __getitem__(self, index: int) -> Pair:
        small, original = self.pair(index % len(self.originals))
        return (small, original) if self.as_bytes else (small.float(), original.float())

    @property
    def names(self) -> list[str]:
        """What the pictures are called."""
        return [picture.name for picture in self.originals]

    def digest(self) -> str:
        """SHA-256 of all pictures and of what is made of them."""
        found = hashlib.sha256(f"{self.scale} {self.repeats} {self.as_bytes}".encode())
        for index in range(len(self.originals)):
            for part in self.pair(index):
                found.update(f"{tuple(part.shape)}".encode() + part.numpy().tobytes())
        return found.hexdigest()

    def pair(self, index: int) -> Pair:
        """The pictures of that number, as bytes.

        Raises:
            DataError: One cannot be decoded, or their sizes do not belong together.
        """
        if index not in self._kept:
            pair = self._read(index)
            if sum(part.numel() for kept in (*self._kept.values(), pair) for part in kept) > KEPT_BYTES:
                return pair
            self._kept[index] = pair
        return self._kept[index]

    def _read(self, index: int) -> Pair:
        try:
            original = crop_to_multiple(self.originals[index].read(), self.scale)
        except DataError as error:
            name = self.originals[index].name
            raise error if str(error).startswith(name) else DataError(f"{name}: {error}") from error
        if self.small is None:
            return shrink(original, self.scale), original
        small = self.small[index].read()
        if any(self.scale * part != whole for part, whole in zip(small.shape[1:], original.shape[1:], strict=True)):
            raise DataError(
                f"{self.small[index].name} has {_size(small)} pixels, {self.originals[index].name} {_size(original)}: at scale {self.scale} "
                "they do not belong together. Name pictures that do, or the scale that fits them."
            )
        return small, original


class FixedPatches(Dataset[Pair]):
    """Patches at places that are drawn once: the first of each picture, then the second of each, and so on."""

    def __init__(self, pairs: PicturePairs, patch: int) -> None:
        self.pairs, self.patch = pairs, patch

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Pair:
        pair = self.pairs.pair(index % len(self.pairs.originals))
        small, original = cut_patch(pair, self.patch, self.pairs.scale, Generator().manual_seed(index))
        return small.float(), original.float()


def cut_patch(pair: Pair, patch: int, scale: int, generator: Generator) -> Pair:
    """``patch`` x ``patch`` pixels of the small picture at a random place, and those of the original that belong to them."""
    small, original = pair
    top, left = (int(torch.randint(side - patch + 1, (), generator=generator)) for side in small.shape[1:])
    y, x = scale * top, scale * left
    return small[:, top : top + patch, left : left + patch], original[:, y : y + scale * patch, x : x + scale * patch]


@dataclass(frozen=True)
class Patches:
    """Patches of the pictures of a batch, at random places; flipped both ways and transposed, each with probability one half."""

    patch: int
    scale: int
    flips: bool = True

    def __call__(self, batch: tuple[Sequence[Tensor], Sequence[Tensor]], generator: Generator) -> Pair:
        """float32 ``[N, 3, patch, patch]`` and ``[N, 3, scale * patch, scale * patch]``."""
        pairs = [self._turned(cut_patch(pair, self.patch, self.scale, generator), generator) for pair in zip(*batch, strict=True)]
        small, originals = zip(*pairs, strict=True)
        return torch.stack(small).float(), torch.stack(originals).float()

    def plain(self, batch: tuple[Sequence[Tensor], Sequence[Tensor]]) -> Pair:
        """The same at places that depend on nothing, as they are."""
        return Patches(self.patch, self.scale, flips=False)(batch, Generator().manual_seed(0))

    def _turned(self, pair: Pair, generator: Generator) -> Pair:
        rows, columns, swap = (torch.rand(3, generator=generator) < 0.5).tolist() if self.flips else (False, False, False)
        dims = [dim for dim, chosen in ((1, rows), (2, columns)) if chosen]
        small, original = (part.flip(dims) for part in pair)
        return (small.mT, original.mT) if swap else (small, original)


@dataclass(frozen=True)
class UpscalingData(ImageData):
    """Pairs for super-resolution; ``input_shape`` is that of a patch.

    Attributes:
        scale: How many times larger an original is than the small picture.
        pictures: How many there are.
        given: Whether the small pictures were given, not made.
    """

    scale: int = 2
    pictures: int = 0
    given: bool = False

    def sizes(self) -> tuple[str, str]:
        """Those of the smallest and of the largest original, ``WIDTH x HEIGHT``, by the number of pixels; this reads all of them."""
        held = self.dataset.pairs if isinstance(self.dataset, FixedPatches) else self.dataset
        assert isinstance(held, PicturePairs)
        found = sorted((held.pair(index)[1] for index in range(self.pictures)), key=Tensor.numel)
        return _size(found[0]), _size(found[-1])

    @property
    def has_targets(self) -> bool:
        return True

    @property
    def largest_batch(self) -> int | None:
        return 1 if isinstance(self.dataset, PicturePairs) and not self.dataset.as_bytes else None  # pictures differ in size

    @property
    def fixed(self) -> Dataset[Sample]:
        """Patches at places that are drawn once."""
        if isinstance(self.dataset, PicturePairs):
            return FixedPatches(self.dataset, self.input_shape[1])
        if isinstance(self.dataset, Subset) and isinstance(self.dataset.dataset, PicturePairs):
            return Subset(FixedPatches(self.dataset.dataset, self.input_shape[1]), self.dataset.indices)
        return self.dataset

    def augmentation(self, name: str) -> Patches | None:
        """Patches of the pictures, turned as well for ``auto`` and ``crop_flip``."""
        return Patches(self.input_shape[1], self.scale, flips=name in ("auto", "crop_flip"))


@dataclass(frozen=True)
class UpscalingSuite:
    """Named pictures.

    Attributes:
        summary: What they are, in one line.
        places: Where they are looked for, and how to get them.
        load: The pictures of a split.
    """

    summary: str
    places: str
    load: Callable[[Split], Sequence[Picture]]


def sample_photographs(split: Split) -> list[PictureInMemory]:
    """scikit-learn's two photographs, china and flower: the right half of each to measure on, the left half to train on."""
    try:
        from sklearn.datasets import load_sample_image
    except ImportError as error:
        raise missing_extra("scikit-learn", "data", "the sample photographs") from error
    found = []
    for name in ("china.jpg", "flower.jpg"):
        pixels = torch.from_numpy(load_sample_image(name).copy()).permute(2, 0, 1)
        half = pixels.shape[2] // 2
        found.append(PictureInMemory(name, (pixels[:, :, half:] if split == "test" else pixels[:, :, :half]).contiguous()))
    return found


UPSCALING_SUITES: dict[str, UpscalingSuite] = {
    "sample-photographs": UpscalingSuite(
        "two photographs of 640x427 pixels, left halves to train on, right halves to measure on; the embedded default",
        f"part of scikit-learn ({install_command('data')})",
        sample_photographs,
    ),
    "photographs": UpscalingSuite(
        "128 photographs of about 500x350 to 960x540 pixels, 24 of them to measure on", f"Debian packages ({INSTALL})", photographs
    ),
}


def load_pairs(spec: str, *, scale: int, split: Split = "train", patch: int = 48, strict: bool = True) -> UpscalingData:
    """Pictures for super-resolution.

    Args:
        spec: A name of ``UPSCALING_SUITES``, or a folder of originals, divided by sub-folders called train, test, val and so on where there
            are any. Where a folder has the sub-folders HR and LR (or high and low), the small pictures are those in LR, or in LR/X2 for scale
            2, by the names of their originals, with or without x2 behind them.
        scale: How many times larger an original is.
        split: ``"train"`` (patches), ``"test"`` (whole pictures), or ``"calibration"`` (patches of the training pictures at fixed places).
        patch: Side of a patch of the small picture, in pixels.
        strict: False leaves out pictures that cannot be decoded, and those whose small picture cannot be.

    Raises:
        UnknownNameError: Neither a suite nor a path.
        DataError: Pictures cannot be read, are smaller than a patch, or do not belong together.
        SpecError: A scale or patch below 1.
    """
    if scale < 1 or patch < 1:
        raise SpecError(f"scale {scale}, patch {patch}: both are whole numbers from 1")
    ignored, small = 0, None
    originals: Sequence[Picture]
    if spec in UPSCALING_SUITES:
        originals = UPSCALING_SUITES[spec].load(split)
    else:
        originals, small, ignored = _from_folder(Path(spec), split, scale)
    skipped: list[Path] = []
    pairs = PicturePairs(originals, scale, small)
    if not strict:
        pairs, skipped = _readable(pairs, spec)
    if split != "test":
        _check_sizes(pairs, patch, spec)
        pairs.repeats, pairs.as_bytes = max(PATCHES, -(-FEWEST_SAMPLES // len(pairs.originals))), split == "train"
    dataset = FixedPatches(pairs, patch) if split == "calibration" else pairs
    shape = (3, patch, patch)
    return UpscalingData(
        spec,
        dataset,
        None,
        shape,
        ignored=ignored,
        skipped=tuple(skipped),
        scale=scale,
        pictures=len(pairs.originals),
        given=small is not None,
    )


def _from_folder(folder: Path, split: Split, scale: int) -> tuple[list[Picture], list[Picture] | None, int]:
    """Originals, small pictures where they are given, and how many other files there are."""
    if not folder.exists():
        raise unknown_name("data", str(folder), UPSCALING_SUITES, "Or a folder of pictures; there is no such path.")
    if not folder.is_dir():
        raise DataError(f"{folder}: expected a folder of pictures")
    folder = split_folder(folder, split)
    parts = {path.name.lower(): path for path in folders_in(folder)}
    high, low = (next((parts[name] for name in names if name in parts), None) for names in (HIGH, LOW))
    if high is None and low is not None:
        raise DataError(f"{folder}: has small pictures in {low.name}, but no sub-folder {' or '.join(HIGH)} with their originals")
    originals, ignored = pictures_beside(high or folder)
    if not originals:
        raise DataError(f"{high or folder}: no picture ({', '.join(SUFFIXES)}) in it, {ignored} other file(s)")
    files: list[Picture] = [PictureFile(path) for path in originals]
    if low is None:
        return files, None, ignored
    inner = {path.name.lower(): path for path in folders_in(low)}
    small, others = pictures_beside(inner.get(f"x{scale}", low))
    by_name = {_stem(path, scale): path for path in small}
    alone = [path.name for path in originals if path.stem not in by_name]
    unknown = sorted(set(by_name) - {path.stem for path in originals})
    if alone or unknown or len(by_name) != len(small):
        raise DataError(
            f"{folder}: pictures in {high.name if high else '.'} and {low.name} do not belong together: "
            f"{_listed(alone)} without a small picture, {_listed(unknown)} without an original. They must have the same names."
        )
    return files, [PictureFile(by_name[path.stem]) for path in originals], ignored + others


def _readable(pairs: PicturePairs, spec: str) -> tuple[PicturePairs, list[Path]]:
    """The pairs that can be decoded, and the files of those that cannot."""
    kept, skipped = [], []
    for index, picture in enumerate(pairs.originals):
        try:
            picture.read()
            if pairs.small is not None:
                pairs.small[index].read()
            kept.append(index)
        except DataError:
            skipped.append(Path(picture.name))
    if not kept:
        raise DataError(f"{spec}: none of the {len(skipped)} pictures can be decoded, {skipped[0]} among them")
    small = None if pairs.small is None else [pairs.small[index] for index in kept]
    return PicturePairs([pairs.originals[index] for index in kept], pairs.scale, small), skipped


def _check_sizes(pairs: PicturePairs, patch: int, spec: str) -> None:
    """DataError where a picture is smaller than a patch."""
    smaller = []
    for index, picture in enumerate(pairs.originals):
        small, original = pairs.pair(index)
        if min(small.shape[1:]) < patch:
            smaller.append(f"{picture.name} ({_size(original)})")
    if smaller:
        side = patch * pairs.scale
        raise DataError(
            f"{spec}: smaller than a patch of {side} x {side} pixels ({patch} x {patch} at scale {pairs.scale}): {_listed(smaller)}. "
            "Remove them, or ask for smaller patches with patch=."
        )


def _stem(path: Path, scale: int) -> str:
    return path.stem.removesuffix(f"x{scale}")


def _size(picture: Tensor) -> str:
    return f"{picture.shape[2]} x {picture.shape[1]}"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{', '.join(names[:SHOWN])}{more}" if names else "none"
