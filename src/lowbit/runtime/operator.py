"""Functions as operators of torch, so that exported and compiled programs carry them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec

import torch
from torch import Tensor

P = ParamSpec("P")


def register_operator(fake: Callable[..., Tensor]) -> Callable[[Callable[P, Tensor]], Callable[P, Tensor]]:
    """A torch operator ``lowbit::`` whose output looks like ``fake``'s, so that programs with it can be exported and compiled.

    ``torch.library.custom_op`` does the same and adds checks that take longer than a small layer.
    """

    def register(function: Callable[P, Tensor]) -> Callable[P, Tensor]:
        name = f"lowbit::{function.__name__}"
        torch.library.define(name, torch.library.infer_schema(function, mutates_args=()))
        torch.library.impl(name, "CompositeExplicitAutograd", function)
        torch.library.register_fake(name, fake)
        overload = getattr(torch.ops.lowbit, function.__name__).default

        @functools.wraps(function)
        def call(*arguments: P.args, **options: P.kwargs) -> Tensor:
            y: Tensor = overload(*arguments, **options)
            return y

        return call

    return register
