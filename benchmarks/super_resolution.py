"""How fast networks for super-resolution are in few bits, and how much memory tiles save.

    python benchmarks/super_resolution.py                # some minutes

- The embedded EDSR on a whole picture of 510 x 339 pixels, which becomes twice as large: the ONNX file in integers over the float one, in ONNX
  Runtime and in OpenVINO.
- The body of SRResNet, 16 blocks of 64 channels, with binary_sr's accumulation: on lowbit's kernels over float in torch and ONNX Runtime.
- The peak memory of a process that enlarges a picture of 2040 x 1356 pixels, whole and in tiles.

What is compared is timed turn by turn in one process, one thread on one core; ratios are medians over the turns. Results:
benchmarks/results/super_resolution.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from timing import machine, onnx_call, openvino_call, ratio, turn_by_turn
from torch import Tensor, nn

import lowbit
from lowbit.formats.packed.network import PackedNetwork
from lowbit.models import load_model, upscaling_weights
from lowbit.models.srresnet import srresnet
from lowbit.runtime.compile import RuntimeNetwork
from lowbit.workflows.enlarge import Tiling, enlarge_tensor

RESULT = Path(__file__).parent / "results" / "super_resolution.json"
PICTURE, LARGE = (339, 510), (1356, 2040)  # height and width
FEATURES = (85, 128)  # of what the body of SRResNet reads
TILE = 256


def noise(*shape: int) -> Tensor:
    return torch.rand(1, 3, *shape, generator=torch.Generator().manual_seed(1)) * 255


def summary(times: dict[str, list[float]], fast: str, slow: str) -> dict[str, object]:
    return {
        "ms": {name: round(1e3 * statistics.median(values), 1) for name, values in times.items()},
        f"{slow} over {fast}": round(ratio(times[slow], times[fast]), 2),
    }


def embedded(folder: Path, runs: int) -> dict[str, object]:
    """The embedded EDSR in integers and in float, in both runtimes."""
    model, x, small = load_model("edsr_small", upscaling_weights(), scale=2), noise(*PICTURE), noise(48, 48)
    quantized = lowbit.quantize(model, method="round_to_nearest", calibration=[small])
    files = {"int8": folder / "int8.onnx", "float": folder / "float.onnx"}
    for network, path in ((quantized, files["int8"]), (model, files["float"])):
        print(lowbit.export(network, path, sample=small, dynamic=("H", "W"), measure_speed=False).parity, flush=True)
    found: dict[str, object] = {}
    for runtime, call in (("onnxruntime", onnx_call), ("openvino", openvino_call)):
        found[runtime] = summary(turn_by_turn({kind: call(path, x) for kind, path in files.items()}, runs), "int8", "float")
        print(runtime, found[runtime], flush=True)
    return found


class Body(nn.Module):
    """The residual blocks of SRResNet."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = srresnet(2).blocks

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.blocks(x)
        return out


def binary(folder: Path, runs: int) -> dict[str, object]:
    """The body of SRResNet in one bit on lowbit's kernels, and in float."""
    torch.manual_seed(0)
    x, plain = torch.randn(1, 64, *FEATURES), Body().eval()
    policy = lowbit.BitPolicy.uniform(1, 1, first_last=None)
    prepared = lowbit.prepare(plain, method="binary_sr", policy=policy, sample=x[:, :, :32, :32]).eval()
    network = lowbit.compile_runtime(prepared, sample=x)
    assert isinstance(network, RuntimeNetwork)
    print(network.report, flush=True)
    torch.onnx.export(plain, (x,), folder / "body.onnx", input_names=["x"], output_names=["y"], dynamo=True, verbose=False)
    last = x.contiguous(memory_format=torch.channels_last)
    fast = plain.to(memory_format=torch.channels_last)
    calls = {"binary": lambda: network(x), "torch float32": lambda: fast(last), "onnxruntime float32": onnx_call(folder / "body.onnx", x)}
    times = turn_by_turn(calls, runs)
    return {
        "kernels": network.report.target,
        **summary(times, "binary", "torch float32"),
        **summary(times, "binary", "onnxruntime float32"),
    }


def peak() -> int:
    """The most memory that this process had so far, in MiB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) // 1024


def peak_of(packed: Path, tile: int) -> None:
    """Enlarge a picture and print the peak memory that this took, in MiB."""
    torch.set_num_threads(1)
    network = lowbit.load(packed)
    assert isinstance(network, PackedNetwork)
    picture = noise(*LARGE)[0].to(torch.uint8)
    before = peak()
    tiling, _ = Tiling.of(network, tile)
    enlarge_tensor(network, picture, 2, tiling)
    print(json.dumps({"before": before, "peak": peak()}))


def memory(folder: Path) -> dict[str, object]:
    """Peak memory with and without tiles, each in a process of its own."""
    model = load_model("edsr_small", upscaling_weights(), scale=2)
    quantized = lowbit.quantize(model, method="round_to_nearest", calibration=[noise(48, 48)])
    lowbit.export(quantized, folder / "small.lowbit", sample=noise(48, 48), dynamic=("H", "W"))
    found: dict[str, object] = {"picture": f"{LARGE[1]} x {LARGE[0]}", "unit": "MiB"}
    for name, tile in (("whole", max(LARGE)), (f"tiles of {TILE}", TILE)):
        command = [sys.executable, __file__, "--peak", str(folder / "small.lowbit"), str(tile)]
        found[name] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(name, found[name], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        peak_of(Path(args.peak[0]), int(args.peak[1]))
        return
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    with torch.no_grad(), tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        result: dict[str, object] = {
            "machine": machine(),
            "load": round(os.getloadavg()[0], 1),
            "edsr_small, 510 x 339": embedded(folder, args.runs),
            "body of SRResNet, 64 x 85 x 128": binary(folder, args.runs),
            "peak memory": memory(folder),
        }
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
