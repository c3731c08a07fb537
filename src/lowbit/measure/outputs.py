"""Running networks for measurement: batches of any structure in, one tensor out."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sized

import torch
from torch import Tensor, nn

from lowbit.errors import DataError
from lowbit.inputs import Calibration, Inputs

_LABEL_KEYS = ("labels", "label", "targets", "target")


def device_of(model: nn.Module) -> torch.device:
    """Where the model's parameters are; the processor for a model without any tensor."""
    tensor = next(model.parameters(), next(model.buffers(), None))
    return torch.device("cpu") if tensor is None else tensor.device


def output_tensor(output: object, key: str | int | None = None) -> Tensor:
    """The tensor to measure in a network's output.

    Args:
        output: A tensor, or any nesting of tuples, lists, mappings and dataclasses.
        key: Which entry: a mapping's key, an index, or an attribute; left out, the first floating-point tensor found.

    Raises:
        DataError: There is no such entry, or no floating-point tensor.
    """
    if key is not None:
        try:
            output = getattr(output, key) if isinstance(key, str) and not isinstance(output, Mapping) else output[key]  # type: ignore[index]
        except (KeyError, IndexError, AttributeError, TypeError) as error:
            held = sorted(map(str, output)) if isinstance(output, Mapping) else type(output).__name__
            raise DataError(f"the network's output has no entry {key!r}; it is {held}") from error
    found = next(_floating_tensors(output), None)
    if found is None:
        kind = type(output).__name__
        raise DataError(f"the network's output ({kind}) holds no floating-point tensor to measure. Name the entry that holds the logits.")
    return found


def _floating_tensors(output: object) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _floating_tensors(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from _floating_tensors(value)
    elif dataclasses.is_dataclass(output):
        yield from _floating_tensors(vars(output))


def class_dimension(logits: Tensor) -> int:
    """The dimension over classes: the second of an image-like map ``[n, classes, h, w]``, else the last."""
    return 1 if logits.dim() >= 4 else logits.dim() - 1


def labelled(batch: object) -> tuple[Inputs, Tensor]:
    """Inputs and labels of a batch: ``(inputs, labels)``, a longer tuple that ends in labels, or a mapping with a ``labels`` entry.

    Raises:
        DataError: The batch holds no integer labels.
    """
    if isinstance(batch, Mapping):
        for key in _LABEL_KEYS:
            if isinstance(batch.get(key), Tensor):
                return Inputs.of({name: value for name, value in batch.items() if name != key}), _checked(batch[key])
    elif isinstance(batch, (tuple, list)) and len(batch) >= 2 and isinstance(batch[-1], Tensor):
        inputs = batch[0] if len(batch) == 2 else tuple(batch[:-1])
        return Inputs.of(tuple(inputs) if isinstance(inputs, list) else inputs), _checked(batch[-1])
    kinds = ", ".join(type(part).__name__ for part in batch) if isinstance(batch, (tuple, list)) else type(batch).__name__
    raise DataError(f"accuracy needs labels: a batch must be (inputs, labels) or a mapping with a 'labels' entry, got {kinds}")


def _checked(labels: Tensor) -> Tensor:
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise DataError(f"labels must be class numbers (integers), got {labels.dtype} of shape {tuple(labels.shape)}")
    return labels


def batch_count(data: object, calibration: Calibration) -> int:
    """How many batches there are, without reading a loader that knows its own length."""
    known = isinstance(data, Sized) and not isinstance(data, (Tensor, Mapping, Inputs, Calibration))
    return len(data) if known else len(calibration)  # type: ignore[arg-type]


def pieces(inputs: Inputs, size: int) -> Iterator[Inputs]:
    """``inputs`` cut into at most ``size`` samples each where all inputs share their first dimension; else whole."""
    total = inputs.batch_size
    if any(t.dim() == 0 or t.shape[0] != total for t in inputs.tensors):
        yield inputs
        return
    for start in range(0, total, size):
        yield inputs.take(start, start + size)
