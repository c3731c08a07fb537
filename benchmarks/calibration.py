"""What post-training quantization costs: against other tools, against the bare forward pass, against the plain search.

    python benchmarks/calibration.py            # all parts, about five minutes
    python benchmarks/calibration.py mse cle    # some parts

One pinned thread, random images and weights (speed does not depend on them), competitors interleaved in one process, the least of each. Ratios
are what counts: absolute times depend on the machine and on what else runs there. Parts whose competitor is not installed say so. Results go
to benchmarks/results/calibration.json, parts that are not run keep their rows.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from lowbit.inputs import Calibration
from lowbit.methods.post_training.round_to_nearest import RoundToNearest
from lowbit.models import load_model
from lowbit.network.graph.dataflow import capture
from lowbit.post_training.pipeline import PtqJob
from lowbit.quantizers.ranges.range_search import shrink_search
from lowbit.quantizers.ranges.scale_search import mmse_scale
from lowbit.spec import BitPolicy
from lowbit.workflows.quantize import quantize

RESULTS = Path(__file__).parent / "results" / "calibration.json"
IMAGES = 300
Row = dict[str, object]


def interleaved(variants: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Least seconds of each variant; every round runs all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, run in variants.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: round(min(times), 3) for name, times in seconds.items()}


def ratios(seconds: dict[str, float], ours: str) -> dict[str, float]:
    """Our time over each other's."""
    return {f"{ours} / {name}": round(seconds[ours] / value, 3) for name, value in seconds.items() if name != ours}


def lite0() -> nn.Module:
    """The network as a user has it, in the memory layout that is fastest on this kind of machine."""
    torch.manual_seed(0)
    return load_model("timm:tf_efficientnet_lite0").eval().to(memory_format=torch.channels_last)


def images(count: int) -> list[Tensor]:
    """Single random images."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 3, 224, 224, generator=generator).to(memory_format=torch.channels_last) for _ in range(count)]


def lowbit_ptq(model: nn.Module, data: list[Tensor], observer: str = "mse") -> nn.Module:
    """W8A8, per channel, everything included: capture, folding, weight search, calibration."""
    return quantize(model, method="round_to_nearest", weight_bits=8, activation_bits=8, calibration=data, activation_observer=observer)


def ptq() -> Row:
    """Lite0 to 8 bits with 300 images, against NNCF on an OpenVINO model and ONNX Runtime's static quantizer."""
    import nncf
    import onnxruntime
    import openvino
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self, data: list[Tensor]) -> None:
            self.feed = iter([{"x": image.contiguous().numpy()} for image in data])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.feed, None)

    model, data = lite0(), images(IMAGES)
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        torch.onnx.export(model, (data[0],), source, input_names=["x"], dynamo=True, verbose=False)
        float_openvino = openvino.convert_model(str(source))
        arrays = [image.contiguous().numpy() for image in data]
        variants = {
            "lowbit": lambda: lowbit_ptq(model, data),
            "lowbit min-max": lambda: lowbit_ptq(model, data, "min_max"),
            "NNCF (OpenVINO)": lambda: nncf.quantize(float_openvino.clone(), nncf.Dataset(arrays), subset_size=IMAGES),
            "ONNX Runtime static": lambda: quantize_static(
                source, target, Reader(data), per_channel=True, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8
            ),
        }
        seconds = interleaved(variants, rounds=2)
    versions = {"nncf": nncf.__version__, "openvino": openvino.__version__, "onnxruntime": onnxruntime.__version__}
    return {"images": IMAGES, "seconds": seconds, "ratios": ratios(seconds, "lowbit"), "versions": versions}


def prepared(model: nn.Module, data: object, observer: str) -> PtqJob:
    """A job with weights quantized and activation quantizers in place."""
    calibration = Calibration.of(data)
    job = PtqJob(model=model, policy=BitPolicy.uniform(8, 8), sample=calibration.sample, calibration=calibration)
    method = RoundToNearest(activation_observer=observer, weight_observer="min_max")
    job.fold()
    job.insert_weights(method.weight_quantizer)
    job.insert_activations(method)
    return job


def parts() -> Row:
    """Where the seconds of quantizing Lite0 go, by observer: each step alone, the least of three rounds."""
    model, data = lite0(), images(IMAGES // 3)
    calibration = Calibration.of(data)
    rows: Row = {"images": len(data)}
    for observer in ("mse", "min_max"):
        method = RoundToNearest(activation_observer=observer)
        seconds: dict[str, list[float]] = {}

        def timed(name: str, step: Callable[[], object], seconds: dict[str, list[float]] = seconds) -> object:
            start = time.perf_counter()
            result = step()
            seconds.setdefault(name, []).append(time.perf_counter() - start)
            return result

        for _ in range(3):
            network = copy.deepcopy(model)
            timed("capture", lambda network=network: capture(network, calibration.sample))
            job = PtqJob(model=network, policy=BitPolicy.uniform(8, 8), sample=calibration.sample, calibration=calibration)
            timed("fold", job.fold)
            timed("weight ranges", lambda job=job, method=method: job.insert_weights(method.weight_quantizer))
            timed("placement", lambda job=job, method=method: job.insert_activations(method))
            timed("forward passes", lambda job=job: forward(job.reference, data))
            timed("calibration, forward passes included", job.calibrate_activations)
        least = {name: round(min(values), 3) for name, values in seconds.items()}
        least["observers"] = round(least.pop("calibration, forward passes included") - least["forward passes"], 3)
        rows[observer] = least
        print(observer, least, flush=True)
    return rows


@torch.no_grad()
def forward(model: nn.Module, data: list[Tensor]) -> None:
    """Every image through the network, nothing else."""
    for image in data:
        model(image)


def calibration() -> Row:
    """Calibration of Lite0's activations over a plain forward pass of the same images, by observer."""
    model, data = lite0(), images(IMAGES // 2)
    jobs = {observer: prepared(lite0(), data, observer) for observer in ("min_max", "mse", "percentile", "entropy", "omse")}
    variants: dict[str, Callable[[], object]] = {"plain forward": lambda: forward(model, data)}
    variants |= {observer: job.calibrate_activations for observer, job in jobs.items()}
    seconds = interleaved(variants, rounds=3)
    over = {name: round(value / seconds["plain forward"], 3) for name, value in seconds.items() if name != "plain forward"}
    return {"images": len(data), "seconds": seconds, "over plain forward": over}


def plain_search(weight: Tensor, qmax: int, power: float) -> Tensor:
    """80 shrinking ranges for each channel, one after the other, as reconstruction programs do it."""
    scales = []
    for channel in weight:
        low, high = channel.min(), channel.max()
        best = torch.tensor(float("inf"))
        chosen = high
        for step in range(80):
            scale = (high - low) * (1 - step * 0.01) / qmax
            zero_point = (-low * (1 - step * 0.01) / scale).round()
            quantized = ((channel / scale).round() + zero_point).clamp(0, qmax)
            error = ((quantized - zero_point) * scale - channel).abs().pow(power).sum()
            if error < best:
                best, chosen = error, scale
        scales.append(chosen)
    return torch.stack(scales)


def mse() -> Row:
    """The weight search of four ResNet-18 layers (one of each width), 4 bits, against the plain loop over channels and candidates."""
    torch.manual_seed(0)
    weights = [torch.randn(width, width, 3, 3) * 0.05 for width in (64, 128, 256, 512)]
    rows = [weight.flatten(1) for weight in weights]
    found = [shrink_search(row, 0, 15, symmetric=False, power=2.4, contain_zero=False)[0] for row in rows]
    for row, scale in zip(rows, found, strict=True):
        agree = torch.isclose(plain_search(row[:8], 15, 2.4), scale[:8], rtol=1e-4).float().mean()
        assert agree == 1, f"the two searches disagree on {1 - agree:.0%} of the channels"
    seconds = interleaved(
        {
            "plain loop, power 2.4": lambda: [plain_search(row, 15, 2.4) for row in rows],
            "lowbit, power 2.4": lambda: [shrink_search(row, 0, 15, symmetric=False, power=2.4, contain_zero=False) for row in rows],
            "plain loop, power 2": lambda: [plain_search(row, 15, 2.0) for row in rows],
            "lowbit, power 2": lambda: [shrink_search(row, 0, 15, symmetric=False, contain_zero=False) for row in rows],
            "lowbit omse": lambda: [mmse_scale(row, -8, 7) for row in rows],
        },
        rounds=2,
    )
    over = {power: round(seconds[f"lowbit, {power}"] / seconds[f"plain loop, {power}"], 3) for power in ("power 2.4", "power 2")}
    return {"weights": sum(w.numel() for w in weights), "seconds": seconds, "lowbit / plain loop": over}


def linear() -> Row:
    """Seconds of one calibration by number of images."""
    data = images(IMAGES)
    jobs = {count: prepared(lite0(), data[:count], "mse") for count in (75, 150, 300)}
    seconds = interleaved({str(count): job.calibrate_activations for count, job in jobs.items()}, rounds=2)
    return {"seconds by images": seconds, "milliseconds of an image": {k: round(1000 * v / int(k), 2) for k, v in seconds.items()}}


def _peak_mib() -> float:
    """Peak resident memory of this process alone (a child's ru_maxrss starts at its parent's)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


class Stream:
    """Random batches made when they are asked for, so that the data itself takes no memory."""

    def __init__(self, count: int, batch_size: int) -> None:
        self.count, self.batch_size = count, batch_size

    def __iter__(self) -> Iterator[Tensor]:
        for index in range(self.count // self.batch_size):
            generator = torch.Generator().manual_seed(index)
            yield torch.randn(self.batch_size, 3, 224, 224, generator=generator)


def _memory_of(what: str, count: int, batch_size: int, pipe: multiprocessing.connection.Connection) -> None:
    torch.set_num_threads(1)
    if what == "search":
        rows = torch.randn(4800, 2435)  # the weights of ResNet-18
        before = _peak_mib()
        shrink_search(rows, -8, 7, symmetric=True)
        mmse_scale(rows[:512], -8, 7)
    else:
        model = lite0()
        before = _peak_mib()
        if what == "forward":
            with torch.no_grad():
                for batch in Stream(count, batch_size):
                    model(batch)
        else:
            quantize(model, method="round_to_nearest", calibration=Stream(count, batch_size))
    pipe.send(round(_peak_mib() - before))


def memory() -> Row:
    """Peak resident memory above that of the loaded network, each in a fresh process."""
    row: Row = {}
    context = multiprocessing.get_context("spawn")
    for name, arguments in {
        "forward, batch 8": ("forward", 16, 8),
        "quantize, 16 images, batch 8": ("quantize", 16, 8),
        "quantize, 64 images, batch 8": ("quantize", 64, 8),
        "search over 11.7 M weights": ("search", 0, 0),
    }.items():
        receive, send = context.Pipe(duplex=False)
        process = context.Process(target=_memory_of, args=(*arguments, send))
        process.start()
        row[f"{name} (MiB)"] = receive.recv()
        process.join()
    return row


PARTS: dict[str, Callable[[], Row]] = {
    "ptq": ptq,
    "parts": parts,
    "calibration": calibration,
    "mse": mse,
    "linear": linear,
    "memory": memory,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"any of {', '.join(PARTS)}; all when left out")
    parser.add_argument("--core", type=int, default=0, help="the processor core to run on")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    unknown = set(args.parts) - set(PARTS)
    if unknown:
        parser.error(f"unknown part {', '.join(sorted(unknown))}; known: {', '.join(PARTS)}")
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {args.core})
    torch.set_num_threads(1)
    results: Row = json.loads(args.out.read_text()) if args.out.exists() else {}
    results["machine"] = {"processor": platform.processor() or platform.machine(), "torch": torch.__version__, "threads": 1}
    for name in args.parts or PARTS:
        start = time.perf_counter()
        try:
            results[name] = PARTS[name]()
        except ImportError as error:
            results[name] = {"skipped": f"not installed: {error.name}"}
        print(f"{name} ({time.perf_counter() - start:.0f} s): {json.dumps(results[name], indent=2)}", flush=True)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
