"""The tiny task that the laws are held on: sixteen patterns in noise, and a small network trained on them."""

from __future__ import annotations

import copy
import dataclasses
import functools

import torch
from tests.networks import TinyNet
from torch import Tensor, nn
from torch.nn import functional as F

import lowbit
from lowbit.registry import MethodInfo, get_method, list_methods

CLASSES, SIZE = 16, 8
POST_TRAINING = [info.name for info in list_methods(kind="post_training")]


def samples(count: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Images ``[count, 3, 8, 8]``, each one of sixteen fixed patterns with strong noise, and their labels."""
    patterns = torch.randn(CLASSES, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    return patterns[labels] + torch.randn(count, 3, SIZE, SIZE, generator=generator), labels


@functools.cache
def trained() -> nn.Module:
    """A small residual network trained for two seconds; the scales of its hidden channels differ, as in real depthwise networks."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = TinyNet(channels=16, classes=CLASSES).train()
        optimizer = torch.optim.Adam(model.parameters(), 5e-3)
        for step in range(150):
            images, labels = samples(64, seed=1000 + step)
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        spread = torch.exp2(torch.linspace(-3, 3, 16)[torch.randperm(16)])
    with torch.no_grad():  # ReLU is homogeneous: what the norm scales up, the next layer scales down
        assert isinstance(model, TinyNet)
        model.bn1.weight *= spread
        model.bn1.bias *= spread
        model.conv2.weight /= spread[:, None, None]
    return model.eval()


@functools.cache
def calibration() -> Tensor:
    """Unlabelled training images, shape ``[128, 3, 8, 8]``."""
    return samples(128, seed=1)[0]


@functools.cache
def held_out() -> Tensor:
    """Images that nothing was fitted to, shape ``[512, 3, 8, 8]``."""
    return samples(512, seed=2)[0]


def has_field(info: MethodInfo, name: str) -> bool:
    """Whether ``name`` is a hyper-parameter of the method."""
    assert info.method is not None
    return name in {f.name for f in dataclasses.fields(info.method)}


def budget(info: MethodInfo, iterations: int) -> dict[str, object]:
    """Options that keep a reconstruction short; empty for methods without iterations."""
    return {name: iterations for name in ("iterations", "activation_iterations") if has_field(info, name)}


def quantize(
    name: str, model: nn.Module, data: Tensor, *, weight_bits: int, activation_bits: int | None = 8, iterations: int = 20
) -> nn.Module:
    """The method at its defaults but for a short reconstruction."""
    options = budget(get_method(name), iterations)
    return lowbit.quantize(
        model, method=name, weight_bits=weight_bits, activation_bits=activation_bits, calibration=data, seed=3, **options
    )


@functools.cache
def _quantized(name: str, weight_bits: int) -> nn.Module:
    return quantize(name, trained(), calibration(), weight_bits=weight_bits)


def quantized(name: str, weight_bits: int = 4) -> nn.Module:
    """The trained network under one method, with 8-bit activations; a copy, so that tests may change it."""
    return copy.deepcopy(_quantized(name, weight_bits))


def outputs(model: nn.Module, images: Tensor) -> Tensor:
    """Logits without gradients."""
    with torch.no_grad():
        return model(images)


def sqnr_db(reference: Tensor, other: Tensor) -> float:
    """``10 log10(var(reference) / mean((reference - other)**2))``."""
    error = (reference - other).double().square().mean().clamp_min(1e-30)
    return float(10 * torch.log10(reference.double().var(correction=0) / error))
