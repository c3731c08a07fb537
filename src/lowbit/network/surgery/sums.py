"""Sums as modules, so that a quantizer can sit at one operand of a shortcut and at nothing else that reads the same tensor."""

from __future__ import annotations

from torch import Tensor, nn

from lowbit.network.graph.dataflow import Dataflow
from lowbit.network.placement import source_of


class Sum(nn.Module):
    """``left + right``: each operand passes a module of its own.

    >>> import torch
    >>> Sum()(torch.ones(2), torch.ones(2))
    tensor([2., 2.])
    """

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Identity(), nn.Identity()

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        out: Tensor = self.left(left) + self.right(right)
        return out


def sums_of(flow: Dataflow, model: nn.Module) -> dict[str, tuple[str, ...]]:
    """The sums of ``model`` that run once, by name, and the layers that read one of their operands as it comes."""
    found = {}
    for name, module in model.named_modules():
        adds = [node for node in flow.nodes if node.op == "add" and node.owner == name]
        if isinstance(module, Sum) and len(adds) == 1:
            operands = {source_of(flow, operand).name for operand in adds[0].inputs}
            readers = (node for node in flow.nodes if node.layer is not None and node.inputs)
            found[name] = tuple(str(node.layer) for node in readers if source_of(flow, node.inputs[0]).name in operands)
    return found
