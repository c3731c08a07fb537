"""Resizing and measures of super-resolution for reference cases."""

from __future__ import annotations

from torch import Tensor

from lowbit.data.image_data import TensorImages
from lowbit.measure.picture_quality import luma
from lowbit.qat.tasks import SuperResolution
from lowbit.resize import imresize, round_pixels


def planes(pixels: Tensor) -> Tensor:
    """``[H, W, 3]`` as ``[1, 3, H, W]``."""
    return pixels.permute(2, 0, 1).unsqueeze(0)


def y_channel(params: dict, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"y": luma(planes(inputs["rgb"]))}


def imresize_bicubic(params: dict, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    pixels = planes(inputs["img"])
    fractions = TensorImages(pixels, None, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)).normalized(pixels)
    out, whole = (imresize(part, params["scale"], antialiasing=params["antialiasing"])[0] for part in (fractions, pixels))
    return {"out": out.permute(1, 2, 0), "out_u8": round_pixels(whole).permute(1, 2, 0)}


def metrics(params: dict, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    measures = {
        "y": SuperResolution(),
        "rgb": SuperResolution(channels="rgb"),
        "y_edsr": SuperResolution(channels="y_256"),
        "rgb_edsr_shave6": SuperResolution(channels="rgb", more_border=6),
    }
    for name, task in measures.items():
        quality = task.quality(planes(inputs["sr"]), planes(inputs["hr"]), params["scale"])
        found |= {f"{measure.lower()}_{name}": value for measure, value in quality.items()}
    return found


def output_rounding(params: dict, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"y": round_pixels(inputs["x"])}
