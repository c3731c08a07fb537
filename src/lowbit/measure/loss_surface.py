"""The mean loss of a float network over samples, as a function of its weights or activations that can be differentiated twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lowbit.autograd import plain_tensor, records_gradients
from lowbit.errors import DataError, LayerError, unknown_name
from lowbit.inputs import Inputs, map_tensors, sample_count, tensors_of
from lowbit.measure.outputs import device_of
from lowbit.network.calls import Call, input_of, with_input
from lowbit.network.taps import Tap
from lowbit.network.unwrap import plain_copy
from lowbit.quantizers import Quantizer

Batch: TypeAlias = Any  # whatever the data give: a tensor, a tuple, a dict
Loss: TypeAlias = Callable[[Any, Batch], Tensor]  # the mean loss of a network's output on a batch, as ``Task.loss``
Place: TypeAlias = str | Tap  # a parameter by name, or what a module reads or gives


@dataclass(frozen=True)
class Graph:
    """Gradients of the loss of one batch, with the graph to differentiate them again.

    Attributes:
        share: Share of the batch in all samples.
        samples: Number of samples in the batch.
        blocks: Name of the block that each tensor belongs to.
        places: Index of the place that each tensor belongs to, among all of the Hessian.
        tensors: Tensors that the loss is differentiated by.
        gradients: Gradients with respect to them; ``None`` where the loss does not depend on one.
    """

    share: float
    samples: int
    blocks: list[str]
    places: list[int]
    tensors: list[Tensor]
    gradients: tuple[Tensor | None, ...]


def call(model: nn.Module, batch: Batch) -> Any:
    """The output of a network for the inputs in ``batch``, as ``Task.predict``."""
    inputs = Inputs.of(batch, model)
    return model(*inputs.args, **inputs.kwargs)


class LossSurface:
    """The mean loss of a float network in evaluation mode over the samples of some batches, as a function of what it computes with.

    Args:
        model: The float network; it is copied.
        batches: Batches as for training. All are kept, so that every pass sees the same ones.
        loss: Mean loss of a batch from the network's output, such as ``Task.loss``, or a distance from the network's own answers.
        samples: Take batches until they hold this many samples; default: all.
        predict: The network's output for a batch, such as ``Task.predict``.

    Raises:
        DataError: There is no batch.
        LayerError: A quantizer is in the network: rounding has no curvature.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> surface = LossSurface(model, [torch.zeros(4, 2), torch.ones(1, 2)], lambda output, batch: output.square().mean())
        >>> surface.samples, [round(surface.graph(index, {"all": ["weight"]}).share, 2) for index in (0, 1)]
        (5, [0.8, 0.2])
    """

    @records_gradients
    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Batch],
        loss: Loss,
        *,
        predict: Callable[[nn.Module, Batch], Any] = call,
        samples: int | None = None,
    ) -> None:
        self.model = plain_copy(model).eval()  # batch statistics would couple samples
        for name, module in self.model.named_modules():
            if isinstance(module, Quantizer) and module.enabled:
                raise LayerError(
                    f"quantizer {name!r}: rounding has no curvature. Pass the float network, or let its quantizers be disabled."
                )
        for parameter in self.model.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        device = device_of(self.model)
        self.loss, self.predict = loss, predict
        self.batches: list[Batch] = []
        self.samples = 0
        for batch in batches:
            self.batches.append(map_tensors(batch, lambda tensor: plain_tensor(tensor).to(device)))
            self.samples += sample_count(batch)
            if samples is not None and self.samples >= samples:
                break
        if not self.samples:
            raise DataError("the Hessian of a loss needs samples, and the data hold none. Pass a loader with at least one batch.")

    @records_gradients
    def graph(self, index: int, blocks: Mapping[str, Sequence[Place]]) -> Graph:
        """Gradients of the loss of one batch by the places of all blocks.

        Raises:
            DataError: The loss is not finite.
            LayerError: A layer can be differentiated once only, or the loss not at all.
        """
        batch = self.batches[index]
        owners = [(name, place) for name, places in blocks.items() for place in places]
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        for _, place in owners:
            if isinstance(place, str) and place not in parameters:
                raise unknown_name("parameter", place, parameters)
        # efficient attention is differentiable once
        with _shifted(self.model, [place for _, place in owners if isinstance(place, Tap)]) as shifts, sdpa_kernel(SDPBackend.MATH):
            loss = self.loss(self.predict(self.model, batch), batch)
        if not bool(torch.isfinite(loss)):
            raise DataError(
                f"batch {index}: the loss is {float(loss.detach())}. Check the inputs and the weights for values that are not finite."
            )
        uncalled = next((tap for tap, calls in shifts.items() if not calls), None)
        if uncalled is not None:
            raise LayerError(
                f"module {uncalled.module!r} is not called{'' if uncalled.call is None else f' {uncalled.call + 1} times'}, so that it has no activations. Leave it out."
            )
        if not loss.requires_grad:
            raise LayerError(
                "the loss has no gradient: the network, or the loss, computes under torch.no_grad() or returns detached tensors."
            )
        found = [[parameters[place]] if isinstance(place, str) else shifts[place] for _, place in owners]
        tensors = [tensor for part in found for tensor in part]
        try:
            gradients = torch.autograd.grad(loss, tensors, create_graph=True, allow_unused=True)
        except RuntimeError as error:
            raise self.undifferentiable(index, str(error)) from error
        if _is_cut(gradients):
            raise self.undifferentiable(index, "its backward pass is marked as differentiable once")
        samples, sizes = sample_count(batch), [len(part) for part in found]
        names = [name for (name, _), size in zip(owners, sizes, strict=True) for _ in range(size)]
        return Graph(samples / self.samples, samples, names, [i for i, size in enumerate(sizes) for _ in range(size)], tensors, gradients)

    def undifferentiable(self, index: int, reason: str) -> LayerError:
        """The error that names the innermost layer that cannot be differentiated twice."""
        with _inputs_recorded(self.model) as calls, torch.enable_grad():
            self.predict(self.model, self.batches[index])
        names = sorted(calls, key=lambda name: -name.count("."))
        blocking = next((name for name in names if name and not _differentiates_twice(self.model.get_submodule(name), calls[name])), None)
        where = f"layer {blocking!r} ({type(self.model.get_submodule(blocking)).__name__})" if blocking else "what the network calls itself"
        return LayerError(
            f"{where} cannot be differentiated twice, which a Hessian needs: {reason.splitlines()[0]}. "
            "Replace it by one made of differentiable operations, or choose a method that needs no Hessian."
        )


@contextmanager
def _shifted(model: nn.Module, taps: Iterable[Tap]) -> Iterator[dict[Tap, list[Tensor]]]:
    """Within the context a zero is added to what each tap names, and put into the dictionary, one for each call.

    The loss has the same derivatives by these zeros as by the activations, which operations in place may overwrite.
    """
    shifts: dict[Tap, list[Tensor]] = {tap: [] for tap in taps}
    modules, calls = dict(model.named_modules()), Counter[Tap]()

    def shift(tap: Tap, value: object) -> object:
        calls[tap] += 1
        if tap.call not in (None, calls[tap] - 1):
            return value
        values: list[Any] = list(value) if isinstance(value, (tuple, list)) else [value]
        place = next((i for i, entry in enumerate(values) if isinstance(entry, Tensor) and entry.is_floating_point()), None)
        if place is None:
            raise LayerError(
                f"module {tap.module!r} ({type(modules[tap.module]).__name__}) has no floating-point tensor as its {tap.side}. Name another one."
            )
        shifts[tap].append(torch.zeros_like(values[place], requires_grad=True))
        values[place] = values[place] + shifts[tap][-1]
        return values[0] if isinstance(value, Tensor) else type(value)(values)  # type: ignore[call-arg]

    handles = []
    try:
        for tap in shifts:
            if tap.module not in modules:
                raise unknown_name("module", tap.module, [name for name in modules if name])
            if tap.side == "output":
                handles.append(modules[tap.module].register_forward_hook(lambda _m, _args, output, tap=tap: shift(tap, output)))
            else:
                handles.append(
                    modules[tap.module].register_forward_pre_hook(
                        lambda _m, args, kwargs, tap=tap: with_input(args, kwargs, shift(tap, input_of(args, kwargs))), with_kwargs=True
                    )
                )
        yield shifts
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _inputs_recorded(model: nn.Module) -> Iterator[dict[str, Call]]:
    """Within the context, the arguments of each module's first call, by its name, in the order of calls."""
    calls: dict[str, Call] = {}

    def recorder(name: str) -> Callable[[nn.Module, tuple[object, ...], dict[str, object]], None]:
        def record(_module: nn.Module, *call: object) -> None:
            calls.setdefault(name, map_tensors(call, Tensor.detach))  # type: ignore[arg-type]

        return record

    handles = [module.register_forward_pre_hook(recorder(name), with_kwargs=True) for name, module in model.named_modules()]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _differentiates_twice(module: nn.Module, call: Call) -> bool:
    """Whether the sum of what the module gives can be differentiated twice by all that it reads."""
    leaves: list[Tensor] = [p for p in module.parameters() if p.requires_grad]

    def leaf(tensor: Tensor) -> Tensor:
        copy = tensor.clone().requires_grad_(tensor.is_floating_point())
        leaves.extend([copy] if copy.requires_grad else [])
        return copy

    try:
        args, kwargs = cast(Call, map_tensors(call, leaf))
        output = module(*args, **kwargs)
        total = sum(tensor.square().sum() for tensor in tensors_of(output) if tensor.requires_grad)
        if isinstance(total, Tensor):
            first = torch.autograd.grad(total, leaves, create_graph=True, allow_unused=True)
            if _is_cut(first):
                return False
            curved = [gradient for gradient in first if gradient is not None and gradient.requires_grad]
            torch.autograd.grad(curved, leaves, [torch.ones_like(gradient) for gradient in curved], allow_unused=True) if curved else ()
    except RuntimeError:
        return False
    return True


def _is_cut(gradients: Iterable[Tensor | None]) -> bool:
    """Whether the graph of gradients ends where a function is marked as differentiable once.

    Autograd only raises when it comes by such a place. On the way to a given tensor it does not, and leaves out what lies behind it.
    """
    pending = [gradient.grad_fn for gradient in gradients if gradient is not None and gradient.grad_fn is not None]
    seen = set(pending)
    while pending:
        node = pending.pop()
        if node.name().endswith("Error"):  # torch::autograd::Error, which such functions put there
            return True
        new = [other for other, _ in node.next_functions if other is not None and other not in seen]
        seen.update(new)
        pending.extend(new)
    return False
