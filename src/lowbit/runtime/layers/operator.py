"""Functions as operators of torch, so that exported and compiled programs carry them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Generic, ParamSpec

import torch
from torch import Tensor

P = ParamSpec("P")


class Operator(Generic[P]):
    """A registered operator.

    Attributes:
        function: What it computes, without the operator around it: torch's way to it and back takes longer than a small layer. Programs that
            are being exported or compiled do not see what is called so.
    """

    def __init__(self, function: Callable[P, Tensor], overload: Callable[..., Tensor]) -> None:
        functools.update_wrapper(self, function)
        self.function, self._overload = function, overload

    def __call__(self, *arguments: P.args, **options: P.kwargs) -> Tensor:
        return self._overload(*arguments, **options)


def register_operator(fake: Callable[..., Tensor]) -> Callable[[Callable[P, Tensor]], Operator[P]]:
    """A torch operator ``lowbit::`` whose output looks like ``fake``'s, so that programs with it can be exported and compiled.

    ``torch.library.custom_op`` does the same and adds checks that take longer than a small layer.
    """

    def register(function: Callable[P, Tensor]) -> Operator[P]:
        name = f"lowbit::{function.__name__}"
        torch.library.define(name, torch.library.infer_schema(function, mutates_args=()))
        torch.library.impl(name, "CompositeExplicitAutograd", function)
        torch.library.register_fake(name, fake)
        return Operator(function, getattr(torch.ops.lowbit, function.__name__).default)

    return register
