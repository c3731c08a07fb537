"""What samples without data cost: zeroq against the same loop written out, in time and memory; and how much samples of dsg and zeroq differ.

    python benchmarks/synthesis.py                       # all parts
    python benchmarks/synthesis.py time memory           # some parts: time, memory (Linux), spread

EfficientNet-Lite0 needs the packages that benchmarks/subjects.py names; without them it is left out. One thread; the two loops take turns, step
by step, in one process, on the same start. A pass is one forward and one backward pass to the inputs of the same batch without any statistics.
Memory is the most that a process of its own held above what it held before. Results go to benchmarks/results/synthesis.json, the spread also to
synthesis_spread.svg; parts that are not run keep their rows.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from subjects import lite0_network
from timing import machine
from torch import Tensor, nn

import lowbit
from lowbit.errors import DataError
from lowbit.inputs import Inputs
from lowbit.methods.zero_shot.zeroq import ZeroqSamples
from lowbit.models import load_model
from lowbit.progress import Progress, Stage
from lowbit.report import svg
from lowbit.synthesis.problem import make_problem

FOLDER = Path(__file__).parent
RESULTS, PLOT = FOLDER / "results" / "synthesis.json", FOLDER / "results" / "synthesis_spread.svg"
COUNT, PAPER_ITERATIONS = 64, 500
TURNS = {"resnet20": 30, "EfficientNet-Lite0": 3}  # measured steps
WARMUP = 1
BATCHES = (16, 64)
SPREAD_ITERATIONS = 500
Row = dict[str, object]


def resnet20() -> tuple[nn.Module, tuple[int, ...]]:
    """The network trained on Fashion-MNIST."""
    return load_model("resnet20", FOLDER / "weights" / "resnet20_fashion.safetensors", in_channels=1).eval(), (1, 28, 28)


def efficientnet() -> tuple[nn.Module, tuple[int, ...]]:
    """The network trained on ImageNet."""
    return lite0_network(), (3, 224, 224)


NETWORKS: dict[str, Callable[[], tuple[nn.Module, tuple[int, ...]]]] = {"resnet20": resnet20, "EfficientNet-Lite0": efficientnet}


class Steps(Progress):
    """Notes how long each step of the descent takes, and runs ``between`` after it."""

    def __init__(self, between: Callable[[], None]) -> None:
        super().__init__(quiet=True)
        self.seconds: list[float] = []
        self.between = between

    @contextmanager
    def stage(self, name: str, total: float, *, done: int = 0) -> Iterator[Stage]:
        """A stage whose ``advance`` ends a step."""
        with super().stage(name, total, done=done) as stage:
            start = time.perf_counter()

            def advance(amount: float = 1, note: str = "") -> None:
                nonlocal start
                self.seconds.append(time.perf_counter() - start)
                self.between()
                start = time.perf_counter()

            stage.advance = advance  # type: ignore[method-assign]
            yield stage


def bare_loop(model: nn.Module, x: Tensor) -> Iterator[float]:
    """The loss before each step of the same descent, with plain hooks and nothing else: what one would write for one network."""
    found: list[tuple[Tensor, Tensor]] = []
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    targets = [(norm.running_mean, (norm.running_var + 1e-6).sqrt()) for norm in norms]  # type: ignore[operator]

    def note(_norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        values = args[0].flatten(2)
        found.append((values.mean(2), (values.var(2) + 1e-6).sqrt()))

    for norm in norms:
        norm.register_forward_pre_hook(note)
    model.requires_grad_(False)
    optimizer = torch.optim.Adam([x.requires_grad_()], 0.5)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=100, min_lr=1e-4)
    while True:
        found.clear()
        optimizer.zero_grad()
        model(x)
        pixels = x.flatten(2)
        loss = (pixels.mean(2).square().sum() + ((pixels.var(2) + 1e-6).sqrt() - 1).square().sum()) / len(x)
        for (mean, std), (wanted, kept) in zip(found, targets, strict=True):
            loss = loss + ((mean - wanted).square().sum() + (std - kept).square().sum()) / len(x)
        loss.backward()
        optimizer.step()
        schedule.step(loss.item())
        yield loss.item()


def passes(model: nn.Module, x: Tensor) -> Iterator[None]:
    """Forward and backward passes to the inputs."""
    model.requires_grad_(False)
    leaf = x.clone().requires_grad_()
    while True:
        torch.autograd.grad(model(leaf).sum(), leaf)
        yield


def timed(name: str) -> Row:
    """Seconds of a step of lowbit, of the bare loop and of a pass, turn by turn."""
    model, shape = NETWORKS[name]()
    turns = TURNS[name] + WARMUP
    problem = make_problem(model, Inputs((torch.zeros(1, *shape),)), count=COUNT)
    method = ZeroqSamples(iterations=turns)
    x = method.first_inputs(problem).args[0].clone()
    bare, single = bare_loop(NETWORKS[name]()[0], x.clone()), passes(NETWORKS[name]()[0], x)
    seconds: dict[str, list[float]] = {"bare loop": [], "pass": []}
    losses = []

    def others() -> None:
        start = time.perf_counter()
        losses.append(next(bare))
        middle = time.perf_counter()
        next(single)
        seconds["bare loop"].append(middle - start)
        seconds["pass"].append(time.perf_counter() - middle)

    steps = Steps(others)
    made = method.synthesize(replace(problem, progress=steps))
    torch.testing.assert_close(torch.tensor(made.losses), torch.tensor(losses), rtol=1e-2, atol=1e-2)
    seconds["lowbit"] = steps.seconds
    seconds = {key: values[WARMUP:] for key, values in seconds.items()}
    medians = {key: statistics.median(values) for key, values in seconds.items()}

    def ratio(other: str) -> float:
        return round(statistics.median(a / b for a, b in zip(seconds["lowbit"], seconds[other], strict=True)), 3)

    return {
        "samples": COUNT,
        "steps measured": TURNS[name],
        "seconds of a step": {key: round(value, 4) for key, value in medians.items()},
        "lowbit / bare loop": ratio("bare loop"),
        "passes of a step": ratio("pass"),
        f"seconds of {PAPER_ITERATIONS} steps, by these": round(PAPER_ITERATIONS * medians["lowbit"], 1),
        "loss, lowbit and bare loop after the last step": [made.losses[-1], losses[-1]],
    }


def _peak(name: str, batch_size: int) -> float:
    torch.set_num_threads(1)
    model, shape = NETWORKS[name]()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _kilobytes("VmRSS")
    lowbit.synthesize(model, method="zeroq", shape=shape, count=COUNT, iterations=2, batch_size=batch_size, progress=False)
    return (_kilobytes("VmHWM") - before) / 1024


def _kilobytes(entry: str) -> int:
    """An entry of this process in Linux' own books."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(entry))


def memory(name: str) -> Row:
    """Peak memory of two steps, in MiB, by the size of batches."""
    found = {}
    for size in BATCHES:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            found[f"batches of {size}"] = round(pool.submit(_peak, name, size).result())
    return {"samples": COUNT, "MiB above the network": found}


def spread() -> Row:
    """The spread of samples by dsg and by zeroq from one start along the norms of resnet20, and the plot of it."""
    model, shape = resnet20()
    settings = {"shape": shape, "count": 21, "iterations": SPREAD_ITERATIONS, "start": "gaussian"}
    data = {name: lowbit.synthesize(model, method=name, progress=False, **settings) for name in ("dsg", "zeroq")}  # type: ignore[arg-type]
    found = {name: [round(entry.samples.spread or 0.0, 4) for entry in made.statistics] for name, made in data.items()}
    noise = [round(entry.noise.spread or 0.0, 4) for entry in data["dsg"].statistics]
    names = [entry.norm for entry in data["dsg"].statistics]
    series = [svg.Series("dsg", "main", found["dsg"]), svg.Series("zeroq", "second", found["zeroq"]), svg.Series("noise", "noise", noise)]
    drawn = svg.curves(series, names, None, unit="spread", format_value=lambda value: f"{value:.3f}", span=(0.0, 1.1 * max(noise)),
                       below=[str(place) for place in range(1, len(names) + 1)], title="Spread of samples along the norms of resnet20")  # fmt: skip
    legend = "".join(svg.label(70 + 90 * place, 14, one.name, "start", f"name {one.class_}") for place, one in enumerate(series))
    PLOT.write_text(
        str(drawn).replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1).replace("</svg>", f"{legend}<style>{STYLE}</style></svg>")
    )
    ratios = [a / b for a, b in zip(found["dsg"], found["zeroq"], strict=True)]
    return {
        "samples": 21,
        "iterations": SPREAD_ITERATIONS,
        "norms": names,
        **found,
        "noise": noise,
        "dsg / zeroq, median": round(statistics.median(ratios), 2),
    }


STYLE = (
    "text{font:11px sans-serif;fill:#5d6673}.grid{stroke:#e1e4e9}.curve{fill:none;stroke-width:1.5}"
    ".curve.main{stroke:#2f66d0}.curve.second{stroke:#c05a0a}.curve.noise{stroke:#7d8896}"
    "circle.main,text.main{fill:#2f66d0}circle.second,text.second{fill:#c05a0a}circle.noise,text.noise{fill:#7d8896}"
)


def main() -> None:
    """Run the parts and write their rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="time, memory, spread; default: all")
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for part in asked.parts or ("time", "memory", "spread"):
        measured: dict[str, Callable[[], Row]] = {"spread": spread} if part == "spread" else {}
        if part in ("time", "memory"):
            measured = {
                f"{part}, {name}": (lambda name=name, part=part: {"time": timed, "memory": memory}[part](name)) for name in asked.networks
            }  # type: ignore[misc]
        for key, run in measured.items():
            try:
                rows[key] = {**run(), "machine": machine(), "torch": torch.__version__}
            except DataError as error:
                print(f"{key}: {error}")
                continue
            print(key, json.dumps(rows[key]), flush=True)
            RESULTS.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
