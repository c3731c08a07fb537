"""A resnet20 trained on Fashion-MNIST, quantized after training: bits x methods.

    python benchmarks/fashion.py                       # all settings on this machine
    python benchmarks/fashion.py --device cuda --iterations 5000

Weights: benchmarks/weights/resnet20_fashion.safetensors (scripts/train_fashion.py made them). Accuracy is on the 10,000 test
images; calibration sees 1,024 training images without their labels. First and last layer stay at 8 bits.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import torch
from torch import Tensor, nn

import lowbit
from lowbit.data import load_data
from lowbit.models import load_model
from lowbit.progress import Progress

HERE = Path(__file__).parent
SETTINGS = ((8, 8), (4, 8), (4, 4), (3, 4), (2, 4))
METHODS = ("round_to_nearest", "dfq", "lbq", "adaround", "brecq", "white_paper")
LEARNED = ("adaround", "brecq", "white_paper")


def tensors(split: str, root: Path | None, limit: int | None = None) -> tuple[Tensor, Tensor]:
    data = load_data("fashion-mnist", root=root, split=split).dataset
    count = len(data) if limit is None else limit
    pairs = [data[index] for index in range(count)]
    return torch.stack([x for x, _ in pairs]), torch.tensor([int(y) for _, y in pairs])


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Percent of the test images that are classified rightly."""
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in zip(images.split(500), labels.split(500), strict=True))
    return round(100 * right / len(labels), 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--data", type=Path, help="folder with the Fashion-MNIST files")
    parser.add_argument("--iterations", type=int, default=1000, help="of each unit in adaround and brecq")
    parser.add_argument("--methods", nargs="*", default=METHODS, help="the others keep their rows")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "fashion.json")
    args = parser.parse_args()
    model = load_model("resnet20", HERE / "weights" / "resnet20_fashion.safetensors", in_channels=1).to(args.device).eval()
    images, labels = (t.to(args.device) for t in tensors("test", args.data))
    calibration = list(tensors("train", args.data, limit=1024)[0].to(args.device).split(64))
    rows = [row for row in json.loads(args.out.read_text())["rows"] if row["method"] not in args.methods] if args.out.exists() else []
    baseline = accuracy(model, images, labels)
    print(f"float: {baseline} %")
    for weight_bits, activation_bits in SETTINGS:
        for name in args.methods:
            if weight_bits not in lowbit.get_method(name).weight_bits:
                continue
            options = {"iterations": args.iterations} if name in LEARNED else {}
            options |= {"activation_iterations": args.iterations} if name == "brecq" else {}
            start = time.perf_counter()
            quantized = lowbit.quantize(
                model,
                method=name,
                weight_bits=weight_bits,
                activation_bits=activation_bits,
                calibration=calibration,
                progress=Progress(),
                **options,
            )
            seconds = time.perf_counter() - start
            row = {
                "weight_bits": weight_bits,
                "activation_bits": activation_bits,
                "method": name,
                "accuracy": accuracy(quantized, images, labels),
                "seconds": round(seconds, 1),
            }
            rows.append(row)
            rows.sort(key=lambda row: (SETTINGS.index((row["weight_bits"], row["activation_bits"])), METHODS.index(row["method"])))
            print(row, flush=True)
            result = {
                "float_accuracy": baseline,
                "iterations": args.iterations,
                "command": f"python benchmarks/fashion.py --device {args.device} --iterations {args.iterations}",
                "machine": torch.cuda.get_device_name() if args.device == "cuda" else f"{os.cpu_count()} CPU cores",
                "rows": rows,
            }
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
