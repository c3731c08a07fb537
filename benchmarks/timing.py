"""What benchmarks of layers and networks share: turns, ratios, and the same network in other runtimes."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

SHAPES = ((64, 56), (128, 28), (256, 14), (512, 7))  # channels, height and width of the 3x3 convolutions of ResNet-18
WARMUP, WARMUP_SECONDS = 8, 0.2  # untimed calls before each timed one: so many the caches and the heap take to settle after another runtime


def turn_by_turn(
    calls: Mapping[str, Callable[[], object]], runs: int, after_turn: Callable[[], object] = lambda: None
) -> dict[str, list[float]]:
    """Seconds of each call in each of ``runs`` turns, right after untimed calls of its own."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(runs):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(WARMUP):
                call()
                if time.perf_counter() - start > WARMUP_SECONDS:
                    break
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
        after_turn()
    return times


def ratio(slow: list[float], fast: list[float]) -> float:
    """Median of the ratios of calls that stood side by side."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def onnx_files(layer: nn.Module, x: Tensor, folder: Path) -> tuple[Path, Path]:
    """The layer in float, and by ONNX Runtime's static quantizer: per channel, uint8 activations, int8 weights."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = [{"x": x.numpy()}]

        def get_next(self) -> dict[str, object] | None:
            return self.left.pop() if self.left else None

    paths = folder / "float.onnx", folder / "int8.onnx"
    torch.onnx.export(layer, (x,), paths[0], input_names=["x"], output_names=["y"], dynamo=True, verbose=False)
    quantize_static(
        paths[0],
        paths[1],
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    return paths


def onnx_call(path: Path, x: Tensor) -> Callable[[], object]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {"x": x.numpy()})


def openvino_call(path: Path, x: Tensor) -> Callable[[], object]:
    """The file in OpenVINO, in float32 where it is not in integers."""
    import openvino

    core = openvino.Core()
    settings = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    request = core.compile_model(str(path), "CPU", settings).create_infer_request()
    return lambda: request.infer({"x": x.numpy()})


def machine() -> str:
    """The processor by name."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    flags = next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), [])
    units = ", ".join(unit for unit, flag in (("VNNI", "avx512_vnni"), ("AMX", "amx_int8")) if flag in flags)
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}{f' with {units}' if units else ''}, {os.cpu_count()} cores"
