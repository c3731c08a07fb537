"""``lowbit.compile_runtime``: a network whose layers run on low-bit kernels.

It works on the graph of a packed file, so that trained and loaded networks are treated alike.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import cast, get_args

import torch
from torch import Tensor, nn

from lowbit.errors import FileFormatError, LayerError, SpecError
from lowbit.formats.packed.file import Package, package, package_widths
from lowbit.formats.packed.network import PackedNetwork
from lowbit.formats.program.calls import OperatorCall
from lowbit.formats.program.operators import Function, find_operator
from lowbit.formats.program.program import export_program, export_switches
from lowbit.network.record import record_of
from lowbit.provenance import provenance_of
from lowbit.runtime.cpu.target import active_target
from lowbit.runtime.layers.binary import compiled_loops
from lowbit.runtime.layers.operator import LayerCall
from lowbit.runtime.lowering.convert import OPERATORS, Conversion, LayerPath, WeightOnly
from lowbit.runtime.pieces import LARGEST_BYTES, Shape, images_are_apart


@dataclass(frozen=True)
class RuntimeReport:
    """The kernel of each layer.

    Attributes:
        target: The kernels in use.
        why: The reason for this target.
        layers: One entry for each layer.
    """

    target: str
    why: str
    layers: tuple[LayerPath, ...]

    @property
    def head(self) -> str:
        """A line with the number of layers on each kind of kernel, and the reason for the target."""
        few = sum(layer.kernel in ("binary", "ternary", "planes") for layer in self.layers)
        whole, packed = (sum(layer.kernel == kernel for layer in self.layers) for kernel in ("int8", "packed"))
        kept = f", {packed} with weights that stay packed" if packed else ""
        return f"of {len(self.layers)} layers {few} on {self.target} kernels, {whole} on 8-bit ones{kept}: {self.why}"

    def __str__(self) -> str:
        return "\n".join([self.head, *map(str, self.layers)])


class RuntimeNetwork(PackedNetwork):
    """A packed network in which layers were replaced by the runtime's operators.

    Where no image's result depends on another image, large batches are computed in pieces whose activations stay in the processor's caches.
    """

    def __init__(self, content: Package, weight_only: WeightOnly = "none", *, max_elements: int | None = None) -> None:
        super().__init__(content, max_elements)
        self.packed_weight_only = weight_only
        self._convert(content)

    def _take(self, content: Package) -> None:
        self._show(content)
        self._convert(content)

    def _convert(self, content: Package) -> None:
        """Put the layers of what is shown, ``content``, on kernels."""
        conversion = Conversion(self.packed_graph, self.stored_tensors(), self.packed_codes, self.packed_weight_only)
        tensors = {**content.tensors, **conversion.tensors}
        read = {name: tensor for name, tensor in tensors.items() if name in conversion.graph.tensors}
        self._show(replace(content, graph=conversion.graph, tensors=read))
        for parameter in self.parameters():
            if parameter.dim() == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        target, why = active_target()
        if target.lanes and compiled_loops() is None:
            why = "the kernels could not be compiled, so the reference runs"
        self.packed_report = RuntimeReport(target.name, why, tuple(conversion.paths))
        self.packed_source = content
        self.packed_layers = {
            node.name: LayerCall(OPERATORS[node.operator]) for node in self.packed_graph.nodes if node.operator in OPERATORS
        }
        self.packed_pieces: dict[tuple[Shape, ...], int] = {}  # images in a piece, by the shapes of the inputs

    @property
    def report(self) -> RuntimeReport:
        """The kernel of each layer."""
        return self.packed_report

    @property
    def source(self) -> Package:
        """The packed network that it was made from; ``lowbit.export`` writes that to a file."""
        return self.packed_source

    def compute(self, inputs: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> list[object]:
        """Compute large batches in pieces where the result is the same, and inputs with NaN in float, as codes cannot represent it."""
        if not torch.compiler.is_compiling() and any(map(_has_nan, inputs.values())):
            plain = self.in_float().to(next(iter(inputs.values())).device)
            return plain.compute(inputs, plain.stored_tensors())
        if torch.compiler.is_compiling() or next(iter(inputs.values())).device.type != "cpu" or self.packed_graph.batch_range[0] > 1:
            return super().compute(inputs, stored)
        batches = {tensor.shape[0] if tensor.dim() else 0 for tensor in inputs.values()}
        batch = batches.pop()
        if batches or batch < 2:
            return super().compute(inputs, stored)
        key = tuple(tensor.shape[1:] for tensor in inputs.values())
        if key not in self.packed_pieces:
            self.packed_pieces[key] = self._images_in_piece(inputs, stored)
        size = self.packed_pieces[key] * torch.get_num_threads()
        if not 0 < size < batch:
            return super().compute(inputs, stored)
        pieces = [super(RuntimeNetwork, self).compute(piece, stored) for piece in _split(inputs, batch, size)]
        return [torch.cat(cast("tuple[Tensor, ...]", outputs)) for outputs in zip(*pieces, strict=True)]

    def _images_in_piece(self, inputs: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> int:
        """Number of images whose largest activation fits ``LARGEST_BYTES``; 0 if the batch cannot be split."""
        shapes: dict[str, Shape] = {}
        largest = 1

        def observe(node: OperatorCall, _seconds: float, result: object) -> None:
            nonlocal largest
            first = result[0] if isinstance(result, (list, tuple)) else result
            if isinstance(first, Tensor):
                shapes[node.name], largest = tuple(first.shape), max(largest, first.nbytes)

        observer, self.packed_observer = self.packed_observer, observe
        try:
            super().compute({name: tensor[:1] for name, tensor in inputs.items()}, stored)
        except FileFormatError:  # a single image does not work; the whole batch still may
            return 0
        finally:
            self.packed_observer = observer
        return max(LARGEST_BYTES // largest, 1) if images_are_apart(self.packed_graph, shapes) else 0

    def in_float(self) -> PackedNetwork:
        """The same network with every layer in float, the reference for the kernels."""
        return PackedNetwork(self.source, self.packed_max_elements).eval()

    def why_in_float(self) -> str:
        """Why no layer runs on kernels, with the reason for each; "" if one does."""
        if any(layer.kernel != "float" for layer in self.report.layers):
            return ""
        elsewhere = [layer for layer in self.report.layers if layer.elsewhere]
        if elsewhere:
            reasons = "; ".join(dict.fromkeys(layer.reason for layer in elsewhere))
            return f"no layer runs on low-bit kernels of this processor: {', '.join(layer.name for layer in elsewhere)}: {reasons}"
        reasons = "; ".join(str(layer) for layer in self.report.layers) or "there is no convolution or linear layer"
        return (
            f"no layer can run on low-bit kernels: {reasons}. They need signs as inputs and weights of one bit (or -1, 0, 1), or inputs and "
            "weights on affine grids of up to 8 bits: quantize or train with activation_bits. For layers of which only the weights are "
            "quantized, pass weight_only='int8' or 'float'."
        )

    def require_kernels(self) -> None:
        """Raise LayerError if no layer runs on kernels; warn if some would on another processor."""
        why = self.why_in_float()
        if why and not any(layer.elsewhere for layer in self.report.layers):
            raise LayerError(why)
        if why:
            warnings.warn(why, stacklevel=3)

    def functions(self) -> list[Function]:
        """The runtime's operators besides those of packed files."""
        if torch.compiler.is_compiling() or torch.compiler.is_exporting():
            return [
                OPERATORS[call.node.operator].overload if call.node.name in self.packed_layers else find_operator(call.node.operator)
                for call in self.packed_calls
            ]
        return [self.packed_layers.get(call.node.name) or find_operator(call.node.operator) for call in self.packed_calls]

    def overload_of(self, operator: str) -> object:
        """The runtime's operators besides those of packed files."""
        return OPERATORS[operator].overload if operator in OPERATORS else super().overload_of(operator)


def _has_nan(x: Tensor) -> bool:
    """Whether a value is NaN. NaN makes a sum NaN, and a sum takes a twentieth of the time of looking at each value."""
    return x.is_floating_point() and not bool(x.sum().isfinite()) and bool(x.isnan().any())


def _split(inputs: Mapping[str, Tensor], batch: int, size: int) -> Iterator[dict[str, Tensor]]:
    for first in range(0, batch, size):
        yield {name: tensor[first : first + size] for name, tensor in inputs.items()}


def package_of(model: nn.Module, sample: object) -> Package:
    """What a packed file of the network holds: all its widths, where it has several."""
    record, provenance = record_of(model), provenance_of(model)
    if record is None or len(record.switches) < 2:
        return package(export_program(model, sample), record, provenance)
    return package_widths(model, export_switches(model, sample), record, provenance)


def compile_runtime(model: nn.Module, *, sample: object = None, weight_only: WeightOnly = "none") -> RuntimeNetwork:
    """Compile a quantized network so that its low-bit layers run on low-bit kernels.

    Args:
        model: A network with quantizers, or one from ``lowbit.load``; it is not changed.
        sample: Inputs of one call, required for a network with quantizers.
        weight_only: Treatment of layers with quantized weights and float inputs: ``none``: they stay in float; ``float``: their weights
            stay packed in memory and are decoded while they run, which is exact and slower; ``int8``: inputs of linear layers are also
            rounded to 8 bits per row, which is fast for few rows and changes the outputs by about half a percent.

    Returns:
        A module in evaluation mode; ``.report`` lists every layer with its kernel, or the reason why it stayed in float. Where ``model`` has
        several widths, ``lowbit.set_bits`` switches between them here too.

        A network that this processor has no kernels for, though others do, runs in float, with a warning.

    Raises:
        SpecError: ``sample`` is missing, or ``weight_only`` is unknown.
        LayerError: No layer could be converted on any processor; the error gives the reason for each.
        GraphError: The network cannot be exported.

    Example:
        >>> import torch, lowbit
        >>> images = torch.rand(8, 1, 8, 8)
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU())
        >>> quantized = lowbit.quantize(model, method="round_to_nearest", calibration=images)
        >>> compiled = lowbit.compile_runtime(quantized, sample=images)
        >>> torch.allclose(compiled(images), quantized(images), atol=1e-4)
        True
    """
    if weight_only not in get_args(WeightOnly):
        raise SpecError(f"weight_only must be one of {', '.join(get_args(WeightOnly))}, got {weight_only!r}")
    max_elements = model.packed_max_elements if isinstance(model, PackedNetwork) else None
    if isinstance(model, RuntimeNetwork):
        content = model.source
    elif isinstance(model, PackedNetwork):
        content = model.packed_content
    elif sample is None:
        raise SpecError("compile_runtime needs a sample to see what the network computes: compile_runtime(model, sample=images)")
    else:
        content = package_of(model, sample)
    network = RuntimeNetwork(content, weight_only, max_elements=max_elements).eval()
    network.require_kernels()
    return network
