"""Super-resolution: the target is the picture that the input was made of, 2, 3 or 4 times larger."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from lowbit.errors import DataError
from lowbit.measure.picture_quality import BT601, BT601_256, luma, psnr, ssim, without_border
from lowbit.options import AtLeast
from lowbit.qat.recipe import UPSCALING_RECIPE
from lowbit.qat.task import Batch, Example, Output, Sums, Supervised, format_shape
from lowbit.resize import enlarge, round_pixels

MOST_PSNR = 100.0  # dB: what equal pictures count, so that a mean stays a number
CROP = 96  # pixels of a picture in a report
LUMA = {"y": BT601, "y_256": BT601_256}


@dataclass(frozen=True)
class SuperResolution(Supervised):
    """L1; PSNR and SSIM on luma, of the network and of bicubic enlarging.

    Inputs ``[N, 3, H, W]``, outputs and targets ``[N, 3, scale * H, scale * W]``, all RGB in 0 to 255. In a batch of pictures of different sizes
    inputs and targets are lists of ``[3, H, W]``. Outputs are clipped and rounded to whole numbers before they are measured, and a border
    of ``scale`` pixels is left out. Metrics are means over pictures; a picture that equals its original counts 100 dB.

    Attributes:
        scale: How many times larger the output is. Default: as the targets are.
        channels: What is measured: luma as in ITU-R BT.601; luma with the factors of 8-bit arithmetic, as EDSR's program has it; or colours.
        more_border: Pixels left out besides the scale: 6 as EDSR's program does it on DIV2K.

    Example:
        >>> import torch, lowbit
        >>> small = torch.full((1, 3, 16, 16), 100.0)
        >>> network = torch.nn.Upsample(scale_factor=2)
        >>> original = torch.full((1, 3, 32, 32), 110.0)
        >>> found = lowbit.evaluate(network, (small, original), task=lowbit.SuperResolution(scale=2))
        >>> round(found["PSNR"], 3), round(found["bicubic PSNR"], 3)
        (29.453, 29.453)
    """

    scale: Annotated[int, AtLeast(1)] | None = None
    channels: Literal["y", "y_256", "rgb"] = "y"
    more_border: Annotated[int, AtLeast(0)] = 0

    metric_name = "PSNR"
    units: ClassVar = {"PSNR": "dB", "bicubic PSNR": "dB"}
    meanings: ClassVar = {
        "PSNR": "Peak signal-to-noise ratio on luma, the mean over pictures.",
        "SSIM": "Structural similarity on luma, the mean over pictures; 1 for equal ones.",
        "bicubic PSNR": "PSNR of bicubic enlarging, which a network has to beat.",
        "bicubic SSIM": "SSIM of bicubic enlarging.",
    }
    has_classes = False
    recipe = UPSCALING_RECIPE
    open_dimensions = ("H", "W")

    def predict(self, model: nn.Module, batch: Batch) -> Output:
        """The network's output; a list where the inputs are one."""
        inputs = batch[0] if isinstance(batch, (tuple, list)) and self.target is None else None
        if isinstance(inputs, list):
            return [self.output_in(model(picture.unsqueeze(0)))[0] for picture in inputs]
        return super().predict(model, batch)

    def loss(self, output: Output, batch: Batch) -> Tensor:
        """Mean absolute difference of all values."""
        pairs = self._pairs(output, batch)
        if any(found.shape != wanted.shape for found, wanted in pairs):
            self.check(output, batch)
        return torch.stack([functional.l1_loss(found, wanted) for found, wanted in pairs]).mean()

    def distillation_loss(self, output: Output, teacher_output: Output) -> Tensor:
        """Mean absolute difference to the teacher's picture."""
        return functional.l1_loss(self.output_in(output), self.output_in(teacher_output))

    def measure(self, output: Output, batch: Batch) -> Sums:
        """PSNR and SSIM of each picture and of the bicubically enlarged input, added up, and the number of pictures."""
        sums: dict[str, list[Tensor]] = {}
        count = 0
        for small, (found, wanted) in zip(self._inputs(batch), self._pairs(output, batch), strict=True):
            scale = wanted.shape[-1] // small.shape[-1]
            for name, values in self._quality(found, wanted, scale).items():
                sums.setdefault(name, []).append(values.sum())
            for name, values in self._quality(enlarge(small, scale), wanted, scale).items():
                sums.setdefault(f"bicubic {name}", []).append(values.sum())
            count += len(wanted)
        return {name: (torch.stack(values).sum(), count) for name, values in sums.items()}

    def examples(self, batch: Batch, output: Output, float_output: Output | None) -> Sequence[Example]:
        """For each picture the part of it where the quantized network differs most from the float one, or else from the original."""
        rows: list[Example] = []
        floats = [None] * len(self._inputs(batch)) if float_output is None else [found for found, _ in self._pairs(float_output, batch)]
        for small, (found, wanted), rival in zip(self._inputs(batch), self._pairs(output, batch), floats, strict=True):
            scale = wanted.shape[-1] // small.shape[-1]
            shown = {"bicubic": enlarge(small, scale), "float": rival, "quantized": found, "original": wanted}
            for index in range(len(wanted)):
                parts = {name: round_pixels(pictures[index]).float() for name, pictures in shown.items() if pictures is not None}
                parts["difference"] = (parts["quantized"] - parts["original" if rival is None else "float"]).abs()
                top, left = _largest_window(parts["difference"].sum(0), CROP)
                order = [name for name in ("bicubic", "float", "quantized", "difference", "original") if name in parts]
                cut = {name: parts[name][:, top : top + CROP, left : left + CROP] for name in order}
                strength = max(float(cut["difference"].max()), 1.0)
                quality = self.quality(found[index : index + 1], wanted[index : index + 1], scale)
                words = f"PSNR {float(quality['PSNR']):.2f} dB, at row {top}, column {left}"
                rows.append(
                    Example(
                        f"{words}; white in the difference is {strength:.0f} levels",
                        {
                            name: (part * (255 / strength) if name == "difference" else part).to(torch.uint8).cpu()
                            for name, part in cut.items()
                        },
                    )
                )
        return rows

    def check(self, output: Output, batch: Batch) -> None:
        for small, (found, wanted) in zip(self._inputs(batch), self._pairs(output, batch), strict=True):
            sizes = [tuple(part.shape[-2:]) for part in (small, found, wanted)]
            factors = [{whole / part for whole, part in zip(sizes[index], sizes[0], strict=True)} for index in (1, 2)]
            scale = next(iter(factors[1]))
            if len(factors[1]) > 1 or (self.scale is not None and scale != self.scale) or scale != int(scale):
                raise DataError(
                    f"SuperResolution: an input of {_words(sizes[0])} pixels goes with a target of {_words(sizes[2])}; targets must be "
                    f"{self.scale or 'a whole number of'} times larger. Change the scale, or the data."
                )
            if factors[0] != factors[1]:
                raise DataError(
                    f"SuperResolution: the network makes {_words(sizes[1])} pixels of {_words(sizes[0])}, the target has {_words(sizes[2])}: it is "
                    f"no network for scale {scale:g}. Use one that is, or data for its scale."
                )

    def quality(self, pictures: Tensor, originals: Tensor, scale: int) -> dict[str, Tensor]:
        """PSNR (infinite where nothing differs) and SSIM of each picture of ``[N, 3, H, W]``, float64 ``[N]``."""
        border = scale + self.more_border
        x, y = (without_border(part, border) for part in (round_pixels(pictures), originals))
        if self.channels != "rgb":
            x, y = luma(x, LUMA[self.channels]), luma(y, LUMA[self.channels])
        return {"PSNR": psnr(x, y), "SSIM": ssim(x, y)}

    def _quality(self, pictures: Tensor, originals: Tensor, scale: int) -> dict[str, Tensor]:
        return {name: values.clamp(max=MOST_PSNR) for name, values in self.quality(pictures, originals, scale).items()}

    def _inputs(self, batch: Batch) -> Sequence[Tensor]:
        """Small pictures as batches of one size."""
        inputs = next(value for key, value in batch.items() if key != self.target) if isinstance(batch, dict) else batch[0]
        return [picture.unsqueeze(0) for picture in inputs] if isinstance(inputs, list) else [inputs]

    def _pairs(self, output: Output, batch: Batch) -> Sequence[tuple[Tensor, Tensor]]:
        """Outputs and targets as batches of one size each.

        Raises:
            DataError: Targets of another size than the outputs', or no pictures.
        """
        target = self.target_in(batch)
        if isinstance(output, list) and isinstance(target, list):
            return [(found.unsqueeze(0), wanted.unsqueeze(0)) for found, wanted in zip(output, target, strict=True)]
        found, wanted = self.output_in(output), self.tensor_target(batch)
        if any(part.dim() != 4 or part.shape[1] != 3 for part in (found, wanted)):  # a check may be of another batch's output
            raise DataError(
                f"SuperResolution: a network with outputs of shape {format_shape(found)} and targets {format_shape(wanted)}; both must be "
                "colour pictures [N, 3, H, W] in 0 to 255."
            )
        return [(found, wanted.to(found))]


def _largest_window(values: Tensor, side: int) -> tuple[int, int]:
    """Top and left of the ``side`` x ``side`` part of ``[H, W]``, or of what there is, with the largest sum."""
    size = [min(side, length) for length in values.shape]
    sums = functional.avg_pool2d(values[None, None], size, stride=8)[0, 0]
    top, left = divmod(int(sums.argmax()), sums.shape[1])
    return 8 * top, 8 * left


def _words(size: Sequence[int]) -> str:
    return f"{size[1]} x {size[0]}"
