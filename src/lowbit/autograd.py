"""The state of autograd that the library computes in, whatever its caller's."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")


def records_gradients(function: Callable[P, T]) -> Callable[P, T]:
    """Let ``function`` compute as it would outside of ``torch.no_grad()`` and ``torch.inference_mode()``.

    >>> @records_gradients
    ... def needs_grad(x):
    ...     return (2 * x).requires_grad
    >>> with torch.inference_mode():
    ...     needs_grad(torch.nn.Parameter(torch.ones(())))
    True
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        with torch.inference_mode(False), torch.enable_grad():
            return function(*args, **kwargs)

    return run


def plain_tensor(tensor: Tensor) -> Tensor:
    """``tensor`` itself, or a copy where it was made in ``torch.inference_mode()``: autograd cannot record such tensors.

    >>> with torch.inference_mode():
    ...     x = torch.zeros(2)
    >>> plain_tensor(x).is_inference()
    False
    """
    return tensor.clone() if isinstance(tensor, Tensor) and tensor.is_inference() else tensor
