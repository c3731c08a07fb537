"""Unlabelled batches that methods look at: validated, re-iterable, labels dropped."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lowbit.errors import CalibrationError


@dataclass(frozen=True)
class Inputs:
    """What one call of the model gets: ``model(*args, **kwargs)``."""

    args: tuple[Tensor, ...] = ()
    kwargs: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def tensors(self) -> list[Tensor]:
        """All input tensors, positional ones first."""
        return [*self.args, *self.kwargs.values()]

    @property
    def batch_size(self) -> int:
        """Size of the first dimension of the first input."""
        return self.tensors[0].shape[0] if self.tensors[0].dim() else 1

    def to(self, device: torch.device | str) -> Inputs:
        """The same inputs on ``device``."""
        return Inputs(tuple(t.to(device) for t in self.args), {k: t.to(device) for k, t in self.kwargs.items()})

    def take(self, start: int, stop: int) -> Inputs:
        """Samples ``start`` to ``stop`` (exclusive) of every input."""
        return Inputs(tuple(t[start:stop] for t in self.args), {k: t[start:stop] for k, t in self.kwargs.items()})

    @staticmethod
    def of(batch: object) -> Inputs:
        """Inputs from a batch: a tensor, ``(inputs, labels)``, a tuple of inputs, a dict of keyword inputs, or Inputs.

        In a pair the second tensor counts as labels when it is a vector of integers (or a vector where the first is not).
        """
        if isinstance(batch, Inputs):
            return batch
        if isinstance(batch, Tensor):
            return Inputs((batch,))
        if isinstance(batch, Mapping) and batch and all(isinstance(value, Tensor) for value in batch.values()):
            return Inputs((), dict(batch))
        if isinstance(batch, (tuple, list)) and batch:
            if len(batch) == 2 and isinstance(batch[0], (tuple, list, Mapping)):
                return Inputs.of(batch[0])
            if all(isinstance(value, Tensor) for value in batch):
                if len(batch) == 2 and _is_label(batch[1], batch[0]):
                    return Inputs((batch[0],))
                return Inputs(tuple(batch))
        raise CalibrationError(
            f"calibration: a batch must be a tensor, (inputs, labels), a tuple of tensors or a dict of tensors; got {type(batch).__name__}"
            + (f" of {', '.join(type(v).__name__ for v in batch)}" if isinstance(batch, (tuple, list)) else "")
        )


def _is_label(candidate: Tensor, inputs: Tensor) -> bool:
    return candidate.dim() <= 1 and inputs.dim() > 1 and (not candidate.is_floating_point() or candidate.dim() < inputs.dim() - 1)


class Calibration:
    """Re-iterable batches of model inputs, each checked when it is first seen.

    Raises CalibrationError when there is no batch, a batch holds no sample, or a value is NaN or infinite.
    """

    def __init__(self, batches: Iterable[object], *, limit: int | None = None) -> None:
        if isinstance(batches, Iterator):
            batches = list(batches)  # a generator can be read only once
        self._batches, self._limit = batches, limit
        self._counts: list[int] | None = None

    @staticmethod
    def of(data: object, *, limit: int | None = None) -> Calibration:
        """Calibration from a loader, a list of batches, or one tensor (cut into batches of 32). ``limit`` caps the samples."""
        if isinstance(data, Calibration) and limit is None:
            return data
        if isinstance(data, Tensor):
            data = list(data.split(32)) if data.dim() else [data]
        elif isinstance(data, (Inputs, Mapping)):
            data = [data]
        if not isinstance(data, Iterable):
            raise CalibrationError(f"calibration must be a loader, a list of batches or a tensor, got {type(data).__name__}")
        return Calibration(data, limit=limit)

    def __iter__(self) -> Iterator[Inputs]:
        counts: list[int] = []
        for index, batch in enumerate(self._batches):
            inputs = Inputs.of(batch)
            if self._limit is not None:
                inputs = inputs.take(0, self._limit - sum(counts)) if inputs.batch_size > self._limit - sum(counts) else inputs
            if self._counts is None:
                _check_batch(inputs, index)
            counts.append(inputs.batch_size)
            yield inputs
            if self._limit is not None and sum(counts) >= self._limit:
                break
        if not counts:
            raise CalibrationError("calibration: the data holds no batch. Pass a loader or folder with at least one sample.")
        self._counts = counts

    def __len__(self) -> int:
        return len(self._sizes())

    @property
    def samples(self) -> int:
        """How many samples all batches hold together."""
        return sum(self._sizes())

    @property
    def sample(self) -> Inputs:
        """The first batch."""
        return next(iter(self))

    def _sizes(self) -> list[int]:
        if self._counts is None:
            for _ in self:
                pass
        assert self._counts is not None
        return self._counts


def _check_batch(inputs: Inputs, index: int) -> None:
    for position, tensor in enumerate(inputs.tensors):
        where = f"calibration batch {index}, input {position} of shape {tuple(tensor.shape)}"
        if tensor.numel() == 0:
            raise CalibrationError(f"{where}: holds no value")
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            bad = int((~torch.isfinite(tensor)).sum())
            raise CalibrationError(
                f"{where}: {bad} of {tensor.numel()} values are NaN or infinite. Remove these samples or repair the preprocessing."
            )
