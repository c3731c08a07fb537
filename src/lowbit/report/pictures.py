"""Pictures in a report: those that the float and the quantized network classify differently, and samples that a task shows."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from lowbit.inputs import Inputs

MOST_PICTURES = 12
LARGEST_SIDE = 128  # pixels of a picture in a report


@dataclass(frozen=True)
class Disagreement:
    """One picture.

    Attributes:
        sample: Its position in the data, from 0.
        float_answer, quantized_answer: The class that each network predicts.
        label: The right class; ``None`` without labels.
        margin: How much larger the float network's logit of its own answer is than that of the quantized network's answer.
        png: The picture; values are stretched from its smallest to its largest.
    """

    sample: int
    float_answer: int
    quantized_answer: int
    label: int | None
    margin: float
    png: bytes

    @property
    def facts(self) -> dict[str, int | None]:
        """The entry in ``report.json``."""
        return {"sample": self.sample, "float": self.float_answer, "quantized": self.quantized_answer, "label": self.label}

    @property
    def data_uri(self) -> str:
        """The picture as the source of an HTML image."""
        return data_uri(self.png)


class Disagreements:
    """Batches that two networks answer, and the pictures on which their answers differ, the float network's most confident answers first.

    Labels are those of the batch that was drawn last, so ``watch`` has to see the answers before the next one is drawn.

    Attributes:
        count: How many answers differed, kept or not.
    """

    def __init__(self, data: Iterable[object]) -> None:
        self.count = 0
        self._data = data
        self._seen = 0
        self._batch: object = None
        self._kept: list[tuple[float, int, int, int, int | None, Tensor]] = []

    def __iter__(self) -> Iterator[object]:
        for batch in self._data:
            self._batch = batch
            yield batch

    def __len__(self) -> int:
        return len(self._data)  # type: ignore[arg-type] # a TypeError where it is not known, as of the data itself

    def watch(self, inputs: Inputs, wanted: Tensor, got: Tensor) -> None:
        """Compare the answers of the float and of the quantized network to one batch."""
        first, self._seen = self._seen, self._seen + inputs.batch_size
        if not _are_pictures(inputs) or wanted.dim() != 2 or wanted.shape[1] < 2 or len(wanted) != inputs.batch_size:
            return
        right, answer = wanted.argmax(1), got.argmax(1)
        labels = _labels(self._batch, len(right))
        for index in (right != answer).nonzero().flatten().tolist():
            self.count += 1
            margin = float(wanted[index, right[index]] - wanted[index, answer[index]])
            label = None if labels is None else int(labels[index])
            picture = inputs.tensors[0][index].detach().cpu()
            self._kept.append((-margin, first + index, int(right[index]), int(answer[index]), label, picture))
        self._kept = sorted(self._kept, key=lambda entry: entry[:2])[:MOST_PICTURES]

    def found(self) -> list[Disagreement]:
        """The pictures that were kept, the float network's most confident answers first."""
        return [
            Disagreement(sample, right, answer, label, -negative, picture_png(picture))
            for negative, sample, right, answer, label, picture in self._kept
        ]


@dataclass(frozen=True)
class PictureRow:
    """A sample of the task with pictures of it.

    Attributes:
        words: What it is.
        pictures: Sources of HTML images by what they show.
    """

    words: str
    pictures: Mapping[str, str]

    @staticmethod
    def of(words: str, pictures: Mapping[str, Tensor]) -> PictureRow:
        """From uint8 ``[3, H, W]``."""
        return PictureRow(words, {name: data_uri(png_of(pixels)) for name, pixels in pictures.items()})


def data_uri(png: bytes) -> str:
    """A picture as the source of an HTML image."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def png_of(pixels: Tensor) -> bytes:
    """uint8 ``[1, H, W]`` or ``[3, H, W]`` as PNG, at most ``LARGEST_SIDE`` pixels wide and high."""
    image = Image.fromarray(pixels.squeeze(0).numpy() if len(pixels) == 1 else pixels.permute(1, 2, 0).contiguous().numpy())
    image.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return file.getvalue()


def _are_pictures(inputs: Inputs) -> bool:
    tensors = inputs.tensors
    return len(tensors) == 1 and tensors[0].dim() == 4 and tensors[0].shape[1] in (1, 3) and tensors[0].is_floating_point()


def _labels(batch: object, count: int) -> Tensor | None:
    """The second member of a batch, where it is one whole number for each sample."""
    label = batch[1] if isinstance(batch, (tuple, list)) and len(batch) == 2 else None
    is_class = isinstance(label, Tensor) and label.shape == (count,) and not label.is_floating_point()
    return label if is_class else None


def picture_png(picture: Tensor) -> bytes:
    """A picture of one or three channels as PNG, at most ``LARGEST_SIDE`` pixels wide and high, values stretched to black and white."""
    low, high = picture.amin(), picture.amax()
    return png_of(((picture - low) / (high - low).clamp_min(1e-12) * 255).round().to(torch.uint8))
