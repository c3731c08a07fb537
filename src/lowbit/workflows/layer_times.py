"""Time of one call of a layer at each pair of widths, by the kernels that run it: those of lowbit's runtime and of ONNX Runtime.

A layer alone is quantized, put on the runtime as ``lowbit.compile_runtime`` does and exported to ONNX as ``lowbit.export`` does. Widths that
one kernel computes alike are measured once: time is that of a kernel on tensors of some shapes, whatever the codes in them.
"""

from __future__ import annotations

import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from lowbit.errors import GraphError, LayerError
from lowbit.formats.onnx.inner import cut_out, write_empty
from lowbit.formats.onnx.sessions import load_onnx
from lowbit.formats.onnx.translate import QUANTIZE, translate
from lowbit.formats.program.calls import OperatorCall
from lowbit.formats.program.program import Program, export_program
from lowbit.inputs import Inputs, tensors_of
from lowbit.network.calls import input_of
from lowbit.network.insert import float_weight, set_input_quantizer, set_output_quantizer, set_weight_quantizer
from lowbit.network.layers import QUANTIZABLE, evaluating, layers_with_weights, output_channel_axis
from lowbit.quantizers import BinaryQuantizer, Quantizer, UniformQuantizer
from lowbit.quantizers.binary import SignQuantizer
from lowbit.quantizers.ranges.observers import make_observer
from lowbit.runtime.compile import RuntimeNetwork, package_of
from lowbit.runtime.layers.packed import container_bits
from lowbit.runtime.layers.planes import choose_kernel, most_pairs
from lowbit.runtime.lowering.convert import WeightOnly
from lowbit.spec import Granularity, LayerBits, switch_name

if TYPE_CHECKING:
    import onnx_ir as ir

K = TypeVar("K")
Runtime = Literal["fastest", "lowbit", "onnxruntime"]
WARMUP = 2  # untimed calls before each timed one, as other kernels have used the caches meanwhile
SECONDS, FEWEST_RUNS = 20.0, 5  # slow layers are timed for about this long, and at least so often
LEAST_SHARE = 0.1  # of a call, where an empty one happened to take longer than that
EIGHT, FLOAT, FEW = LayerBits(8, 8), LayerBits(None, None), 4


@dataclass(frozen=True)
class CapturedCall:
    """A call of a layer within a call of its network.

    Attributes:
        layer: The layer.
        args, kwargs: What it was called with.
    """

    layer: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """What its time depends on: class and settings of the layer, and the shapes of its weights and inputs."""
        weights = [tuple(parameter.shape) for parameter in self.layer.parameters()]
        inputs = [tuple(tensor.shape) for tensor in tensors_of((self.args, dict(self.kwargs)))]
        return f"{type(self.layer).__module__}.{self.layer} with weights {weights} on {inputs}"

    @property
    def has_kernels(self) -> bool:
        """Whether it is a layer whose inputs can be quantized, called with one tensor of floats."""
        is_plain = len(self.args) + len(self.kwargs) == 1 and self.input is not None
        return isinstance(self.layer, QUANTIZABLE) and is_plain

    @property
    def input(self) -> Tensor | None:
        """What the layer reads."""
        return input_of(self.args, dict(self.kwargs))


@dataclass(frozen=True)
class LayerTime:
    """Milliseconds of a call, and the kernel that needs no more than any other."""

    milliseconds: float
    kernel: str


@dataclass(frozen=True)
class Candidate:
    """A way to compute a layer.

    Attributes:
        kernel: What computes it, for tables.
        milliseconds: Calls it once and says how long that took.
    """

    kernel: str
    milliseconds: Callable[[], float]


@dataclass(frozen=True)
class Variant:
    """What a candidate is made from: a runtime, the widths of the layer, and in lowbit's what it does to layers with float inputs."""

    runtime: Literal["lowbit", "onnxruntime"]
    bits: LayerBits
    weight_only: WeightOnly = "none"


def captured_calls(model: nn.Module, sample: Inputs) -> dict[str, list[CapturedCall]]:
    """The calls of each layer with weights in one call of ``model``, by the layer's name; none of those that are never called."""
    calls: dict[str, list[CapturedCall]] = {name: [] for name in layers_with_weights(model)}

    def keep(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        return lambda layer, args, kwargs: calls[name].append(CapturedCall(layer, args, kwargs))

    handles = [
        layer.register_forward_pre_hook(keep(name), with_kwargs=True) for name, layer in layers_with_weights(model).items()
    ]  # fmt: skip
    try:
        with evaluating(model):
            model(*sample.args, **sample.kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def variants_of(bits: LayerBits, runtime: Runtime, *, is_linear: bool = False) -> list[Variant]:
    """What can compute a layer of these widths; widths with the same kernels give the same variants.

    With float inputs lowbit computes in float, on weights that it decodes once: decoding them in every call takes longer. Linear layers can also
    round their inputs to 8 bits and read packed codes (``weight_only="int8"``).
    """
    found: list[Variant] = []
    if runtime != "onnxruntime":
        is_weight_only = bits.weight is not None and bits.activation is None
        found.append(Variant("lowbit", FLOAT if is_weight_only else _in_lowbit(bits)))
        if is_weight_only and is_linear:
            found.append(Variant("lowbit", _in_lowbit(bits), "int8"))
    if runtime != "lowbit":
        found.append(Variant("onnxruntime", _in_onnx_runtime(bits)))
    return found


def _in_lowbit(bits: LayerBits) -> LayerBits:
    """The widths whose kernel computes ``bits`` too.

    Weights of ``w`` bits on a grid around zero need at least ``w - 1`` bit planes; where there are too many pairs of planes, all run as 8
    bits, or as 7 bits of weights or inputs where the processor's kernels are exact for these alone.
    """
    weight, activation = bits.weight, bits.activation
    if weight is None or activation is None:
        return LayerBits(weight and container_bits(weight), activation and 8)
    if max(weight - 1, 1) * activation <= max(most_pairs()[0], 1):
        return LayerBits(weight, activation)
    fitting = ((w, a) for w, a in ((8, 8), (7, 8), (8, 7)) if weight <= w and activation <= a)
    return next((LayerBits(w, a) for w, a in fitting if choose_kernel(w, a)[0] == "int8"), EIGHT)


def _in_onnx_runtime(bits: LayerBits) -> LayerBits:
    """The widths that ONNX Runtime computes as it does ``bits``.

    Codes of weights take a byte each, and inputs of less than 8 bits are clipped besides. It computes in float where one of the two is.
    """
    if bits.weight is None or bits.activation is None:
        return FLOAT
    return LayerBits(8, 8 if bits.activation == 8 else FEW)


def time_call(
    call: CapturedCall,
    widths: Iterable[LayerBits],
    *,
    runtime: Runtime,
    threads: int,
    runs: int,
    advance: Callable[[float], None] = lambda _share: None,
) -> dict[LayerBits, LayerTime]:
    """Time of the call at each pair of widths by the fastest variant; ``advance`` is told which share of the work is done.

    All variants are called in turns, so that they meet the same state of the machine, and compared by their medians. A layer that has no
    quantized inputs, such as a recurrent one, is computed in float whatever its widths are.
    """
    wanted = {bits: variants_of(bits, runtime, is_linear=isinstance(call.layer, nn.Linear)) for bits in widths}
    if not call.has_kernels:
        plain = Candidate("torch in float", _stopwatch(lambda: call.layer(*call.args, **call.kwargs)))
        milliseconds = turn_by_turn({"": plain}, runs, advance)[""]
        return {bits: LayerTime(milliseconds, plain.kernel) for bits in wanted}
    with tempfile.TemporaryDirectory() as folder:
        maker = _Maker(call, threads, Path(folder))
        needed = list(dict.fromkeys(variant for variants in wanted.values() for variant in variants))
        candidates: dict[Variant, Candidate] = {}
        for variant in needed:
            made = maker.make(variant)
            if made is not None:
                candidates[variant] = made
            advance(0.5 / len(needed))
        found = turn_by_turn(candidates, runs, lambda share: advance(share / 2))
    times = {}
    for bits, variants in wanted.items():
        able = [variant for variant in variants if variant in found]
        if not able:
            raise LayerError(
                f"{call.key}: {runtime} cannot run it. Measure with runtime='fastest', or leave this layer out of the network."
            )
        best = min(able, key=found.__getitem__)
        times[bits] = LayerTime(found[best], candidates[best].kernel)
    return times


def turn_by_turn(candidates: Mapping[K, Candidate], runs: int, advance: Callable[[float], None] = lambda _share: None) -> dict[K, float]:
    """Median milliseconds of each candidate, called in turns after ``WARMUP`` untimed calls of its own."""
    times: dict[K, list[float]] = {name: [] for name in candidates}
    deadline = time.perf_counter() + SECONDS
    with torch.no_grad():
        for turn in range(runs):
            for name, candidate in candidates.items():
                for _ in range(WARMUP):
                    candidate.milliseconds()
                times[name].append(candidate.milliseconds())
            advance(1 / runs)
            if turn + 1 >= min(FEWEST_RUNS, runs) and time.perf_counter() > deadline:
                break
    return {name: statistics.median(found) for name, found in times.items()}


class _Maker:
    """Makes candidates of one layer; weights and inputs are noise, so that kernels do not depend on what they were trained to."""

    def __init__(self, call: CapturedCall, threads: int, folder: Path) -> None:
        generator = torch.Generator().manual_seed(0)
        self._layer = copy.deepcopy(call.layer)
        weight = float_weight(self._layer)
        weight.data = torch.randn(weight.shape, generator=generator) / weight[0].numel() ** 0.5
        assert call.input is not None
        self._x = torch.randn(call.input.shape, generator=generator).abs()
        self._threads, self._folder = threads, folder
        self._exported: tuple[Program, ir.Model] | None = None

    def make(self, variant: Variant) -> Candidate | None:
        """The candidate; ``None`` where the runtime has no such layer."""
        return self._on_lowbit(variant) if variant.runtime == "lowbit" else self._on_onnx_runtime(variant.bits)

    def _on_lowbit(self, variant: Variant) -> Candidate:
        quantized = self._quantized(variant.bits)
        x = self._x.contiguous(memory_format=torch.channels_last) if self._x.dim() == 4 else self._x
        try:
            network = RuntimeNetwork(package_of(quantized, x), variant.weight_only).eval()
        except GraphError:
            return Candidate("torch in float", _stopwatch(lambda: quantized(x)))
        passed = 0.0

        def observe(_node: OperatorCall, seconds: float, _result: object) -> None:
            nonlocal passed
            passed += seconds

        network.packed_observer = observe

        def milliseconds() -> float:
            nonlocal passed
            passed = 0.0
            network(x)
            return 1e3 * passed

        paths = network.report.layers
        arithmetic = f", {paths[0].reason}" if paths and paths[0].kernel == "packed" else ""
        return Candidate(f"lowbit {paths[0].kernel if paths else 'float'}{arithmetic}", milliseconds)

    def _on_onnx_runtime(self, bits: LayerBits) -> Candidate | None:
        import onnx_ir as ir

        from lowbit.formats.onnx.rewrite import float_network, integer_network

        try:
            program, marked = self._exported = self._exported or _exported(self._quantized(EIGHT, has_output=True), self._x)
        except GraphError:
            return None
        if bits.activation is not None:
            marked = _with_fewer_codes(marked, bits.activation)
        model = float_network(marked) if bits.weight is None else integer_network(marked, program.weights).model
        whole, layer = self._folder / "whole.onnx", self._folder / f"{switch_name(bits).replace('/', '-')}.onnx"
        ir.save(model, whole)
        x, operators = cut_out(whole, self._x, layer)
        kernel = f"onnxruntime {' + '.join(dict.fromkeys(operators))}"
        called, empty = self._session(layer, x), self._empty_session()

        def milliseconds() -> float:
            passed = called()
            return max(passed - empty(), LEAST_SHARE * passed)

        return Candidate(kernel, milliseconds)

    def _empty_session(self) -> Callable[[], float]:
        path = self._folder / "empty.onnx"
        write_empty(path)
        return self._session(path, torch.zeros(1))

    def _session(self, path: Path, x: Tensor) -> Callable[[], float]:
        network = load_onnx(path, threads=self._threads)
        prepared = network.prepare(Inputs((x,)))
        return _stopwatch(lambda: network.run(prepared))

    def _quantized(self, bits: LayerBits, *, has_output: bool = False) -> nn.Module:
        """The layer in a network of its own, rounded to nearest; inputs of one bit that meet weights of one bit are signs."""
        layer = copy.deepcopy(self._layer)
        network, weight = nn.Sequential(layer).eval(), float_weight(layer).detach()
        channels = Granularity.channel(output_channel_axis(layer))
        if bits.weight is not None:
            quantizer = BinaryQuantizer(granularity=channels) if bits.weight == 1 else _uniform(bits.weight, channels, signed=True)
            set_weight_quantizer(layer, _initialized(quantizer, weight))
        if bits.activation is not None:
            is_sign = bits.weight == bits.activation == 1
            set_input_quantizer(layer, _initialized(SignQuantizer() if is_sign else _uniform(bits.activation), self._x))
            if has_output:
                with torch.no_grad():
                    set_output_quantizer(layer, _initialized(_uniform(bits.activation), network(self._x)))
        return network


def _uniform(bit_width: int, granularity: Granularity | None = None, *, signed: bool = False) -> UniformQuantizer:
    granularity = granularity or Granularity.tensor()
    observer = make_observer("min_max", granularity)
    return UniformQuantizer(bit_width, signed=signed, symmetric=signed, granularity=granularity, observer=observer)


def _initialized(quantizer: Quantizer, values: Tensor) -> Quantizer:
    quantizer.initialize(values)
    return quantizer


def _exported(network: nn.Module, x: Tensor) -> tuple[Program, ir.Model]:
    program = export_program(network, x)
    return program, translate(program)


def _with_fewer_codes(marked: ir.Model, bit_width: int) -> ir.Model:
    """A copy in which activations have ``bit_width`` bits: another range of codes changes no operator but their clip."""
    import onnx_ir as ir

    model = marked.clone()
    for node in model.graph:
        if node.op_type == QUANTIZE:
            node.attributes["qmax"] = ir.AttrInt64("qmax", node.attributes["qmin"].as_int() + 2**bit_width - 1)
    return model


def _stopwatch(call: Callable[[], object]) -> Callable[[], float]:
    def milliseconds() -> float:
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)

    return milliseconds
