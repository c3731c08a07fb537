"""Train the embedded default network of super-resolution on photographs of Debian packages; its weights ship in the package.

apt-get install --no-install-recommends gcompris-qt-data palapeli-data
python scripts/train_edsr.py        # three minutes on one core; PSNR on the 24 test photographs against 28.70 dB of bicubic enlarging
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

SCALE, PATCH, BATCH, LEARNING_RATE = 2, 24, 8, 2e-3


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
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=upscaling_weights())
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # sums over several threads differ in their last bits
    model = load_model("edsr_small", scale=SCALE)
    train(model, load_pairs("photographs", scale=SCALE, split="train", patch=PATCH), args.steps, args.seed)
    found = evaluate(model, load_pairs("photographs", scale=SCALE, split="test"), task=SuperResolution(SCALE), progress=False)
    facts = {"model": "edsr_small", "scale": SCALE, "data": "photographs", "steps": args.steps, "seed": args.seed}
    save(model, args.out, {**facts, **{f"test {name}": round(value, 4) for name, value in found.metrics.items()}})


if __name__ == "__main__":
    main()
