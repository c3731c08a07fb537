"""Augmentation of batches in plain tensor code: the same seed produces the same pictures on every device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Generator, Tensor
from torch.nn import functional

SMALLEST_AUGMENTED = 28  # pixels; smaller pictures lose too much when they are shifted


def pad_crop(images: Tensor, padding: int, generator: Generator, *, fill: float = 0.0) -> Tensor:
    """Shift each image of ``[N, C, H, W]`` by up to ``padding`` pixels each way; what comes in from outside is ``fill``.

    ``fill`` is in the units of ``images``: black is ``-mean / std`` where they are normalised.
    """
    count, _, height, width = images.shape
    padded = functional.pad(images, [padding] * 4, value=fill)
    top, left = (torch.randint(2 * padding + 1, (count, 1), generator=generator).to(images.device) for _ in range(2))
    rows, columns = top + torch.arange(height, device=images.device), left + torch.arange(width, device=images.device)
    sample = torch.arange(count, device=images.device).view(-1, 1, 1)
    return padded[sample, :, rows.unsqueeze(2), columns.unsqueeze(1)].permute(0, 3, 1, 2).contiguous()


def flip(images: Tensor, generator: Generator) -> Tensor:
    """Mirror each image of ``[N, C, H, W]`` left to right with probability one half."""
    chosen = torch.rand(len(images), generator=generator).to(images.device) < 0.5
    return torch.where(chosen.view(-1, 1, 1, 1), images.flip(3), images)


class BatchChange(Protocol):
    """What is done to training batches."""

    def __call__(self, batch: Any, generator: Generator) -> Any:
        """The batch with random changes."""

    def plain(self, batch: Any) -> Any:
        """The batch as a network takes it, without random changes."""


@dataclass(frozen=True)
class Augmentation:
    """Random changes of the pictures ``[N, C, H, W]`` that are the first member of a batch.

    Attributes:
        padding: Largest shift in pixels, each way.
        flips: Whether to mirror half of the pictures left to right.
        fill: Value outside of the picture, one for each channel.
    """

    padding: int = 0
    flips: bool = False
    fill: tuple[float, ...] = (0.0,)

    def __call__(self, batch: Sequence[Tensor], generator: Generator) -> tuple[Tensor, ...]:
        """The batch with changed pictures."""
        images, *rest = batch
        if self.padding:
            fill = torch.tensor(self.fill, dtype=images.dtype, device=images.device).view(-1, 1, 1)
            images = pad_crop(images - fill, self.padding, generator) + fill
        return (flip(images, generator) if self.flips else images, *rest)

    def plain(self, batch: Sequence[Tensor]) -> Sequence[Tensor]:
        """The batch as it is."""
        return batch
