"""Whether steps, calibration and compiled networks cost more than in an earlier state of the source.

    git worktree add ../earlier 35bdeb9
    python benchmarks/states.py ../earlier              # about five minutes

One process for each state; they take turns call by call, each call is timed by the processor time of its process, and what is compared are
the least times. One thread each. Beside the time stands the number of instructions of Python's interpreter in one call, which no other work
on the machine changes: what grew there is our own code.
Results: benchmarks/results/states.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

RESULTS = Path(__file__).parent / "results" / "states.json"
LIMIT = 1.03  # of the time in the earlier state
Call = Callable[[], object]


def training_step(method: str, batch: int) -> Call:
    """A step of ResNet-20 on random images of CIFAR's shape, channels-last: hooks, loss, backward pass and SGD."""
    import lowbit
    from lowbit.models.resnet import resnet20

    x, y = torch.randn(batch, 3, 32, 32), torch.randint(0, 10, (batch,))
    network: nn.Module = resnet20().train()
    if method != "float":
        network = lowbit.prepare(network, method=method, weight_bits=4, activation_bits=4, sample=x).train()
    network, x = network.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    if method == "float":
        own = torch.optim.SGD(network.parameters(), lr=1e-4, momentum=0.9)

        def step() -> None:
            own.zero_grad()
            functional.cross_entropy(network(x), y).backward()
            own.step()

        return step
    run = lowbit.training(network, steps_per_epoch=10**6, epochs=2)
    optimizer = torch.optim.SGD(run.parameter_groups(learning_rate=1e-4), momentum=0.9)

    def quantized_step() -> None:
        run.before_step(optimizer)
        run.loss((x, y)).backward()
        run.after_backward()
        optimizer.step()
        run.after_step()

    return quantized_step


def calibration() -> Call:
    """Rounding ResNet-20 to nearest, activations of 256 images of 28 x 28 included."""
    import lowbit
    from lowbit.models.resnet import resnet20

    network, batches = resnet20(in_channels=1).eval(), [torch.randn(32, 1, 28, 28) for _ in range(8)]
    return lambda: lowbit.quantize(network, method="round_to_nearest", calibration=batches)


def binary_network(batch: int, calls: int) -> Call:
    """``calls`` calls of a compiled ResNet-20 whose weights and activations are signs."""
    import lowbit
    from lowbit.models import load_model

    x = torch.randn(max(batch, 8), 1, 28, 28)
    network = lowbit.prepare(
        load_model("bireal_resnet20", in_channels=1), method="bi_real_net", weight_bits=1, activation_bits=1, sample=x[:8]
    ).eval()
    images = x[:batch].contiguous()
    compiled = lowbit.compile_runtime(network, sample=images)

    def run() -> None:
        with torch.no_grad():
            for _ in range(calls):
                compiled(images)

    return run


CASES: dict[str, Callable[[], Call]] = {
    "float step, batch 64": lambda: training_step("float", 64),
    "lsq step, batch 64": lambda: training_step("lsq", 64),
    "lsq step, batch 8": lambda: training_step("lsq", 8),
    "pact step, batch 64": lambda: training_step("pact", 64),
    "dorefa step, batch 64": lambda: training_step("dorefa", 64),
    "round_to_nearest": calibration,
    "binary resnet20, batch 1": lambda: binary_network(1, 20),
    "binary resnet20, batch 32": lambda: binary_network(32, 3),
}


def instructions(call: Call) -> int:
    """Instructions of Python's interpreter in one call, in this thread."""
    count = 0

    def trace(frame: object, event: str, _: object) -> Callable[..., object]:
        nonlocal count
        frame.f_trace_opcodes = True  # type: ignore[attr-defined]
        count += event == "opcode"
        return trace

    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(None)
    return count


def serve() -> None:
    """Answer the name of a case by the seconds of one call, and ``count NAME`` by its instructions."""
    torch.set_num_threads(1)
    made: dict[str, Call] = {}
    replies, sys.stdout = sys.stdout, sys.stderr  # nothing else may be written between the replies
    for line in sys.stdin:
        name = line.strip().removeprefix("count ")
        if name not in made:
            torch.manual_seed(0)
            made[name] = CASES[name]()
            for _ in range(3):
                made[name]()
        if line.startswith("count "):
            reply: float = instructions(made[name])
        else:
            start = time.process_time()
            made[name]()
            reply = time.process_time() - start
        print(reply, file=replies, flush=True)


class State:
    """A process that runs one state of the source."""

    def __init__(self, source: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": str(source.resolve() / "src"), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(Path(__file__).resolve()), "--serve"]
        self.process = subprocess.Popen(
            command, cwd=source, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def ask(self, question: str) -> float:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{question}\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())


def commit_of(source: Path) -> str:
    command = ["git", "-C", str(source), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("earlier", nargs="?", type=Path, help="folder of the earlier state")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES), metavar="CASE")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve()
        return
    if args.earlier is None:
        parser.error("name the folder of the earlier state")
    sources = args.earlier, Path(__file__).resolve().parents[1]
    states = [State(source) for source in sources]
    rows: dict[str, object] = {}
    for case in args.cases:
        times = [[state.ask(case) for state in states] for _ in range(args.rounds)]
        least = [1000 * min(column) for column in zip(*times, strict=True)]
        counts = [int(state.ask(f"count {case}")) for state in states]
        ratio = least[1] / least[0]
        rows[case] = {
            "earlier_ms": round(least[0], 2),
            "now_ms": round(least[1], 2),
            "ratio": round(ratio, 3),
            "median_ratio": round(statistics.median(now / earlier for earlier, now in times), 3),
            "instructions": counts,
        }
        print(f"{case}: {json.dumps(rows[case])}{'' if ratio <= LIMIT else f' over {LIMIT}'}", flush=True)
    results = {
        "command": " ".join(["python", "benchmarks/states.py", "EARLIER", *sys.argv[2:]]),
        "states": [commit_of(source) for source in sources],
        "torch": torch.__version__,
        "rounds": args.rounds,
        "load at the end": round(os.getloadavg()[0], 1),
        "cases": rows,
    }
    args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
