"""Runs the network in a packed file without the code of the original network."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from lowbit.errors import DataError, FileFormatError, LowbitError, SpecError
from lowbit.formats.packed.file import Package, at_places
from lowbit.formats.packed.tensor import PackedTensor
from lowbit.formats.program.arguments import check_tensors
from lowbit.formats.program.budget import Budget
from lowbit.formats.program.calls import Graph, GraphInput, InputDevice, OperatorCall, Result, Stored, references
from lowbit.formats.program.naming import name_inputs
from lowbit.formats.program.operators import Function, find_operator, find_overload
from lowbit.formats.program.structure import restore
from lowbit.inputs import Inputs
from lowbit.network.bits import LayerWidths
from lowbit.network.record import FloatSize, attach_record
from lowbit.provenance import Provenance, attach_provenance, provenance_of
from lowbit.quantizers import QTensor
from lowbit.spec import LayerBits


class PackedNetwork(nn.Module):
    """A network that runs the operator calls of a packed file on its decoded tensors.

    It has the inputs and outputs of the original network, and the record of its quantization. Where the file holds several widths,
    ``lowbit.set_bits`` switches between them: it takes the graph and the tensors of others from the file's content, which stays as it is.

    Raises:
        FileFormatError: A tensor has a name that no network can have.
    """

    def __init__(self, package: Package, max_elements: int | None = None) -> None:
        super().__init__()
        self.packed_max_elements = max_elements
        self.packed_refuses_nan = False
        self.packed_observer: Callable[[OperatorCall, float, object], None] | None = (
            None  # called with each call, its seconds and its result
        )
        self._show(package)

    def _show(self, package: Package) -> None:
        """Run what is in ``package`` from now on; nothing changes where that is impossible."""
        held = nn.Module()
        codes = {name: tensor.unpack() for name, tensor in package.tensors.items() if isinstance(tensor, PackedTensor)}
        owners: dict[str, tuple[nn.Module, str]] = {}
        for name, tensor in package.tensors.items():
            values = codes[name].decode() if isinstance(tensor, PackedTensor) else tensor
            owner, last = _add(held, name, values.to(memory_format=package.layout_of(name)) if values.dim() in (4, 5) else values)
            owners[name] = (self if owner is held else owner), last
        # long names, because the file's names become attributes next to these
        self.packed_content = package
        self.packed_graph = package.graph
        self.packed_codes = codes
        self.packed_calls = [
            _PreparedCall.of(node, read) for node, read in zip(package.graph.nodes, _last_reads(package.graph), strict=True)
        ]
        self.packed_owners = owners
        self.packed_checked: set[tuple[object, ...]] = set()  # shapes of inputs for which every call was checked
        self._parameters, self._buffers, self._modules = held._parameters, held._buffers, held._modules
        self.train(self.training)
        if package.record is not None:
            attach_record(self, package.record)
        if package.provenance is not None:
            attach_provenance(self, package.provenance)

    def layer_widths(self) -> Mapping[str, LayerWidths]:
        """The bits of every layer, by name, and those at each width that the file holds, where it holds several."""
        widths, record = self.packed_content.widths, self.packed_content.record
        if widths is not None:
            bits = widths.bits_at(self.packed_content.places)
            return {name: LayerWidths(bits[name], at) for name, at in widths.layers.items()}
        rows = [] if record is None else list(record.table)
        return {row.name: LayerWidths(LayerBits(row.weight_bits, row.activation_bits, row.output_bits)) for row in rows}

    def select_widths(self, bits: Mapping[str, LayerBits], switch: LayerBits | None) -> None:
        """What ``lowbit.set_bits`` calls."""
        widths = self.packed_content.widths
        assert widths is not None  # else the record has no switches
        device = next((tensor.device for tensor in self.stored_tensors().values()), torch.device("cpu"))
        self._take(at_places(self.packed_content, widths.places(bits, switch)))
        self.to(device)

    def _take(self, content: Package) -> None:
        """Run another combination of widths."""
        self._show(content)

    @property
    def provenance(self) -> Provenance | None:
        """Where the network comes from: its preprocessing, its classes and so on; ``None`` where the file does not say."""
        return provenance_of(self)

    @property
    def lowbit_inputs(self) -> tuple[str, ...]:
        """The names of its inputs, which the signature of ``forward`` does not contain."""
        return tuple(item.name for item in self.packed_graph.inputs)

    @property
    def float_size(self) -> FloatSize | None:
        """The size of the float network that the file was made from; ``None`` where the file does not say."""
        return self.packed_content.float_size

    def weight_codes(self) -> dict[str, QTensor]:
        """The codes of each quantized weight by parameter name."""
        return dict(self.packed_codes)

    def forward(self, *args: Tensor, **kwargs: Tensor) -> object:
        stored = self.stored_tensors()
        inputs = _checked(self.packed_graph, Inputs(args, kwargs), stored)
        if self.packed_refuses_nan and not torch.compiler.is_exporting():
            _require_finite(inputs)
        return restore(self.packed_graph.structure, self.compute(inputs, stored))

    def compute(self, inputs: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> list[object]:
        """The outputs, in order, for inputs and stored tensors by name."""
        graph = self.packed_graph
        device = next(iter(inputs.values())).device
        shapes = tuple(tensor.shape for tensor in inputs.values())
        is_traced = torch.compiler.is_compiling() or torch.compiler.is_exporting()  # torch checks calls while tracing
        budget = None if is_traced or shapes in self.packed_checked else Budget(self.packed_max_elements, list(inputs.values()))
        values: dict[str, object] = dict(inputs)

        def value_of(argument: object) -> object:
            if isinstance(argument, Result):
                return values[argument.name]
            if isinstance(argument, Stored):
                return stored[argument.name]
            if isinstance(argument, InputDevice):
                return device
            if isinstance(argument, (list, tuple)):
                return [value_of(item) for item in argument]
            return argument

        for call, function in zip(self.packed_calls, self.functions(), strict=True):
            arguments, options = call.arguments.copy(), call.options.copy()
            for index, name in call.stored_arguments:
                arguments[index] = stored[name]
            for key, name in call.stored_options:
                options[key] = stored[name]
            for index in call.open_arguments:
                arguments[index] = value_of(arguments[index])
            for key in call.open_options:
                options[key] = value_of(options[key])
            start = time.perf_counter() if self.packed_observer is not None else 0.0
            try:
                if budget is not None:
                    self._check(call, arguments, options, budget)
                values[call.node.name] = _call(call.node, function, *arguments, **options)
            except FileFormatError as error:
                _check_equal_batches(graph, inputs, error)
                raise
            if self.packed_observer is not None:
                self.packed_observer(call.node, time.perf_counter() - start, values[call.node.name])
            for name in call.read_last:
                del values[name]
            if budget is not None:
                _call(call.node, budget.hold, call.node.name, values.get(call.node.name), call.read_last)
        if budget is not None and not budget.is_decided_by_values:
            self.packed_checked.add(shapes)
        return [value_of(output) for output in graph.outputs]

    def stored_tensors(self) -> dict[str, Tensor]:
        """The current parameters and buffers by their names in the file."""
        found: dict[str, Tensor] = {}
        for name, (owner, last) in self.packed_owners.items():
            parameter = owner._parameters.get(last)
            tensor = owner._buffers.get(last) if parameter is None else parameter
            if tensor is not None:
                found[name] = tensor
        return found

    def functions(self) -> list[Function]:
        """The function that each node of the graph calls."""
        return [find_operator(call.node.operator) for call in self.packed_calls]

    def overload_of(self, operator: str) -> object:
        """The torch operator for an operator of the graph; ``None`` for arithmetic on sizes."""
        return find_overload(operator)

    def _check(self, call: _PreparedCall, arguments: list[object], options: dict[str, object], budget: Budget) -> None:
        """Raise FileFormatError if torch cannot be trusted with a call, or if it exceeds the budget."""
        overload = self.overload_of(call.node.operator)
        if overload is not None:
            _call(call.node, check_tensors, overload, arguments, options)
            _call(call.node, budget.check, overload, arguments, options)


def _add(root: nn.Module, name: str, values: Tensor) -> tuple[nn.Module, str]:
    """Register a tensor under its full name, creating a module for each part of that name; gives its module and the last part."""
    *path, last = name.split(".")
    module = root
    try:
        # not by add_module and the like, which refuse what is also the name of a method or property, such as provenance
        for part in path:
            if part not in module._modules:
                _check_name(module, part)
                module._modules[part] = nn.Module()
            module = cast(nn.Module, module._modules[part])
        _check_name(module, last)
    except KeyError as error:
        raise FileFormatError(f"a tensor has a name that no network can have: {error}") from error
    if values.is_floating_point() and values.dim():
        module._parameters[last] = nn.Parameter(values, requires_grad=False)
    else:
        module._buffers[last] = values
    return module, last


_RESERVED = ("packed_", "lowbit_")  # what attributes of loaded networks begin with


def _check_name(module: nn.Module, name: str) -> None:
    """KeyError where ``module`` cannot have a part of that name because torch or lowbit needs it, or because it has one."""
    taken = (vars(module), module._modules, module._parameters, module._buffers)
    if not name or name.startswith(_RESERVED) or hasattr(nn.Module, name) or any(name in parts for parts in taken):
        raise KeyError(f"{name!r} is taken, empty, or begins with {' or '.join(_RESERVED)}")


@dataclass(frozen=True)
class _PreparedCall:
    """A node with its arguments as lists, the positions of stored tensors and other references, and the results last read by it."""

    node: OperatorCall
    arguments: list[object]
    options: dict[str, object]
    stored_arguments: tuple[tuple[int, str], ...]
    stored_options: tuple[tuple[str, str], ...]
    open_arguments: tuple[int, ...]
    open_options: tuple[str, ...]
    read_last: tuple[str, ...]

    @staticmethod
    def of(node: OperatorCall, read_last: tuple[str, ...]) -> _PreparedCall:
        arguments, options = [_as_lists(value) for value in node.args], {key: _as_lists(value) for key, value in node.kwargs.items()}
        return _PreparedCall(
            node,
            arguments,
            options,
            tuple((index, value.name) for index, value in enumerate(arguments) if isinstance(value, Stored)),
            tuple((key, value.name) for key, value in options.items() if isinstance(value, Stored)),
            tuple(index for index, value in enumerate(arguments) if _is_open(value) and not isinstance(value, Stored)),
            tuple(key for key, value in options.items() if _is_open(value) and not isinstance(value, Stored)),
            read_last,
        )


def _as_lists(value: object) -> object:
    return [_as_lists(item) for item in value] if isinstance(value, (list, tuple)) else value


def _is_open(value: object) -> bool:
    return any(map(_is_open, value)) if isinstance(value, list) else isinstance(value, (Result, Stored, InputDevice))


def _checked(graph: Graph, inputs: Inputs, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inputs by name, checked for the dtype, shape and device that the network expects."""
    expected = {item.name: item for item in graph.inputs}
    if len(inputs.tensors) != len(expected) or not set(inputs.kwargs) <= set(expected):
        wanted = ", ".join(f"{name}: {item}" for name, item in expected.items())
        given = [*("a tensor" for _ in inputs.args), *inputs.kwargs]
        raise SpecError(f"the network expects {wanted}; got {len(given)} inputs: {', '.join(given) or 'none'}")
    named = name_inputs(list(expected), inputs)
    lowest, highest = graph.batch_range
    devices = {tensor.device for tensor in stored.values()}
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor):
            raise SpecError(f"input {name!r} must be a tensor: {expected[name]}; got {type(tensor).__name__}")
        if tensor.dtype != expected[name].dtype or not _fits(expected[name], tensor):
            raise SpecError(f"input {name!r} must be {expected[name]}, got {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}")
        sizes = _open_batch(expected[name], tensor)
        if any(size < lowest or (highest is not None and size > highest) for size in sizes):
            raise SpecError(f"input {name!r}: the batch size must be {lowest} to {highest or 'any'}, got {sizes[0]}")
        if devices and tensor.device not in devices:
            where = ", ".join(map(str, devices))
            raise SpecError(f"input {name!r} is on {tensor.device}, the network on {where}. Move one of them with .to().")
    return named


def _require_finite(inputs: Mapping[str, Tensor]) -> None:
    """Raise DataError naming the first input with NaN or infinity, and its samples."""
    for name, tensor in inputs.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            bad = ~tensor.isfinite()
            samples = bad.flatten(1).any(1).nonzero().flatten().tolist() if bad.dim() > 1 else []
            place = f" in sample {', '.join(map(str, samples[:4]))}" if samples else ""
            raise DataError(
                f"input {name!r}: {int(bad.sum())} of {bad.numel()} values are NaN or infinite{place}. "
                "Remove these samples or repair the preprocessing."
            )


def _check_equal_batches(graph: Graph, inputs: Mapping[str, Tensor], error: FileFormatError) -> None:
    """Raise SpecError if different batch sizes of the inputs may be the reason why a node cannot be computed."""
    sizes = {item.name: _open_batch(item, inputs[item.name]) for item in graph.inputs}
    if len({size for found in sizes.values() for size in found}) > 1:
        batches = ", ".join(f"{name} {size}" for name, found in sizes.items() for size in found)
        raise SpecError(f"the inputs differ in their batch size: {batches}. {error}") from error


def _open_batch(expected: GraphInput, tensor: Tensor) -> list[int]:
    dim = expected.batch_dim
    return [tensor.shape[dim]] if expected.shape and expected.shape[dim] is None else []


def _fits(expected: GraphInput, tensor: Tensor) -> bool:
    sizes = zip(expected.shape, tensor.shape, strict=False)
    return len(expected.shape) == tensor.dim() and all(fixed is None or fixed == size for fixed, size in sizes)


def _call(node: OperatorCall, function: Callable[..., object], /, *args: object, **kwargs: object) -> object:
    """Call a function, turning its errors into a FileFormatError that names the node."""
    try:
        return function(*args, **kwargs)
    except SpecError as error:  # inputs were checked, so the file's calls and tensors do not fit each other
        raise FileFormatError(f"graph node {node.name!r} ({node.operator}) cannot be computed: {error}") from error
    except LowbitError:
        raise
    except Exception as error:  # whatever torch raises
        if torch.compiler.is_compiling() or torch.compiler.is_exporting():
            raise
        reason, _, _ = str(error).partition("\n")
        raise FileFormatError(f"graph node {node.name!r} ({node.operator}) cannot be computed: {reason}") from error


def _last_reads(graph: Graph) -> list[tuple[str, ...]]:
    """For each node, the results that are not read after it."""
    waiting = {reference.name for output in graph.outputs for reference in references(output) if isinstance(reference, Result)}
    finished: list[tuple[str, ...]] = []
    for node in reversed(graph.nodes):
        read = {r.name for value in (*node.args, *node.kwargs.values()) for r in references(value) if isinstance(r, Result)} | {node.name}
        finished.append(tuple(sorted(read - waiting)))
        waiting |= read
    return finished[::-1]
