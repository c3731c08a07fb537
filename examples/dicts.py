"""Batches and outputs are dicts: a custom task reads both, and has two metrics.

python examples/dicts.py
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from loops import train_float, train_low_bit
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import DataLoader, Dataset

import lowbit


class Discs(Dataset[dict[str, object]]):
    """Pictures of one disc or square ring: what it is, and where."""

    def __init__(self, count: int) -> None:
        grid = torch.arange(12.0)
        centre, self.square = torch.rand(count, 2) * 6 + 3, torch.randint(0, 2, (count,))
        x, y = (grid - centre[:, :1])[:, None, :], (grid - centre[:, 1:])[:, :, None]
        distance = torch.maximum(x.abs(), y.abs())
        shapes = torch.where(self.square[:, None, None] == 1, (distance > 1.4) & (distance < 2.6), x**2 + y**2 < 2.6**2)
        self.pictures, self.centre = shapes[:, None].float() + torch.randn(count, 1, 12, 12) * 0.1, centre / 12

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> dict[str, object]:
        return {"picture": self.pictures[index], "square": self.square[index], "centre": self.centre[index], "name": f"shape {index}"}


class Finder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        convolutions = [nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3, stride=2), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU()]
        self.features = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(64, 64), nn.ReLU())
        self.kind, self.centre = nn.Linear(64, 2), nn.Linear(64, 2)

    def forward(self, picture: Tensor) -> dict[str, Tensor]:
        features = self.features(picture)
        return {"kind": self.kind(features), "centre": self.centre(features)}


class Find(lowbit.Task):
    """The kind counts once, the place ten times."""

    metric_name = "right kind"
    units: ClassVar = {"right kind": "%", "distance": "pixels"}

    def loss(self, output: Mapping[str, Tensor], batch: Mapping[str, Any]) -> Tensor:
        return cross_entropy(output["kind"], batch["square"]) + 10 * mse_loss(output["centre"], batch["centre"])

    def measure(self, output: Mapping[str, Tensor], batch: Mapping[str, Any]) -> dict[str, object]:
        right = output["kind"].argmax(1) == batch["square"]
        distance = 12 * (output["centre"] - batch["centre"]).norm(dim=1)
        return {"right kind": (right.sum(), len(right)), "distance": (distance.sum(), len(right))}


def main(folder: Path) -> dict[str, float]:
    torch.manual_seed(0)
    train, test, task = Discs(1024), Discs(256), Find()
    batches = list(DataLoader(train, 64, shuffle=True))
    model = train_float(Finder(), batches, task, epochs=10)

    recipe = lowbit.Recipe(epochs=6, batch_size=64, optimizer=lowbit.OptimizerSpec("adam", 0.002, weight_decay=0.0))
    trained = lowbit.train(model, train, task=task, test_data=test, weight_bits=3, activation_bits=4, recipe=recipe)
    prepared = lowbit.prepare(model, weight_bits=3, activation_bits=4, sample=batches[0])
    looped = train_low_bit(prepared, batches, task, epochs=6)

    for name in ("finder.lowbit", "finder.onnx"):
        lowbit.export(trained, folder / name, sample=batches[0], measure_speed=False)
    again = lowbit.load(folder / "finder.lowbit")(batches[0]["picture"])
    assert all(torch.equal(again[name], value) for name, value in trained(batches[0]["picture"]).items())
    scores = {name: lowbit.evaluate(net, test, task=task) for name, net in (("float", model), ("train", trained), ("loop", looped))}
    for name, found in scores.items():
        print(f"{name}: {', '.join(f'{metric} {task.describe(metric, value)}' for metric, value in found.metrics.items())}")
    return {name: found.value for name, found in scores.items()}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        main(Path(place))
