"""Train small networks of super-resolution on photographs of Debian packages: the embedded default, whose weights ship in the package, and others.

apt-get install --no-install-recommends gcompris-qt-data palapeli-data
python scripts/train_upscaler.py    # three minutes on one core; PSNR on the 24 test photographs against 28.70 dB of bicubic enlarging
python scripts/train_upscaler.py --scale 4 --steps 1600 --out benchmarks/weights/edsr_small_x4.safetensors
python scripts/train_upscaler.py --model srresnet --steps 3500 --out benchmarks/weights/srresnet_small_x2.safetensors
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
from torch import Generator, nn
from torch.nn import functional
from training import save

from lowbit import evaluate
from lowbit.data import UpscalingData, load_pairs
from lowbit.models import load_model
from lowbit.models.default import upscaling_weights
from lowbit.qat.tasks import SuperResolution

PATCH, BATCH, LEARNING_RATE = 24, 8, 2e-3


def train(model: nn.Module, data: UpscalingData, steps: int, seed: int) -> None:
    """L1 and Adam, the learning rate along a half cosine to zero. On one machine the same seed gives the same weights."""
    generator, change = Generator().manual_seed(seed), data.augmentation("auto")
    assert change is not None
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 + 0.5 * math.cos(math.pi * step / steps))
    model.train()
    losses, start = 0.0, time.perf_counter()
    for step in range(1, steps + 1):
        chosen = torch.randint(len(data), (BATCH,), generator=generator).tolist()
        small, originals = change(tuple(zip(*(data.dataset[index] for index in chosen), strict=True)), generator)
        loss = functional.l1_loss(model(small), originals)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses += loss.item()
        if step % 100 == 0:
            elapsed = time.perf_counter() - start
            print(f"step {step}/{steps}: mean loss {losses / 100:.3f}, about {elapsed / step * (steps - step):.0f} s left", flush=True)
            losses = 0.0
    model.eval()


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="edsr_small")
    parser.add_argument("--scale", type=int, default=2)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--width", type=int, default=24)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=upscaling_weights())
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # sums over several threads differ in their last bits
    options = {name: getattr(args, name) for name in ("scale", "blocks", "width")}
    model = load_model(args.model, **options)
    train(model, load_pairs("photographs", scale=args.scale, split="train", patch=PATCH), args.steps, args.seed)
    found = evaluate(model, load_pairs("photographs", scale=args.scale, split="test"), task=SuperResolution(args.scale), progress=False)
    facts = {"model": args.model, **options, "data": "photographs", "steps": args.steps, "seed": args.seed}
    save(model, args.out, {**facts, **{f"test {name}": round(value, 4) for name, value in found.metrics.items()}})


if __name__ == "__main__":
    main()
