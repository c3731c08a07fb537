"""Quantized networks for the tests of integer networks, and what ONNX Runtime computes of them."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import lowbit
from lowbit.data import load_data
from lowbit.models import load_default
from lowbit.models.mobilenet import mobilenet_v2_small
from lowbit.models.resnet import resnet20


class Branches(nn.Module):
    """Dilated, grouped, strided and 1-D convolutions, a clip, a concatenation, both pools, a permutation, a linear layer on rows."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 5, padding=4, dilation=2)
        self.grouped, self.line, self.head = (
            nn.Conv2d(16, 12, 3, groups=4, stride=(2, 1), padding=(0, 1)),
            nn.Conv1d(12, 6, 3),
            nn.Linear(6, 5),
        )
        self.relu, self.clip, self.relu2, self.relu3 = nn.ReLU(), nn.Hardtanh(-0.5, 0.7), nn.ReLU(), nn.ReLU6()
        self.largest, self.mean = nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(3, 2, 1, count_include_pad=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.largest(torch.cat([self.relu(self.left(x)), self.clip(self.right(x))], 1))
        x = self.mean(self.relu2(self.grouped(x))).flatten(2)
        return self.head(self.relu3(self.line(x)).transpose(1, 2))


class Upward(nn.Module):
    """Transposed convolutions: strided, padded past the kernel, dilated, grouped with a batch norm behind it, depthwise, and 1-D."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.up = nn.Conv2d(3, 6, 3, stride=2), nn.ConvTranspose2d(6, 8, 3, stride=2, padding=1, output_padding=1)
        self.grouped = nn.ConvTranspose2d(8, 12, (3, 2), stride=(1, 2), dilation=(2, 1), padding=(5, 0), groups=4, bias=False)
        self.norm, self.depthwise = nn.BatchNorm2d(12), nn.ConvTranspose2d(12, 12, 4, stride=2, padding=1, groups=12)
        self.line = nn.ConvTranspose1d(12, 5, 3, stride=3)
        self.relus = nn.ModuleList(nn.ReLU() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.relus[1](self.up(self.relus[0](self.stem(x))))
        x = self.relus[2](self.norm(self.grouped(x)))
        return self.line(self.relus[3](self.depthwise(x)).flatten(2)[:, :, :40])


class Volumes(nn.Module):
    """3-D convolutions: strided, padded, dilated, depthwise, transposed; a mean over the volume."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.depthwise = (
            nn.Conv3d(3, 6, (1, 3, 3), padding=(0, 1, 1)),
            nn.Conv3d(6, 6, 3, stride=(2, 1, 2), padding=1, groups=6),
        )
        self.dilated, self.up = nn.Conv3d(6, 8, (2, 3, 3), dilation=(1, 2, 1)), nn.ConvTranspose3d(8, 4, 2, stride=(1, 2, 2))
        self.relus, self.mean, self.head = nn.ModuleList(nn.ReLU() for _ in range(4)), nn.AdaptiveAvgPool3d(1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer, relu in zip((self.first, self.depthwise, self.dilated, self.up), self.relus, strict=True):
            x = relu(layer(x))
        return self.head(self.mean(x).flatten(1))


class Joined(nn.Module):
    """Concatenations of tensors whose scales are far apart, one of them read by another layer too, and a pool behind one."""

    def __init__(self) -> None:
        super().__init__()
        self.small, self.large = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
        self.after, self.last = nn.Conv2d(8, 6, 3, padding=1), nn.Conv2d(10, 2, 1)
        self.first, self.second, self.relu, self.pool = nn.ReLU(), nn.ReLU(), nn.ReLU(), nn.MaxPool2d(2)
        self.large.weight.data.mul_(30)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.first(self.small(x)), self.second(self.large(x))
        joined = self.relu(self.after(torch.cat([left, right], 1)))
        return self.last(self.pool(torch.cat([joined, left], 1)))


def images(split: str, count: int) -> Tensor:
    """Digits, normalised."""
    data = load_data("digits", split=split)
    return torch.stack([data.dataset[index][0] for index in range(min(count, len(data)))])


@cache
def digits(weight_bits: int = 4) -> nn.Module:
    """The embedded network."""
    return lowbit.quantize(load_default(), method="round_to_nearest", weight_bits=weight_bits, calibration=images("train", 128))


def settled(model: nn.Module, x: Tensor) -> nn.Module:
    """``model`` in evaluation mode with batch norms that have seen ``x``."""
    model.train()
    with torch.no_grad():
        for _ in range(5):
            model(x)
    return model.eval()


@cache
def network_of(name: str) -> tuple[nn.Module, Tensor]:
    """A quantized network by name, and inputs."""
    torch.manual_seed(0)
    if name == "digits":
        return digits(), images("test", 64)
    x = torch.randn(4, 3, 5, 9, 8) if name == "volumes" else torch.randn(4, 3, 16, 16)
    made = {
        "branches": Branches, "mobilenet": mobilenet_v2_small, "resnet20": resnet20, "upward": Upward, "volumes": Volumes, "joined": Joined,
    }[name]()  # fmt: skip
    bits = 4 if name in ("mobilenet", "resnet20") else 8
    return lowbit.quantize(settled(made, x), method="round_to_nearest", weight_bits=bits, calibration=x), x


def onnx_codes(path: Path, x: Tensor) -> dict[str, Tensor]:
    """What ONNX Runtime's quantizers give, as int8 codes, by the name of the program's node; and the float outputs."""
    import onnx
    import onnxruntime

    model = onnx.load(path)
    names = [node.output[0] for node in model.graph.node if node.op_type == "QuantizeLinear"]
    for name in names:
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.UINT8, None))
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    results = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    named = {output.name: torch.from_numpy(np.asarray(result)) for output, result in zip(session.get_outputs(), results, strict=True)}
    return {
        name.removesuffix(".QuantizeLinear"): value.int() - 128 if name.endswith(".QuantizeLinear") else value
        for name, value in named.items()
    }
