"""Batches of any structure: the inputs that a network takes from them, their number of samples, and calibration data."""

from __future__ import annotations

import dataclasses
import inspect
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lowbit.autograd import plain_tensor
from lowbit.errors import CalibrationError, SpecError

TARGET_NAMES = ("labels", "label", "targets", "target")  # entries of a dict that a network takes only where it must


@dataclass(frozen=True)
class Takes:
    """Which inputs a network takes, as its ``forward`` says.

    Attributes:
        required: Positional arguments without a default.
        optional: Further positional arguments that may be tensors: their default is ``None``.
    """

    required: tuple[str, ...]
    optional: tuple[str, ...] = ()

    @staticmethod
    def of(model: nn.Module) -> Takes | None:
        """What ``model`` takes, wrappers such as ``DistributedDataParallel`` put aside; ``None`` where its ``forward`` does not say."""
        names = getattr(model, "lowbit_inputs", None)  # networks loaded from a file
        if names is not None:
            return Takes(tuple(names))
        inner = model._modules.get("module" if isinstance(model, _PARALLEL) else "_orig_mod")
        if inner is not None:
            return Takes.of(inner)
        try:
            parameters = list(inspect.signature(model.forward).parameters.values())
        except (TypeError, ValueError):
            return None
        if any(parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) for parameter in parameters):
            return None
        required = tuple(p.name for p in parameters if p.default is p.empty)
        return Takes(required, tuple(p.name for p in parameters if p.default is None and p.name not in TARGET_NAMES))


_PARALLEL = (nn.parallel.DistributedDataParallel, nn.DataParallel)


@dataclass(frozen=True)
class Inputs:
    """Inputs of one call of the model: ``model(*args, **kwargs)``.

    Attributes:
        args: Positional inputs.
        kwargs: Inputs by keyword.
        batch_dim: The dimension over samples: 1 where time comes first. A tensor that does not have it, such as a vector of lengths or a
            padding mask, has its samples in dimension 0.
    """

    args: tuple[Tensor, ...] = ()
    kwargs: Mapping[str, Tensor] = field(default_factory=dict)
    batch_dim: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "args", tuple(map(plain_tensor, self.args)))
        object.__setattr__(self, "kwargs", {name: plain_tensor(value) for name, value in self.kwargs.items()})

    @property
    def tensors(self) -> list[Tensor]:
        """All input tensors, positional ones first."""
        return [*self.args, *self.kwargs.values()]

    @property
    def batch_size(self) -> int:
        """Size of the batch dimension of the first input that has one."""
        return next((t.shape[self.batch_dim] for t in self.tensors if t.dim() > self.batch_dim), 1)

    def batch_dim_of(self, tensor: Tensor) -> int | None:
        """The dimension of ``tensor`` over samples; ``None`` where it has none, as a mask that counts for all samples.

        Example:
            >>> inputs = Inputs((torch.zeros(7, 4, 3), torch.zeros(4), torch.zeros(7, 7)), batch_dim=1)
            >>> inputs.batch_size, [inputs.batch_dim_of(tensor) for tensor in inputs.tensors]
            (4, [1, 0, None])
        """
        size = self.batch_size
        return next((dim for dim in (self.batch_dim, 0) if tensor.dim() > dim and tensor.shape[dim] == size), None)

    def map(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        """The same inputs with every tensor changed."""
        return Inputs(tuple(map(change, self.args)), {name: change(tensor) for name, tensor in self.kwargs.items()}, self.batch_dim)

    def to(self, device: torch.device | str) -> Inputs:
        """The same inputs on ``device``."""
        return self.map(lambda tensor: tensor.to(device))

    def take(self, start: int, stop: int) -> Inputs:
        """Samples ``start`` to ``stop`` (exclusive) of every input that has samples."""

        def part(tensor: Tensor) -> Tensor:
            dim = self.batch_dim_of(tensor)
            return tensor if dim is None else tensor[(slice(None),) * dim + (slice(start, stop),)]

        return self.map(part)

    def repeat(self, count: int) -> Inputs:
        """Every sample ``count`` times."""

        def repeated(tensor: Tensor) -> Tensor:
            dim = self.batch_dim_of(tensor)
            return tensor if dim is None else torch.cat([tensor] * count, dim)

        return self.map(repeated)

    def distinct(self) -> Inputs:
        """The same inputs, copied where one tensor is given several times: a graph of it would treat different tensors as one."""
        seen: set[int] = set()

        def copied(tensor: Tensor) -> Tensor:
            is_new = id(tensor) not in seen
            seen.add(id(tensor))
            return tensor if is_new else tensor.clone()

        return self.map(copied)

    @staticmethod
    def of(batch: object, model: nn.Module | None = None) -> Inputs:
        """Inputs from a batch; what the network does not take, targets above all, is dropped whatever it is.

        Args:
            batch: A tensor, ``(inputs, targets, ...)``, ``((input, input), targets, ...)``, a dict with inputs by name, a tuple of inputs,
                or Inputs.
            model: The network, whose ``forward`` says what it takes. Without it, or where it does not say, all tensors of a batch are
                inputs, but for the second of a pair that is a vector of integers (or a vector where the first is not), and
                for entries of a dict called ``labels`` and the like.

        Raises:
            CalibrationError: The batch lacks an input that the network needs, or holds something else than tensors.

        Example:
            >>> batch = torch.zeros(2, 3), torch.ones(2, 3)
            >>> len(Inputs.of(batch).args), len(Inputs.of(batch, nn.Linear(3, 1)).args)
            (2, 1)
        """
        if isinstance(batch, Inputs):
            return batch
        if isinstance(batch, Tensor):
            return Inputs((batch,))
        takes = None if model is None else Takes.of(model)
        if isinstance(batch, Mapping) and batch:
            return _named_inputs(batch, takes)
        if isinstance(batch, (tuple, list)) and batch:
            if len(batch) >= 2 and isinstance(batch[0], (tuple, list, Mapping)):
                return Inputs.of(batch[0], model)
            return _positional_inputs(batch, takes)
        raise CalibrationError(f"{_EXPECTED}; got {_kinds(batch)}")


_EXPECTED = "a batch must be a tensor, (inputs, targets), a tuple of tensors or a dict of tensors"


def _positional_inputs(batch: tuple[object, ...] | list[object], takes: Takes | None) -> Inputs:
    """The leading members that the network takes: as many as it needs, and optional ones that are no labels."""
    members = list(batch)
    if takes is not None and takes.required and not takes.optional:
        if len(members) < len(takes.required):
            raise CalibrationError(
                f"the network takes {len(takes.required)} inputs ({', '.join(takes.required)}); a batch has {len(members)}"
            )
        members = members[: len(takes.required)]
    else:
        if takes is not None:
            members = members[: len(takes.required) + len(takes.optional)]
        needed = 1 if takes is None else max(len(takes.required), 1)
        while takes is not None and len(members) > needed and not isinstance(members[-1], Tensor):
            members.pop()
        tensors = [member for member in members if isinstance(member, Tensor)]
        may_be_label = len(members) == 2 if needed < 2 else len(batch) == len(members) == needed + 1
        is_length = takes is not None and len(members) > 2 and "len" in takes.optional[0]
        if may_be_label and not is_length and len(tensors) == len(members) and _is_label(tensors[-1], tensors[0]):
            members.pop()
    if not all(isinstance(member, Tensor) for member in members):
        raise CalibrationError(f"{_EXPECTED}; got {_kinds(batch)}")
    return Inputs(tuple(member for member in members if isinstance(member, Tensor)))


def _named_inputs(batch: Mapping[object, object], takes: Takes | None) -> Inputs:
    """The entries that have the names of the network's arguments; one that has another name where the network takes one."""
    tensors = {str(name): value for name, value in batch.items() if isinstance(value, Tensor)}
    others = {name: value for name, value in tensors.items() if name not in TARGET_NAMES}
    if takes is None:
        found = others
    else:
        found = {name: tensors[name] for name in (*takes.required, *takes.optional) if name in tensors}
        missing = [name for name in takes.required if name not in found]
        if len(takes.required) == 1 and missing and len(others) == 1:
            return Inputs(tuple(others.values()))
        if missing:
            raise CalibrationError(
                f"the network takes {', '.join(takes.required)}; the batch holds the tensors {', '.join(tensors) or 'none'}. "
                "Name the entries as the arguments of its forward, or give a task whose predict calls it."
            )
    if not found:
        raise CalibrationError(f"{_EXPECTED}; got a dict of {', '.join(map(str, batch))} without a tensor that is an input")
    return Inputs((), found)


def _is_label(candidate: Tensor, inputs: Tensor) -> bool:
    return candidate.dim() <= 1 and inputs.dim() > 1 and (not candidate.is_floating_point() or candidate.dim() < inputs.dim() - 1)


def _kinds(batch: object) -> str:
    members = f" of {', '.join(type(member).__name__ for member in batch)}" if isinstance(batch, (tuple, list)) else ""
    return f"{type(batch).__name__}{members}"


def sample_count(batch: object) -> int:
    """How many samples a batch of any structure holds: the length of a list of targets, else the size of the first tensor.

    Example:
        >>> sample_count({"image": torch.zeros(4, 3), "name": "abcd"}), sample_count((torch.zeros(0, 3), [{"box": 1}, {"box": 2}]))
        (4, 2)
    """
    if isinstance(batch, (tuple, list)):
        listed = [len(m) for m in batch if isinstance(m, list) and m and not isinstance(m[0], Tensor)]
        if listed:
            return listed[0]
        if len(batch) > 1 and all(isinstance(member, list) for member in batch):  # pictures of different sizes cannot be stacked
            return len(batch[0])
    first = next(tensors_of(batch), None)
    return first.shape[0] if first is not None and first.dim() else 1


def known_length(batches: object) -> int | None:
    """How many batches there are; ``None`` where that is not known without reading them, as of a loader over a stream."""
    try:
        return len(batches)  # type: ignore[arg-type]
    except TypeError:
        return None


def tensors_of(value: object) -> Iterator[Tensor]:
    """Every tensor in a nesting of tuples, lists, mappings, dataclasses and Inputs, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from tensors_of(entry)
    elif isinstance(value, (tuple, list)):
        for entry in value:
            yield from tensors_of(entry)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from tensors_of(vars(value))


def map_tensors(value: object, change: Callable[[Tensor], Tensor]) -> object:
    """The same nesting of tuples, lists and mappings with every tensor changed; all else stays."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {name: map_tensors(entry, change) for name, entry in value.items()}
    if isinstance(value, (tuple, list)):
        entries = [map_tensors(entry, change) for entry in value]
        return value._make(entries) if hasattr(value, "_make") else type(value)(entries)
    return value


BatchDim = int | Callable[[Inputs], int]  # a dimension, or what finds it in the first batch


def _dim_of(batch_dim: BatchDim, inputs: Inputs) -> int:
    return batch_dim if isinstance(batch_dim, int) else batch_dim(inputs)


class Calibration:
    """Re-iterable batches of model inputs, each checked when it is first seen.

    Raises CalibrationError when there is no batch, a batch holds no sample, or a value is NaN or infinite. An input beside others may
    hold ``-inf``, as masks do; what of it reaches a quantizer may not.
    """

    def __init__(
        self, batches: Iterable[object], *, model: nn.Module | None = None, limit: int | None = None, batch_dim: BatchDim = 0
    ) -> None:
        if isinstance(batches, Iterator):
            batches = list(batches)  # a generator can be read only once
        self._batches, self._model, self._limit, self._batch_dim = batches, model, limit, batch_dim
        self._counts: list[int] | None = None

    @staticmethod
    def of(data: object, model: nn.Module | None = None, *, limit: int | None = None, batch_dim: BatchDim = 0) -> Calibration:
        """Calibration from a loader, a list of batches, a data set or one tensor (both cut into batches of 32 samples).

        ``model`` is the network they are for, see ``Inputs.of``; ``limit`` caps the samples; ``batch_dim`` is the dimension over samples of
        batches that do not say it, or finds it in the first of them.

        Example:
            >>> time_first = torch.zeros(7, 40, 3)
            >>> [batch.args[0].shape[:2] for batch in Calibration.of(time_first, limit=33, batch_dim=1)]
            [torch.Size([7, 32]), torch.Size([7, 1])]
        """
        if isinstance(data, Calibration) and limit is None:
            return data
        if isinstance(data, Tensor):
            batch_dim = _dim_of(batch_dim, Inputs((data,)))
            data = list(data.split(32, batch_dim)) if data.dim() > batch_dim else [data]
        elif isinstance(data, (Inputs, Mapping)):
            data = [data]
        elif isinstance(data, Dataset) and not isinstance(data, Iterable):
            data = DataLoader(data, 32, collate_fn=getattr(data, "collate", None))
        if not isinstance(data, Iterable):
            raise CalibrationError(f"calibration must be a loader, a list of batches, a data set or a tensor, got {type(data).__name__}")
        return Calibration(data, model=model, limit=limit, batch_dim=batch_dim)

    def __iter__(self) -> Iterator[Inputs]:
        counts: list[int] = []
        for index, batch in enumerate(self._batches):
            try:
                inputs = Inputs.of(batch, self._model)
            except CalibrationError as error:
                raise CalibrationError(f"calibration batch {index}: {error}") from error
            if not isinstance(batch, Inputs):
                self._batch_dim = _dim_of(self._batch_dim, inputs)
                inputs = dataclasses.replace(inputs, batch_dim=self._batch_dim)
            if self._limit is not None:
                inputs = inputs.take(0, self._limit - sum(counts)) if inputs.batch_size > self._limit - sum(counts) else inputs
            if self._counts is None:
                check_values(inputs, f"calibration batch {index}", infinite="masks")
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


def check_memory(needed: int, what: str) -> None:
    """SpecError where tensors of ``needed`` bytes, which ``what`` names, exceed the memory of this machine."""
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else math.inf
    if needed > there:
        raise SpecError(f"{what} {needed / 1e9:,.1f} GB, and this machine has {there / 1e9:,.1f} GB of memory")


Infinite = Literal["refused", "masks", "allowed"]


def check_values(inputs: Inputs, place: str, *, infinite: Infinite = "refused") -> Inputs:
    """The inputs, from which something is to be learned.

    Args:
        inputs: Inputs of one call.
        place: What they are, for the error.
        infinite: Where values may be infinite: ``masks`` allows ``-inf`` in an input beside others, ``allowed`` any infinity.

    Raises:
        CalibrationError: A tensor without values, or with NaN or infinity.
    """
    for position, tensor in enumerate(inputs.tensors):
        where = f"{place}, input {position} of shape {tuple(tensor.shape)}"
        if tensor.numel() == 0:
            raise CalibrationError(f"{where}: holds no value")
        if not tensor.is_floating_point():
            continue
        is_bad = torch.isnan(tensor) if infinite == "allowed" else ~torch.isfinite(tensor)
        if infinite == "masks" and len(inputs.tensors) > 1:
            is_bad &= ~torch.isneginf(tensor)
        bad = int(is_bad.sum())
        if bad:
            what = "NaN" if infinite == "allowed" else "NaN or infinite"
            raise CalibrationError(
                f"{where}: {bad} of {tensor.numel()} values are {what}. Remove these samples or repair the preprocessing."
            )
    return inputs
