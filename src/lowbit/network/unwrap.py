"""Removal of wrappers by other tools (compilers, data parallelism), which would keep running the old code."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from lowbit.autograd import plain_tensor
from lowbit.errors import LayerError

_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def plain_copy(model: nn.Module) -> nn.Module:
    """A deep copy of ``model`` without wrappers at any depth, so that quantizers inserted into it take effect.

    ``torch.compile`` keeps compiled code that knows nothing of quantizers inserted later, and ``DataParallel`` and
    ``DistributedDataParallel`` call their own copies. Names of layers lose the wrappers' parts (``_orig_mod.``, ``module.``).

    Raises:
        LayerError: A part of it was scripted or traced by ``torch.jit``, whose code cannot be changed.

    >>> list(dict(plain_copy(nn.DataParallel(nn.Sequential(nn.Linear(2, 2)))).named_children()))
    ['0']
    """
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            where = f"its part {name!r}" if name else "it"
            raise LayerError(
                f"{type(model).__name__}: {where} is a {type(module).__name__} of torch.jit, whose code cannot be changed. "
                "Pass the network that it was made from."
            )
    inner = _unwrapped(model)
    taken = copy.deepcopy(inner, _computed_tensors(inner))
    _renew_inference_tensors(taken)
    for parent in list(taken.modules()):
        parent._compiled_call_impl = None  # what nn.Module.compile leaves behind
        for name, child in list(parent._modules.items()):
            if child is not None:
                parent._modules[name] = _unwrapped(child)
    return taken


def _computed_tensors(model: nn.Module) -> dict[int, object]:
    """What modules keep of their last call, as old-style weight norm does with its weight: ``deepcopy`` refuses tensors with a graph."""
    kept = (value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor))
    return {id(value): value.detach().clone() for value in kept if not value.is_leaf}


def _renew_inference_tensors(model: nn.Module) -> None:
    """Make a network that was built or loaded in ``torch.inference_mode()`` one that can be trained."""
    renewed: dict[nn.Parameter, nn.Parameter] = {}  # several modules may share one
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_inference():
                new = nn.Parameter(plain_tensor(parameter.detach()), requires_grad=parameter.requires_grad)
                module._parameters[name] = renewed.setdefault(parameter, new)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = plain_tensor(buffer)


def _unwrapped(module: nn.Module) -> nn.Module:
    while True:
        if isinstance(module, _PARALLEL):
            module = module.module
        elif "_orig_mod" in module._modules and isinstance(module._modules["_orig_mod"], nn.Module):  # of torch.compile
            module = module._modules["_orig_mod"]
        else:
            return module
