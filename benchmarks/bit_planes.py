"""How fast convolutions of a few bits are plane by plane, against 8-bit convolutions of the same shape.

    python benchmarks/bit_planes.py                   # the 3x3 shapes of ResNet-18, batch 1
    ONEDNN_MAX_CPU_ISA=AVX512_CORE_VNNI python benchmarks/bit_planes.py --name avx512_vnni
    LOWBIT_KERNELS=avx2 ONEDNN_MAX_CPU_ISA=AVX2_VNNI python benchmarks/bit_planes.py --name avx2_vnni

Weights times inputs: 1 bit, or -1, 0 and +1 (ternary), or 2 bits (-2 to 1, and -3, -1, 1, 3 as odd) times 1 to 4 bits. Float in, float
out: all variants but torch's float convolution quantize their input. Timed as in benchmarks/binary_conv.py. ``int8`` is lowbit.int8_conv2d, that is
oneDNN's, which ONEDNN_MAX_CPU_ISA keeps from instructions that other processors lack; it says nothing to ONNX Runtime. Results:
benchmarks/results/bit_planes.json, one entry for each ``--name``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from timing import SHAPES, machine, onnx_call, onnx_files, ratio, turn_by_turn
from torch import Tensor, nn

from lowbit.runtime.arguments import Affine, PlanesLayer, Window
from lowbit.runtime.cpu.target import active_target
from lowbit.runtime.layers.int8 import InputGrid, has_exact_kernels, int8_conv2d
from lowbit.runtime.layers.planes import input_thresholds, pack_planes, planes_conv2d

WINDOW = Window((3, 3), padding=(1, 1))
RESULT = Path(__file__).parent / "results" / "bit_planes.json"
WEIGHTS = {"1": (-1, 1), "ternary": (-1, 0, 1), "2": (-2, -1, 0, 1), "2 odd": (-3, -1, 1, 3)}
PAIRS = (("1", 1), ("1", 2), ("ternary", 2), ("1", 3), ("ternary", 3), ("1", 4), ("ternary", 4), ("2", 2), ("2 odd", 2))


def planes_call(x: Tensor, levels: tuple[int, ...], bit_width: int) -> Callable[[], object]:
    """A convolution of random weights of these levels with inputs of ``bit_width``."""
    channels = x.shape[1]
    weight = torch.tensor(levels)[torch.randint(len(levels), (channels, channels, 3, 3))]
    thresholds = input_thresholds(InputGrid(0.0, 0.25, 0.0, 0.0, 0.25, 0, 2**bit_width - 1))
    words, mask = pack_planes(weight)
    layer, epilogue = PlanesLayer(words, channels, thresholds, 0, mask), Affine(torch.ones(channels))
    return lambda: planes_conv2d.function(x, layer, WINDOW, epilogue)


def variants(x: Tensor, folder: Path) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    channels = x.shape[1]
    x_last = x.contiguous(memory_format=torch.channels_last)
    layer = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
    last = nn.Conv2d(channels, channels, 3, padding=1, bias=False).to(memory_format=torch.channels_last)
    most = 127 if has_exact_kernels() else 64
    codes = torch.randint(-most, most + 1, (channels, channels, 3, 3), dtype=torch.int8)
    rest = [0.0, 0.02, 0.0, 0.0, 0.02, 0, 255], WINDOW, Affine(torch.ones(channels))
    calls: dict[str, Callable[[], object]] = {f"{weight} x {bits}": planes_call(x_last, WEIGHTS[weight], bits) for weight, bits in PAIRS}
    if has_exact_kernels(255, most):
        calls["int8"] = lambda: int8_conv2d.function(x_last, codes, *rest)
    calls["onnxruntime int8"] = onnx_call(onnx_files(layer, x, folder)[1], x)
    calls["torch float32 channels-last"] = lambda: last(x_last)
    return calls


def measure(channels: int, size: int, runs: int) -> dict[str, object]:
    """Milliseconds of each variant of one shape, and how often each fits into the faster of the 8-bit convolutions."""
    torch.manual_seed(0)
    x = torch.randn(1, channels, size, size)
    with tempfile.TemporaryDirectory() as folder:
        calls = variants(x, Path(folder))
    with torch.inference_mode():
        times = turn_by_turn(calls, runs)
    planes = [f"{weight} x {bits}" for weight, bits in PAIRS]
    rows = {name: values for name, values in times.items() if name not in planes}
    row: dict[str, object] = {
        "channels": channels,
        "size": size,
        "ms": {name: round(1e3 * statistics.median(values), 4) for name, values in times.items()},
        "faster_than": {other: {name: round(ratio(values, times[name]), 2) for name in planes} for other, values in rows.items()},
    }
    print(json.dumps(row), flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=60)
    parser.add_argument("--name", default="all", help="of the entry in the results")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    load = round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None
    target, limit = active_target()[0].name, os.environ.get("ONEDNN_MAX_CPU_ISA", "")
    print(f"{machine()}; kernels {target}; load {load}", flush=True)
    result: dict[str, object] = {
        "threads": 1,
        "machine": machine(),
        "load": load,
        "kernels": target,
        "onednn_limit": limit,
        "runs": args.runs,
    }
    result["shapes"] = [measure(channels, size, args.runs) for channels, size in SHAPES]
    known = json.loads(args.out.read_text()) if args.out.exists() else {}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({**known, args.name: result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
