"""Training batches in an order that depends on nothing but the seed, divided among processes."""

from __future__ import annotations

import hashlib
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Generator, Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler, SequentialSampler, default_collate

from lowbit.data.augment import flip, pad_crop
from lowbit.data.image_data import ImageData, TensorImages
from lowbit.errors import DataError, SpecError
from lowbit.qat.recipe import Recipe
from lowbit.qat.task import Batch

AugmentName = Literal["auto", "none", "crop", "crop_flip"]
Fetch = Callable[[list[list[int]], Generator], Iterable[Batch]]  # batches for lists of sample numbers
SMALLEST_AUGMENTED = 28  # pixels; smaller pictures lose too much when they are shifted


def seeded(*parts: int) -> Generator:
    """A generator whose numbers depend on all of ``parts``."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return Generator().manual_seed(int.from_bytes(digest) >> 1)


@dataclass(frozen=True)
class Augmentation:
    """Random changes of pictures ``[N, C, H, W]``.

    Attributes:
        padding: Pictures are shifted by up to so many pixels each way.
        flips: Mirror half of them left to right.
        fill: What comes in from outside, one value for each channel.
    """

    padding: int = 0
    flips: bool = False
    fill: tuple[float, ...] = (0.0,)

    def __call__(self, images: Tensor, generator: Generator) -> Tensor:
        """The changed pictures."""
        if self.padding:
            fill = torch.tensor(self.fill, dtype=images.dtype, device=images.device).view(-1, 1, 1)
            images = pad_crop(images - fill, self.padding, generator) + fill
        return flip(images, generator) if self.flips else images

    @staticmethod
    def of(name: AugmentName, data: object) -> Augmentation | None:
        """The augmentation called ``name`` for ``data``; ``auto`` shifts and mirrors pictures of 28 pixels and more.

        Raises:
            SpecError: No such augmentation, or ``data`` are no pictures.
        """
        if name not in get_args(AugmentName):
            raise SpecError(f"augment must be one of {', '.join(get_args(AugmentName))}, got {name!r}")
        shape = data.input_shape if isinstance(data, ImageData) else ()
        are_pictures = isinstance(data, ImageData) and len(shape) == 3 and len(data.mean) == shape[0]
        if name == "none" or (name == "auto" and (not are_pictures or min(shape[1:]) < SMALLEST_AUGMENTED)):
            return None
        if not isinstance(data, ImageData) or not are_pictures:
            raise SpecError(f"augment {name!r} works on pictures of lowbit.data. Use 'none', and change samples in your data set.")
        black = tuple(-mean / std for mean, std in zip(data.mean, data.std, strict=True))
        return Augmentation(min(shape[1:]) // 8, name != "crop", black)


class Feed(ABC):
    """Training batches of one process.

    Attributes:
        steps: Optimizer steps of an epoch.
        samples: Of an epoch, over all processes; 0 where that is not known.
        targets: Those of all samples, where they lie in memory.
    """

    steps: int
    samples: int
    targets: Tensor | None = None

    @abstractmethod
    def epoch(self, index: int, start: int = 0) -> Iterator[tuple[Batch, float]]:
        """The batches of epoch ``index`` from step ``start`` on, each with its weight.

        Each step takes as many batches as gradients are accumulated. The weighted losses of a step's batches, added up over all
        its batches and divided by their number, are the mean over its samples.
        """

    @abstractmethod
    def first(self, count: int) -> Iterable[Batch]:
        """``count`` batches at most in a fixed order, without augmentation, the same in every process."""

    def facts(self) -> dict[str, object]:
        """What tells this data from other data."""
        return {"samples": self.samples, "steps": self.steps}


class DatasetFeed(Feed):
    """Every sample of a data set once in an epoch, in steps of nearly equal size.

    An epoch's order is drawn from the seed and its number, augmentation from these, the step and the batch's place in it, so that
    one process that accumulates the gradients of two batches and two processes with one batch each see the same.

    Args:
        fetch: Gives the batches for lists of sample numbers.
        samples: How many there are.
        recipe: Batch size, accumulation, seed.
        augmentation: Applied to the inputs of training batches.
        rank, processes: This process, and how many there are.
    """

    def __init__(
        self,
        fetch: Fetch,
        samples: int,
        recipe: Recipe,
        *,
        augmentation: Augmentation | None = None,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        self._parts = recipe.accumulate * processes
        if samples < self._parts:
            raise DataError(f"{samples} training samples cannot be divided into {self._parts} batches for each step. Use more data.")
        self.samples = samples
        self.steps = -(-samples // (recipe.batch_size * self._parts))
        self._fetch, self._recipe, self._augmentation, self._rank, self._processes = fetch, recipe, augmentation, rank, processes

    def epoch(self, index: int, start: int = 0) -> Iterator[tuple[Batch, float]]:
        order = torch.randperm(self.samples, generator=seeded(self._recipe.seed, index))
        chosen, weights, places = [], [], []
        for step, members in enumerate(order.tensor_split(self.steps)[start:], start):
            parts = members.tensor_split(self._parts)
            for place in range(self._rank, self._parts, self._processes):
                chosen.append(parts[place].tolist())
                weights.append(len(parts[place]) * self._parts / len(members))
                places.append((step, place))
        batches = self._fetch(chosen, seeded(self._recipe.seed, index, start, self._rank))
        for batch, weight, (step, place) in zip(batches, weights, places, strict=True):
            if self._augmentation is not None:
                generator = seeded(self._recipe.seed, index, step, place)
                batch = (self._augmentation(batch[0], generator), *batch[1:])
            yield batch, weight

    def first(self, count: int) -> Iterable[Batch]:
        order = torch.randperm(self.samples, generator=seeded(self._recipe.seed))[: count * self._recipe.batch_size]
        return self._fetch([part.tolist() for part in order.split(self._recipe.batch_size)], seeded(self._recipe.seed))


class BatchFeed(Feed):
    """Batches as they come from an iterable that knows its length."""

    def __init__(self, batches: Iterable[Batch], recipe: Recipe, processes: int = 1) -> None:
        if not isinstance(batches, Sized):
            raise SpecError(f"{type(batches).__name__} does not know how many batches it has (len). Pass a data set or a list of batches.")
        if processes > 1:
            raise SpecError("batches cannot be divided among processes: pass a data set, or train in one process.")
        if len(batches) < recipe.accumulate:
            raise DataError(
                f"{len(batches)} batches are fewer than the {recipe.accumulate} whose gradients are accumulated. Use more data."
            )
        self._batches, self._recipe, self.samples = batches, recipe, 0
        self.steps = len(batches) // recipe.accumulate

    def epoch(self, index: int, start: int = 0) -> Iterator[tuple[Batch, float]]:
        accumulate = self._recipe.accumulate
        return ((batch, 1.0) for batch in itertools.islice(iter(self._batches), start * accumulate, self.steps * accumulate))

    def first(self, count: int) -> Iterable[Batch]:
        return itertools.islice(iter(self._batches), count)


def make_feed(data: object, recipe: Recipe, *, augment: AugmentName = "auto", rank: int = 0, processes: int = 1, workers: int = 0) -> Feed:
    """Training batches from whatever a user has.

    Args:
        data: ``ImageData`` of ``lowbit.data``, a data set of torch, a pair of tensors ``(inputs, labels)``, a loader of torch (of
            which data set, collating and workers are taken where it has no sampler of its own), or batches that know their number.
        recipe: Batch size, accumulation, seed.
        augment: ``auto``, ``none``, ``crop`` or ``crop_flip``; for ``ImageData``.
        rank, processes: This process, and how many there are.
        workers: Processes that fetch samples.

    Raises:
        SpecError: Data of another kind.
        DataError: No sample, or no labels.
    """
    augmentation = Augmentation.of(augment, data)
    collate: Callable[[list[Any]], Any] = default_collate
    if isinstance(data, DataLoader):
        if not _has_plain_order(data):
            return BatchFeed(data, recipe, processes)
        collate, workers, data = data.collate_fn, max(workers, data.num_workers), data.dataset
    if isinstance(data, ImageData):
        if data.num_classes is None:
            raise DataError(f"{data.name}: there are no labels to train with. Name a folder with one sub-folder for each class.")
        data = data.dataset
    if isinstance(data, (tuple, list)) and len(data) == 2 and all(isinstance(part, Tensor) for part in data):
        if len(data[0]) != len(data[1]):
            raise DataError(f"training data: {len(data[0])} inputs, but {len(data[1])} labels")
        feed = DatasetFeed(_tensor_fetch(*data), len(data[0]), recipe, augmentation=augmentation, rank=rank, processes=processes)
        feed.targets = data[1]
        return feed
    fetch: Fetch
    if isinstance(data, TensorImages):
        fetch = _image_fetch(data)
    elif isinstance(data, Dataset) and isinstance(data, Sized):
        fetch = _dataset_fetch(data, collate, workers)
    elif isinstance(data, Iterable):
        return BatchFeed(data, recipe, processes)
    else:
        raise SpecError(f"training data: expected a data set, tensors (inputs, labels) or a loader, got {type(data).__name__}")
    feed = DatasetFeed(fetch, len(data), recipe, augmentation=augmentation, rank=rank, processes=processes)
    feed.targets = data.labels if isinstance(data, TensorImages) else None
    return feed


def evaluation_batches(data: object, batch_size: int) -> Iterable[Batch]:
    """Batches of test data, in order; see ``make_feed`` for what ``data`` may be."""
    if isinstance(data, ImageData):
        data = data.dataset
    if isinstance(data, TensorImages) or (isinstance(data, (tuple, list)) and len(data) == 2 and all(isinstance(p, Tensor) for p in data)):
        count = len(data) if isinstance(data, TensorImages) else len(data[0])
        fetch = _image_fetch(data) if isinstance(data, TensorImages) else _tensor_fetch(*data)
        return _Batches(fetch, [list(range(start, min(start + batch_size, count))) for start in range(0, count, batch_size)])
    if isinstance(data, Dataset) and isinstance(data, Sized):
        return DataLoader(data, batch_size)
    if isinstance(data, Iterable):
        return data
    raise SpecError(f"test data: expected a data set, tensors (inputs, labels) or a loader, got {type(data).__name__}")


class _Batches(Iterable[Batch]):
    """Fixed batches that can be run through again and again."""

    def __init__(self, fetch: Fetch, chosen: list[list[int]]) -> None:
        self._fetch, self._chosen = fetch, chosen

    def __len__(self) -> int:
        return len(self._chosen)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._fetch(self._chosen, Generator()))


def _has_plain_order(loader: DataLoader[Any]) -> bool:
    is_plain = isinstance(loader.sampler, (SequentialSampler, RandomSampler)) and not getattr(loader.sampler, "replacement", False)
    return is_plain and loader.batch_size is not None and isinstance(loader.dataset, Sized)


def _tensor_fetch(inputs: Tensor, labels: Tensor) -> Fetch:
    return lambda chosen, _: ((inputs[members], labels[members]) for members in chosen)


def _image_fetch(data: TensorImages) -> Fetch:
    labels = data.labels
    if labels is None:
        raise DataError("there are no labels to train with")
    return lambda chosen, _: ((data.normalized(data.images[members]), labels[members]) for members in chosen)


def _dataset_fetch(data: Dataset[Any], collate: Callable[[list[Any]], Any], workers: int) -> Fetch:
    def fetch(chosen: list[list[int]], generator: Generator) -> Iterable[Batch]:
        # a generator of its own: a loader draws from torch's, which would then depend on how often training was stopped
        return DataLoader(data, batch_sampler=_Fixed(chosen), collate_fn=collate, num_workers=workers, generator=generator)

    return fetch


class _Fixed(Sequence[list[int]]):
    """A batch sampler of given batches; a class, so that worker processes can be started with it."""

    def __init__(self, batches: list[list[int]]) -> None:
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: Any) -> Any:
        return self._batches[index]
