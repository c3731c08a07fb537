"""Runs ONNX files in ONNX Runtime and OpenVINO, and counts the layers that are actually computed in integers."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor

from lowbit.errors import DataError, FileFormatError, LowbitError, SpecError, missing_extra
from lowbit.formats.program.naming import name_inputs
from lowbit.inputs import Inputs
from lowbit.provenance import Provenance, provenance_from_json
from lowbit.reading import shorten

if TYPE_CHECKING:
    import onnx
    import onnxruntime

Runtime = Literal["onnxruntime", "openvino"]

# Processors without VNNI add pairs of 8-bit products in 16 bits, which saturate. With this session setting ONNX Runtime uses exact but
# slower instructions there; with VNNI it has no effect.
PRECISE_PRODUCTS = ("session.x64quantprecision", "1")

SATURATION_NOTE = (
    "this processor has no VNNI: run the file in ONNX Runtime with the session setting session.x64quantprecision = 1, as was done here; "
    "without it sums of 8-bit products saturate"
)

PROVENANCE_KEY = "lowbit.provenance"  # entry of a file's metadata: where the network comes from, as JSON

_INTEGER_CONVOLUTIONS = frozenset({"QLinearConv", "ConvInteger"})
_FLOAT_CONVOLUTIONS = frozenset({"Conv", "FusedConv", "NhwcFusedConv", "NhwcConv", "ConvTranspose"})
_INTEGER_PRODUCTS = frozenset({"QGemm", "QLinearMatMul", "MatMulInteger", "MatMulIntegerToFloat"})
_FLOAT_PRODUCTS = frozenset({"Gemm", "FusedGemm", "MatMul", "FusedMatMul", "MatMulNBits", "DynamicQuantizeMatMul"})


@dataclass(frozen=True)
class IntegerCount:
    """Numbers of convolutions and linear layers in ONNX Runtime's optimized graph, and of those with an integer kernel.

    Products of two activations, as in attention, are not counted. ``operators`` is the number of nodes by operator.
    """

    conv_integer: int
    conv_total: int
    linear_integer: int
    linear_total: int
    operators: Mapping[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        convolutions, linear = f"{self.conv_integer} of {self.conv_total}", f"{self.linear_integer} of {self.linear_total}"
        return f"{convolutions} convolutions and {linear} linear layers in integers"


def count_integer_kernels(path: Path | str) -> IntegerCount:
    """Optimize the file with ONNX Runtime for this machine and count the integer kernels that it chose.

    Raises:
        MissingExtraError: onnx or onnxruntime is not installed.
        FileFormatError: ONNX Runtime does not accept the file.
    """
    graph = optimized_model(path).graph
    constants = {tensor.name for tensor in graph.initializer}
    for node in graph.node:  # weights that are decoded at run time count as weights, too
        if node.op_type == "DequantizeLinear" and node.input[0] in constants:
            constants.update(node.output)
    kinds = [
        node.op_type
        for node in graph.node
        if node.op_type not in _FLOAT_PRODUCTS | _INTEGER_PRODUCTS or constants.intersection(_weight_inputs(node))
    ]
    counts = Counter(kinds)

    def total(group: frozenset[str]) -> int:
        return sum(counts[kind] for kind in group)

    conv, linear = total(_INTEGER_CONVOLUTIONS), total(_INTEGER_PRODUCTS)
    operators = dict(Counter(node.op_type for node in graph.node).most_common())
    return IntegerCount(conv, conv + total(_FLOAT_CONVOLUTIONS), linear, linear + total(_FLOAT_PRODUCTS), operators)


def optimized_model(path: Path | str) -> onnx.ModelProto:
    """The file as ONNX Runtime rewrites it for this machine.

    Raises:
        MissingExtraError: onnx or onnxruntime is not installed.
        FileFormatError: ONNX Runtime does not accept the file.
    """
    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        _session(str(path), threads=1, optimized=optimized)
        model: onnx.ModelProto = _onnx().load(optimized)
    return model


def _weight_inputs(node: onnx.NodeProto) -> tuple[str, ...]:
    """Names of the two factors of a product; quantized linear operators have the scale and zero point of the first in between."""
    position = 3 if node.op_type in ("QGemm", "QLinearMatMul") else 1
    return node.input[0], node.input[position]


class Network(Protocol):
    """A file that a runtime has loaded."""

    @property
    def input_names(self) -> tuple[str, ...]:
        """The names of the inputs, in the order of the file."""

    def __call__(self, inputs: Inputs) -> dict[str, Tensor]:
        """The outputs by name, in the order of the file; DataError where the file cannot be run on these inputs."""

    def prepare(self, inputs: Inputs) -> object:
        """Convert inputs to the form that ``run`` expects."""

    def run(self, prepared: object) -> object:
        """Run one call without any conversion; this is the part that is timed."""


def load_onnx(path: Path | str, *, runtime: Runtime = "onnxruntime", threads: int = 1, observe: tuple[str, ...] = ()) -> Network:
    """Load an ONNX file with all optimizations on.

    Args:
        path: The file.
        runtime: ``onnxruntime`` or ``openvino``.
        threads: Processor threads for one call.
        observe: Inner values to return after the outputs (ONNX Runtime only); names that the file does not have are ignored.

    Raises:
        MissingExtraError: The runtime is not installed.
        DataError: There is no such file.
        FileFormatError: The runtime does not accept the file.
        SpecError: The runtime is unknown, or ``threads`` is below 1.
    """
    if threads < 1:
        raise SpecError(f"threads must be at least 1, got {threads}")
    if not Path(path).is_file():
        raise DataError(f"there is no file {path}")
    if runtime == "onnxruntime":
        return _OnnxRuntimeNetwork(path, threads, observe)
    if runtime == "openvino":
        return _OpenVinoNetwork(path, threads)
    raise SpecError(f"unknown runtime {runtime!r}. Allowed: onnxruntime, openvino.")


def onnx_provenance(path: Path | str) -> Provenance | None:
    """Where the network in the file comes from; ``None`` where the file does not say.

    Raises:
        MissingExtraError: onnx is not installed.
        FileFormatError: The file is damaged, or what it says cannot be understood.
    """
    try:
        found = {entry.key: entry.value for entry in _onnx().load(path, load_external_data=False).metadata_props}
        return provenance_from_json(json.loads(found[PROVENANCE_KEY])) if PROVENANCE_KEY in found else None
    except FileFormatError as error:
        raise FileFormatError(f"{path}: {error}") from error
    except LowbitError:
        raise
    except Exception as error:  # protobuf's and JSON's
        raise FileFormatError(f"{path}: it is no ONNX file, or a damaged one ({shorten(str(error))})") from error


def saturates() -> bool:
    """Whether 8-bit products saturate on this processor unless ``PRECISE_PRODUCTS`` is set: x86 without VNNI."""
    found = torch.cpu.get_capabilities()
    return found["architecture"] == "x86_64" and not (found["avx512_vnni"] or found["avx_vnni"])


class _OnnxRuntimeNetwork:
    def __init__(self, path: Path | str, threads: int, observe: tuple[str, ...]) -> None:
        self._session = _session(_with_outputs(path, observe) if observe else str(path), threads)
        self.input_names = tuple(value.name for value in self._session.get_inputs())
        self._outputs = [value.name for value in self._session.get_outputs()]

    def prepare(self, inputs: Inputs) -> object:
        return {name: tensor.detach().cpu().numpy() for name, tensor in name_inputs(list(self.input_names), inputs).items()}

    def run(self, prepared: object) -> object:
        return self._session.run(None, prepared)

    def __call__(self, inputs: Inputs) -> dict[str, Tensor]:
        try:
            values = self._session.run(None, self.prepare(inputs))
        except LowbitError:
            raise
        except Exception as error:  # its errors share no base class
            shapes = ", ".join(str(list(tensor.shape)) for tensor in inputs.tensors)
            reason = str(error).strip().splitlines()[0]
            raise DataError(f"ONNX Runtime cannot run the file on inputs of the shapes {shapes}: {reason}") from error
        return {name: torch.as_tensor(value) for name, value in zip(self._outputs, values, strict=True)}


class _OpenVinoNetwork:
    def __init__(self, path: Path | str, threads: int) -> None:
        try:
            import openvino
        except ImportError as error:
            raise missing_extra("openvino", "openvino", "running a file in OpenVINO") from error
        # float32, because OpenVINO would compute in bfloat16 where the processor can
        settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
        try:
            self._compiled = openvino.Core().compile_model(str(path), "CPU", settings)
        except RuntimeError as error:
            raise FileFormatError(f"{path}: OpenVINO does not accept it: {str(error).strip().splitlines()[0]}") from error
        self._request = self._compiled.create_infer_request()
        self.input_names = tuple(port.get_any_name() for port in self._compiled.inputs)

    def prepare(self, inputs: Inputs) -> object:
        named = name_inputs(list(self.input_names), inputs)
        return {name: tensor.detach().cpu().numpy() for name, tensor in named.items()}

    def run(self, prepared: object) -> object:
        return self._request.infer(prepared, share_inputs=True, share_outputs=True)

    def __call__(self, inputs: Inputs) -> dict[str, Tensor]:
        values = self._request.infer(self.prepare(inputs))
        return {port.get_any_name(): torch.as_tensor(values[index].copy()) for index, port in enumerate(self._compiled.outputs)}


def _with_outputs(path: Path | str, names: tuple[str, ...]) -> bytes:
    """The file with inner values as additional outputs."""
    onnx = _onnx()
    model = onnx.load(path)
    made = {name for node in model.graph.node for name in node.output} - {value.name for value in model.graph.output}
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names if name in made)
    content: bytes = model.SerializeToString()
    return content


def _session(source: str | bytes, threads: int, optimized: Path | None = None) -> onnxruntime.InferenceSession:
    try:
        import onnxruntime
    except ImportError as error:
        raise missing_extra("onnxruntime", "onnx", "running an ONNX file") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    if saturates():
        options.add_session_config_entry(*PRECISE_PRODUCTS)
    options.log_severity_level = 4  # exceptions carry the messages
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    try:
        try:
            return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        except onnxruntime.capi.onnxruntime_pybind11_state.Fail as error:
            if "Attempt to replace the existing tensor" not in str(error):
                raise
            return onnxruntime.InferenceSession(_without_sharing(source), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors share no base class
        name = source if isinstance(source, str) else "the file"
        raise FileFormatError(f"{name}: ONNX Runtime does not accept it: {str(error).strip().splitlines()[0]}") from error


def _without_sharing(source: str | bytes) -> bytes:
    """The file with a copy of shared decoded weights for each reader: ``PRECISE_PRODUCTS`` fails on weights that layers share."""
    onnx = _onnx()
    model = onnx.load_from_string(source) if isinstance(source, bytes) else onnx.load(source)
    graph = model.graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    decoders = {node.output[0]: node for node in graph.node if node.op_type == "DequantizeLinear" and set(node.input) <= set(stored)}
    read: set[str] = set()
    copies: list[Any] = []
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name in decoders and name in read:
                copy = onnx.NodeProto()
                copy.CopyFrom(decoders[name])
                ending = f".{len(copies)}"
                copy.name, copy.output[0], node.input[index] = copy.name + ending, name + ending, name + ending
                for place, tensor in enumerate(copy.input):
                    graph.initializer.add().CopyFrom(stored[tensor])
                    graph.initializer[-1].name = copy.input[place] = tensor + ending
                copies.append(copy)
            read.add(name)
    nodes = [*copies, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    content: bytes = model.SerializeToString()
    return content


def _onnx() -> Any:
    try:
        import onnx
    except ImportError as error:
        raise missing_extra("onnx", "onnx", "reading an ONNX file") from error
    return onnx
