"""How fast a binary convolution is: float in, float out, against float32 and int8 convolutions of the same shape.

    python benchmarks/binary_conv.py                  # the 3x3 shapes of ResNet-18, batch 1 and 32
    python benchmarks/binary_conv.py --batch 1 --runs 100
    LOWBIT_KERNELS=avx2 ONEDNN_MAX_CPU_ISA=AVX2 python benchmarks/binary_conv.py --out benchmarks/results/binary_conv_avx2_forced.json

Random signs: the time does not depend on them. Ours are called as a compiled network calls them. All variants are timed turn by turn in one
process, one thread on one core, each right after untimed calls of its own, so that none pays for the caches and the memory that the one before
it left; ratios are medians over the turns. Shares of the peak take the clock from chains of multiplications timed in the same turn: once for the
whole call, once for its core loop, the convolution of packed signs into floats, alone. Results: benchmarks/results/binary_conv_<kernels>.json;
binary_conv_xeon_amx.json was made by the same script with one untimed call, on a processor with AMX.

``ONEDNN_MAX_CPU_ISA`` keeps torch and OpenVINO from AVX-512 too; ONNX Runtime cannot be kept from it.

What can be reached depends on the processor. A core with VPOPCNTDQ does 341 products of one bit in a cycle; of float32 it does 16 (Zen 4) or 32
(two units of 512 bits, as in Xeons), of int8 64 or 128 with VNNI, and 1024 with AMX, where 8 bits are faster than one bit can be.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from timing import SHAPES, machine, onnx_call, onnx_files, openvino_call, ratio, turn_by_turn
from torch import Tensor, nn

from lowbit.runtime.arguments import Epilogue, SignLayer, Window
from lowbit.runtime.cpu.compiled import VARIABLE
from lowbit.runtime.cpu.target import active_target
from lowbit.runtime.layers.binary import binary_conv2d, compiled_loops, pack_conv_weight
from lowbit.runtime.layers.operator import LayerCall
from lowbit.runtime.layers.prepared import PreparedLayer

RESULTS = Path(__file__).parent / "results"
CORE = "core loop"
WINDOW = Window((3, 3), padding=(1, 1))
CHAIN = 30_000  # multiplications that wait for one another
READINGS = 5  # of the clock, of which the fastest counts: an interruption can only slow a reading down
CHAIN_CYCLES = 4  # of each: 3 for the multiplication and 1 for the exclusive or, on x86-64 of the last ten years
FIRST_USE = (
    "import time; s = time.perf_counter(); from lowbit.runtime.layers.binary import *; compiled_loops(); print(time.perf_counter() - s)"
)


def convolutions(x: Tensor, weight: Tensor, folder: Path) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    layer = nn.Conv2d(weight.shape[1], weight.shape[0], 3, padding=1, bias=False)
    layer.weight.data = weight.clone()
    last = nn.Conv2d(weight.shape[1], weight.shape[0], 3, padding=1, bias=False).to(memory_format=torch.channels_last)
    last.load_state_dict(layer.state_dict())
    x_last = x.contiguous(memory_format=torch.channels_last)
    float_file, int8_file = onnx_files(layer, x, folder)
    signs, ternary = torch.where(weight >= 0, 1.0, -1.0), torch.where(weight.abs() < 0.5, 0.0, weight.sign())
    epilogue = Epilogue(torch.ones(len(weight)))
    calls_of = {name: binary_conv2d.flatten(x_last, layer_of(w), WINDOW, epilogue) for name, w in (("binary", signs), ("ternary", ternary))}
    calls = {
        **{name: functools.partial(LayerCall(binary_conv2d), **arguments) for name, arguments in calls_of.items()},
        **core_loop(x_last, layer_of(signs)),
        "torch float32": lambda: layer(x),
        "torch float32 channels-last": lambda: last(x_last),
        "onnxruntime float32": onnx_call(float_file, x),
        "onnxruntime int8": onnx_call(int8_file, x),
    }
    if find_spec("openvino") is not None:
        calls["openvino int8"] = openvino_call(int8_file, x)
    return calls


def layer_of(weight: Tensor) -> SignLayer[Tensor]:
    words, mask = pack_conv_weight(weight)
    return SignLayer(words, weight.shape[1], mask)


def core_loop(x: Tensor, signs: SignLayer[Tensor]) -> dict[str, Callable[[], object]]:
    """The kernel alone, from packed signs to floats; nothing where there are no compiled kernels."""
    loops = compiled_loops()
    if loops is None:
        return {}
    layer = PreparedLayer(loops, signs, WINDOW, Epilogue(torch.ones(len(signs.words))))
    n, _, height, width = x.shape
    plan, y = layer.plan(n, height, width), torch.empty_like(x)
    plan.run(x, y, None, None)
    table, _ = plan.workspaces[0]
    return {CORE: lambda: loops.layer(table, 0, 0, 0, y.data_ptr(), 0, n * height)}


def clock() -> Callable[[], float]:
    """Cycles per second at the moment."""
    import numba

    @numba.njit
    def chain(value: int, factor: int, count: int) -> int:
        for i in range(count):
            value = (value * factor) ^ i  # neither can be moved past the other
        return value

    chain(1, 3, 1)

    def read() -> float:
        start = time.perf_counter()
        chain(1, 3, CHAIN)
        return CHAIN * CHAIN_CYCLES / (time.perf_counter() - start)

    return lambda: max(read() for _ in range(READINGS))


def measure(channels: int, size: int, batch: int, runs: int, cycles: Callable[[], float] | None) -> dict[str, object]:
    """Milliseconds of each variant of one shape, and the ratios to the binary convolution."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, channels, size, size, generator=generator)
    weight = torch.randn(channels, channels, 3, 3, generator=generator)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        calls = convolutions(x, weight, Path(folder))
        rates: list[float] = []
        times = turn_by_turn(calls, runs, lambda: None if cycles is None else rates.append(cycles()))
    row: dict[str, object] = {
        "channels": channels,
        "size": size,
        "batch": batch,
        "ms": {name: round(1e3 * statistics.median(values), 4) for name, values in times.items()},
        "least_ms": {name: round(1e3 * min(values), 4) for name, values in times.items()},
        "over_binary": {name: round(ratio(values, times["binary"]), 3) for name, values in times.items() if name != "binary"},
    }
    if rates:
        products, peak = batch * size**2 * channels**2 * 9, active_target()[0].peak
        for name, prefix in (("binary", ""), (CORE, "core_")):
            per_cycle = statistics.median(products / (t * rate) for t, rate in zip(times[name], rates, strict=True))
            row[f"{prefix}products_per_cycle"] = round(per_cycle, 1)
            if peak:
                row[f"{prefix}share_of_peak"] = round(per_cycle / peak, 3)
    print(row, flush=True)
    return row


def first_use() -> dict[str, float]:
    """Seconds until the kernels can be called in a new process, torch's import left out, without and with a filled cache."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, VARIABLE: folder}
        found = {}
        for state in ("cold", "cached"):
            command = [sys.executable, "-c", f"import torch; {FIRST_USE}"]
            found[state] = round(float(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout), 2)
    print("first use", found, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--runs", type=int, default=40, help="turns at batch 1; larger batches get a tenth, at least 5")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/binary_conv_<kernels>.json")
    args = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    target, why = active_target()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else np.nan
    print(f"{machine()}; kernels {target.name}: {why}; load {load:.1f}", flush=True)
    cycles = None if compiled_loops() is None else clock()
    result = {"threads": 1, "machine": machine(), "load": round(load, 1), "kernels": target.name, "why": why, "runs": args.runs}
    result["environment"] = {name: os.environ[name] for name in ("LOWBIT_KERNELS", "ONEDNN_MAX_CPU_ISA") if name in os.environ}
    result["first_use_seconds"] = first_use()
    result["shapes"] = [
        measure(channels, size, batch, args.runs if batch == 1 else max(args.runs // 10, 5), cycles)
        for batch in args.batch
        for channels, size in SHAPES
    ]
    out = args.out or RESULTS / f"binary_conv_{target.name}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
