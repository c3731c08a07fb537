"""What an iteration of learned rounding costs beside the bare convolutions of the same block.

    python benchmarks/reconstruction.py          # about three minutes

A ResNet-18 basic block (64 channels, 56x56), its last (512 channels, 7x7) and an inverted residual of EfficientNet-Lite0
(40 channels, 240 inside, 28x28), batch norms folded, 4 bits, mini-batch 32 out of 64 cached samples, regularizer on. The floor is what
no loop can avoid: every convolution forward, its weight gradient, and its input gradient in all but the first, on the same shapes in
channels-last float32. One pinned thread; all variants in each round, one after the other, and the median over rounds of their ratio
within a round, so that other work on the machine disturbs little. Each block is timed twice: with glibc's allocator as it is, and told
to keep freed memory (MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ in the environment), without which every large activation is
paged in anew. Memory is the peak of a fresh process above the loaded block.
Results go to benchmarks/results/reconstruction.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import multiprocessing.connection
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from lowbit.inputs import Calibration
from lowbit.methods.post_training.adaround import Adaround
from lowbit.models.mobilenet import InvertedResidual
from lowbit.models.resnet import ResidualBlock
from lowbit.network.insert import float_weight, set_weight_quantizer
from lowbit.network.layers import quantizable_layers
from lowbit.post_training.pipeline import PtqJob
from lowbit.post_training.reconstruction.adam import ResumableAdam
from lowbit.post_training.reconstruction.objective import Objective, rounding_loss
from lowbit.post_training.reconstruction.rounding import AdaptiveRounding, BetaSchedule
from lowbit.post_training.reconstruction.unit_data import CallCache, TensorCache, UnitData
from lowbit.post_training.reconstruction.units import PlannedUnit
from lowbit.quantizers import UniformQuantizer
from lowbit.spec import BitPolicy

RESULTS = Path(__file__).parent / "results" / "reconstruction.json"
BATCH, CACHED = 32, 64
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**33)}
VARIANTS = ("bare convolutions", "lowbit fp32", "lowbit bf16")
Row = dict[str, object]
BLOCKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int]]] = {
    "ResNet-18 block, 64 channels, 56x56": (lambda: ResidualBlock(64, 64, 1), (64, 56)),
    "ResNet-18 block, 512 channels, 7x7": (lambda: ResidualBlock(512, 512, 1), (512, 7)),
    "Lite0 inverted residual, 40 channels, 28x28": (lambda: InvertedResidual(40, 40, 1, 6), (40, 28)),
}


class Bare:
    """The convolutions of a block and nothing else: inputs and output gradients of each are recorded once."""

    def __init__(self, block: nn.Module, x: Tensor) -> None:
        self._calls: list[tuple[nn.Conv2d, Tensor, Tensor]] = []
        layers = list(quantizable_layers(block).values())
        handles = [layer.register_forward_hook(self._note) for layer in layers]
        block(x)
        for handle in handles:
            handle.remove()
        for index, (_, inputs, _) in enumerate(self._calls):
            inputs.requires_grad_(index > 0)

    def _note(self, layer: nn.Conv2d, args: tuple[Tensor], output: Tensor) -> None:
        self._calls.append((layer, args[0].detach().clone(), torch.randn_like(output)))

    def run(self) -> None:
        """One pass forward and one backward through each."""
        for layer, inputs, gradient in self._calls:
            wanted = [layer.weight, *([inputs] if inputs.requires_grad else [])]
            torch.autograd.grad(layer(inputs), wanted, gradient)


class Learning:
    """lowbit's own loop on one block: draw samples, read the caches, soft weights, block, loss, gradients, Adam."""

    def __init__(self, block: nn.Module, x: Tensor, precision: str) -> None:
        job = PtqJob(block, BitPolicy.uniform(4, None, first_last=None), Calibration.of(x[:1]).sample)
        job.insert_weights(Adaround().weight_quantizer)
        with torch.no_grad():
            target = job.reference(x)
        self._unit = PlannedUnit("", tuple(job.layers), None, is_carried=False, channel_axis=1, cost=1.0)
        self._data = UnitData(CallCache.of(TensorCache.of(x)), TensorCache.of(target))
        roundings: dict[str, AdaptiveRounding] = {}
        for name, layer in job.layers.items():
            grid = layer.parametrizations.weight[0].quantizer
            assert isinstance(grid, UniformQuantizer)
            roundings[name] = AdaptiveRounding(grid)
            roundings[name].initialize(float_weight(layer))
            set_weight_quantizer(layer, roundings[name])
        self._module, self._roundings = job.model, roundings
        self._objective = Objective(10_000, 1e-3, BATCH, schedule=BetaSchedule("cosine", 10_000, warm_start=0.0), precision=precision)  # type: ignore[arg-type]
        logits = {name: rounding.logits for name, rounding in roundings.items()}
        self._descent = ResumableAdam(logits, learning_rate=1e-3, iterations=10_000, samples=len(x), batch_size=BATCH, seed=0)

    def run(self) -> None:
        """One iteration."""
        arguments = self._unit, self._module, self._data
        self._descent.step(
            lambda index: rounding_loss(*arguments, index, self._objective, self._roundings.values(), self._descent.iteration)
        )


def folded(name: str) -> tuple[nn.Module, Tensor]:
    """The block as reconstruction sees it, without batch norms, channels-last, and inputs for all cached samples."""
    torch.manual_seed(0)
    make, (channels, size) = BLOCKS[name]
    block = make().eval()
    for path, module in list(block.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            setattr(block.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2], nn.Identity())
    x = torch.randn(CACHED, channels, size, size).relu_()
    return block.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)


def variant_of(name: str, block: nn.Module, x: Tensor) -> Callable[[], None]:
    """One iteration of a variant."""
    return Bare(block, x[:BATCH]).run if name == "bare convolutions" else Learning(block, x, name.removeprefix("lowbit ")).run


def _speed_of(pipe: multiprocessing.connection.Connection, name: str, seconds: float) -> None:
    torch.set_num_threads(1)
    block, x = folded(name)
    runs = {variant: variant_of(variant, copy.deepcopy(block), x) for variant in VARIANTS}
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {key: [] for key in runs}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for key, run in runs.items():
            start = time.perf_counter()
            run()
            times[key].append(1000 * (time.perf_counter() - start))
    floor = times["bare convolutions"]
    ratios = {
        f"{key} / bare convolutions": round(statistics.median(a / b for a, b in zip(values, floor, strict=True)), 3)
        for key, values in times.items()
        if values is not floor
    }
    pipe.send(
        {
            "milliseconds": {key: round(statistics.median(values), 1) for key, values in times.items()},
            "ratios": ratios,
            "rounds": len(floor),
        }
    )


def _peak_mib() -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def _memory_of(pipe: multiprocessing.connection.Connection, name: str, variant: str) -> None:
    torch.set_num_threads(1)
    block, x = folded(name)
    before = _peak_mib()
    run = variant_of(variant, block, x)
    run()
    run()
    pipe.send(round(_peak_mib() - before))


def in_new_process(work: Callable[..., None], *arguments: object, environment: dict[str, str] | None = None) -> object:
    """What ``work(pipe, *arguments)`` sends, from a process started with ``environment`` added to this one's."""
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(send, *arguments))
    before = dict(os.environ)
    os.environ.update(environment or {})
    try:
        process.start()
    finally:
        os.environ.clear()
        os.environ.update(before)
    send.close()  # so that a process that dies ends the wait
    result = receive.recv()
    process.join()
    return result


def machine() -> Row:
    """The processor and what it has for bfloat16."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    has = [label for flag, label in (("amx_bf16", "AMX"), ("avx512_bf16", "AVX512-BF16")) if flag in flags]
    model = next((line.partition(":")[2].strip() for line in flags.splitlines() if line.startswith("model name")), platform.processor())
    return {
        "processor": model,
        "bfloat16": has or "emulated",
        "torch": torch.__version__,
        "threads": 1,
        "load at the start": round(os.getloadavg()[0], 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--core", type=int, default=0, help="the processor core to run on")
    parser.add_argument("--seconds", type=float, default=25, help="for each block and allocator")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    results: Row = {"machine": machine(), "batch": BATCH, "cached samples": CACHED}
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {args.core})
    for name in BLOCKS:
        results[name] = {
            "default allocator": in_new_process(_speed_of, name, args.seconds),
            "memory kept": in_new_process(_speed_of, name, args.seconds, environment=KEEP_MEMORY),
            "peak memory (MiB)": {variant: in_new_process(_memory_of, name, variant) for variant in VARIANTS},
        }
        print(f"{name}: {json.dumps(results[name], indent=2)}", flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
