"""Folding of batch norms into the layers before them, which changes no output of the network in evaluation mode."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lowbit.network.graph.dataflow import Dataflow, Node
from lowbit.network.layers import CONVOLUTIONS, TRANSPOSED

EXACT_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True)
class FoldedNorm:
    """One folded batch norm, with what it says of the layer's output before the activation: mean (beta) and deviation,
    ``|gamma| sqrt(var / (var + eps))``.
    """

    layer: str
    norm: str
    out_mean: Tensor
    out_std: Tensor


def fold_batch_norm(
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    *,
    channels: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weight and bias of a layer that computes ``batch_norm(layer(x))``.

    ``W' = gamma W / sqrt(var + eps)``, ``b' = beta + gamma (b - mean) / sqrt(var + eps)``, for each output channel; float64 inside.

    Args:
        weight: ``[out, ...]``, or any layout with ``channels``.
        bias: ``[out]`` or ``None``.
        gamma, beta: ``[out]`` or ``None`` (a norm without affine parameters).
        mean, var: Running statistics, ``[out]``.
        eps: The norm's epsilon.
        channels: Output channel of each weight, broadcasting with ``weight``; by default the index of its first axis.

    Returns:
        ``(weight, bias, out_std, out_mean)``: deviation ``|gamma|`` and mean ``beta`` of the output before the activation.

    Source: Nagel et al. 2019, section 3.2; Jacob et al. 2018, Eq. 14.
    """
    gamma64 = torch.ones_like(var, dtype=torch.float64) if gamma is None else gamma.detach().double()
    beta64 = torch.zeros_like(gamma64) if beta is None else beta.detach().double()
    factor = gamma64 / (var.double() + eps).sqrt()
    old_bias = torch.zeros_like(beta64) if bias is None else bias.detach().double()
    index = torch.arange(weight.shape[0], device=weight.device).reshape(-1, *[1] * (weight.dim() - 1)) if channels is None else channels
    new_weight = (weight.detach().double() * factor[index]).to(weight.dtype)
    new_bias = (beta64 + factor * (old_bias - mean.double())).to(weight.dtype)
    return new_weight, new_bias, gamma64.abs().to(weight.dtype), beta64.to(weight.dtype)


def output_channels(layer: nn.Module, weight: Tensor) -> Tensor:
    """Output channel of each weight as an index that broadcasts with ``weight``.

    A transposed convolution's weight is ``[in, out / groups, ...]``: the group of an input channel decides the output channel.
    """
    spatial = [1] * (weight.dim() - 2)
    if isinstance(layer, TRANSPOSED):
        per_group = weight.shape[1]
        group = torch.arange(weight.shape[0], device=weight.device) // (weight.shape[0] // layer.groups)
        return (group[:, None] * per_group + torch.arange(per_group, device=weight.device)).reshape(weight.shape[0], per_group, *spatial)
    return torch.arange(weight.shape[0], device=weight.device).reshape(-1, 1, *spatial)


def fold_batch_norms(model: nn.Module, dataflow: Dataflow) -> list[FoldedNorm]:
    """Fold, in place, every batch norm that is the only reader of a layer's output; both must run once and share no weight.

    ``nn.BatchNorm`` becomes ``nn.Identity``. A subclass may do more than normalize: where that is running its children in order
    (timm's norms apply the activation so) it becomes a ``Sequential`` of them, else it is kept and made an exact identity:
    weight 1, bias 0, mean 0, variance 1, eps 0. The dataflow is updated alike.
    """
    folded = []
    for layer_name, norm_name in foldable_norms(model, dataflow):
        layer, norm = model.get_submodule(layer_name), model.get_submodule(norm_name)
        assert isinstance(norm, EXACT_NORMS)
        old, mean, var = layer.weight, norm.running_mean, norm.running_var
        assert isinstance(old, Tensor) and mean is not None and var is not None
        weight, bias, out_std, out_mean = fold_batch_norm(
            old, layer._parameters["bias"], norm.weight, norm.bias, mean, var, norm.eps, channels=output_channels(layer, old)
        )
        layer.weight = nn.Parameter(weight, requires_grad=old.requires_grad)
        layer.bias = nn.Parameter(bias, requires_grad=old.requires_grad)
        # a channel that hardly varies does not vary behind the norm either, whatever gamma is
        share = (var / (var + norm.eps)).sqrt().to(out_std)
        if not remove_norm(model, dataflow, norm_name):
            _neutralize(norm)
            dataflow.forget(norm_name)
        folded.append(FoldedNorm(layer_name, norm_name, out_mean, out_std * share))
    return folded


def foldable_norms(model: nn.Module, dataflow: Dataflow) -> Iterator[tuple[str, str]]:
    """The names of every layer whose output a batch norm alone reads, and of that norm; both run once and share no weight.

    Norms may be folded while they are found.
    """
    owners: dict[int, int] = {}
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter):
            owners[id(weight)] = owners.get(id(weight), 0) + 1
    for node in dataflow.nodes:
        pair = _foldable(model, dataflow, node)
        if pair is not None and owners[id(model.get_submodule(pair[0]).weight)] == 1:
            yield pair


def _foldable(model: nn.Module, dataflow: Dataflow, node: Node) -> tuple[str, str] | None:
    readers = dataflow.consumers(node)
    if node.layer is None or len(readers) != 1 or readers[0].op != "batch_norm" or dataflow.is_output(node):
        return None
    norm = model.get_submodule(readers[0].owner)
    if not isinstance(norm, EXACT_NORMS) or norm.running_mean is None or readers[0].inputs[0] != node.name:
        return None
    if dataflow.calls(node.layer) != 1 or dataflow.calls(readers[0].owner) != 1:
        return None
    layer = model.get_submodule(node.layer)
    if not isinstance(layer, (*CONVOLUTIONS, *TRANSPOSED)) and len(node.shape) != 2:
        return None  # a linear layer over tokens: its features are not the norm's channels
    return node.layer, readers[0].owner


def remove_norm(model: nn.Module, dataflow: Dataflow, name: str) -> bool:
    """Put the identity in the place of a batch norm that was folded, or, where it does more, its children in order.

    Returns:
        Whether that was possible; else nothing has changed. The dataflow is updated alike.
    """
    norm = model.get_submodule(name)
    children = OrderedDict(norm.named_children())
    if type(norm) not in EXACT_NORMS and not (children and _runs_children(dataflow, name)):
        return False
    parent, _, child = name.rpartition(".")
    rest = nn.Identity() if type(norm) in EXACT_NORMS else nn.Sequential(children)
    setattr(model.get_submodule(parent), child, rest.train(norm.training))
    dataflow.forget(name)
    return True


def _neutralize(norm: _BatchNorm) -> None:
    """Make a batch norm an exact identity in evaluation mode."""
    with torch.no_grad():
        if norm.weight is not None:
            norm.weight.fill_(1)
            norm.bias.zero_()
        assert norm.running_mean is not None and norm.running_var is not None
        norm.running_mean.zero_()
        norm.running_var.fill_(1)
    norm.eps = 0.0


def _runs_children(dataflow: Dataflow, name: str) -> bool:
    """Whether all that the norm does after normalizing is done by its children, one after the other."""
    own = [node for node in dataflow.nodes if node.owner == name and node.is_activation]
    inside = [node for node in dataflow.nodes if node.owner.startswith(f"{name}.") and node.is_activation]
    chain = [node.name for node in (*own, *inside)]
    is_chain = all(node.inputs[0] == before for node, before in zip(inside, chain, strict=False))
    return len(own) == 1 and is_chain and name in dataflow[chain[-1]].returned_by
