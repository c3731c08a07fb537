"""Post-training methods on the tiny task of the laws."""

from __future__ import annotations

import copy
import dataclasses
import functools
from typing import Any

from torch import Tensor, nn

from lowbit.registry import MethodInfo, find_method
from lowbit.testing import tiny
from lowbit.testing.checks import MethodRef
from lowbit.workflows.quantize import quantize as lowbit_quantize


def facts(method: MethodRef) -> MethodInfo:
    """What is known of the method."""
    return find_method(method, "post_training")


def budget(method: MethodRef, iterations: int) -> dict[str, object]:
    """Options that keep a reconstruction short; empty for methods without iterations."""
    cls = facts(method).method
    assert cls is not None and dataclasses.is_dataclass(cls)
    return {field.name: iterations for field in dataclasses.fields(cls) if field.name in ("iterations", "activation_iterations")}


def quantize(
    method: MethodRef,
    model: nn.Module,
    data: Tensor,
    *,
    weight_bits: int,
    activation_bits: int | None = 8,
    iterations: int = 20,
    seed: int = 3,
) -> nn.Module:
    """The method at its defaults but for a short reconstruction."""
    options: dict[str, Any] = budget(method, iterations)
    return lowbit_quantize(
        model, method=method, weight_bits=weight_bits, activation_bits=activation_bits, calibration=data, seed=seed, **options
    )


@functools.cache
def _quantized(method: MethodRef, weight_bits: int) -> nn.Module:
    return quantize(method, tiny.trained(), tiny.calibration(), weight_bits=weight_bits)


def quantized(method: MethodRef, weight_bits: int = 4) -> nn.Module:
    """The trained network under one method, with 8-bit activations; a copy, so that tests may change it."""
    return copy.deepcopy(_quantized(method, weight_bits))
