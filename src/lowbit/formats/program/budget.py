"""Limits the memory and time of a graph from a file before it runs.

A call is first made on the meta device, where tensors have shapes but no values: torch computes all sizes, those of intermediate results
included, and allocates nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

LEAST = 2**28  # elements of one result: 1 GiB of float32
PER_INPUT = 64  # elements of one result per input element, as in a first layer of 64 channels on grey images
AT_A_TIME = 16  # results of full size that may be in memory together
PRODUCTS = 2**13  # multiply-accumulates per allowed element of a result: minutes on one core
PER_ELEMENT = 64  # cost of one element outside matrix products, in multiply-accumulates


class Budget:
    """Limits on the memory and time of one pass through a graph.

    Args:
        max_elements: Largest number of elements of one result. Default: ``2**28``, or 64 times those of the inputs if that is more.
        inputs: Inputs of the pass.

    Attributes:
        is_decided_by_values: Whether the size of a result depended on values, so that other inputs of the same shapes can need more.
    """

    def __init__(self, max_elements: int | None, inputs: Sequence[Tensor]) -> None:
        given = sum(tensor.numel() for tensor in inputs)
        self.max_elements = max(LEAST, PER_INPUT * given) if max_elements is None else max_elements
        self.work = 0.0
        self.is_decided_by_values = False
        self._held: dict[str, int] = {}

    def check(self, overload: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Raise ValueError if a call exceeds the budget; nothing is computed or allocated."""
        name = str(overload)
        if name in _RECURRENT:
            self.count(*_recurrent(*args))
            return
        if name in _SIZED_BY_VALUES:
            self.is_decided_by_values = True
            elements = _SIZED_BY_VALUES[name](*args, **kwargs)
            self.count(elements, elements * PER_ELEMENT)
            return
        if name in _INDEXED and any(map(_is_mask, args[1])):
            self.is_decided_by_values = True
            args = [args[0], _places(args[1]), *args[2:]]
        options = {key: _to_meta(value) for key, value in kwargs.items()}
        if any(argument.name == "device" for argument in overload._schema.arguments):
            options["device"] = torch.device("meta")
        with torch.no_grad(), _Meter(self):
            result = overload(*(_to_meta(value) for value in args), **options)
        self.add_work(_windows(overload, args, kwargs) * sum(t.numel() for t in tree_leaves(result) if isinstance(t, Tensor)))

    def count(self, elements: int, work: float) -> None:
        """Count a result; ValueError if it is too large."""
        if elements > self.max_elements:
            raise ValueError(f"its result has {elements:,} elements, at most {self.max_elements:,} are allowed. {RAISE}")
        self.add_work(work)

    def add_work(self, work: float) -> None:
        """Count multiply-accumulates; ValueError if the pass needs too many."""
        self.work += work
        if self.work > PRODUCTS * self.max_elements:
            raise ValueError(
                f"up to here {self.work:.1e} operations are needed, at most {PRODUCTS * self.max_elements:.1e} are allowed. {RAISE}"
            )

    def hold(self, name: str, result: object, freed: Sequence[str]) -> None:
        """Record that a result is kept and others are freed; ValueError if too much is in memory together."""
        self._held[name] = sum(t.numel() for t in tree_leaves(result) if isinstance(t, Tensor))
        for other in freed:
            self._held.pop(other, None)
        held = sum(self._held.values())
        if held > AT_A_TIME * self.max_elements:
            raise ValueError(f"{held:,} elements are in memory together, at most {AT_A_TIME * self.max_elements:,} are allowed. {RAISE}")


RAISE = "If the file can be trusted, load it with a larger max_elements."


class _Meter(TorchDispatchMode):
    """Counts the results of every operator, including those that composite operators consist of."""

    def __init__(self, budget: Budget) -> None:
        super().__init__()
        self._budget = budget

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        elements = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        products = flop_registry.get(func._overloadpacket)
        flops = products(*args, **(kwargs or {}), out_val=result) / 2 if products is not None else 0
        self._budget.count(max(elements, default=0), flops + PER_ELEMENT * (0 if func.is_view else sum(elements)))
        return result


def _to_meta(value: object) -> object:
    if isinstance(value, Tensor):
        return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device="meta")
    if isinstance(value, (list, tuple)):
        return [_to_meta(item) for item in value]
    return torch.device("meta") if isinstance(value, torch.device) else value


def _windows(overload: Any, args: Sequence[object], kwargs: Mapping[str, object]) -> float:
    """Number of elements that a pooling reads for one output, padding included."""
    name = overload._schema.name
    if "_pool" in name and "adaptive" not in name:
        size = kwargs.get("kernel_size", args[1] if len(args) > 1 else 1)
        dims = int(name[name.index("d", name.index("_pool") + 5) - 1])
        return PER_ELEMENT / 4 * (math.prod(size) if isinstance(size, (list, tuple)) and len(size) > 1 else _single(size) ** dims)
    layer = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)][1:2]
    if name.startswith("lowbit::") and layer and name.endswith(("conv2d", "linear")):  # a packed word contains up to 32 elements
        return 32 * layer[0].numel() / max(layer[0].shape[0], 1)
    return 0.0


def _single(size: object) -> int:
    return int(size[0]) if isinstance(size, (list, tuple)) and size else int(size) if isinstance(size, int) else 1


def _recurrent(x: Tensor, _states: object, parameters: Sequence[Tensor], *_rest: object) -> tuple[int, float]:
    """Elements and multiply-accumulates: every step computes a row for each weight and multiplies by all of them."""
    steps = x.shape[0] * x.shape[1]
    return steps * sum(p.shape[0] for p in parameters if p.dim()), float(steps) * sum(p.numel() for p in parameters)


def _one_hot(x: Tensor, num_classes: int = -1) -> int:
    return x.numel() * (num_classes if num_classes >= 0 else int(x.max()) + 1 if x.numel() else 1)


def _repeated(repeats: Tensor, **_options: object) -> int:
    return int(repeats.sum())


def _repeated_along(x: Tensor, repeats: Tensor, dim: int | None = None, **_options: object) -> int:
    rows = x.numel() if dim is None else x.shape[dim]
    total = int(repeats) * rows if repeats.numel() == 1 else int(repeats.sum())
    return total * (x.numel() // max(rows, 1))


def _is_mask(index: object) -> bool:
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)


def _places(indices: Sequence[object]) -> list[object]:
    """Indices on the meta device, with masks replaced by the indices that they select."""
    found: list[object] = []
    for index in indices:
        if isinstance(index, Tensor) and _is_mask(index):
            found += [torch.empty(int(index.count_nonzero()), dtype=torch.int64, device="meta")] * index.dim()
        else:
            found.append(index)
    return found


_RECURRENT = frozenset(f"aten.{name}.input" for name in ("lstm", "gru", "rnn_tanh", "rnn_relu"))
_INDEXED = frozenset({"aten.index.Tensor", "aten.index_put.default"})
_SIZED_BY_VALUES: dict[str, Callable[..., int]] = {
    "aten.one_hot.default": _one_hot,
    "aten.repeat_interleave.Tensor": _repeated,
    "aten.repeat_interleave.self_Tensor": _repeated_along,
    "aten.where.default": lambda condition: int(condition.numel() * condition.dim()),
    "aten.tensor_split.tensor_indices_or_sections": lambda x, *_: int(x.numel()),
}
