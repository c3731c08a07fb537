"""Running networks for measurement: batches of any structure in, one tensor out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from lowbit.errors import DataError
from lowbit.inputs import Calibration, Inputs, known_length, tensors_of


def device_of(model: nn.Module) -> torch.device:
    """Where the model's parameters are; the processor for a model without any tensor."""
    tensor = next(model.parameters(), next(model.buffers(), None))
    return torch.device("cpu") if tensor is None else tensor.device


def output_tensor(output: object, key: str | int | None = None) -> Tensor:
    """The tensor to measure in a network's output.

    Args:
        output: A tensor, or any nesting of tuples, lists, mappings and dataclasses.
        key: Which entry: a mapping's key, an index, or an attribute; default: the first floating-point tensor found.

    Raises:
        DataError: There is no such entry, or no floating-point tensor.
    """
    if key is not None:
        try:
            output = getattr(output, key) if isinstance(key, str) and not isinstance(output, Mapping) else output[key]  # type: ignore[index]
        except (KeyError, IndexError, AttributeError, TypeError) as error:
            held = sorted(map(str, output)) if isinstance(output, Mapping) else type(output).__name__
            raise DataError(f"the network's output has no entry {key!r}; it is {held}") from error
    found = next((tensor for tensor in tensors_of(output) if tensor.is_floating_point()), None)
    if found is None:
        kind = type(output).__name__
        raise DataError(f"the network's output ({kind}) holds no floating-point tensor to measure. Name the entry that holds the logits.")
    return found


def class_dimension(logits: Tensor) -> int:
    """The dimension over classes: the second of an image-like map ``[n, classes, h, w]``, else the last."""
    return 1 if logits.dim() >= 4 else logits.dim() - 1


def batch_count(data: object, calibration: Calibration) -> int:
    """How many batches there are, without reading a loader that knows its own length."""
    known = None if isinstance(data, (Tensor, Mapping, Inputs, Calibration)) else known_length(data)
    return len(calibration) if known is None else known


def pieces(inputs: Inputs, size: int) -> Iterator[Inputs]:
    """``inputs`` in pieces of at most ``size`` samples if all inputs share their first dimension, else as one piece."""
    total = inputs.batch_size
    if any(t.dim() == 0 or t.shape[0] != total for t in inputs.tensors):
        yield inputs
        return
    for start in range(0, total, size):
        yield inputs.take(start, start + size)
