"""Every training method on equal terms: one small network, one float start, one budget, one order of the data.

    python benchmarks/qat.py                              # all methods and bits; about an hour on one core
    python benchmarks/qat.py --methods lsq ewgs --bits 2  # some; the others keep their rows
    python benchmarks/qat.py --methods pact+sawb          # a method with options of its own, see VARIANTS
    python benchmarks/qat.py --network resnet20 --images 60000 --epochs 6 --methods lsq ewgs --bits 2 --out benchmarks/results/qat_long.json

A resnet8 of width 16 was trained in float on 12,000 Fashion-MNIST images (starts/); each method trains on from there for three
epochs: SGD 0.02 with Nesterov momentum and cosine decay, batch 128, shifts and flips, first and last layer at 8 bits. Accuracy is
on all 10,000 test images. "round_to_nearest" is the float start rounded after the fact. Each run is a process of its own with one
thread; memory is its peak above the process before training. Results: benchmarks/results/qat.json, row by row, so that a stopped
run goes on where it was. "float" in a row is the accuracy of its start, which is chance with --from-scratch.

Binary networks, all with --network resnet20 --bits 1: qat_binary.json (--images 60000 --epochs 3), qat_binary_adam.json (--images 12000 --epochs 4
--optimizer adam --learning-rate 0.002) and qat_binary_scratch.json (the same --from-scratch).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import multiprocessing.connection
import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

import lowbit
from lowbit.data import load_data
from lowbit.data.augment import flip, pad_crop
from lowbit.data.image_data import TensorImages
from lowbit.models import load_model
from lowbit.qat import Classification, OptimizerSpec, Recipe, TrainRun
from lowbit.qat.prepare import method_of, prepare
from lowbit.registry import list_methods

HERE = Path(__file__).parent
BATCH, SEED, FLOAT_EPOCHS = 128, 0, 30
VARIANTS: dict[str, tuple[str, dict[str, object]]] = {
    "pact+sawb": ("pact", {"weights": "sawb", "clip_init": "least_error"}),
    "pact+least_error": ("pact", {"clip_init": "least_error"}),
    "xnor_net+size": ("xnor_net", {"multiply_by_size": True}),
    "react_net+quarter": ("react_net", {"real_weights": 0.25}),
    "react_net+one_step": ("react_net", {"real_weights": 0.0}),
}
Row = dict[str, object]


class Data:
    """Training batches in a fixed random order with shifts and flips, and the test images."""

    def __init__(self, images: int) -> None:
        train, test = (load_data("fashion-mnist", split=split).dataset for split in ("train", "test"))
        assert isinstance(train, TensorImages) and isinstance(test, TensorImages) and train.labels is not None and test.labels is not None
        self._train, self.labels = train.normalized(train.images[:images]), train.labels[:images]
        self._black = float(train.normalized(torch.zeros(1, 1, 1, dtype=torch.uint8)))
        self.test, self.test_labels = test.normalized(test.images), test.labels

    @property
    def steps(self) -> int:
        """Batches of an epoch."""
        return len(self.labels) // BATCH

    def epoch(self, index: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of epoch ``index``, the same in every run."""
        generator = torch.Generator().manual_seed(1000 * SEED + index)
        order = torch.randperm(len(self.labels), generator=generator)[: self.steps * BATCH]
        for chosen in order.split(BATCH):
            yield flip(pad_crop(self._train[chosen], 2, generator, fill=self._black), generator), self.labels[chosen]

    @torch.no_grad()
    def accuracy(self, model: nn.Module) -> float:
        """Percent of the test images that are classified rightly, in evaluation mode."""
        model.eval()
        right = sum(int((model(x).argmax(1) == y).sum()) for x, y in zip(self.test.split(500), self.test_labels.split(500), strict=True))
        model.train()
        return round(100 * right / len(self.test_labels), 2)


def start_of(args: argparse.Namespace) -> nn.Module:
    """The network that all methods start from: one trained in float, or one with random weights, the same for all."""
    if args.from_scratch:
        torch.manual_seed(SEED)
        return load_model(args.network, in_channels=1, num_classes=10)
    return float_start(args.network, args.images)


def float_start(network: str, images: int) -> nn.Module:
    """A float network; trained once and kept in starts/ (resnet20: weights/)."""
    folder = HERE / ("weights" if network == "resnet20" else "starts")
    path = folder / f"{network}_fashion.safetensors"
    torch.manual_seed(SEED)
    model = load_model(network, path if path.exists() else None, in_channels=1, num_classes=10)
    if path.exists():
        return model
    data = Data(images)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=FLOAT_EPOCHS * data.steps, pct_start=0.1)
    for epoch in range(FLOAT_EPOCHS):
        for x, y in data.epoch(-1 - epoch):
            optimizer.zero_grad()
            functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            schedule.step()
        print(f"float epoch {epoch + 1}: {data.accuracy(model)} %", flush=True)
    folder.mkdir(exist_ok=True)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path)
    return model


def peak_mib() -> float:
    """Peak memory of this process so far."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def train(
    pipe: multiprocessing.connection.Connection, args: argparse.Namespace, method: str, weight_bits: int, activation_bits: int | None
) -> None:
    """One run; sends its row."""
    torch.set_num_threads(1)
    model, data = start_of(args), Data(args.images)
    if method == "round_to_nearest":
        calibration = [x for (x, _), _ in zip(data.epoch(0), range(4), strict=False)]
        rounded = lowbit.quantize(model, method=method, weight_bits=weight_bits, activation_bits=activation_bits, calibration=calibration)
        pipe.send({"accuracy": data.accuracy(rounded)})
        return
    before = peak_mib()
    sample = next(iter(data.epoch(0)))[0]
    name, options = VARIANTS.get(method, (method, {}))
    qat = prepare(model, method=name, weight_bits=weight_bits, activation_bits=activation_bits, sample=sample, seed=SEED, **options).train()
    optimizer = OptimizerSpec(args.optimizer, args.learning_rate, nesterov=True)
    run = TrainRun(
        qat,
        method_of(qat),
        Classification(),
        Recipe(args.epochs, BATCH, optimizer, seed=SEED),
        data.steps,
        batches=lambda count: [batch for batch, _ in zip(data.epoch(0), range(count), strict=False)],
    )
    seconds = 0.0
    for epoch in run.each_epoch():
        start = time.perf_counter()
        for batch in data.epoch(epoch):
            run.before_step()
            run.loss(batch).backward()
            run.after_backward()
            run.optimizer_step()
            run.after_step()
        seconds += time.perf_counter() - start
    steps = run.epochs * data.steps
    pipe.send(
        {
            "accuracy": data.accuracy(qat),
            "ms_per_step": round(1000 * seconds / steps, 1),
            "peak_mib": round(peak_mib() - before),
            "steps": steps,
        }
    )


def in_new_process(*arguments: object) -> Row:
    """What ``train`` sends from a process of its own; an ``error`` where it sends nothing."""
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=train, args=(send, *arguments))
    process.start()
    send.close()
    try:
        return dict(receive.recv())
    except EOFError:
        return {"error": "the run failed"}
    finally:
        process.join()


def settings(args: argparse.Namespace) -> Iterator[tuple[str, int, int | None]]:
    """Method, weight bits and activation bits of every run, baselines first."""
    names = args.methods or ["round_to_nearest", "qat_baseline", "lsq", *(i.name for i in list_methods(kind="training")), *VARIANTS]
    for name in dict.fromkeys(names):
        info = lowbit.get_method(VARIANTS.get(name, (name, {}))[0])
        for bits in args.bits:
            if bits in info.weight_bits and not args.no_weight_only:
                yield name, bits, None
            if bits in info.weight_bits and info.activation_bits is not None and bits in info.activation_bits:
                yield name, bits, bits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="*", help="default: all")
    parser.add_argument("--bits", type=int, nargs="*", default=[1, 2, 3, 4], help="of weights, alone and with as many of activations")
    parser.add_argument("--no-weight-only", action="store_true", help="only weights and activations together")
    parser.add_argument("--network", default="resnet8")
    parser.add_argument("--images", type=int, default=12_000)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--learning-rate", type=float, default=0.02)
    parser.add_argument("--optimizer", choices=["sgd", "adam"], default="sgd")
    parser.add_argument("--from-scratch", action="store_true", help="start from random weights, as many papers do")
    parser.add_argument("--fresh", action="store_true", help="run again what has a row already")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "qat.json")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    results = json.loads(args.out.read_text()) if args.out.exists() else {"rows": {}}
    results["setting"] = {key: getattr(args, key) for key in ("network", "images", "epochs", "learning_rate", "optimizer", "from_scratch")}
    results["float"] = Data(args.images).accuracy(start_of(args))
    print(f"float: {results['float']} %")
    for method, weight_bits, activation_bits in settings(args):
        key = f"{method} W{weight_bits}A{activation_bits or 32}"
        if key in results["rows"] and not args.fresh and "error" not in results["rows"][key]:
            continue
        results["rows"][key] = {**in_new_process(args, method, weight_bits, activation_bits), "float": results["float"]}
        print(key, results["rows"][key], flush=True)
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
