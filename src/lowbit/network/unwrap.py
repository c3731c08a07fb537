"""Removal of wrappers by other tools (compilers, data parallelism), which would keep running the old code."""

from __future__ import annotations

import copy

import torch
from torch import nn

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
    taken = copy.deepcopy(inner)
    for parent in list(taken.modules()):
        parent._compiled_call_impl = None  # what nn.Module.compile leaves behind
        for name, child in list(parent._modules.items()):
            if child is not None:
                parent._modules[name] = _unwrapped(child)
    return taken


def _unwrapped(module: nn.Module) -> nn.Module:
    while True:
        if isinstance(module, _PARALLEL):
            module = module.module
        elif "_orig_mod" in module._modules and isinstance(module._modules["_orig_mod"], nn.Module):  # of torch.compile
            module = module._modules["_orig_mod"]
        else:
            return module
