"""A network with two inputs: batches are ((picture, angle), label), or (picture, angle, label) with target=2.

python examples/two_inputs.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from loops import train_float, train_low_bit
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import lowbit


class Turned(nn.Module):
    """Says which digit a turned picture shows, knowing by how many quarters it was turned."""

    def __init__(self) -> None:
        super().__init__()
        self.picture = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, stride=2), nn.ReLU(), nn.Flatten())
        self.quarters = nn.Sequential(nn.Linear(4, 16), nn.ReLU())
        self.both = nn.Sequential(nn.Linear(16 * 9 + 16, 64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, picture: Tensor, quarters: Tensor) -> Tensor:
        return self.both(torch.cat([self.picture(picture), self.quarters(quarters)], 1))


def digits() -> TensorDataset:
    pictures, labels = load_digits(return_X_y=True)
    pictures = torch.tensor(pictures, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    quarters = torch.randint(0, 4, (len(pictures),))
    turned = torch.stack([torch.rot90(picture, int(k), (1, 2)) for picture, k in zip(pictures, quarters, strict=True)])
    return TensorDataset(turned, nn.functional.one_hot(quarters, 4).float(), torch.tensor(labels))


def main(folder: Path) -> dict[str, float]:
    torch.manual_seed(0)
    data = digits()
    train, test = torch.utils.data.random_split(data, [1400, len(data) - 1400])
    batches, task = list(torch.utils.data.DataLoader(train, 64, shuffle=True)), lowbit.Classification(target=2)
    model = train_float(Turned(), batches, task, epochs=10)

    recipe = lowbit.Recipe(epochs=6, batch_size=64, optimizer=lowbit.OptimizerSpec("adam", 0.002, weight_decay=0.0))
    trained = lowbit.train(model, train, task=task, weight_bits=3, activation_bits=3, recipe=recipe)
    sample = tuple(batches[0][:2])
    looped = train_low_bit(lowbit.prepare(model, weight_bits=3, activation_bits=3, sample=sample), batches, task, epochs=6)

    for name in ("turned.lowbit", "turned.onnx"):
        lowbit.export(trained, folder / name, sample=sample, measure_speed=False)
    assert torch.equal(lowbit.load(folder / "turned.lowbit")(*sample), trained(*sample))
    return {name: lowbit.evaluate(net, test, task=task).value for name, net in (("float", model), ("train", trained), ("loop", looped))}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        for name, value in main(Path(place)).items():
            print(f"{name}: accuracy {value:.2%}")
