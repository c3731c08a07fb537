"""How fast and how small a whole binary ResNet-18 is, against the same network in float32 and in 8 bits.

    python benchmarks/binary_network.py                # batch 1 and 32; some minutes
    LOWBIT_KERNELS=avx2 python benchmarks/binary_network.py --out benchmarks/results/binary_network_avx2.json

The network is bi_real_net's form of ResNet-18 for 224-pixel images: 16 binary 3x3 convolutions with a shortcut each, 1x1 convolutions of
shortcuts in float, first and last layer in 8 bits. Weights are random: the time does not depend on them. The float and the 8-bit network are
the same one without binary layers, in ONNX Runtime and OpenVINO, the 8-bit file by ONNX Runtime's static quantizer. All variants are timed
turn by turn in one process, one thread on one core; ratios are medians over the turns. Results: benchmarks/results/binary_network.json,
and binary_network_xeon_amx.json on a processor with AMX.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from timing import machine, onnx_call, onnx_files, openvino_call, ratio, turn_by_turn
from torch import Tensor, nn

import lowbit
from lowbit.models.bireal import bireal_resnet18
from lowbit.runtime.compile import RuntimeNetwork
from lowbit.runtime.profile import profile
from lowbit.spec import BitPolicy

RESULT = Path(__file__).parent / "results" / "binary_network.json"
SIDE = 224


def binary(model: nn.Module, sample: Tensor) -> nn.Module:
    """The network with binary weights and inputs, its norms settled."""
    policy = BitPolicy.uniform(1, 1)
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1):
            policy = policy.keep_float(name)
    prepared = lowbit.prepare(model, method="bi_real_net", policy=policy, sample=sample).train()
    for _ in range(2):
        prepared(sample)
    return prepared.eval()


def measure(network: RuntimeNetwork, plain: nn.Module, batch: int, runs: int, folder: Path) -> dict[str, object]:
    """Milliseconds of each variant, and the ratios to the binary network."""
    x = torch.randn(batch, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    float_file, int8_file = onnx_files(plain, x, folder)
    last = x.contiguous(memory_format=torch.channels_last)
    calls = {
        "lowbit": lambda: network(x),
        "torch float32 channels-last": lambda: plain(last),
        "onnxruntime float32": onnx_call(float_file, x),
        "onnxruntime int8": onnx_call(int8_file, x),
        "openvino float32": openvino_call(float_file, x),
        "openvino int8": openvino_call(int8_file, x),
    }
    times = turn_by_turn(calls, runs)
    row: dict[str, object] = {
        "batch": batch,
        "ms": {name: round(1e3 * statistics.median(values), 3) for name, values in times.items()},
        "over_lowbit": {name: round(ratio(values, times["lowbit"]), 2) for name, values in times.items() if name != "lowbit"},
        "shares_ms": {name: round(value, 3) for name, value in profile(network, x, runs=max(runs // 2, 3)).shares().items()},
    }
    print(json.dumps(row, indent=1), flush=True)
    return row


def sizes(prepared: nn.Module, sample: Tensor, folder: Path) -> dict[str, float]:
    """Bytes of the packed file, of 32-bit values, and of codes, scales and biases counted bit by bit."""
    report = lowbit.export(prepared, folder / "binary.lowbit", sample=sample)
    loaded = lowbit.load(folder / "binary.lowbit")
    codes = loaded.weight_codes()
    state = loaded.state_dict()
    bits = sum(
        code.codes.numel() * code.bit_width + 32 * sum(t.numel() for t in code.decoder.tensors().values()) for code in codes.values()
    )
    rest = sum(tensor.numel() for name, tensor in state.items() if name not in codes)
    values = sum(tensor.numel() for tensor in state.values())
    arithmetic = bits // 8 + 4 * rest
    found = {"packed": report.size_bytes, "float32": 4 * values, "arithmetic": arithmetic}
    print(found, flush=True)
    return {**found, "over_arithmetic": round(report.size_bytes / arithmetic, 4), "smaller": round(4 * values / report.size_bytes, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--runs", type=int, default=30, help="turns at batch 1; larger batches get 5")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sample = torch.randn(2, 3, SIDE, SIDE)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        prepared, plain = binary(bireal_resnet18(), sample), bireal_resnet18().eval().to(memory_format=torch.channels_last)
        start = time.perf_counter()
        network = lowbit.compile_runtime(prepared, sample=sample)
        seconds = time.perf_counter() - start
        print(f"{machine()}; load {os.getloadavg()[0]:.1f}\n{network.report}", flush=True)
        result: dict[str, object] = {
            "machine": machine(),
            "load": round(os.getloadavg()[0], 1),
            "kernels": network.report.target,
            "compile_seconds": round(seconds, 2),
            "bytes": sizes(prepared, sample, Path(folder)),
            "batches": [measure(network, plain, batch, args.runs if batch == 1 else 5, Path(folder)) for batch in args.batch],
        }
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
