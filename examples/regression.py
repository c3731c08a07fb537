"""A regression on scikit-learn's diabetes data: targets are numbers, metrics RMSE and R2.

python examples/regression.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from loops import train_float, train_low_bit
from sklearn.datasets import load_diabetes
from torch import Tensor, nn

import lowbit


def patients() -> tuple[Tensor, Tensor]:
    """Ten measurements of each patient, and how far the disease is a year later; both with mean 0 and variance 1."""
    inputs, targets = load_diabetes(return_X_y=True)
    found = torch.tensor(inputs, dtype=torch.float32), torch.tensor(targets, dtype=torch.float32)
    return tuple((values - values.mean(0)) / values.std(0) for values in found)  # type: ignore[return-value]


def main(folder: Path) -> dict[str, float]:
    torch.manual_seed(0)
    inputs, targets = patients()
    order = torch.randperm(len(inputs))
    train, test = ((inputs[chosen], targets[chosen]) for chosen in (order[:342], order[342:]))
    batches, task = list(zip(train[0].split(32), train[1].split(32), strict=True)), lowbit.Regression()
    network = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))
    model = train_float(network, batches, task, epochs=10, learning_rate=0.003)

    recipe = lowbit.Recipe(epochs=5, batch_size=32, optimizer=lowbit.OptimizerSpec("adam", 0.001, weight_decay=0.0))
    trained = lowbit.train(model, train, task=task, weight_bits=4, activation_bits=4, recipe=recipe)
    looped = train_low_bit(
        lowbit.prepare(model, weight_bits=4, activation_bits=4, sample=train[0]), batches, task, epochs=5, learning_rate=0.001
    )

    for name in ("diabetes.lowbit", "diabetes.onnx"):
        lowbit.export(trained, folder / name, sample=test[0], measure_speed=False)
    assert torch.equal(lowbit.load(folder / "diabetes.lowbit")(test[0]), trained(test[0]))
    return {name: lowbit.evaluate(net, test, task=task)["R2"] for name, net in (("float", model), ("train", trained), ("loop", looped))}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        for name, value in main(Path(place)).items():
            print(f"{name}: R2 {value:.3f}")
