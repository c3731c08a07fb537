"""Which modules of a network hold weights that can be quantized, and how those weights are laid out.

Convolutions and linear layers read a tensor that can be quantized too, and runtimes compute them in integers. Embeddings, recurrent layers
and the input projections of attention are *weight-only*: their weights are quantized, and what is done with them stays in float.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from lowbit.errors import LayerError
from lowbit.inputs import Inputs, tensors_of

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
NORMS = (*BATCH_NORMS, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
QUANTIZABLE = (*CONVOLUTIONS, *TRANSPOSED, nn.Linear)
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
RECURRENT = (nn.RNNBase, nn.RNNCellBase)
WEIGHT_ONLY = (*EMBEDDINGS, *RECURRENT, nn.MultiheadAttention)
WEIGHT = "weight"  # the parameter of a layer that has one weight


def weights_of(layer: nn.Module) -> tuple[str, ...]:
    """Names of the parameters of ``layer`` that are weights which can be quantized, in the order of their definition.

    >>> weights_of(nn.LSTM(2, 3, bidirectional=True))
    ('weight_ih_l0', 'weight_hh_l0', 'weight_ih_l0_reverse', 'weight_hh_l0_reverse')
    >>> weights_of(nn.MultiheadAttention(4, 2)), weights_of(nn.LayerNorm(4))
    (('in_proj_weight',), ())
    """
    if isinstance(layer, (*QUANTIZABLE, *EMBEDDINGS)):
        return (WEIGHT,)
    if isinstance(layer, nn.RNNBase):
        return tuple(name for names in layer._all_weights for name in names if name.startswith("weight_"))
    if isinstance(layer, nn.RNNCellBase):
        return ("weight_ih", "weight_hh")
    if isinstance(layer, nn.MultiheadAttention):
        return ("in_proj_weight",) if layer._qkv_same_embed_dim else ("q_proj_weight", "k_proj_weight", "v_proj_weight")
    return ()


def layers_with_weights(model: nn.Module) -> dict[str, nn.Module]:
    """Every layer that holds weights which can be quantized by name, in definition order, each module once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, (*QUANTIZABLE, *WEIGHT_ONLY))}


def quantizable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every convolution, transposed convolution and linear layer by name, in definition order, each module once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QUANTIZABLE)}


def output_channel_axis(layer: nn.Module) -> int:
    """The axis of a weight that counts output channels: 1 in a transposed convolution (``[in, out / groups, ...]``), else 0.

    In an embedding these are its rows: their norms follow the frequencies of what they stand for. With a scale for each row of 64 numbers,
    4 bits take 4.5 bits in all, and lose several dB less than with one scale.
    """
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
    """``linear``, ``conv2d``, ``depthwise_conv2d``, ``grouped_conv2d``, ``conv_transpose2d``, ``embedding``, ``lstm``, ``attention``, ..."""
    for cls, kind in _KINDS.items():
        if isinstance(layer, cls):
            return kind
    for dims in (1, 2, 3):
        if isinstance(layer, TRANSPOSED[dims - 1]):
            return f"conv_transpose{dims}d"
        if isinstance(layer, CONVOLUTIONS[dims - 1]):
            if layer.groups == 1:
                return f"conv{dims}d"
            return f"{'depthwise' if layer.groups == layer.in_channels else 'grouped'}_conv{dims}d"
    raise LayerError(
        f"{type(layer).__name__} is not a layer that lowbit quantizes. "
        f"Allowed: {', '.join(cls.__name__ for cls in (*QUANTIZABLE, *_KINDS))}."
    )


def execution_order(model: nn.Module, sample: Inputs) -> list[str]:
    """Names of the layers with weights in the order in which ``model(sample)`` first calls them.

    A layer that is never called (unused, or only its weight is used) is missing.
    """
    return list(dict.fromkeys(_calls(model, sample, layers_with_weights(model))))


def shuffled_layers(model: nn.Module, sample: Inputs) -> list[str]:
    """Names of the layers with weights that ``model(sample)`` calls right before a pixel shuffle."""
    layers = layers_with_weights(model)
    shuffles = {name: module for name, module in model.named_modules() if isinstance(module, nn.PixelShuffle)}
    if not shuffles:
        return []
    calls = _calls(model, sample, layers | shuffles)
    return [layer for layer, name in itertools.pairwise(calls) if name in shuffles and layer in layers]


def _calls(model: nn.Module, sample: Inputs, modules: Mapping[str, nn.Module]) -> list[str]:
    """The names of ``modules`` in the order in which ``model(sample)`` calls them, each as often as it is called."""
    calls: list[str] = []
    handles = [module.register_forward_pre_hook(_noting(name, calls)) for name, module in modules.items()]
    try:
        with evaluating(model):
            model(*sample.args, **sample.kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return calls


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


def is_random(model: nn.Module, inputs: Inputs) -> bool:
    """Whether two calls in evaluation mode with the same inputs give different outputs, as with dropout that is always on."""
    with evaluating(model):
        first, second = (list(tensors_of(model(*inputs.args, **inputs.kwargs))) for _ in range(2))
    return any(a.shape != b.shape or not torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(first, second, strict=True))


_KINDS: dict[type[nn.Module], str] = {
    nn.Linear: "linear", nn.Embedding: "embedding", nn.EmbeddingBag: "embedding_bag", nn.MultiheadAttention: "attention", nn.LSTM: "lstm",
    nn.GRU: "gru", nn.RNN: "rnn", nn.RNNBase: "rnn", nn.LSTMCell: "lstm_cell", nn.GRUCell: "gru_cell", nn.RNNCellBase: "rnn_cell",
}  # fmt: skip


def _noting(name: str, calls: list[str]) -> Callable[[nn.Module, tuple[object, ...]], None]:
    return lambda _module, _args: calls.append(name)
