"""A class for each pixel: targets are masks, and files take pictures of any height and width.

python examples/segmentation.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from loops import train_float, train_low_bit
from torch import Tensor, nn

import lowbit


def pictures(count: int, size: int = 16) -> tuple[Tensor, Tensor]:
    """Noise with a bright horizontal bar (class 1) and a bright vertical one (class 2) on it."""
    images, masks = torch.randn(count, 1, size, size) * 0.3, torch.zeros(count, size, size, dtype=torch.long)
    for image, mask in zip(images, masks, strict=True):
        row, column = torch.randint(1, size - 2, (2,)).tolist()
        image[0, row : row + 2], mask[row : row + 2] = image[0, row : row + 2] + 1.5, 1
        image[0, :, column : column + 2], mask[:, column : column + 2] = image[0, :, column : column + 2] + 3, 2
    return images, masks


def network() -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, 16), (16, 16), (16, 16)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(16, 3, 1))


def main(folder: Path) -> dict[str, float]:
    torch.manual_seed(0)
    train, test = pictures(256), pictures(64)
    batches, task = list(zip(train[0].split(32), train[1].split(32), strict=True)), lowbit.Segmentation()
    model = train_float(network(), batches, task, epochs=6)

    recipe = lowbit.Recipe(epochs=4, batch_size=32, optimizer=lowbit.OptimizerSpec("adam", 0.002, weight_decay=0.0))
    trained = lowbit.train(model, train, task=task, weight_bits=2, activation_bits=3, recipe=recipe, progress=None)
    prepared = lowbit.prepare(model, weight_bits=2, activation_bits=3, sample=train[0][:32])
    looped = train_low_bit(prepared, batches, task, epochs=4)

    for name in ("bars.lowbit", "bars.onnx"):
        lowbit.export(trained, folder / name, sample=test[0][:8], dynamic=("H", "W"), measure_speed=False)
    larger = pictures(8, size=24)
    assert torch.equal(lowbit.load(folder / "bars.lowbit")(larger[0]), trained(larger[0]))
    return {name: lowbit.evaluate(net, test, task=task).value for name, net in (("float", model), ("train", trained), ("loop", looped))}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        for name, value in main(Path(place)).items():
            print(f"{name}: mean IoU {value:.2%}")
