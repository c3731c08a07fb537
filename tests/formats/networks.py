"""Quantized networks for the export tests, made by hand so that they depend on no method."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tests.networks import settled
from torch import Tensor, nn

from lowbit.network.insert import set_input_quantizer, set_weight_quantizer
from lowbit.network.layers import output_channel_axis, quantizable_layers
from lowbit.quantizers import (
    BinaryQuantizer,
    CodebookQuantizer,
    PowerOfTwoQuantizer,
    Quantizer,
    SumQuantizer,
    UniformQuantizer,
)
from lowbit.spec import Granularity

WEIGHT_QUANTIZERS: dict[str, Callable[[Granularity], Quantizer]] = {
    "uniform": lambda g: UniformQuantizer(4, signed=True, symmetric=True, granularity=g),
    "affine": lambda g: UniformQuantizer(3, signed=False, symmetric=False, granularity=g),
    "binary": lambda g: BinaryQuantizer(granularity=g),
    "codebook": lambda g: CodebookQuantizer(2, granularity=g),
    "power_of_two": lambda g: PowerOfTwoQuantizer(4, granularity=g),
    "sum": lambda g: SumQuantizer([BinaryQuantizer(granularity=g) for _ in range(2)]),
}


def activation_quantizer(bit_width: int = 8) -> UniformQuantizer:
    """Per tensor, affine, with a zero point that is not 0."""
    quantizer = UniformQuantizer(bit_width, signed=False, symmetric=False)
    quantizer.set_parameters(torch.tensor(6.0 / (2**bit_width - 1)), torch.tensor(float(2**bit_width // 3)))
    return quantizer


def quantized(model: nn.Module, *inputs: Tensor, weights: str = "uniform", granularity: str = "per_channel") -> nn.Module:
    """``model`` in evaluation mode with a weight and an input quantizer on every layer."""
    model = settled(model, *inputs)
    for layer in quantizable_layers(model).values():
        quantizer = WEIGHT_QUANTIZERS[weights](Granularity.parse(granularity, output_channel_axis(layer)))
        quantizer.initialize(layer.weight.detach())
        set_weight_quantizer(layer, quantizer)
        set_input_quantizer(layer, activation_quantizer())
    return model
