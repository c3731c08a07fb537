"""Pictures decoded safely and brought to the shape that a network takes."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from lowbit.errors import DataError, SpecError
from lowbit.reading import check_readable

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # no other decoder of Pillow sees a file
MAX_PIXELS = 100_000_000  # a small file can unpack to any size
MAX_BYTES = 200_000_000
_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR, "nearest": Image.Resampling.NEAREST}


@dataclass(frozen=True)
class Preprocessing:
    """From a picture of any size to a normalised tensor.

    The shorter side is resized to ``floor(size / crop_fraction)``, the centre ``size`` x ``size`` is cut out, pixels in 0..1 become
    ``(pixel - mean) / std``. The defaults are those of most ImageNet networks.

    Attributes:
        size: Height and width of the result, in pixels.
        crop_fraction: Part of the shorter side that is kept, above 0 to 1.
        mean, std: Per channel; one number counts for all of them.
        grey: One channel instead of three.
    """

    size: int = 224
    crop_fraction: float = 0.875
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: Literal["bicubic", "bilinear", "nearest"] = "bicubic"
    grey: bool = False

    def __post_init__(self) -> None:
        if self.size < 1 or not 0 < self.crop_fraction <= 1:
            raise SpecError(
                f"preprocessing: size {self.size}, crop_fraction {self.crop_fraction}; size is 1 or more, crop_fraction above 0 to 1"
            )
        if self.interpolation not in _FILTERS:
            raise SpecError(f"preprocessing: interpolation {self.interpolation!r}, expected one of {', '.join(_FILTERS)}")
        for name in ("mean", "std"):
            if len(getattr(self, name)) == 1:  # one number counts for all channels
                object.__setattr__(self, name, getattr(self, name) * self.channels)
        if len(self.mean) != self.channels or len(self.std) != self.channels:
            raise SpecError(f"preprocessing: mean {self.mean}, std {self.std}; give one number, or {self.channels}, one for each channel")
        if min(self.std) <= 0:
            raise SpecError(f"preprocessing: std {self.std}; every value must be positive")

    @property
    def channels(self) -> int:
        """1 for grey, else 3."""
        return 1 if self.grey else 3

    def __str__(self) -> str:
        mean, std = (", ".join(f"{value:.4g}" for value in values) for values in (self.mean, self.std))
        colours = "grey" if self.grey else "colour"
        return f"{self.size} x {self.size}, {colours}, mean {mean}, std {std}, crop fraction {self.crop_fraction:g}, {self.interpolation}"

    def __call__(self, picture: Image.Image) -> Tensor:
        """float32 ``[channels, size, size]``; DataError where resizing would make more than ``MAX_PIXELS`` pixels of it."""
        shorter = int(self.size / self.crop_fraction)
        scale = shorter / min(picture.size)
        width, height = (max(shorter, round(side * scale)) for side in picture.size)
        if width * height > MAX_PIXELS:
            raise DataError(
                f"a picture of {picture.width} x {picture.height} pixels is too narrow: its shorter side at {shorter} pixels makes "
                f"{width:,} x {height:,}, at most {MAX_PIXELS:,} pixels are computed. Cut it to its subject."
            )
        picture = picture.convert("L" if self.grey else "RGB").resize((width, height), _FILTERS[self.interpolation])
        left, top = (width - self.size) // 2, (height - self.size) // 2
        pixels = torch.from_numpy(np.array(picture.crop((left, top, left + self.size, top + self.size)), dtype=np.float32))
        planes = pixels.reshape(self.size, self.size, self.channels).permute(2, 0, 1) / 255
        mean, std = (torch.tensor(values, dtype=torch.float32).view(-1, 1, 1) for values in (self.mean, self.std))
        return ((planes - mean) / std).contiguous()


def read_picture(path: Path, *, max_pixels: int = MAX_PIXELS, max_bytes: int = MAX_BYTES, one_frame: bool = False) -> Image.Image:
    """The decoded picture in ``path``, upright as its EXIF orientation says; of several frames the first, or an error with ``one_frame``.

    Raises:
        DataError: It is too large, truncated, corrupt, or no picture.
    """
    return decode_picture(check_readable(path, max_bytes=max_bytes), str(path), max_pixels=max_pixels, one_frame=one_frame)


def decode_picture(source: Path | BinaryIO, name: str, *, max_pixels: int = MAX_PIXELS, one_frame: bool = False) -> Image.Image:
    """The picture in a file, or in what is opened for reading, as ``read_picture`` gives it; ``name`` is for errors."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about damaged metadata, and about size, which max_pixels decides
            with Image.open(source, formats=FORMATS) as picture:
                if picture.width * picture.height > max_pixels:
                    raise DataError(f"{name}: {picture.width} x {picture.height} pixels, at most {max_pixels:,} are decoded")
                frames = getattr(picture, "n_frames", 1)
                if one_frame and frames > 1:
                    raise DataError(f"{name}: {frames} frames or pages, expected one picture. Save the one that is meant.")
                return ImageOps.exif_transpose(_eight_bits(picture))
    except DataError:
        raise
    except Image.DecompressionBombError as error:
        raise DataError(f"{name}: too many pixels, at most {max_pixels:,} are decoded ({error})") from error
    except UnidentifiedImageError as error:
        raise DataError(f"{name}: no picture in a known format ({', '.join(FORMATS)}). Repair or remove it.") from error
    except Exception as error:  # a damaged file can make a decoder stumble in any way
        raise DataError(f"{name}: cannot be decoded, it is truncated or corrupt ({error}). Repair or remove it.") from error


def colour_planes(picture: Image.Image) -> Tensor:
    """uint8 ``[3, H, W]``: red, green and blue of a picture of any kind; grey counts for all three, transparency is dropped."""
    colours = picture.convert("RGBA").convert("RGB") if picture.mode == "P" else picture.convert("RGB")
    return torch.from_numpy(np.array(colours)).permute(2, 0, 1).contiguous()


def read_input(path: Path, preprocessing: Preprocessing) -> Tensor:
    """The picture in ``path`` as a network takes it, float32 ``[channels, size, size]``.

    Raises:
        DataError: It cannot be decoded, or is too large or too narrow.
    """
    picture = read_picture(path)
    try:
        return preprocessing(picture)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def _eight_bits(picture: Image.Image) -> Image.Image:
    """The decoded picture, 16-bit grey as 8-bit grey: Pillow's own conversion would cut off everything above 255."""
    picture.load()
    if picture.mode.startswith("I"):
        return Image.fromarray((np.asarray(picture).astype(np.int64) // 256).clip(0, 255).astype(np.uint8))
    return picture
