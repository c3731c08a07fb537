"""Reparametrized tensors made plain ones: weight norm, spectral norm, orthogonal weights, pruning masks and those of one's own.

What is computed from other parameters at every call (``torch.nn.utils.parametrize``, and the hooks that ``torch.nn.utils`` had before)
becomes the parameter that it computes in evaluation mode, so that the network computes there what it did.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm


@torch.no_grad()
def merge_reparametrized(model: nn.Module) -> dict[str, str]:
    """Merge every reparametrization of ``model`` in place; gives what kind each was, by the name of the tensor.

    >>> layer = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    >>> merge_reparametrized(nn.Sequential(layer))
    {'0.weight': 'weight norm'}
    >>> [name for name, _ in layer.named_parameters()]
    ['bias', 'weight']
    """
    merged: dict[str, str] = {}
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        merged |= {f"{prefix}{tensor}": kind for tensor, kind in (_merge_hooks(module) | _merge_parametrizations(module)).items()}
    return merged


def _merge_hooks(module: nn.Module) -> dict[str, str]:
    merged = {}
    for hook in list(module._forward_pre_hooks.values()):
        if isinstance(hook, WeightNorm):
            remove_weight_norm(module, hook.name)
            merged[hook.name] = "weight norm"
        elif isinstance(hook, SpectralNorm):
            remove_spectral_norm(module, hook.name)
            merged[hook.name] = "spectral norm"
        elif isinstance(hook, prune.BasePruningMethod):
            prune.remove(module, hook._tensor_name)
            merged[hook._tensor_name] = "pruning"
    return merged


def _merge_parametrizations(module: nn.Module) -> dict[str, str]:
    if not parametrize.is_parametrized(module):
        return {}
    lists: nn.ModuleDict = module.parametrizations  # type: ignore[assignment]
    kinds = {name: " and ".join(_kind(part) for part in parametrizations.children()) for name, parametrizations in lists.items()}
    is_training = {part: part.training for part in lists.modules()}
    lists.eval()  # spectral norm goes one step on in training mode
    values = {name: (getattr(module, name).detach().clone(), _originals(parametrizations)) for name, parametrizations in lists.items()}
    for part, flag in is_training.items():
        part.training = flag
    # parametrize.remove_parametrizations edits the generated class, which copies of this module share
    module.__class__ = type(module).__mro__[1]
    del module._modules["parametrizations"]
    for name, (value, originals) in values.items():
        if all(isinstance(original, nn.Parameter) for original in originals):
            setattr(module, name, nn.Parameter(value, requires_grad=any(original.requires_grad for original in originals)))
        else:
            module.register_buffer(name, value)
    return kinds


def _originals(parametrizations: nn.Module) -> list[Tensor]:
    """What the value is computed from."""
    own = {**parametrizations._parameters, **parametrizations._buffers}
    return [tensor for name, tensor in own.items() if name.startswith("original") and tensor is not None]


def _kind(parametrization: nn.Module) -> str:
    """``_WeightNorm``, ``_SpectralNorm`` and ``_Orthogonal`` in words; those of one's own by their class."""
    known = {"_WeightNorm": "weight norm", "_SpectralNorm": "spectral norm", "_Orthogonal": "orthogonality"}
    return known.get(type(parametrization).__name__, type(parametrization).__name__)
