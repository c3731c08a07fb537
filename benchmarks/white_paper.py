"""What the default method costs: learned rounding that follows the size of the layer, against a fixed number of steps.

    python benchmarks/white_paper.py                               # all networks; the fixed 10,000 steps take an hour
    python benchmarks/white_paper.py digits --fixed 10000          # one network
    python benchmarks/white_paper.py resnet8 resnet20 --fixed 1000

4-bit weights, 8-bit activations, 256 calibration images, one thread. SQNR of the outputs in decibels, over test images that calibration did
not see (500 of Fashion-MNIST, all of digits); processor seconds of the whole call, which do not depend on what else runs. Networks that
are not run keep their rows in benchmarks/results/white_paper.json.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from torch import Tensor, nn

import lowbit
from lowbit.data import load_data
from lowbit.models import load_default, load_model

HERE = Path(__file__).parent
WEIGHTS = {"resnet8": HERE / "starts" / "resnet8_fashion.safetensors", "resnet20": HERE / "weights" / "resnet20_fashion.safetensors"}
NETWORKS = ("digits", *WEIGHTS)
CALIBRATION, TEST, BATCH = 256, 500, 32
Row = dict[str, object]


def images(name: str, split: str, limit: int) -> Tensor:
    data = load_data(name, split=split).dataset
    return torch.stack([data[index][0] for index in range(min(limit, len(data)))])


def network(name: str) -> tuple[nn.Module, str]:
    """A trained network and the data it was trained on."""
    if name == "digits":
        return load_default(), "digits"
    return load_model(name, WEIGHTS[name], in_channels=1).eval(), "fashion-mnist"


@torch.no_grad()
def sqnr_db(model: nn.Module, quantized: nn.Module, test: Tensor) -> float:
    expected, found = (torch.cat([net(x) for x in test.split(100)]) for net in (model, quantized))
    return float(10 * torch.log10(expected.square().sum() / (expected - found).square().sum()))


def measure(name: str, fixed: int, seed: int) -> Row:
    model, source = network(name)
    calibration, test = list(images(source, "train", CALIBRATION).split(BATCH)), images(source, "test", TEST)
    row: Row = {"seed": seed}
    for kind, options in (("by size", {}), (f"fixed {fixed}", {"iterations": fixed, "settled": None})):
        start = time.process_time()
        quantized = lowbit.quantize(model, weight_bits=4, calibration=calibration, seed=seed, **options)
        seconds = time.process_time() - start
        row[kind] = {"sqnr_db": round(sqnr_db(model, quantized, test), 2), "cpu_seconds": round(seconds, 1)}
        print(f"{name}, {kind}: {row[kind]}", flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=NETWORKS, help=f"any of {', '.join(NETWORKS)}")
    parser.add_argument("--fixed", type=int, default=10_000, help="steps to compare with")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "white_paper.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results: Row = json.loads(args.out.read_text()) if args.out.exists() else {}
    for name in args.networks:
        results[name] = measure(name, args.fixed, args.seed)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
