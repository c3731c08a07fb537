"""Packed weights in the order in which kernels read them, prepared once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

T = TypeVar("T")


class PreparedWeights(Generic[T]):
    """What was made of packed weights, kept as long as they live and nobody writes to them."""

    def __init__(self) -> None:
        self._known = WeakTensorKeyDictionary()  # packed weight -> (its version, what was made of it)

    def get(self, words: Tensor, prepare: Callable[[], T]) -> T:
        """What ``prepare`` made of ``words``; a state dict that is loaded into them makes it anew."""
        version = 0 if words.is_inference() else words._version
        known: tuple[int, T] | None = self._known.get(words)
        if known is None or known[0] != version:
            known = version, prepare()
            self._known[words] = known
        return known[1]
