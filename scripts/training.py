"""What the training scripts share: a seeded loop with warm-up and cosine decay, accuracy, and weights with their story in the file."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Generator, Tensor, nn
from torch.nn import functional

from lowbit.data.image_data import TensorImages
from lowbit.files import replacing


@dataclass(frozen=True)
class Recipe:
    """SGD with Nesterov momentum; the learning rate rises for ``warm_up`` epochs and falls along a half cosine to zero."""

    epochs: int
    seed: int
    batch_size: int = 128
    learning_rate: float = 0.1
    weight_decay: float = 5e-4
    warm_up: float = 1.0  # epochs
    label_smoothing: float = 0.0
    bfloat16: bool = False


def train(
    model: nn.Module, data: TensorImages, recipe: Recipe, augment: Callable[[Tensor, Generator], Tensor], device: torch.device
) -> None:
    """Train ``model`` in place. On one machine and device the same seed gives the same weights."""
    assert data.labels is not None
    images, labels = data.images.to(device), data.labels.to(device)
    generator = Generator().manual_seed(recipe.seed)
    model.to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9, nesterov=True, weight_decay=recipe.weight_decay)
    per_epoch = len(images) // recipe.batch_size
    total, warm_up = recipe.epochs * per_epoch, max(1, round(recipe.warm_up * per_epoch))
    step, start = 0, time.perf_counter()
    for epoch in range(recipe.epochs):
        losses = torch.zeros((), device=device)
        order = torch.randperm(len(images), generator=generator).to(device)
        for chosen in order[: per_epoch * recipe.batch_size].split(recipe.batch_size):
            rise, progress = (step + 1) / warm_up, (step - warm_up) / max(1, total - warm_up)
            optimizer.param_groups[0]["lr"] = recipe.learning_rate * (
                rise if rise < 1 else 0.5 + 0.5 * math.cos(math.pi * max(0.0, progress))
            )
            batch = augment(data.normalized(images[chosen]), generator).to(memory_format=torch.channels_last)
            with torch.autocast(device.type, torch.bfloat16, enabled=recipe.bfloat16):
                loss = functional.cross_entropy(model(batch), labels[chosen], label_smoothing=recipe.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses += loss.detach()
            step += 1
            if step % 100 == 0:
                elapsed = time.perf_counter() - start
                print(f"step {step}/{total}, about {elapsed / step * (total - step):.0f} s left", flush=True)
        print(
            f"epoch {epoch + 1}/{recipe.epochs}: mean loss {losses.item() / per_epoch:.4f}, {time.perf_counter() - start:.0f} s", flush=True
        )
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, data: TensorImages, device: torch.device) -> float:
    """Percent of ``data`` that ``model``, in evaluation mode and float32, classifies rightly."""
    assert data.labels is not None
    batches = zip(data.images.split(500), data.labels.split(500), strict=True)
    right = sum(int((model(data.normalized(x.to(device))).argmax(1).cpu() == y).sum()) for x, y in batches)
    return round(100 * right / len(data), 2)


def save(model: nn.Module, path: Path, facts: dict[str, object]) -> None:
    """Write the state dict as safetensors with ``facts`` as its metadata; a file that was there is replaced whole."""
    state = {
        name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items() if not name.endswith("num_batches_tracked")
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        save_file(state, temporary, metadata={key: str(value) for key, value in facts.items()})
    print(f"{path}: {path.stat().st_size:,} bytes, {facts}")
