"""Batch norms folded into the layers before them in training: the layer's weight is quantized as it will be when it is folded for good.

In training the norm's statistics are those of the batch, for which the layer runs a second time with its own weight; later, and in
evaluation, they are the moving ones.

Source: Jacob et al. 2018, section 3.2, Eq. 14; Krishnamoorthi 2018 for moving statistics at the end.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.network.graph.dataflow import Dataflow
from lowbit.network.surgery.fold import EXACT_NORMS, foldable_norms, output_channels, remove_norm


class FoldedNorm(nn.Module):
    """A batch norm that has become part of the layer before it.

    ``W' = gamma W / sqrt(var + eps)``, ``b' = beta + gamma (b - mean) / sqrt(var + eps)``, with gradients to all of them, and through the
    batch's mean and variance.

    Args:
        norm: The norm; it keeps its moving statistics.
        channels: Output channel of each weight, broadcasting with the weight.

    Attributes:
        is_frozen: Whether training uses the moving statistics too, and leaves them as they are.
        is_passing: Whether weight and bias are to be those of the layer alone, which quantizers leave as they are meanwhile.
    """

    def __init__(self, norm: nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d, channels: Tensor) -> None:
        super().__init__()
        self.norm = norm
        self.register_buffer("channels", channels, persistent=False)
        self.channels: Tensor
        self.is_frozen = False
        self.is_passing = False
        self._batch: tuple[Tensor, Tensor] | None = None  # of the pass under way

    @property
    def uses_batch(self) -> bool:
        """Whether the statistics are those of the batch."""
        return self.training and self.norm.training and not self.is_frozen

    def weight(self, weight: Tensor) -> Tensor:
        """The weight of layer and norm together, of the type of ``weight``."""
        factor, _ = self._factor_and_mean()
        return (weight * factor[self.channels]).to(weight.dtype)

    def bias(self, bias: Tensor) -> Tensor:
        """The bias of layer and norm together, of the type of ``bias``."""
        factor, mean = self._factor_and_mean()
        folded = (bias - mean) * factor
        return (folded if self.norm.bias is None else folded + self.norm.bias).to(bias.dtype)

    @contextmanager
    def passing(self) -> Iterator[None]:
        """Within the context ``is_passing``."""
        self.is_passing = True
        try:
            yield
        finally:
            self.is_passing = False

    def see(self, output: Tensor) -> None:
        """Take the statistics of what the layer alone computes for a batch, ``[N, channels, ...]``, until ``forget``."""
        with torch.no_grad():
            self.norm(output.detach())  # the moving statistics
        values = output.float().movedim(1, 0).flatten(1)
        self._batch = values.mean(1), values.var(1, correction=0)

    def forget(self) -> None:
        """The pass is over."""
        self._batch = None

    def _factor_and_mean(self) -> tuple[Tensor, Tensor]:
        """``(gamma / sqrt(var + eps), mean)``."""
        norm = self.norm
        assert norm.running_mean is not None and norm.running_var is not None
        mean, var = self._batch if self._batch is not None and self.training else (norm.running_mean, norm.running_var)
        factor = torch.rsqrt(var + norm.eps)
        return (factor if norm.weight is None else norm.weight * factor), mean


def take_norms(model: nn.Module, dataflow: Dataflow, layers: Collection[str]) -> dict[str, FoldedNorm]:
    """Take the batch norms behind ``layers`` out of ``model``, in place, for the quantizers of their weights to fold.

    Each of these layers gets a bias, zeros where it had none, for the norm's to be added to. The dataflow is updated alike. A norm that
    does more than normalize stays where it is, unless that is running its children in order.

    Returns:
        The norms by the names of their layers.
    """
    taken = {}
    for layer_name, norm_name in foldable_norms(model, dataflow):
        layer, norm = model.get_submodule(layer_name), model.get_submodule(norm_name)
        if layer_name not in layers or not remove_norm(model, dataflow, norm_name):
            continue
        weight = layer.weight
        assert isinstance(weight, Tensor)
        folded = FoldedNorm(_plain(norm), output_channels(layer, weight))
        if layer._parameters["bias"] is None:
            zeros = torch.zeros(folded.norm.num_features, dtype=weight.dtype, device=weight.device)
            layer.bias = nn.Parameter(zeros)
        taken[layer_name] = folded
    return taken


def see_batches(layer: nn.Module, folded: FoldedNorm) -> None:
    """Let ``folded`` see what ``layer`` computes with its own weight, just before each call in training; behind its input quantizer."""
    layer.register_forward_pre_hook(_See(folded), with_kwargs=True)
    layer.register_forward_hook(_Forget(folded))


class _See:
    """A hook that can be copied together with the layer that it belongs to."""

    def __init__(self, folded: FoldedNorm) -> None:
        self.folded = folded

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.folded.uses_batch:
            with self.folded.passing():
                self.folded.see(layer.forward(*args, **kwargs))


class _Forget(_See):
    def __call__(self, *_: object) -> None:
        self.folded.forget()


def _plain(norm: nn.Module) -> nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d:
    """A batch norm of torch's own class with the state of ``norm``."""
    kind = next(kind for kind in EXACT_NORMS if isinstance(norm, kind))
    assert isinstance(norm, EXACT_NORMS) and norm.running_mean is not None
    plain = kind(norm.num_features, norm.eps, norm.momentum, norm.affine, device=norm.running_mean.device, dtype=norm.running_mean.dtype)
    plain.load_state_dict({name: value for name, value in norm.state_dict().items() if name in plain.state_dict()})
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(norm.get_parameter(name).requires_grad)
    return plain.train(norm.training)
