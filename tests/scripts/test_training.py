from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from scripts.training import Recipe, accuracy, save, train
from torch import Generator, Tensor, nn

from lowbit.data import TensorImages
from lowbit.models import load_weights


def halves() -> TensorImages:
    """Noise that is brighter in the upper half (class 0) or the lower one (class 1)."""
    images = torch.randint(0, 100, (256, 1, 8, 8), generator=Generator().manual_seed(0), dtype=torch.uint8)
    labels = torch.arange(256) % 2
    images[labels == 0, :, :4] += 60
    images[labels == 1, :, 4:] += 60
    return TensorImages(images, labels, (0.2,), (0.1,))


def trained(seed: int, epochs: int = 4) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    train(model, halves(), Recipe(epochs, seed, batch_size=32, learning_rate=0.05), lambda images, _generator: images, torch.device("cpu"))
    return model


def test_training_learns_and_leaves_evaluation_mode() -> None:
    model = trained(0)
    assert accuracy(model, halves(), torch.device("cpu")) > 95
    assert not model.training


def test_the_same_seed_gives_the_same_weights() -> None:
    first, second, other = (trained(seed, epochs=1).state_dict()["4.weight"] for seed in (0, 0, 1))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_every_full_batch_of_an_epoch_is_seen_once_and_augmented() -> None:
    seen: list[Tensor] = []

    def augment(images: Tensor, generator: Generator) -> Tensor:
        seen.append(images)
        return images

    train(nn.Sequential(nn.Flatten(), nn.Linear(64, 2)), halves(), Recipe(1, 0, batch_size=100), augment, torch.device("cpu"))
    assert [len(images) for images in seen] == [100, 100]
    assert len(torch.cat(seen).flatten(1).unique(dim=0)) == 200


def test_saved_weights_carry_their_story_and_load_again(tmp_path: Path) -> None:
    model = trained(0, epochs=1)
    save(model, tmp_path / "deep" / "w.safetensors", {"test_accuracy": 97.5, "seed": 0})
    with safe_open(tmp_path / "deep" / "w.safetensors", "pt") as file:
        assert file.metadata() == {"test_accuracy": "97.5", "seed": "0"}
    again = trained(1, epochs=1)
    load_weights(again, tmp_path / "deep" / "w.safetensors")
    assert torch.equal(again(torch.ones(1, 1, 8, 8)), model(torch.ones(1, 1, 8, 8)))
