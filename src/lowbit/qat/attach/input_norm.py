"""Batch norms in front of quantizers that need values of both signs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from lowbit.network import insert
from lowbit.network.layers import TRANSPOSED
from lowbit.network.slot import QuantizerFactory, Slot
from lowbit.qat.attach.job import InitializeLayer, QatJob
from lowbit.quantizers import Quantizer

NormPlaces = Literal["unsigned", "always", "never"]


class InputNorm(nn.Module):
    """Batch norm in front of a layer, over the channels of its input whatever their place.

    Args:
        layer: Convolution (channels come second) or linear layer (features come last).
        epsilon: Added to the variance.
    """

    def __init__(self, layer: nn.Module, epsilon: float = 1e-4) -> None:
        super().__init__()
        self.dims = len(getattr(layer, "kernel_size", ()))
        weight = insert.float_weight(layer)
        channels = weight.shape[0] if isinstance(layer, TRANSPOSED) else weight.shape[1] * int(getattr(layer, "groups", 1))
        kind = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[self.dims]
        self.norm = kind(channels, eps=epsilon, device=weight.device)

    def rows(self, x: Tensor) -> Tensor:
        """``x`` as ``[N, channels, ...]`` or ``[N, features]``: a batch stays as it is."""
        if not self.dims:
            return x.reshape(-1, x.shape[-1])
        return x if x.dim() == self.dims + 2 else x.unsqueeze(0)

    @torch.no_grad()
    def set_statistics(self, x: Tensor) -> None:
        """Take the mean and the variance of ``x`` as those of evaluation."""
        rows = self.rows(x.float()).movedim(1, 0).flatten(1)
        assert self.norm.running_mean is not None and self.norm.running_var is not None
        self.norm.running_mean.copy_(rows.mean(1))
        self.norm.running_var.copy_(rows.var(1, correction=0))

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        rows = self.rows(x).to(norm.weight.dtype)
        if self.training and rows.numel() == rows.shape[1]:  # one value has no variance
            y = functional.batch_norm(rows, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
        else:
            y = norm(rows)
        return (y if y.dim() == x.dim() else y.reshape(x.shape)).to(x.dtype)


def insert_with_norms(
    job: QatJob,
    weights: QuantizerFactory,
    activations: QuantizerFactory,
    initialize_layer: InitializeLayer,
    *,
    norm: NormPlaces | Callable[[Slot], bool] = "unsigned",
    epsilon: float = 1e-5,
) -> None:
    """Put quantizers into ``job.model`` and initialize them, with a batch norm in front of those at inputs.

    Behind a ReLU all values are positive, and the signs of all of them equal.

    Args:
        job: The network.
        weights, activations: Make the quantizers.
        initialize_layer: Sets up a layer from its input.
        norm: Where to put norms: where inputs are never negative, always or never, or where a function of the slot says so.
        epsilon: Epsilon of the norms.
    """
    inputs: dict[InputNorm, Tensor] = {}

    def activation_quantizer(slot: Slot) -> Quantizer:
        if norm(slot) if callable(norm) else norm == "always" or (norm == "unsigned" and not slot.is_signed):
            insert.set_input_transform(slot.layer, InputNorm(slot.layer, epsilon))
        return activations(slot)

    def initialize(layer: nn.Module, x: Tensor | None, *parameter: str) -> None:
        transform = insert.input_transform(layer)
        if isinstance(transform, InputNorm) and x is not None:
            inputs[transform] = x
        initialize_layer(layer, x, *parameter)

    job.insert(weights, activation_quantizer)
    job.initialize(initialize)
    for transform, x in inputs.items():  # afterwards: initializing restores the statistics of norms
        transform.set_statistics(x)
