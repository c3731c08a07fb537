"""A cache of objects derived from packed weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

T = TypeVar("T")


class PreparedWeights(Generic[T]):
    """Objects derived from packed weights, cached as long as these are alive and unchanged."""

    def __init__(self) -> None:
        self._known = WeakTensorKeyDictionary()  # packed weight -> (its mask, key, derived object)

    def get(self, words: Tensor, mask: Tensor | None, numbers: tuple[int, ...], prepare: Callable[[], T]) -> T:
        """The result of ``prepare`` for ``words``, ``mask`` and ``numbers``; computed again after a state dict is loaded into them."""
        state = (version_of(words), version_of(mask), *numbers)
        known: tuple[Tensor | None, tuple[int, ...], T] | None = self._known.get(words)
        if known is None or known[0] is not mask or known[1] != state:
            known = mask, state, prepare()
            self._known[words] = known
        return known[2]


def version_of(tensor: Tensor | None) -> int:
    """A number that changes when a state dict is loaded into ``tensor``."""
    return 0 if tensor is None or tensor.is_inference() else tensor._version
