"""Train a built-in network on Fashion-MNIST; the weights go where the benchmarks look for them.

python scripts/train_fashion.py --model resnet20 --epochs 8 --seed 0 --bfloat16
python scripts/train_fashion.py --model mobilenet_v2_small --epochs 5

With OMP_NUM_THREADS=1 the first line made benchmarks/weights/resnet20_fashion.safetensors in 15 minutes: 92.81 % of the test images, the second
benchmarks/weights/mobilenet_v2_small_fashion.safetensors in 15 minutes beside other work: 92.04 %.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Generator, Tensor
from training import Recipe, accuracy, save, train

from lowbit.data import load_data
from lowbit.data.augment import flip, pad_crop
from lowbit.data.image_data import TensorImages
from lowbit.models import BUILT_IN, load_model

WEIGHTS = Path(__file__).parent.parent / "benchmarks" / "weights"


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=BUILT_IN, default="resnet20")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--data", type=Path, help="folder with the Fashion-MNIST files")
    parser.add_argument("--out", type=Path, help="default: benchmarks/weights/MODEL_fashion.safetensors")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=0.1)
    parser.add_argument("--weight-decay", type=float, default=5e-4)
    parser.add_argument("--label-smoothing", type=float, default=0.0)
    parser.add_argument("--bfloat16", action="store_true", help="compute in bfloat16; weights and test stay in float32")
    parser.add_argument("--limit", type=int, help="use only so many training images (to try the script)")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    model = load_model(args.model, in_channels=1, num_classes=10)
    train_set, test_set = (load_data("fashion-mnist", root=args.data, split=split).dataset for split in ("train", "test"))
    assert isinstance(train_set, TensorImages) and isinstance(test_set, TensorImages)
    if args.limit:
        train_set.images, train_set.labels = train_set.images[: args.limit], train_set.labels[: args.limit]
    black = float(train_set.normalized(torch.zeros(1, 1, 1, dtype=torch.uint8)))

    def augment(images: Tensor, generator: Generator) -> Tensor:
        return flip(pad_crop(images, 2, generator, fill=black), generator)

    recipe = Recipe(
        args.epochs,
        args.seed,
        args.batch_size,
        args.learning_rate,
        args.weight_decay,
        label_smoothing=args.label_smoothing,
        bfloat16=args.bfloat16,
    )
    train(model, train_set, recipe, augment, args.device)
    facts = {
        "model": args.model,
        "data": "fashion-mnist",
        "test_accuracy": accuracy(model, test_set, args.device),
        "seed": args.seed,
        "epochs": args.epochs,
    }
    save(model, args.out or WEIGHTS / f"{args.model}_fashion.safetensors", facts)


if __name__ == "__main__":
    main()
