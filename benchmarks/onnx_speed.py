"""How fast the ONNX files are: against the same runtime's float network and against ONNX Runtime's own static quantizer.

    pip install timm torchvision
    apt-get install dataset-fashion-mnist             # pictures to compare answers on
    python benchmarks/onnx_speed.py                   # all networks, batch 1 and 32
    python benchmarks/onnx_speed.py resnet18 --batch 1 --runs 100

The files are timed turn by turn in one process, one thread; the ratios are those of the least times. Networks whose activation functions have
no integer kernel of their own (SiLU, Hardswish, squeeze-and-excitation) must not be slower than ONNX Runtime's file, and their answers not
further from the float network's; they are trained for a few minutes on Fashion-MNIST at 64 x 64, because random weights turn rounding
into other answers. The others have random weights: the time does not depend on them. Results: benchmarks/results/onnx_speed.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

import lowbit
from lowbit.data import load_data
from lowbit.formats.checks.speed import time_interleaved
from lowbit.formats.onnx.rewrite import float_network
from lowbit.formats.onnx.sessions import Runtime, count_integer_kernels, load_onnx
from lowbit.formats.onnx.translate import translate
from lowbit.formats.program.program import export_program
from lowbit.inputs import Inputs
from lowbit.models import load_model

RUNTIMES: tuple[Runtime, ...] = ("onnxruntime", "openvino")
NETWORKS = ("resnet18", "tf_efficientnet_lite0", "mobilenetv3_large_100", "efficientnet_b0", "csp_silu")
TRAINED = ("mobilenetv3_large_100", "efficientnet_b0", "csp_silu")  # at most as slow as ONNX Runtime's own file, at least as accurate
TRAINING_STEPS, TRAINING_BATCH, TRAINING_SIZE = 400, 32, 64
TEST_IMAGES = 512
# goal and least ratio over the same runtime's float network, batch 1
TARGETS = {
    ("resnet18", "onnxruntime"): (3.3, 2.5),
    ("tf_efficientnet_lite0", "onnxruntime"): (1.9, 1.5),
    ("tf_efficientnet_lite0", "openvino"): (2.1, 1.5),
}
RESULT = Path(__file__).parent / "results" / "onnx_speed.json"
CALIBRATION_IMAGES = 16


class ConvSiLU(nn.Sequential):
    """Convolution, batch norm, SiLU."""

    def __init__(self, inputs: int, outputs: int, size: int = 1, stride: int = 1) -> None:
        super().__init__(nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False), nn.BatchNorm2d(outputs), nn.SiLU())


class Bottleneck(nn.Module):
    """Two convolutions and a shortcut around them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(ConvSiLU(channels, channels), ConvSiLU(channels, channels, 3))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.convolutions(x)
        return result


class CrossStage(nn.Module):
    """Half of the channels pass the bottlenecks, the other half goes around them."""

    def __init__(self, channels: int, depth: int) -> None:
        super().__init__()
        half = channels // 2
        self.through = nn.Sequential(ConvSiLU(channels, half), *(Bottleneck(half) for _ in range(depth)))
        self.around, self.join = ConvSiLU(channels, half), ConvSiLU(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.join(torch.cat([self.through(x), self.around(x)], 1))
        return result


class PyramidPooling(nn.Module):
    """Maxima over ever larger windows beside one another."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduce, self.join, self.pool = ConvSiLU(channels, channels // 2), ConvSiLU(2 * channels, channels), nn.MaxPool2d(5, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        levels = [self.reduce(x)]
        for _ in range(3):
            levels.append(self.pool(levels[-1]))
        result: Tensor = self.join(torch.cat(levels, 1))
        return result


class CspSiLU(nn.Sequential):
    """The backbone of a one-stage detector, with a classifier in the place of its heads."""

    def __init__(
        self, widths: tuple[int, ...] = (32, 64, 128, 256, 512), depths: tuple[int, ...] = (1, 2, 3, 1), classes: int = 10
    ) -> None:
        stages: list[nn.Module] = [ConvSiLU(3, widths[0], 3, 2)]
        for before, after, depth in zip(widths[:-1], widths[1:], depths, strict=True):
            stages += [ConvSiLU(before, after, 3, 2), CrossStage(after, depth)]
        super().__init__(*stages, PyramidPooling(widths[-1]), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], classes))


def network(name: str, images: Tensor) -> nn.Module:
    """The network with random weights and batch norms that fit them, or trained."""
    torch.manual_seed(0)
    if name in TRAINED:
        return trained(CspSiLU() if name == "csp_silu" else load_model(f"timm:{name}", num_classes=10))
    model = load_model(f"timm:{name}").train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = None
    with torch.no_grad():
        model(images)
    return model.eval()


def pictures(split: Literal["train", "test"], count: int) -> tuple[Tensor, Tensor]:
    """Fashion-MNIST enlarged, three equal channels, and labels."""
    data = load_data("fashion-mnist", split=split).dataset
    pairs = [data[index] for index in range(count)]
    images = nn.functional.interpolate(torch.stack([x for x, _ in pairs]), TRAINING_SIZE, mode="bilinear")
    return images.expand(-1, 3, -1, -1).contiguous(), torch.tensor([int(y) for _, y in pairs])


def trained(model: nn.Module) -> nn.Module:
    """``model`` after a short training."""
    images, labels = pictures("train", TRAINING_STEPS * TRAINING_BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, TRAINING_STEPS)
    model.train()
    for x, y in zip(images.split(TRAINING_BATCH), labels.split(TRAINING_BATCH), strict=True):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        schedule.step()
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


def write(quantized: nn.Module, files: dict[str, Path], images: Tensor) -> lowbit.ExportReport:
    """The float file, ours and that of ONNX Runtime's static quantizer, for inputs of the size of ``images``, the calibration data."""
    import onnx_ir as ir

    report = lowbit.export(quantized, files["lowbit"], sample=images[:1], measure_speed=False)
    ir.save(float_network(translate(export_program(quantized, images[:1]))), files["float"])
    static_file(files["float"], files["static"], images)
    return report


def measure(name: str, batches: list[int], runs: int, folder: Path) -> dict[str, object]:
    """Files, sizes, kernels and times of one network."""
    images = torch.randn(CALIBRATION_IMAGES, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    model = network(name, images)
    files = {kind: folder / f"{name}_{kind}.onnx" for kind in ("float", "lowbit", "static")}
    row: dict[str, object] = {"network": name, "ratios_of": "least times"}
    if name in TRAINED:
        small, _ = pictures("train", 4 * CALIBRATION_IMAGES)
        quantized = lowbit.quantize(model, method="round_to_nearest", calibration=small.split(CALIBRATION_IMAGES))
        report = write(quantized, files, small)
        row["accuracy"] = compare(model, files)
        row["parity"] = parity_of(report)
        write(quantized, files, nn.functional.interpolate(small[:CALIBRATION_IMAGES], 224))
    else:
        quantized = lowbit.quantize(model, method="round_to_nearest", calibration=images)
        row["parity"] = parity_of(write(quantized, files, images))
    row |= {
        "bytes": {kind: path.stat().st_size for kind, path in files.items()},
        "integer": {kind: str(count_integer_kernels(files[kind])) for kind in ("lowbit", "static")},
        "times": [time_batch(name, files, Inputs((images[:1].expand(batch, -1, -1, -1).contiguous(),)), runs) for batch in batches],
    }
    return row


def parity_of(report: lowbit.ExportReport) -> dict[str, object]:
    return {"passed": report.parity.passed, "excess": report.parity.excess, "changed_codes": report.parity.changed_codes}


@torch.no_grad()
def compare(model: nn.Module, files: dict[str, Path]) -> dict[str, object]:
    """Share of right answers, agreement with the float network and SQNR of each file on test images."""
    images, labels = pictures("test", TEST_IMAGES)
    reference = torch.cat([model(x) for x in images.split(64)])
    row: dict[str, object] = {"images": TEST_IMAGES, "float": {"top1": round((reference.argmax(1) == labels).float().mean().item(), 4)}}
    for kind in ("lowbit", "static"):
        run = load_onnx(files[kind])
        logits = torch.cat([next(iter(run(Inputs((x,))).values())) for x in images.split(64)])
        row[kind] = {
            "top1": round((logits.argmax(1) == labels).float().mean().item(), 4),
            "agreement": round((logits.argmax(1) == reference.argmax(1)).float().mean().item(), 4),
            "sqnr_db": round(10 * torch.log10(reference.var() / (logits - reference).square().mean()).item(), 2),
        }
    print(row, flush=True)
    return row


def time_batch(name: str, files: dict[str, Path], inputs: Inputs, runs: int) -> dict[str, object]:
    """Median and least milliseconds of each file in each runtime, and the ratios."""
    row: dict[str, object] = {"batch": inputs.batch_size}
    for runtime in RUNTIMES:  # one after the other: their thread pools disturb each other
        times = dict(
            zip(files, time_interleaved([load_onnx(path, runtime=runtime) for path in files.values()], inputs, runs=runs), strict=True)
        )
        over_float, over_static = (ratio(times[kind], times["lowbit"]) for kind in ("float", "static"))
        row[runtime] = {
            "runs": len(times["lowbit"]),
            "ms": {kind: round(statistics.median(times[kind]), 3) for kind in files},
            "least_ms": {kind: round(min(times[kind]), 3) for kind in files},
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
        if inputs.batch_size == 1 and name in TRAINED and runtime == "onnxruntime":
            print(
                f"    {over_static:.2f}x over ONNX Runtime's own file, goal 1.0 {'reached' if over_static >= 1 else 'missed'}", flush=True
            )
    return row


def ratio(slow: list[float], fast: list[float]) -> float:
    """Of the least times: what else the machine does can only add to them."""
    return min(slow) / min(fast)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=NETWORKS)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--runs", type=int, default=60)
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    known = json.loads(args.out.read_text())["networks"] if args.out.exists() else []
    rows = {row["network"]: row for row in known if row["network"] in NETWORKS}
    for name in args.networks:
        with tempfile.TemporaryDirectory() as folder:
            rows[name] = measure(name, args.batch, args.runs, Path(folder))
        result = {
            "command": f"python benchmarks/onnx_speed.py {name} --runs {args.runs}",
            "threads": 1,
            "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
            "networks": list(rows.values()),
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
