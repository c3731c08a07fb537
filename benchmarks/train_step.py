"""What a training step costs with quantizers in the network, beside the float step.

    pip install "lowbit[kernels]" brevitas==0.13.4      # brevitas is optional
    python benchmarks/train_step.py                     # about three minutes
    python benchmarks/train_step.py --compile           # torch.compile too: minutes for each network, needs a C++ compiler
    python benchmarks/train_step.py lsq --profile       # which operators of a step take how long, in place of whole steps

ResNet-20 on random images of CIFAR's shape, batch 128: forward, cross-entropy, backward and SGD with momentum. Weights and activations
of all inner convolutions, shortcuts included, have 4 bits, those of the first and the last layer 8. One pinned thread. Every round runs
one step of each variant, one after the other; a ratio is the median over rounds of the ratio within a round, to the float step of the
same memory format (compiled ones: to the compiled float step). Variants run eagerly with fused kernels, unless they say "composed"; "3x3
only" has the 18 inner 3x3 convolutions quantized and nothing else. Brevitas learns its weight scales, one for each channel, and its
activation scales.
Results: benchmarks/results/train_step.json.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowbit.models.resnet import resnet20
from lowbit.qat.prepare import prepare
from lowbit.quantizers.fused import are_available, fused_kernels
from lowbit.spec import BitPolicy

RESULTS = Path(__file__).parent / "results" / "train_step.json"
METHODS = ("lsq", "pact", "dorefa", "ewgs")
BATCH, BITS = 128, 4
SHOWN = 14  # operators in a profile
GOAL, GATE = 1.08, 1.2  # lsq over float of the same memory format
FORMATS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
Row = dict[str, object]


def machine() -> Row:
    """What the figures depend on."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = next((line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")), platform.processor())
    return {"processor": name, "torch": torch.__version__, "threads": 1, "load at the start": round(os.getloadavg()[0], 1)}


class Step:
    """One training step of a network."""

    def __init__(self, model: nn.Module, image: Tensor, label: Tensor, *, is_fused: bool = True, is_compiled: bool = False) -> None:
        self._optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
        self._image, self._label, self._is_fused = image, label, is_fused
        self._model: Callable[[Tensor], Tensor] = torch.compile(model) if is_compiled else model

    def run(self) -> None:
        with fused_kernels(self._is_fused):
            self._optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(self._model(self._image), self._label).backward()
            self._optimizer.step()


def brevitas_network(model: nn.Module) -> nn.Module:
    """The network with Brevitas' quantized layers in the place of its convolutions and its linear layer."""
    import brevitas.nn as qnn
    from brevitas.inject.enum import ScalingImplType
    from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerChannelFloat, Uint8ActPerTensorFloat

    model = copy.deepcopy(model)
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, (nn.Conv2d, nn.Linear)):
            continue
        bits = 8 if name in ("conv", "fc") else BITS
        options = {
            "bias": layer.bias is not None,
            "weight_quant": Int8WeightPerChannelFloat,
            "weight_bit_width": bits,
            "weight_scaling_impl_type": ScalingImplType.PARAMETER_FROM_STATS,
            "input_quant": Int8ActPerTensorFloat if name == "conv" else Uint8ActPerTensorFloat,
            "input_bit_width": bits,
            "input_collect_stats_steps": 1,
        }
        if isinstance(layer, nn.Conv2d):
            made = qnn.QuantConv2d(
                layer.in_channels, layer.out_channels, layer.kernel_size, stride=layer.stride, padding=layer.padding, **options
            )
        else:
            made = qnn.QuantLinear(layer.in_features, layer.out_features, **options)
        made.load_state_dict(layer.state_dict(), strict=False)
        setattr(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], made)
    return model


def variants(names: list[str], *, is_compiled: bool) -> Iterator[tuple[str, Step]]:
    """Every variant by name; the float ones are what others are compared with."""
    torch.manual_seed(0)
    image, label = torch.randn(BATCH, 3, 32, 32), torch.randint(0, 10, (BATCH,))
    networks = {"float": resnet20().train()}
    for method in names:
        if method == "brevitas":
            networks[method] = brevitas_network(networks["float"])
        else:
            networks[method] = prepare(networks["float"], method=method, weight_bits=BITS, activation_bits=BITS, sample=image).train()
    for kind, network in networks.items():
        for name, layout in FORMATS.items():
            if is_compiled and name == "contiguous":
                continue
            model = copy.deepcopy(network).to(memory_format=layout)
            x = image.contiguous(memory_format=layout)
            yield f"{kind}, {name}", Step(model, x, label, is_compiled=is_compiled)
            if kind == "lsq" and name == "channels-last" and not is_compiled:
                yield f"{kind} composed, {name}", Step(copy.deepcopy(model), x, label, is_fused=False)
                policy = BitPolicy.uniform(BITS, BITS, first_last=None).keep_float("conv").keep_float("fc").keep_float("*downsample*")
                fewer = prepare(networks["float"], method=kind, policy=policy, sample=image).train()
                yield f"{kind} 3x3 only, {name}", Step(fewer.to(memory_format=layout), x, label)


def measure(names: list[str], rounds: int, *, is_compiled: bool) -> Row:
    """Milliseconds of a step and its ratio to the float step, for each variant."""
    steps: dict[str, Step] = {}
    seconds: dict[str, float] = {}
    for name, step in variants(names, is_compiled=is_compiled):
        steps[name] = step
        start = time.perf_counter()
        step.run()
        seconds[name] = time.perf_counter() - start
        step.run()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step.run()
            times[name].append(1000 * (time.perf_counter() - start))
    rows: Row = {}
    for name, mine in times.items():
        floats = times[f"float, {name.rpartition(', ')[2]}"]
        row: Row = {"ms": round(statistics.median(mine), 1), "over_float": round(statistics.median(map(_ratio, mine, floats)), 3)}
        brevitas = times.get(f"brevitas, {name.rpartition(', ')[2]}")
        if brevitas is not None and not name.startswith(("float", "brevitas")):
            row["over_brevitas"] = round(statistics.median(map(_ratio, mine, brevitas)), 3)
        if is_compiled:
            row["first_step_s"] = round(seconds[name], 1)
        rows[name] = row
        print(f"{'compiled ' if is_compiled else ''}{name}: {json.dumps(row)}", flush=True)
    return rows


def profile(names: list[str], rounds: int) -> Row:
    """Milliseconds of each operator in a channels-last step, without those it calls; the least of all rounds, largest first."""
    steps = {
        name: step for name, step in variants(names, is_compiled=False) if name in {f"{kind}, channels-last" for kind in ("float", *names)}
    }
    least: dict[str, dict[str, float]] = {name: {} for name in steps}
    for step in steps.values():
        step.run()
    for _ in range(rounds):
        for name, step in steps.items():
            for operator, ms in _operator_times(step).items():
                least[name][operator] = min(ms, least[name].get(operator, ms))
    floats = least["float, channels-last"]
    rows: Row = {}
    for name, times in least.items():
        shown, total = sorted(times, key=lambda key: -times[key])[:SHOWN], sum(times.values())
        rest = total - sum(times[key] for key in shown)
        rows[name] = {**{key: round(times[key], 2) for key in shown}, "all others": round(rest, 2), "sum": round(total, 2)}
        print(f"{name}: {total:.1f} ms in operators, {total / sum(floats.values()):.3f} of float")
        for key in shown:
            print(
                f"  {times[key]:8.2f} ms  {100 * times[key] / total:5.1f} %  {times[key] - floats.get(key, 0.0):+8.2f} ms to float  {key}"
            )
    return rows


def _operator_times(step: Step) -> dict[str, float]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        step.run()
    times: dict[str, float] = {}
    for event in found.key_averages():
        kind = "autograd engine" if event.key.startswith("autograd::engine") else event.key
        times[kind] = times.get(kind, 0.0) + event.self_cpu_time_total / 1000
    return times


def _ratio(a: float, b: float) -> float:
    return a / b


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", default=METHODS)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--core", type=int, default=0, help="the processor core to run on")
    parser.add_argument("--compile", action="store_true", help="time whole networks under torch.compile (channels-last), and only those")
    parser.add_argument("--profile", action="store_true", help="time operators and not whole steps")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {args.core})
    torch.set_num_threads(1)
    results: Row = json.loads(args.out.read_text()) if args.out.exists() else {}
    results |= {"batch": BATCH, "bits": BITS, "fused kernels": are_available()}
    names, command = list(args.methods), " ".join(["python", "benchmarks/train_step.py", *sys.argv[1:]])
    if args.profile:
        results["profile"] = {"machine": machine(), "command": command, "rounds": args.rounds, **profile(names, args.rounds)}
    elif args.compile:
        results["compiled"] = {
            "machine": machine(),
            "command": command,
            "rounds": args.rounds,
            **measure(names, args.rounds, is_compiled=True),
        }
    else:
        if importlib.util.find_spec("brevitas") is not None:
            names.append("brevitas")
        rows = measure(names, args.rounds, is_compiled=False)
        results["eager"] = {"machine": machine(), "command": command, "rounds": args.rounds, **rows}
        lsq = rows.get("lsq, channels-last")
        if isinstance(lsq, dict):
            reached = [f"{limit} {'reached' if lsq['over_float'] <= limit else 'missed'}" for limit in (GOAL, GATE)]
            print(f"lsq over float, channels-last: {lsq['over_float']}; goal {reached[0]}, gate {reached[1]}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
