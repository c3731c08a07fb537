"""What a training step costs in each phase of a procedure, and of a network of several widths, beside a step of its base method.

    python benchmarks/procedure_step.py                   # some minutes
    python benchmarks/procedure_step.py qkd "adabits 8,4,2"

ResNet-20 on random images of CIFAR's shape, batch 128, one pinned thread, in the loop that users write themselves, with the least epochs that
the procedure's phases take. Each turn runs one step of the procedure and one of its base method (weights and activations of 2 bits, where the
method has them); a ratio is the median over the turns of a phase, in processor time. Networks of several widths are compared with the same method
at the highest of them alone. Results: benchmarks/results/procedure_step.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from timing import machine
from torch import Tensor

import lowbit
from lowbit.models.resnet import resnet20
from lowbit.qat.loops.manual import ManualLoop

RESULTS = Path(__file__).parent / "results" / "procedure_step.json"
BATCH = 128


@dataclass(frozen=True)
class Pair:
    """What is timed, and what it is compared with: arguments of ``lowbit.prepare``."""

    asked: dict[str, object]
    base: dict[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.base:
            self.base.update(self.asked, procedure=None)


TWO = {"weight_bits": 2, "activation_bits": 2}
WEIGHTS = {"weight_bits": 5, "activation_bits": None}
PAIRS = {
    "effective_lowbit": Pair({"method": "effective_lowbit", **TWO}, {"method": "dorefa", **TWO}),
    "qkd": Pair({"method": "lsq", "procedure": "qkd", **TWO}),
    "fp_auxiliary": Pair({"method": "fp_auxiliary", **TWO}, {"method": "dorefa", **TWO}),
    "profit": Pair({"method": "lsq", "procedure": "profit", **TWO}),
    "inq": Pair({"method": "inq", **WEIGHTS}, {"method": "lsq", **WEIGHTS}),
    "adabits 8,4": Pair({"method": "adabits", "bits": [8, 4]}, {"method": "adabits", "bits": [8]}),
    "adabits 8,4,2": Pair({"method": "adabits", "bits": [8, 4, 2]}, {"method": "adabits", "bits": [8]}),
    "sp_nets 8,4,2": Pair({"method": "sp_nets", "bits": [8, 4, 2]}, {"method": "sp_nets", "bits": [8]}),
    "bit_mixer 4,3,2": Pair({"method": "bit_mixer", "bits": [4, 3, 2]}, {"method": "bit_mixer", "bits": [4]}),
}


class Loop:
    """A loop of steps on one batch."""

    def __init__(self, asked: dict[str, object], steps: int, epochs: int | None = None) -> None:
        torch.manual_seed(0)
        image, label = torch.randn(BATCH, 3, 32, 32), torch.randint(0, 10, (BATCH,))
        network = resnet20().train()
        model = lowbit.prepare(network, sample=image, **asked)  # type: ignore[arg-type]
        least = len(model.lowbit_method.phases(lowbit.Recipe(epochs=1000)))  # type: ignore[operator, union-attr]
        self.run: ManualLoop = lowbit.training(model, steps_per_epoch=steps, epochs=epochs or least, float_network=network)
        self._optimizer = torch.optim.SGD(self.run.parameter_groups(learning_rate=1e-3), momentum=0.9)
        self._batch: tuple[Tensor, Tensor] = image, label

    def step(self) -> float:
        """Processor seconds of one step, which other work on the machine hardly changes."""
        start = time.process_time()
        self.run.before_step(self._optimizer)
        for loss in self.run.losses(self._batch):
            loss.backward()
        self.run.after_backward()
        self._optimizer.step()
        self.run.after_step()
        return time.process_time() - start


def ratios(pair: Pair, steps: int) -> dict[str, float]:
    """The ratio of a step to one of the base, by phase; the first step of each phase is not counted."""
    loop = Loop(pair.asked, steps)
    total = loop.run.total_steps
    base = Loop(pair.base, total, epochs=1)
    found: dict[str, list[float]] = {}
    for _ in range(total):
        mine, other = loop.step(), base.step()
        found.setdefault(loop.run.phase.name, []).append(mine / other)
    return {name: round(statistics.median(own[1:]), 2) for name, own in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(PAIRS), help=f"any of {', '.join(PAIRS)}")
    parser.add_argument("--steps", type=int, default=8, help="steps of each epoch, one uncounted")
    parser.add_argument("--core", type=int, default=0, help="the processor core to run on")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {args.core})
    torch.set_num_threads(1)
    rows = {}
    for name in args.names:
        rows[name] = ratios(PAIRS[name], args.steps)
        print(f"{name}: {json.dumps(rows[name])}", flush=True)
    command = " ".join(["python", "benchmarks/procedure_step.py", *sys.argv[1:]])
    args.out.write_text(json.dumps({"command": command, "machine": machine(), "over_base": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
