"""Any number of labels for each sample: a 1 for each label that holds.

python examples/several_labels.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from loops import train_float, train_low_bit
from sklearn.datasets import make_multilabel_classification
from torch import nn

import lowbit


def main(folder: Path) -> dict[str, float]:
    torch.manual_seed(0)
    counts, labels = make_multilabel_classification(2000, n_features=30, n_classes=6, n_labels=2, random_state=0)
    inputs, targets = torch.tensor(counts, dtype=torch.float32) / 10, torch.tensor(labels)
    train, test = (inputs[:1500], targets[:1500]), (inputs[1500:], targets[1500:])
    batches, task = list(zip(train[0].split(50), train[1].split(50), strict=True)), lowbit.MultiLabel()
    network = nn.Sequential(nn.Linear(30, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 6))
    model = train_float(network, batches, task, epochs=10)

    recipe = lowbit.Recipe(epochs=6, batch_size=50, optimizer=lowbit.OptimizerSpec("adam", 0.002, weight_decay=0.0))
    trained = lowbit.train(model, train, task=task, weight_bits=3, activation_bits=3, recipe=recipe)
    looped = train_low_bit(lowbit.prepare(model, weight_bits=3, activation_bits=3, sample=train[0][:50]), batches, task, epochs=6)

    for name in ("labels.lowbit", "labels.onnx"):
        lowbit.export(trained, folder / name, sample=test[0][:50], measure_speed=False)
    assert torch.equal(lowbit.load(folder / "labels.lowbit")(test[0]), trained(test[0]))
    return {name: lowbit.evaluate(net, test, task=task).value for name, net in (("float", model), ("train", trained), ("loop", looped))}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        for name, value in main(Path(place)).items():
            print(f"{name}: F1 {value:.3f}")
