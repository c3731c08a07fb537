"""Inputs and target outputs of a unit of a network for every calibration sample.

Inputs and targets stream into caches batch by batch, in memory or in memory-mapped files. A pass through the network ends as soon
as it has reached the unit.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lowbit.errors import CalibrationError, LayerError, OutputError
from lowbit.inputs import Inputs
from lowbit.network.layers import evaluating

CacheKind = Literal["ram", "disk"]
Call = tuple[tuple[Any, ...], dict[str, Any]]

WIDE = 8  # channels; with fewer, oneDNN's AVX2 gradient of strided 1x1 convolutions fails on channels-last inputs


class CacheSpace:
    """The space of all caches: the bytes that they take now (``held``) and took at most (``peak``)."""

    def __init__(self, kind: CacheKind, folder: Path | None) -> None:
        self.kind = kind
        self.held = self.peak = 0
        self._count = 0
        self._temporary = tempfile.TemporaryDirectory(prefix="lowbit-") if kind == "disk" and folder is None else None
        self._folder = Path(self._temporary.name) if self._temporary is not None else folder
        self._remove_files()  # left behind by a killed run

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Path | None]:
        """An empty tensor and, where it is a mapped file, the file."""
        size = torch.Size(shape).numel()
        self.held += size * dtype.itemsize
        self.peak = max(self.peak, self.held)
        if self.kind == "ram":
            return torch.empty(shape, dtype=dtype), None
        assert self._folder is not None
        self._count += 1
        path = self._folder / f"cache-{self._count}.bin"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                _reserve(file.fileno(), size * dtype.itemsize)
            return torch.from_file(str(path), shared=True, size=size, dtype=dtype).view(shape), path
        except (OSError, RuntimeError) as error:
            raise OutputError(
                f"cannot make a cache of {size * dtype.itemsize} bytes in {self._folder}: {error}. Make room or use cache='ram'."
            ) from error

    def release(self, size: int, path: Path | None) -> None:
        """Give ``size`` bytes back."""
        self.held -= size
        if path is not None:
            path.unlink(missing_ok=True)

    def close(self) -> None:
        """Remove the files, and the folder if it was a temporary one."""
        self._remove_files()
        if self._temporary is not None:
            self._temporary.cleanup()

    def _remove_files(self) -> None:
        if self.kind == "disk" and self._folder is not None:
            for path in self._folder.glob("cache-*.bin"):
                path.unlink(missing_ok=True)


def _reserve(file: int, size: int) -> None:
    """Make an open file ``size`` bytes long; where the system can, its room on the disk is taken, so that a full disk shows here."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
    else:
        os.truncate(file, size)


class TensorCache:
    """One tensor of every sample. Four-dimensional ones of ``WIDE`` channels or more are kept, and read, channels-last.

    A tensor whose dimension over samples, ``dim``, is a multiple of the batch size (windows of images, say) keeps that many rows for each sample.
    """

    def __init__(self, first: Tensor, batch_size: int, samples: int, space: CacheSpace, dim: int = 0) -> None:
        self.device, self.dtype, self.dim = first.device, first.dtype, dim
        first = first.movedim(dim, 0)
        self.rows = first.shape[0] // batch_size
        self.shape = first.shape[1:]
        self._is_image = first.dim() == 4 and first.shape[1] >= WIDE
        self._space = space
        kept = _last(first).shape[1:] if self._is_image else first.shape[1:]
        self._data, self._path = space.allocate((samples, self.rows, *kept), first.dtype)

    @property
    def samples(self) -> int:
        """How many samples it holds."""
        return self._data.shape[0]

    def write(self, start: int, batch_size: int, x: Tensor) -> None:
        """Keep ``x`` as samples ``start`` to ``start + batch_size``."""
        x = x.movedim(self.dim, 0)
        if x.shape[1:] != self.shape or x.shape[0] != batch_size * self.rows:
            raise CalibrationError(
                f"reconstruction needs calibration samples of one size: inside the network one batch gives {tuple(self.shape)} for each "
                f"sample, another {tuple(x.shape[1:])}. Resize or crop the samples."
            )
        ordered = _last(x) if self._is_image else x
        self._data[start : start + batch_size].copy_(ordered.reshape(batch_size, *self._data.shape[1:]))

    def read(self, index: Tensor) -> Tensor:
        """A fresh tensor of the samples ``index``."""
        rows = self._data.index_select(0, index).flatten(0, 1)
        ordered = rows.movedim(-1, 1) if self._is_image else rows
        return ordered.movedim(0, self.dim).to(self.device, non_blocking=True)

    def scale(self, factor: float) -> None:
        """Multiply everything by ``factor``."""
        self._data.mul_(factor)

    def release(self) -> None:
        """Give the space back; the cache cannot be read any more."""
        self._space.release(self._data.numel() * self._data.element_size(), self._path)
        del self._data


def _last(x: Tensor) -> Tensor:
    return x.movedim(1, -1)


class CallCache:
    """All inputs of a module's call, nested tuples, lists and dicts included, for every sample.

    Tensors that do not grow with the batch (``dims``, see ``growing``) are kept once; they must be the same in every batch, like
    everything that is no tensor.
    """

    def __init__(self, call: Call, dims: Sequence[int | None], batch_size: int, samples: int, space: CacheSpace) -> None:
        self._caches: list[TensorCache] = []
        self._constants: list[Tensor] = []
        remaining = iter(dims)

        def keep(x: Tensor) -> _Place:
            dim = next(remaining)
            if dim is not None:
                self._caches.append(TensorCache(x, batch_size, samples, space, dim))
                return _Place(len(self._caches) - 1, is_constant=False)
            self._constants.append(x.detach().clone())
            return _Place(len(self._constants) - 1, is_constant=True)

        self._template: Call = _map(call, Tensor, keep)

    @staticmethod
    def of(cache: TensorCache) -> CallCache:
        """Calls with one positional tensor, which ``cache`` holds already."""
        made = CallCache.__new__(CallCache)
        made._caches, made._constants, made._template = [cache], [], ((_Place(0, is_constant=False),), {})
        return made

    @property
    def samples(self) -> int:
        """How many samples it holds."""
        return self._caches[0].samples

    @property
    def has_samples(self) -> bool:
        """Whether any input depends on the sample."""
        return bool(self._caches)

    def write(self, start: int, batch_size: int, call: Call) -> None:
        """Keep ``call`` as samples ``start`` to ``start + batch_size``."""
        found = _tensors(call)
        places: list[_Place] = []
        _map(self._template, _Place, places.append)
        if len(found) != len(places):
            raise CalibrationError("reconstruction: a unit gets another number of tensors in some batches")
        for place, x in zip(places, found, strict=True):
            if not place.is_constant:
                self._caches[place.index].write(start, batch_size, x)
            elif not torch.equal(self._constants[place.index], x):
                raise CalibrationError(
                    "reconstruction: a unit gets a tensor that changes from batch to batch without growing with the batch"
                )

    def read(self, index: Tensor) -> Call:
        """Arguments and keyword arguments for the samples ``index``."""
        made: Call = _map(
            self._template,
            _Place,
            lambda place: self._constants[place.index] if place.is_constant else self._caches[place.index].read(index),
        )
        return made

    def release(self) -> None:
        """Give the space back."""
        for cache in self._caches:
            cache.release()


@dataclass(frozen=True)
class _Place:
    index: int
    is_constant: bool


def _map(value: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """``value`` with every ``kind`` inside nested tuples, lists and mappings changed."""
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_map(v, kind, change) for v in value))
    if isinstance(value, (tuple, list)):
        return type(value)(_map(v, kind, change) for v in value)
    if isinstance(value, Mapping):
        return {k: _map(v, kind, change) for k, v in value.items()}
    return value


def _tensors(value: Any) -> list[Tensor]:
    found: list[Tensor] = []
    _map(value, Tensor, found.append)
    return found


def growing(value: Any, other: Any) -> list[int | None]:
    """The dimension over samples of each tensor in ``value``: the first that differs in ``other``, made from another batch size."""
    return [
        next((dim for dim, sizes in enumerate(zip(a.shape, b.shape, strict=False)) if sizes[0] != sizes[1]), None)
        for a, b in zip(_tensors(value), _tensors(other), strict=True)
    ]


def resized(inputs: Inputs) -> Inputs:
    """``inputs`` with another batch size: the first sample alone, or a single sample twice."""
    return inputs.take(0, 1) if inputs.batch_size > 1 else inputs.repeat(2)


@dataclass
class UnitData:
    """Inputs of a unit, the float outputs to reach, and the task loss's gradients there if the loss needs them."""

    inputs: CallCache
    target: TensorCache
    gradient: TensorCache | None = None

    def release(self) -> None:
        """Give the space back."""
        for cache in (self.inputs, self.target, self.gradient):
            if cache is not None:
                cache.release()


class _Reached(BaseException):
    """Ends a forward pass; no ``except Exception`` of the network catches it."""


@contextmanager
def _hooked(handle: torch.utils.hooks.RemovableHandle) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


def run_until(model: nn.Module, inputs: Inputs, unit: str) -> None:
    """Run ``model`` until a hook ends the pass; LayerError when none does."""
    try:
        model(*inputs.args, **inputs.kwargs)
    except _Reached:
        return
    raise LayerError(f"unit {unit!r} is not called for every calibration batch, so it cannot be reconstructed")


def call_of(model: nn.Module, unit: str, inputs: Inputs) -> Call:
    """Arguments of the module ``unit`` when ``model`` is called with ``inputs``."""
    caught: list[Call] = []

    def stop(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught.append((args, kwargs))
        raise _Reached

    with _hooked(model.get_submodule(unit).register_forward_pre_hook(stop, with_kwargs=True)), evaluating(model), parametrize.cached():
        run_until(model, inputs, unit)
    return caught[0]


def batches(samples: int, size: int) -> Iterator[Tensor]:
    """Indices of all samples in order, ``size`` at a time."""
    yield from torch.arange(samples).split(size)
