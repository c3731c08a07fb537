"""Which dimension of a network's inputs counts samples: the first, or the second where time comes first."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from lowbit.errors import SpecError
from lowbit.inputs import Calibration, Inputs, tensors_of
from lowbit.network.layers import evaluating

_SAME = 1e-4  # of the largest value: what is computed in another order


def find_batch_dim(model: nn.Module, inputs: Inputs) -> int:
    """1 where the samples of a call lie in dimension 1, as in ``nn.LSTM`` and ``nn.MultiheadAttention`` unless ``batch_first``; else 0.

    It is the dimension where one entry of the inputs decides one entry of the outputs and no other. Where both are such, or neither is,
    it is the first.

    Example:
        >>> find_batch_dim(nn.LSTM(3, 4), Inputs((torch.randn(7, 5, 3),))), find_batch_dim(nn.Linear(3, 4), Inputs((torch.randn(7, 5, 3),)))
        (1, 0)
    """
    if all(tensor.dim() < 2 for tensor in inputs.tensors):
        return 0
    return next((dim for dim in (0, 1) if _are_samples(model, replace(inputs, batch_dim=dim))), 0)


def calibration_for(model: nn.Module, data: object, *, limit: int | None = None) -> Calibration:
    """Calibration data for ``model``, cut along the dimension over samples, which is found with two samples of the first batch."""

    def find(inputs: Inputs) -> int:
        if not _may_begin_with_time(inputs):
            return 0
        return next((dim for dim in (0, 1) if _are_samples(model, replace(inputs, batch_dim=dim).take(0, 2))), 0)

    return Calibration.of(data, model, limit=limit, batch_dim=find)


def _may_begin_with_time(inputs: Inputs) -> bool:
    """Whether dimension 1 may count samples: inputs are sequences of vectors or of tokens, and no pictures, tables or volumes."""
    are_sequences = (tensor.dim() == 3 or (tensor.dim() == 2 and not tensor.is_floating_point()) for tensor in inputs.tensors)
    return any(are_sequences) and all(tensor.dim() <= 3 for tensor in inputs.tensors)


def checked_batch_dim(batch_dim: int, inputs: Inputs) -> int:
    """``batch_dim`` itself; SpecError where no input has it."""
    if not 0 <= batch_dim < max(tensor.dim() for tensor in inputs.tensors):
        held = ", ".join(str(list(tensor.shape)) for tensor in inputs.tensors)
        raise SpecError(f"batch_dim={batch_dim}: no input has that dimension; the inputs have the shapes {held}. Count from 0.")
    return batch_dim


def _are_samples(model: nn.Module, inputs: Inputs) -> bool:
    """Whether other values in the first entry of the batch dimension change the first entry of every output, and nothing else."""
    if any(inputs.batch_dim_of(tensor) is None for tensor in inputs.tensors if tensor.dim() > 2):
        return False
    if inputs.batch_size < 2:
        inputs = inputs.repeat(2)
    try:
        with evaluating(model):
            before = list(tensors_of(model(*inputs.args, **inputs.kwargs)))
            changed = inputs.map(lambda tensor: _with_other_first(tensor, inputs.batch_dim_of(tensor)))
            after = list(tensors_of(model(*changed.args, **changed.kwargs)))
    except Exception:  # a size that it cannot take: whatever it raises
        return False
    if [tensor.shape for tensor in before] != [tensor.shape for tensor in after]:
        return False
    differences = [_differences(a, b) for a, b in zip(before, after, strict=True)]
    return any(map(bool, (found.any() for found in differences))) and all(_is_first_only(d, inputs.batch_size) for d in differences)


def _with_other_first(tensor: Tensor, dim: int | None) -> Tensor:
    """The last entry, numbers with another sign, in place of the first."""
    if dim is None:
        return tensor
    changed, last = tensor.clone(), tensor.select(dim, -1)
    changed.select(dim, 0).copy_(-last if tensor.is_floating_point() else last)
    return changed


def _differences(before: Tensor, after: Tensor) -> Tensor:
    if not before.is_floating_point():
        return before != after
    largest = max((float(t.nan_to_num().abs().max()) for t in (before, after) if t.numel()), default=0.0)
    return ~torch.isclose(before, after, rtol=0, atol=_SAME * largest, equal_nan=True)


def _is_first_only(differences: Tensor, size: int) -> bool:
    """Whether there is a dimension of that size whose first entry holds all that differs."""
    dims = [dim for dim in range(differences.dim()) if differences.shape[dim] == size]
    return not bool(differences.any()) or any(not bool(differences.narrow(dim, 1, size - 1).any()) for dim in dims)
