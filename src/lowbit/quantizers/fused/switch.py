"""Whether fused kernels are used."""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType

import torch

from lowbit.lazy import without_collection

_is_on: ContextVar[bool] = ContextVar("fused_kernels", default=True)


@contextmanager
def fused_kernels(enabled: bool) -> Iterator[None]:
    """Within the context, fused kernels are used where they can be, or not at all.

    Disable them to see the inner tensors of a quantizer in the autograd graph (its codes, for second derivatives).
    """
    token = _is_on.set(enabled)
    try:
        yield
    finally:
        _is_on.reset(token)


def is_fusing() -> bool:
    """Whether a fused kernel may run here: it is enabled, numba is installed, and nothing traces the program."""
    # a context variable cannot be traced: it is read last
    return not torch.compiler.is_compiling() and not torch.compiler.is_exporting() and _is_on.get() and are_available()


def are_available() -> bool:
    """Whether numba is installed and works."""
    return loops() is not None


@functools.cache
def loops() -> ModuleType | None:
    """The compiled loops; ``None`` without numba. The first call compiles them, or reads them from numba's cache folder."""
    try:
        with without_collection():
            module = importlib.import_module("lowbit.quantizers.fused.loops")
    except ImportError:
        return None
    except Exception as error:  # a numba that does not fit the numpy or the processor of this machine
        warnings.warn(f"numba does not work here ({type(error).__name__}: {error}), training steps will be slower", stacklevel=2)
        return None
    return module
