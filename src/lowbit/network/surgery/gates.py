"""SiLU as a product with a gate, so that runtimes compute it in integers.

Integer kernels know sigmoids and products but no SiLU. Where the sigmoid is a module of its own, a quantizer can sit behind it.
"""

from __future__ import annotations

import copy
from collections.abc import Collection

from torch import Tensor, nn

from lowbit.network.graph.dataflow import Dataflow
from lowbit.network.placement import source_of

STATELESS = (nn.SiLU, nn.Hardswish, nn.GELU, nn.Sigmoid, nn.Hardsigmoid, nn.Mish, nn.Tanh, nn.LeakyReLU, nn.ReLU, nn.ReLU6)


class GatedSiLU(nn.Module):
    """``x * sigmoid(x)`` with the sigmoid as the submodule ``gate``.

    Example:
        >>> import torch
        >>> GatedSiLU()(torch.tensor([-1.0, 0.0, 2.0]))
        tensor([-0.2689,  0.0000,  1.7616])
    """

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        gated: Tensor = x * self.gate(x)
        return gated


def separate_activations(model: nn.Module) -> None:
    """Give every module that shares an activation function with others one of its own, under the name that it has there.

    Detectors often have one for all of their layers; quantizers belong to modules.
    """
    seen: set[int] = set()
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is None or type(child) not in STATELESS or child._forward_hooks or child._forward_pre_hooks:
                continue
            if id(child) in seen:
                parent._modules[name] = copy.deepcopy(child)
            seen.add(id(child))


def split_gates(model: nn.Module, graph: Dataflow, layers: Collection[str]) -> None:
    """Replace each ``nn.SiLU`` behind one of ``layers`` by a ``GatedSiLU``, in the network and in its dataflow."""
    for node in [node for node in graph.nodes if node.op == "silu"]:
        module = model.get_submodule(node.owner)
        if type(module) is nn.SiLU and graph.calls(node.owner) == 1 and source_of(graph, node.inputs[0]).layer in layers:
            parent, _, name = node.owner.rpartition(".")
            setattr(model.get_submodule(parent), name, GatedSiLU().train(module.training))
            graph.add_gate(node, "sigmoid", f"{node.owner}.gate")
