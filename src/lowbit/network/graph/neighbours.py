"""Which layers lie before and behind a norm, and which layers are shortcuts around others."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property

from lowbit.network.graph.dataflow import Dataflow, Node


class Neighbours:
    """The neighbours among the layers of a network.

    Args:
        flow: The network's dataflow.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lowbit.network.graph.dataflow import capture
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
        >>> neighbours = Neighbours(capture(model, torch.rand(2, 4)))
        >>> neighbours.producer("1"), neighbours.consumer("1"), neighbours.shortcuts
        ('0', '3', {})
    """

    def __init__(self, flow: Dataflow) -> None:
        self._flow = flow
        self._places = {name: place for place, name in enumerate(flow.order())}

    @cached_property
    def shortcuts(self) -> dict[str, str]:
        """Layers alone on the short side of a sum, and for each the last layer on the other side, which starts from the same tensor."""
        found = {}
        for node in self._flow.nodes:
            sides = [self._layers_before(side) for side in self._flow.producers(node)] if node.op == "add" else []
            for own, other in (sides, sides[::-1]) if len(sides) == 2 else ():
                main = self._last(other)
                if len(own) == 1 and main is not None and self._goes_around(own[0], main):
                    found[own[0]] = main
        return found

    def producer(self, norm: str) -> str | None:
        """The layer whose output the norm sees, the last to run where several meet before it; of a shortcut the one that it goes around."""
        nodes = self._of_norm(norm)
        return self._leading(self._last(self._layers_before(self._flow.producers(nodes[0])[0]))) if nodes else None

    def consumer(self, norm: str) -> str | None:
        """The layer that reads what the norm gives, the first to run that is no shortcut where several do."""
        nodes = self._of_norm(norm)
        found = self._walk(nodes[0], self._flow.consumers) if nodes else []
        main = [name for name in found if name not in self.shortcuts]
        return min(main or found, key=self._places.__getitem__, default=None)

    def previous(self, layer: str) -> str | None:
        """The layer before ``layer``."""
        return self._leading(self._last(self._walk(self._flow.of_layer(layer)[0], self._flow.producers)))

    def _of_norm(self, norm: str) -> list[Node]:
        return [node for node in self._flow.nodes if node.op == "batch_norm" and node.owner == norm]

    def _layers_before(self, node: Node) -> list[str]:
        return [node.layer] if node.layer is not None else self._walk(node, self._flow.producers)

    def _walk(self, start: Node, step: Callable[[Node], Iterable[Node]]) -> list[str]:
        """The nearest layers in one direction."""
        found, pending, seen = [], list(step(start)), set()
        while pending:
            node = pending.pop()
            if node.name in seen:
                continue
            seen.add(node.name)
            if node.layer is not None:
                found.append(node.layer)
            else:
                pending.extend(step(node))
        return list(dict.fromkeys(found))

    def _last(self, layers: Iterable[str]) -> str | None:
        return max(layers, key=self._places.__getitem__, default=None)

    def _leading(self, layer: str | None) -> str | None:
        return None if layer is None else self.shortcuts.get(layer, layer)

    def _goes_around(self, layer: str, main: str) -> bool:
        """Whether ``layer`` reads a tensor that ``main`` comes from by way of other layers, and ``main`` does not come from ``layer``."""
        if layer == main:
            return False
        source = self._flow.producers(self._flow.of_layer(layer)[0])[0].name
        node = self._flow.of_layer(main)[0]
        before = self._before(node)
        is_direct = self._flow.producers(node)[0].name == source
        return source in before and not is_direct and self._flow.of_layer(layer)[0].name not in before

    def _before(self, node: Node) -> set[str]:
        """The names of all tensors that ``node`` comes from."""
        found: set[str] = set()
        pending = [node]
        while pending:
            new = [producer for producer in self._flow.producers(pending.pop()) if producer.name not in found]
            found.update(producer.name for producer in new)
            pending.extend(new)
        return found
