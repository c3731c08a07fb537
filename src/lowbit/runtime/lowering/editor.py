"""A graph that is being rewritten: which nodes read which, the replacement of each node, and the resulting graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lowbit.formats.program.calls import Graph, OperatorCall, Result, references


class GraphEditor:
    """The nodes of a graph by name, in order; a replacement takes the position of the node it replaces."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self.nodes = {node.name: node for node in graph.nodes}
        self._returned = {r.name for output in graph.outputs for r in references(output) if isinstance(r, Result)}
        self._readers: dict[str, list[str]] = {}
        for node in graph.nodes:
            for name in _read_by(node):
                self._readers.setdefault(name, []).append(node.name)

    def only_reader(self, node: OperatorCall) -> OperatorCall | None:
        """The node that is the only reader of ``node`` and reads it once."""
        readers = self._readers.get(node.name, [])
        return self.nodes[readers[0]] if len(readers) == 1 and node.name not in self._returned else None

    def source(self, value: object) -> OperatorCall | None:
        """The node that computes ``value``; ``None`` for inputs and for anything that is not a result."""
        return self.nodes.get(value.name) if isinstance(value, Result) else None

    def fuse(self, nodes: Sequence[OperatorCall], fused: OperatorCall) -> None:
        """Replace the last of ``nodes`` by ``fused``, and remove the others together with everything that only they read."""
        read = [name for node in nodes for name in self._forget_reads(node.name)]
        self.nodes[fused.name] = fused  # keeps the position
        for name in _read_by(fused):
            self._readers.setdefault(name, []).append(fused.name)
        for node in nodes:
            if node.name != fused.name:
                del self.nodes[node.name]
        while read:
            name = read.pop()
            if name in self.nodes and not self._readers[name] and name not in self._returned:
                read += self._forget_reads(name)
                del self.nodes[name]

    def _forget_reads(self, name: str) -> list[str]:
        """Remove a node from the readers of everything it reads, and return the names of what it reads."""
        read = _read_by(self.nodes[name])
        for source in read:
            self._readers[source].remove(name)
        return read

    def graph(self) -> Graph:
        """The current graph, without nodes that are no longer read."""
        kept: list[OperatorCall] = []
        needed = set(self._returned)
        for node in reversed(self.nodes.values()):
            if node.name in needed:
                kept.append(node)
                needed.update(_read_by(node))
        return replace(self._graph, nodes=tuple(reversed(kept)))


def _read_by(node: OperatorCall) -> list[str]:
    return [r.name for value in (*node.args, *node.kwargs.values()) for r in references(value) if isinstance(r, Result)]
