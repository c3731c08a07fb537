"""How fast the ONNX files are: against the same runtime's float network and against ONNX Runtime's own static quantizer.

    pip install timm torchvision
    python benchmarks/onnx_speed.py                   # resnet18 and tf_efficientnet_lite0, batch 1 and 32
    python benchmarks/onnx_speed.py resnet18 --batch 1 --runs 100

Random weights: the time does not depend on them. The files are timed turn by turn in one process, one thread; the ratios are
medians over the turns. Results: benchmarks/results/onnx_speed.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

import lowbit
from lowbit.formats.checks.speed import time_interleaved
from lowbit.formats.onnx.rewrite import float_network
from lowbit.formats.onnx.sessions import Runtime, count_integer_kernels, load_onnx
from lowbit.formats.onnx.translate import translate
from lowbit.formats.program.program import export_program
from lowbit.inputs import Inputs
from lowbit.models import load_model

RUNTIMES: tuple[Runtime, ...] = ("onnxruntime", "openvino")
NETWORKS = ("resnet18", "tf_efficientnet_lite0")
# goal and least ratio over the same runtime's float network, batch 1
TARGETS = {
    ("resnet18", "onnxruntime"): (3.3, 2.5),
    ("tf_efficientnet_lite0", "onnxruntime"): (1.9, 1.5),
    ("tf_efficientnet_lite0", "openvino"): (2.1, 1.5),
}
RESULT = Path(__file__).parent / "results" / "onnx_speed.json"
CALIBRATION_IMAGES = 16


def network(name: str, images: Tensor) -> nn.Module:
    """The network with random weights and batch norms that fit them."""
    torch.manual_seed(0)
    model = load_model(f"timm:{name}").train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = None
    with torch.no_grad():
        model(images)
    return model.eval()


def static_file(float_path: Path, path: Path, images: Tensor) -> None:
    """The file that ONNX Runtime's static quantizer makes of the float one: per channel, uint8 activations, int8 weights."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    (name,) = load_onnx(float_path).input_names

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter(images.split(1))

        def get_next(self) -> dict[str, object] | None:
            batch = next(self.batches, None)
            return None if batch is None else {name: batch.numpy()}

    prepared = path.with_name("prepared.onnx")
    quant_pre_process(float_path, prepared, skip_symbolic_shape=True)
    quantize_static(
        prepared,
        path,
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )


def measure(name: str, batches: list[int], runs: int, folder: Path) -> dict[str, object]:
    """Files, sizes, kernels and times of one network."""
    images = torch.randn(CALIBRATION_IMAGES, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    quantized = lowbit.quantize(network(name, images), method="round_to_nearest", calibration=images)
    files = {kind: folder / f"{name}_{kind}.onnx" for kind in ("float", "lowbit", "static")}
    report = lowbit.export(quantized, files["lowbit"], sample=images[:1])
    import onnx_ir as ir

    ir.save(float_network(translate(export_program(quantized, images[:1]))), files["float"])
    static_file(files["float"], files["static"], images)
    row: dict[str, object] = {
        "network": name,
        "bytes": {kind: path.stat().st_size for kind, path in files.items()},
        "integer": {kind: str(count_integer_kernels(files[kind])) for kind in ("lowbit", "static")},
        "parity": {"passed": report.parity.passed, "excess": report.parity.excess, "changed_codes": report.parity.changed_codes},
        "times": [time_batch(name, files, Inputs((images[:1].expand(batch, -1, -1, -1).contiguous(),)), runs) for batch in batches],
    }
    return row


def time_batch(name: str, files: dict[str, Path], inputs: Inputs, runs: int) -> dict[str, object]:
    """Median milliseconds of each file in each runtime, and the ratios."""
    row: dict[str, object] = {"batch": inputs.batch_size}
    for runtime in RUNTIMES:  # one after the other: their thread pools disturb each other
        times = dict(
            zip(files, time_interleaved([load_onnx(path, runtime=runtime) for path in files.values()], inputs, runs=runs), strict=True)
        )
        over_float, over_static = (ratio(times[kind], times["lowbit"]) for kind in ("float", "static"))
        row[runtime] = {
            "runs": len(times["lowbit"]),
            "ms": {kind: round(statistics.median(times[kind]), 3) for kind in files},
            "speedup_over_float": round(over_float, 3),
            "speedup_over_static": round(over_static, 3),
        }
        print(
            f"{name} batch {inputs.batch_size} {runtime}: {over_float:.2f}x over float, {over_static:.2f}x over static, {row[runtime]}",
            flush=True,
        )
        if inputs.batch_size == 1 and (name, runtime) in TARGETS:
            goal, least = TARGETS[name, runtime]
            print(f"    goal {goal}x over float {'reached' if over_float >= goal else 'missed'}, least {least}x", flush=True)
    return row


def ratio(slow: list[float], fast: list[float]) -> float:
    """Median of the ratios of calls that stood side by side."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=NETWORKS)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--runs", type=int, default=60)
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = [measure(name, args.batch, args.runs, Path(folder)) for name in args.networks]
    result = {"threads": 1, "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores", "networks": rows}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
