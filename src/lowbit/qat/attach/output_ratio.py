"""How much smaller or larger a layer's output became by quantizing it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lowbit.network import insert
from lowbit.network.layers import WEIGHT


@torch.no_grad()
def output_ratio(layer: nn.Module, x: Tensor | None, *, with_bias: bool = True, parameter: str = WEIGHT) -> Tensor:
    """``mean |layer(x)|`` in float over ``mean |layer(x)|`` with its initialized quantizers; 1 where either is 0.

    Args:
        layer: A layer with quantizers; transforms of its output are left out.
        x: Its input in float; ``None`` where only its weight is used: then it is the ratio of ``mean |weight|``.
        with_bias: Whether the bias is part of both outputs.
        parameter: The name of the weight, where ``x`` is ``None``.
    """
    if x is None:
        quantizer, weight = insert.weight_quantizer(layer, parameter), insert.float_weight(layer, parameter)
        return _usable(weight.abs().mean() / (weight if quantizer is None else quantizer(weight)).abs().mean())
    inputs = insert.input_quantizer(layer)
    bias = None if with_bias else insert.float_bias(layer)
    saved = None if bias is None else bias.detach().clone()
    try:
        if bias is not None:
            bias.zero_()
        with insert.quantization_enabled(layer, weights=False, activations=False):
            expected = layer.forward(x).abs().mean()
        got = layer.forward(x if inputs is None else inputs(x)).abs().mean()
    finally:
        if bias is not None and saved is not None:
            bias.copy_(saved)
    return _usable(expected / got)


def _usable(ratio: Tensor) -> Tensor:
    return torch.where(torch.isfinite(ratio) & (ratio > 0), ratio, torch.ones_like(ratio))
