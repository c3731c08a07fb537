"""The table of exports: which layer runs in integers where. Every cell is a small network that was really exported, loaded and looked at."""

from __future__ import annotations

import multiprocessing
import re
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lowbit
from lowbit.errors import LowbitError
from lowbit.formats.onnx.sessions import load_onnx, optimized_model

RUNTIMES = {
    "torch": "`.lowbit` in torch",
    "kernels": "`.lowbit` on kernels",
    "onnxruntime": "`.onnx` in ONNX Runtime",
    "openvino": "`.onnx` in OpenVINO",
    "c": "`.c`",
}
QGEMM_OUTPUT_SCALE = 8  # number of inputs of ONNX Runtime's QGemm from which it gives codes
# Operators that only move values, or change between codes and numbers: they say nothing about the arithmetic.
ONNX_MOVES = frozenset({
    "QuantizeLinear", "DequantizeLinear", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Split", "Shape", "Gather",
    "Expand", "Constant", "ConstantOfShape", "Cast", "Identity", "DepthToSpace", "Concat", "Pad", "ReorderInput", "ReorderOutput",
})  # fmt: skip
OPENVINO_MOVES = frozenset({
    "Input", "Output", "Const", "Constant", "Parameter", "Result", "Reorder", "Reshape", "Transpose", "FakeQuantize", "Quantize", "Convert",
    "ShapeOf", "Split", "StridedSlice", "Gather", "DepthToSpace", "SpaceToDepth", "Concatenation", "Broadcast", "Pad", "Tile",
})  # fmt: skip
TORCH_MOVES = frozenset({
    "reshape", "view", "transpose", "permute", "select", "slice", "unsqueeze", "squeeze", "clone", "expand", "cat", "zeros", "sym_size",
    "pixel_shuffle", "flatten", "pad", "embedding", "upsample_nearest2d",
})  # fmt: skip


class Merge(nn.Module):
    """Two convolutions of one input, and what becomes of both results."""

    def __init__(self, join: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.left, self.right, self.join = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1), join

    def forward(self, x: Tensor) -> Tensor:
        return self.join(self.left(x), self.right(x))


class First(nn.Module):
    """The first result of a layer that returns several."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x, x, need_weights=False)[0] if isinstance(self.layer, nn.MultiheadAttention) else self.layer(x)[0]


@dataclass(frozen=True)
class Case:
    """A layer in a small network.

    Attributes:
        group: Heading in the table.
        name: The layer.
        layers: Make the network's layers, this one among them.
        sample: Inputs of one call.
    """

    group: str
    name: str
    layers: Sequence[Callable[[], nn.Module]]
    sample: Tensor

    def build(self) -> nn.Module:
        """The network; its last layer is called ``last``."""
        *body, last = (make() for make in self.layers)
        model = nn.Sequential(OrderedDict(body=nn.Sequential(*body), last=last)).eval()
        model(self.sample)  # lazy layers learn their shapes
        return model


def cases() -> list[Case]:
    """All layers of the table."""
    torch.manual_seed(0)
    sequence, image, volume = torch.randn(32, 4, 12), torch.randn(32, 4, 8, 8), torch.randn(32, 4, 6, 6, 6)
    vectors, series, tokens = torch.randn(32, 8), torch.randn(32, 5, 8), torch.randint(0, 16, (32, 5))

    def first() -> nn.Module:
        return nn.Conv2d(4, 4, 3, padding=1)

    def last() -> nn.Module:
        return nn.LazyConv2d(4, 1)

    def linear() -> nn.Module:
        return nn.Linear(8, 8)

    def layer(group: str, name: str, make: Callable[[], nn.Module]) -> Case:
        return Case(group, name, (first, make, last), image)

    def of_series(name: str, make: Callable[[], nn.Module], sample: Tensor = series) -> Case:
        return Case("Linear, embedding, recurrent, attention", name, (make, linear), sample)

    convolutions = {
        "Conv2d": lambda: nn.Conv2d(4, 4, 3),
        "Conv2d, depthwise": lambda: nn.Conv2d(4, 4, 3, groups=4),
        "Conv2d, grouped": lambda: nn.Conv2d(4, 4, 3, groups=2),
        "Conv2d, dilated": lambda: nn.Conv2d(4, 4, 3, dilation=2),
        "Conv2d, stride 2": lambda: nn.Conv2d(4, 4, 3, stride=2),
        "Conv2d, padding_mode reflect": lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
        "ConvTranspose2d": lambda: nn.ConvTranspose2d(4, 4, 3),
    }
    others = {
        "Activations": {
            "ReLU": nn.ReLU, "ReLU6": nn.ReLU6, "LeakyReLU": nn.LeakyReLU, "PReLU": nn.PReLU, "Hardtanh": nn.Hardtanh,
            "Hardswish": nn.Hardswish, "SiLU": nn.SiLU, "Sigmoid": nn.Sigmoid, "Tanh": nn.Tanh, "GELU": nn.GELU,
            "Softmax": lambda: nn.Softmax(1),
        },
        "Norms": {
            "BatchNorm2d behind a convolution": lambda: nn.BatchNorm2d(4),
            "BatchNorm2d behind a pool": lambda: nn.Sequential(nn.MaxPool2d(2), nn.BatchNorm2d(4)),
            "GroupNorm": lambda: nn.GroupNorm(2, 4),
            "InstanceNorm2d": lambda: nn.InstanceNorm2d(4),
        },
        "Pools": {
            "MaxPool2d": lambda: nn.MaxPool2d(2), "AvgPool2d": lambda: nn.AvgPool2d(2), "AdaptiveAvgPool2d(1)": lambda: nn.AdaptiveAvgPool2d(1),
        },
        "Shapes": {
            "PixelShuffle": lambda: nn.PixelShuffle(2), "Upsample, nearest": lambda: nn.Upsample(scale_factor=2),
            "Upsample, bilinear": lambda: nn.Upsample(scale_factor=2, mode="bilinear"),
        },
    }  # fmt: skip
    merges: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "residual add": torch.add,
        "product": torch.mul,
        "concatenation": lambda left, right: torch.cat((left, right), 1),
    }
    return [
        Case("Convolutions", "Conv1d", (lambda: nn.Conv1d(4, 4, 3), lambda: nn.Conv1d(4, 4, 1)), sequence),
        *(Case("Convolutions", name, (first, make, last), image) for name, make in convolutions.items()),
        Case("Convolutions", "ConvTranspose1d", (lambda: nn.ConvTranspose1d(4, 4, 3), lambda: nn.Conv1d(4, 4, 1)), sequence),
        Case("Convolutions", "Conv3d", (lambda: nn.Conv3d(4, 4, 3), lambda: nn.Conv3d(4, 4, 1)), volume),
        Case("Convolutions", "ConvTranspose3d", (lambda: nn.ConvTranspose3d(4, 4, 3), lambda: nn.Conv3d(4, 4, 1)), volume),
        of_series("Linear", linear, vectors),
        of_series("Linear on sequences", linear),
        of_series("Embedding", lambda: nn.Embedding(16, 8), tokens),
        of_series("EmbeddingBag", lambda: nn.EmbeddingBag(16, 8), tokens),
        of_series("RNN", lambda: First(nn.RNN(8, 8, batch_first=True))),
        of_series("LSTM", lambda: First(nn.LSTM(8, 8, batch_first=True))),
        of_series("GRU", lambda: First(nn.GRU(8, 8, batch_first=True))),
        of_series("MultiheadAttention", lambda: First(nn.MultiheadAttention(8, 2, batch_first=True))),
        *(layer(group, name, make) for group in ("Activations", "Norms") for name, make in others[group].items()),
        Case("Norms", "LayerNorm", (linear, lambda: nn.LayerNorm(8), linear), vectors),
        *(layer("Pools", name, make) for name, make in others["Pools"].items()),
        *(Case("Merges", name, (lambda join=join: Merge(join), last), image) for name, join in merges.items()),
        *(layer("Shapes", name, make) for name, make in others["Shapes"].items()),
        Case("Shapes", "Flatten", (first, nn.Flatten, lambda: nn.LazyLinear(4)), image),
    ]


@dataclass(frozen=True)
class Cell:
    """What came of one export.

    Attributes:
        verdict: ``integers``, ``float`` or ``refused``.
        operators: Those that compute in float.
        reasons: Why something is in float, or why there is no file.
    """

    verdict: str
    operators: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()


def run_case(index: int) -> dict[str, Cell]:
    """Quantize the network of case number ``index``, write all files, and look at how each runtime computes it. Keys are those of ``RUNTIMES``."""
    torch.set_num_threads(1)
    case = cases()[index]
    model, sample = case.build(), case.sample
    policy = lowbit.BitPolicy.uniform(8, 8).with_rule(match="last", output=8)
    quantized = lowbit.quantize(model, method="round_to_nearest", policy=policy, calibration=sample, progress=False)
    with tempfile.TemporaryDirectory() as folder:
        files = {suffix: Path(folder) / f"network.{suffix}" for suffix in ("lowbit", "onnx", "c")}
        return {
            "torch": _tried(lambda: _packed(quantized, files["lowbit"], sample)),
            "kernels": _tried(lambda: _kernels(quantized, sample)),
            "onnxruntime": _tried(lambda: _onnxruntime(quantized, files["onnx"], sample)),
            "openvino": _tried(lambda: _openvino(files["onnx"])),
            "c": _tried(lambda: _c(quantized, files["c"], sample)),
        }


def _tried(look: Callable[[], Cell]) -> Cell:
    try:
        return look()
    except LowbitError as error:
        reason = re.sub(r"^(layer '[^']*' \([^)]*\): |/\S+/)", "", str(error))  # the row names the layer
        return Cell("refused", reasons=(re.split(r"\. |: Exception", reason)[0],))


def _packed(quantized: nn.Module, path: Path, sample: Tensor) -> Cell:
    lowbit.export(quantized, path, sample=sample)
    lowbit.load(path)(sample)
    return Cell("float")


def _kernels(quantized: nn.Module, sample: Tensor) -> Cell:
    network = lowbit.compile_runtime(quantized, sample=sample)
    reasons = [layer.reason for layer in network.report.layers if layer.kernel == "float"]
    calls = [node.operator.split(".")[1] for node in network.packed_graph.nodes if node.operator.startswith("aten.")]
    return _verdict((call for call in calls if call not in TORCH_MOVES and not call.startswith(("conv", "linear"))), reasons)


def _onnxruntime(quantized: nn.Module, path: Path, sample: Tensor) -> Cell:
    lowbit.export(quantized, path, sample=sample, measure_speed=False)
    return _verdict(float_operators(optimized_model(path)))


def float_operators(model: Any) -> Iterator[str]:
    """Operators of an ONNX graph that compute with numbers in place of codes: those of integers by name, others by what they read first."""
    from onnx import TensorProto

    codes = {tensor.name for tensor in model.graph.initializer if tensor.data_type in (TensorProto.INT8, TensorProto.UINT8)}
    for node in model.graph.node:
        is_integer = node.op_type.startswith(("QLinear", "QGemm", "MatMulInteger", "ConvInteger"))
        reads_codes = is_integer or (bool(node.input) and node.input[0] in codes)
        gives_numbers = node.op_type in ("DequantizeLinear", "MatMulIntegerToFloat", "Cast") or (
            node.op_type == "QGemm" and len(node.input) < QGEMM_OUTPUT_SCALE
        )
        if node.op_type == "QuantizeLinear" or (reads_codes and not gives_numbers):
            codes.update(node.output)
        if not reads_codes and node.op_type not in ONNX_MOVES:
            yield node.op_type


def _openvino(path: Path) -> Cell:
    import openvino

    if not path.exists():
        return Cell("refused", reasons=("there is no ONNX file",))
    load_onnx(path, runtime="openvino")
    compiled = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return _verdict(_openvino_operators(compiled.get_runtime_model()))


def _openvino_operators(model: Any) -> Iterator[str]:
    """Operators that compute with numbers; those in front of the output, which decode its codes, are left out."""
    for operation in model.get_ordered_ops():
        info = operation.get_rt_info()
        kind, precision = info["layerType"].astype(str), info["runtimePrecision"].astype(str)
        readers = [reader.get_node() for port in operation.outputs() for reader in port.get_target_inputs()]
        decodes = kind == "Eltwise" and all(
            reader.get_rt_info()["layerType"].astype(str) in ("Output", "Reorder", "Eltwise") for reader in readers
        )
        if kind not in OPENVINO_MOVES and precision not in ("i8", "u8") and not decodes:
            yield kind


def _c(quantized: nn.Module, path: Path, sample: Tensor) -> Cell:
    lowbit.export(quantized, path, sample=sample)
    return Cell("integers")


def _verdict(operators: Iterable[str], reasons: Iterable[str] = ()) -> Cell:
    found, why = tuple(dict.fromkeys(operators)), tuple(dict.fromkeys(reasons))
    return Cell("float" if found or why else "integers", found, why)


def write_exports(folder: Path) -> None:
    """Run all exports, and write the page of them, ``exports.md``."""
    (folder / "exports.md").write_text(exports_page(), encoding="utf-8")


def exports_page(workers: int = 2) -> str:
    """The page with the table, from exports that are run now."""
    known = cases()
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        results = list(pool.map(run_case, range(len(known))))
    reasons: dict[str, int] = {}
    head = ["| layer | " + " | ".join(RUNTIMES.values()) + " |", "| --- " * (len(RUNTIMES) + 1) + "|"]
    tables: dict[str, list[str]] = {}
    for case, cells in zip(known, results, strict=True):
        row = " | ".join(_cell_text(cells[runtime], reasons) for runtime in RUNTIMES)
        tables.setdefault(case.group, [*head]).append(f"| {case.name} | {row} |")
    parts = [f"## {group}\n\n" + "\n".join(rows) for group, rows in tables.items()]
    notes = [f"{number}. {text.replace('<', '&lt;')}" for text, number in reasons.items()]
    return "\n\n".join([_HEAD, *parts, "## Reasons", "\n".join(notes)]) + "\n"


def _cell_text(cell: Cell, reasons: dict[str, int]) -> str:
    numbers = ", ".join(str(reasons.setdefault(reason, len(reasons) + 1)) for reason in cell.reasons)
    operators = f": {', '.join(cell.operators)}" if cell.operators else ""
    return f"{cell.verdict}{operators}" + (f" ({numbers})" if numbers else "")


_HEAD = """# What runs in integers where

Each row is a small network around one layer, quantized to 8-bit weights and inputs by `round_to_nearest`. When this page was built, the network was exported in each
format, loaded, compared with the quantized network, and looked at: the table says what the runtime really does on the machine that built it.

- **integers**: every operator reads integer codes; what a runtime fuses with an integer kernel is part of that kernel.
- **float: X**: operator X computes with floating-point numbers, every other one with codes. Operators that only move values are not counted.
- **float**: codes are stored in exactly their bits, and decoded when they are used.
- **refused**: there is no such file.

Numbers in brackets lead to [reasons](#reasons), in the words of the export."""
