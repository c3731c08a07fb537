"""Runs of one network, each with other layers changed, in which what comes before the first change is computed once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lowbit.inputs import map_tensors, tensors_of
from lowbit.network.insert import weight_sites
from lowbit.network.layers import evaluating

MOST_BYTES = 2**30  # of outputs that are kept

Call = tuple[str, int]  # a module's name, and which of its calls in a pass
Predict = Callable[[nn.Module, Any], object]
Forward = Callable[..., Any]


@dataclass(frozen=True)
class Span:
    """When a call of a module begins and ends in a pass, and whether its output can stand for it."""

    begin: int
    end: int
    is_plain: bool


class Replay:
    """Runs a network on batches again and again, while one or another of its layers is changed.

    Outputs of modules that are done before the first changed layer begins are kept, up to ``MOST_BYTES``, and stand for the modules as long
    as the same layers are changed. Every output equals that of the whole network bit for bit: modules that change what they read, or give
    it back, run each time; a network that draws random numbers runs whole; and with several batches the first one is run in both ways
    whenever other layers are changed, so that a network which remembers one batch until the next is found out, and runs whole too.

    Args:
        model: The network; it is the same again after each run.
        batches: The batches.
        predict: Runs the network on a batch.

    Attributes:
        references: The outputs of the unchanged network.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
        >>> replay = Replay(model, [torch.ones(1, 2)], lambda model, batch: model(batch))
        >>> model[2].weight.data.mul_(2)[:0]
        tensor([], size=(0, 2))
        >>> [torch.equal(output, model(torch.ones(1, 2))) for _ in range(2) for output in replay.outputs(["2"])]
        [True, True]
    """

    def __init__(self, model: nn.Module, batches: Sequence[Any], predict: Predict) -> None:
        self.model, self.predict = model, predict
        self._modules = {name: module for name, module in model.named_modules() if name and _is_replaceable(module)}
        self._names: frozenset[str] | None = None
        before = torch.get_rng_state()
        with evaluating(model):
            self.references = [predict(model, batch) for batch in batches]
            self._can_replay = torch.equal(before, torch.get_rng_state())
            self._passes = [_Pass(batch, self._watch(batch) if self._can_replay else _Watch()) for batch in batches]

    def outputs(self, names: Collection[str]) -> list[object]:
        """The network's output for every batch, in evaluation mode without gradients, while the layers ``names`` are changed."""
        with evaluating(self.model):
            is_new, self._names = frozenset(names) != self._names, frozenset(names)
            found = [self._run(one, names) for one in self._passes]
            if is_new and self._can_replay and len(found) > 1 and not _equal(found[0], self._run(self._passes[0], names)):
                self._can_replay = False
                found = [self._run(one, names) for one in self._passes]
        return found

    def _run(self, one: _Pass, names: Collection[str]) -> object:
        """The output of one pass: kept outputs stand for their modules, and those of what is done before ``names`` are kept."""
        if not self._can_replay:
            one.kept.clear()
            return self.predict(self.model, one.batch)
        first = one.watch.begin_of(names)
        wanted, kept = one.watch.done_before(first), {call: x for call, x in one.kept.items() if one.watch.spans[call].end < first}
        room = MOST_BYTES // len(self._passes) - sum(map(_bytes, (kept[call] for call in wanted & kept.keys())))

        def run(call: Call, forward: Forward, *args: Any, **kwargs: Any) -> Any:
            nonlocal room
            if call in kept:
                return map_tensors(kept[call], Tensor.clone)  # operations in place may follow
            output = forward(*args, **kwargs)
            if call in wanted and _bytes(output) <= room:
                room -= _bytes(output)
                kept[call] = map_tensors(output, Tensor.clone)
            return output

        with self._replaced({name for name, _ in wanted | kept.keys()}, run):
            output = self.predict(self.model, one.batch)
        one.kept = {call: x for call, x in kept.items() if call in wanted}
        return output

    def _watch(self, batch: Any) -> _Watch:
        """What a pass calls and which weights it uses, and when."""
        watch, sites = _Watch(), weight_sites(self.model)

        def run(call: Call, forward: Forward, *args: Any, **kwargs: Any) -> Any:
            given = [*tensors_of(args), *tensors_of(kwargs)]
            versions, begin = _versions(given), watch.tick()
            output = forward(*args, **kwargs)
            is_plain = versions is not None and versions == _versions(given) and _is_new(output, given)
            watch.spans[call] = Span(begin, watch.tick(), is_plain)
            return output

        with self._replaced(self._modules, run), watch:
            self.predict(self.model, batch)
        calls = {name: [span.begin for (called, _), span in watch.spans.items() if called == name] for name in self._modules}
        of_module = {id(module): calls[name] for name, module in self._modules.items()}
        for name, site in sites.items():
            if id(site.original) in watch.uses:
                watch.begins[name] = min([watch.uses[id(site.original)], *of_module.get(id(site.layer), [])])
        return watch

    @contextmanager
    def _replaced(self, names: Collection[str], run: Callable[..., Any]) -> Iterator[None]:
        """Within the context ``run(call, forward, ...)`` is what these modules compute."""
        calls: Counter[str] = Counter()

        def forward(name: str, own: Forward, *args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return run((name, calls[name] - 1), own, *args, **kwargs)

        try:
            for name in names:
                module = self._modules[name]
                module.forward = partial(forward, name, module.forward)
            yield
        finally:
            for name in names:
                vars(self._modules[name]).pop("forward", None)


class _Watch(TorchFunctionMode):
    """Notes when modules are called and parameters are used, as numbers that grow.

    Attributes:
        spans: The calls of modules.
        uses: First use of each parameter, by its identity.
        begins: When each layer begins: its first call or the first use of its weight. Where no use was seen, it is missing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.spans: dict[Call, Span] = {}
        self.uses: dict[int, int] = {}
        self.begins: dict[str, int] = {}
        self._time = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        for tensor in (*tensors_of(args), *tensors_of(kwargs or {})):
            if isinstance(tensor, nn.Parameter):  # others may be gone, and their identity taken
                self.uses.setdefault(id(tensor), self.tick())
        return func(*args, **(kwargs or {}))

    def tick(self) -> int:
        """A number larger than all before."""
        self._time += 1
        return self._time

    def begin_of(self, names: Collection[str]) -> int:
        """When the first of these layers begins; 0 where it is not known."""
        return min((self.begins.get(name, 0) for name in names), default=self._time + 1)

    def done_before(self, first: int) -> set[Call]:
        """The outermost calls that can be replayed and end before ``first``."""
        done: set[Call] = set()
        end = 0
        for call, span in sorted(self.spans.items(), key=lambda item: item[1].begin):
            if span.is_plain and end < span.begin and span.end < first:
                done.add(call)
                end = span.end
        return done


class _Pass:
    """One batch, what a pass of it does, and what is kept of its outputs."""

    def __init__(self, batch: Any, watch: _Watch) -> None:
        self.batch, self.watch = batch, watch
        self.kept: dict[Call, Any] = {}


def _is_replaceable(module: nn.Module) -> bool:
    return not isinstance(module, torch.jit.ScriptModule) and "forward" not in vars(module)


def _versions(tensors: Sequence[Tensor]) -> list[int] | None:
    """How often each was changed in place; ``None`` where torch does not count."""
    return None if any(tensor.is_inference() for tensor in tensors) else [tensor._version for tensor in tensors]


def _is_new(output: object, given: Sequence[Tensor]) -> bool:
    """Whether an output is a plain tensor, or some in a tuple or list, with memory of their own."""
    parts = output if type(output) in (tuple, list) else (output,)
    if not all(isinstance(part, Tensor) and part.layout is torch.strided and not part.is_nested for part in parts):  # type: ignore[attr-defined]
        return False
    read = {tensor.untyped_storage().data_ptr() for tensor in given if tensor.layout is torch.strided and not tensor.is_nested}
    return not any(part.untyped_storage().data_ptr() in read for part in parts)  # type: ignore[attr-defined]


def _bytes(output: object) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(output))


def _equal(first: object, second: object) -> bool:
    return all(torch.equal(a, b) for a, b in zip(tensors_of(first), tensors_of(second), strict=True))
