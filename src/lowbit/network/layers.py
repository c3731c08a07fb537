"""Which modules of a network hold a weight that can be quantized, and how that weight is laid out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from lowbit.errors import LayerError
from lowbit.inputs import Inputs

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
NORMS = (*BATCH_NORMS, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
QUANTIZABLE = (*CONVOLUTIONS, *TRANSPOSED, nn.Linear)


def quantizable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every convolution, transposed convolution and linear layer by name, in definition order, each module once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QUANTIZABLE)}


def output_channel_axis(layer: nn.Module) -> int:
    """The axis of the weight that counts output channels: 1 in a transposed convolution (``[in, out / groups, ...]``), else 0."""
    return 1 if isinstance(layer, TRANSPOSED) else 0


def replace_modules(model: nn.Module, kind: type[nn.Module], make: Callable[[], nn.Module]) -> int:
    """Replace every submodule of exactly the class ``kind`` by ``make()``; returns how many were replaced."""
    count = 0
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if type(child) is kind:
                setattr(parent, name, make().train(child.training))
                count += 1
    return count


def layer_kind(layer: nn.Module) -> str:
    """``linear``, ``conv2d``, ``depthwise_conv2d``, ``grouped_conv2d``, ``conv_transpose2d``, ..."""
    if isinstance(layer, nn.Linear):
        return "linear"
    for dims in (1, 2, 3):
        if isinstance(layer, TRANSPOSED[dims - 1]):
            return f"conv_transpose{dims}d"
        if isinstance(layer, CONVOLUTIONS[dims - 1]):
            if layer.groups == 1:
                return f"conv{dims}d"
            return f"{'depthwise' if layer.groups == layer.in_channels else 'grouped'}_conv{dims}d"
    raise LayerError(
        f"{type(layer).__name__} is not a layer that lowbit quantizes. Allowed: {', '.join(cls.__name__ for cls in QUANTIZABLE)}."
    )


def execution_order(model: nn.Module, sample: Inputs) -> list[str]:
    """Names of the quantizable layers in the order in which ``model(sample)`` first calls them.

    A layer that is never called (unused, or only its weight is used) is missing.
    """
    layers = quantizable_layers(model)
    order: dict[str, None] = {}
    handles = [layer.register_forward_pre_hook(_noting(name, order)) for name, layer in layers.items()]
    try:
        with evaluating(model):
            model(*sample.args, **sample.kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return list(order)


def frozen_norms(model: nn.Module, frozen: Iterable[nn.Parameter] | None = None) -> list[nn.Module]:
    """Batch norms that keep their statistics in training.

    They are those in evaluation mode within a network in training mode, and those whose parameters are all frozen.

    Args:
        model: The network.
        frozen: The frozen parameters; default: those that ask for no gradient.

    >>> norm = nn.BatchNorm1d(2).requires_grad_(False)
    >>> frozen_norms(nn.Sequential(norm, nn.BatchNorm1d(2))) == [norm]
    True
    """
    parameters = [p for p in model.parameters() if not p.requires_grad] if frozen is None else frozen
    known = set(map(id, parameters))
    return [
        norm
        for norm in model.modules()
        if isinstance(norm, BATCH_NORMS)
        and ((model.training and not norm.training) or (norm.affine and all(id(p) in known for p in norm.parameters())))
    ]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module's training flag is restored afterwards."""
    training = [module for module in model.modules() if module.training]
    if training:  # eval() visits every module, which takes longer than a small network's forward pass
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def _noting(name: str, order: dict[str, None]) -> Callable[[nn.Module, tuple[object, ...]], None]:
    return lambda _module, _args: order.setdefault(name)
