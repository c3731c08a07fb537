"""Training batches in an order that depends on nothing but the seed, divided among processes."""

from __future__ import annotations

import hashlib
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any, cast, get_args

import torch
from torch import Generator, Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler, SequentialSampler, default_collate

from lowbit.autograd import plain_tensor
from lowbit.data.augment import BatchChange
from lowbit.data.image_data import ImageData, TensorImages
from lowbit.errors import DataError, SpecError
from lowbit.inputs import known_length, map_tensors, tensors_of
from lowbit.qat.recipe import AugmentName, Recipe
from lowbit.qat.task import Batch

Fetch = Callable[[list[list[int]], Generator], Iterable[Batch]]  # batches for lists of sample numbers


def seeded(*parts: int) -> Generator:
    """A generator whose numbers depend on all of ``parts``."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return Generator().manual_seed(int.from_bytes(digest) >> 1)


def augmentation_for(name: AugmentName, data: object) -> BatchChange | None:
    """The augmentation called ``name`` for ``data``.

    Raises:
        SpecError: No such augmentation, or ``data`` are no pictures.
    """
    if name not in get_args(AugmentName):
        raise SpecError(f"augment must be one of {', '.join(get_args(AugmentName))}, got {name!r}")
    if isinstance(data, ImageData):
        return data.augmentation(name)
    if name in ("auto", "none"):
        return None
    raise SpecError(f"augment {name!r} works on pictures of lowbit.data. Use 'none', and change samples in your data set.")


class BatchSource(ABC):
    """Training batches of one process.

    Attributes:
        steps: Optimizer steps of an epoch.
        samples: Samples of an epoch, over all processes; 0 if unknown.
        targets: Targets of all samples, if they are in memory.
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
        """``count`` batches at most in a fixed order, without random changes, the same in every process."""

    def facts(self) -> dict[str, object]:
        """What distinguishes this data from other data."""
        return {"samples": self.samples, "steps": self.steps}


class DatasetSource(BatchSource):
    """Every sample of a data set once in an epoch, in steps of nearly equal size.

    An epoch's order is drawn from the seed and its number, augmentation from these, the step and the batch's place in it, so that
    one process that accumulates the gradients of two batches and two processes with one batch each see the same.

    Args:
        fetch: Gives the batches for lists of sample numbers.
        samples: How many there are.
        recipe: Batch size, accumulation, seed.
        augmentation: Applied to training batches.
        rank, processes: This process, and how many there are.
    """

    def __init__(
        self,
        fetch: Fetch,
        samples: int,
        recipe: Recipe,
        *,
        augmentation: BatchChange | None = None,
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
                batch = self._augmentation(batch, generator)
            yield batch, weight

    def first(self, count: int) -> Iterable[Batch]:
        order = torch.randperm(self.samples, generator=seeded(self._recipe.seed))[: count * self._recipe.batch_size]
        batches = self._fetch([part.tolist() for part in order.split(self._recipe.batch_size)], seeded(self._recipe.seed))
        return batches if self._augmentation is None else map(self._augmentation.plain, batches)


class IterableSource(BatchSource):
    """Batches as they come from an iterable that can be run through again and again.

    Args:
        batches: A loader, a list of batches, or a stream that does not know its length: its batches are counted in one pass.
        recipe: Accumulation.
        processes: How many there are; batches cannot be divided.
        steps: Optimizer steps of an epoch. Default: as many as there are batches for.
    """

    def __init__(self, batches: Iterable[Batch], recipe: Recipe, processes: int = 1, steps: int | None = None) -> None:
        if isinstance(batches, Iterator):
            raise SpecError(f"training data: {type(batches).__name__} can be run through only once. Pass a list or a loader.")
        if processes > 1:
            raise SpecError("batches cannot be divided among processes: pass a data set, or train in one process.")
        self._batches, self._recipe, self.samples = batches, recipe, 0
        if steps is not None:
            self.steps = steps
            return
        count = known_length(batches)
        count = sum(1 for _ in batches) if count is None else count
        if count < recipe.accumulate:
            raise DataError(f"{count} batches are fewer than the {recipe.accumulate} whose gradients are accumulated. Use more data.")
        self.steps = count // recipe.accumulate

    def epoch(self, index: int, start: int = 0) -> Iterator[tuple[Batch, float]]:
        wanted, done = self.steps * self._recipe.accumulate, start * self._recipe.accumulate
        for batch in itertools.islice(iter(self._batches), done, wanted):
            done += 1
            yield map_tensors(batch, plain_tensor), 1.0
        if done < wanted:
            raise DataError(f"the training data ended after {done} batches, but an epoch takes {wanted}. Pass fewer steps_per_epoch.")

    def first(self, count: int) -> Iterable[Batch]:
        return (map_tensors(batch, plain_tensor) for batch in itertools.islice(iter(self._batches), count))


def make_source(
    data: object,
    recipe: Recipe,
    *,
    augment: AugmentName = "auto",
    rank: int = 0,
    processes: int = 1,
    workers: int = 0,
    steps: int | None = None,
) -> BatchSource:
    """Training batches from whatever a user has.

    Args:
        data: ``ImageData`` of ``lowbit.data``; a data set of torch; tensors: one of inputs, ``(inputs, targets)``,
            ``((input, input), targets)`` or a dict; a list of samples; a loader of torch (of which data set, collating and workers are taken where it
            has no sampler of its own); or batches: a list, or anything that can be run through again and again.
            In a list of samples targets are numbers or tensors of no dimension, or members differ in their first size; a data set is always
            understood.
        recipe: Batch size, accumulation, seed.
        augment: ``auto``, ``none``, ``crop`` or ``crop_flip``; for ``ImageData``.
        rank, processes: This process, and how many there are.
        workers: Processes that fetch samples.
        steps: Optimizer steps of an epoch for batches that are used as they come, such as an endless stream.

    Raises:
        SpecError: Data of another kind.
        DataError: No sample, or no labels.
    """
    augmentation = augmentation_for(augment, data)
    collate: Callable[[list[Any]], Any] = collated
    is_dataset = isinstance(data, DataLoader)
    if isinstance(data, DataLoader):
        if not _has_plain_order(data):
            return IterableSource(data, recipe, processes, steps)
        collate = collated if data.collate_fn is default_collate else data.collate_fn
        workers, data = max(workers, data.num_workers), data.dataset
    if isinstance(data, ImageData):
        if not data.has_targets:
            raise DataError(f"{data.name}: there are no labels to train with. Name a folder with one sub-folder for each class.")
        data = data.dataset
    fetch, count = _fetch(data, "training data", collate, workers, is_dataset=is_dataset)
    if fetch is None:
        return IterableSource(cast(Iterable[Batch], data), recipe, processes, steps)
    if steps is not None:
        raise SpecError("steps_per_epoch is for batches that are used as they come; here every sample is taken once in an epoch.")
    source = DatasetSource(fetch, count, recipe, augmentation=augmentation, rank=rank, processes=processes)
    is_pair = isinstance(data, (tuple, list)) and len(data) == 2 and isinstance(data[1], Tensor)
    source.targets = data.labels if isinstance(data, TensorImages) else data[1] if is_pair else None  # type: ignore[index]
    return source


def evaluation_batches(data: object, batch_size: int) -> Iterable[Batch]:
    """Batches of test data, in order; see ``make_source`` for what ``data`` may be."""
    if isinstance(data, ImageData):
        batch_size, data = min(batch_size, data.largest_batch or batch_size), data.dataset
    if isinstance(data, DataLoader):
        return data
    fetch, count = _fetch(data, "test data")
    if fetch is None:
        return cast(Iterable[Batch], list(data) if isinstance(data, Iterator) else data)
    return _Batches(fetch, [list(range(start, min(start + batch_size, count))) for start in range(0, count, batch_size)])


def _fetch(
    data: object, where: str, collate: Callable[[list[Any]], Any] | None = None, workers: int = 0, *, is_dataset: bool = False
) -> tuple[Fetch | None, int]:
    """How to get samples of ``data`` by their numbers, and how many there are; no way where they are batches already."""
    if isinstance(data, TensorImages):
        return _image_fetch(data), len(data)
    if not is_dataset and _are_columns(data):
        counts = [len(tensor) if tensor.dim() else 0 for tensor in tensors_of(data)]
        if len(set(counts)) > 1:
            raise DataError(f"{where}: tensors must hold equally many samples, got {', '.join(map(str, counts))} in their order")
        return (lambda chosen, _: (map_tensors(data, lambda tensor: tensor[members]) for members in chosen)), counts[0]  # noqa: B023
    if isinstance(data, Sized) and (is_dataset or isinstance(data, Dataset) or _are_samples(data)):
        return _dataset_fetch(cast(Dataset[Any], data), collate or collated, workers), len(data)
    if isinstance(data, Iterable) and not isinstance(data, (str, bytes, Mapping)):
        return None, 0
    raise SpecError(f"{where}: expected a data set, tensors (inputs, targets), a list of samples or a loader, got {type(data).__name__}")


def _are_columns(data: object) -> bool:
    """Whether ``data`` are tensors that hold all samples: one, a pair, a dict, a tuple whose last is a tensor."""
    if isinstance(data, Mapping):
        return bool(data) and all(isinstance(value, Tensor) for value in data.values())
    if isinstance(data, list):
        return len(data) == 2 and all(isinstance(value, Tensor) for value in data)
    if isinstance(data, tuple):
        parts = [isinstance(part, Tensor) or _are_columns(part) for part in data]
        return len(data) > 1 and all(parts) and isinstance(data[-1], Tensor)
    return isinstance(data, Tensor)


def _are_samples(data: object) -> bool:
    """Whether ``data`` is a list of samples and not of batches: members of a batch share their first size, those of a sample hardly do."""
    if not isinstance(data, (list, tuple)) or not data:
        return False
    if isinstance(data[0], Mapping):
        members = list(data[0].values())
    elif isinstance(data[0], (tuple, list)) and len(data[0]) > 1:
        members = list(data[0])
    else:
        return False
    if any(isinstance(member, (int, float)) or (isinstance(member, Tensor) and member.dim() == 0) for member in members):
        return True
    sizes = [len(member) for member in members if isinstance(member, Tensor)]
    return len(set(sizes)) > 1


def collated(samples: list[Any]) -> Any:
    """A batch of samples; members that cannot be stacked (boxes, names, ``None``) stay lists.

    Example:
        >>> images, boxes = collated([(torch.zeros(2), None), (torch.ones(2), None)])
        >>> images.shape, boxes
        (torch.Size([2, 2]), [None, None])
    """
    try:
        return default_collate(samples)
    except (TypeError, RuntimeError):
        first = samples[0]
        if isinstance(first, Mapping):
            return {key: collated([sample[key] for sample in samples]) for key in first}
        if isinstance(first, (tuple, list)) and not hasattr(first, "_fields") and len({len(sample) for sample in samples}) == 1:
            return tuple(collated(list(members)) for members in zip(*samples, strict=True))
        return samples


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


def _image_fetch(data: TensorImages) -> Fetch:
    labels = data.labels
    if labels is None:
        raise DataError("there are no labels to train with")
    return lambda chosen, _: ((data.normalized(data.images[members]), labels[members]) for members in chosen)


def _dataset_fetch(data: Dataset[Any], collate: Callable[[list[Any]], Any], workers: int) -> Fetch:
    def fetch(chosen: list[list[int]], generator: Generator) -> Iterable[Batch]:
        # its own generator: a loader draws from torch's, which would then depend on how often training was stopped
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
