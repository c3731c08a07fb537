"""The trained networks and the data that pictures of methods are made with: the embedded ones."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowbit.data import load_data, load_pairs
from lowbit.models import load_default, load_model, upscaling_weights
from lowbit.network import insert
from lowbit.qat.task import Task
from lowbit.qat.tasks import Classification, SuperResolution
from lowbit.quantizers import Quantizer
from lowbit.registry import MethodInfo

BATCH, BATCHES = 32, 24
PATCH, PATCHES = 12, 4  # pixels of a small picture, and how many are a batch
SCALE = 2


@dataclass(frozen=True)
class Specimen:
    """A trained network with its data.

    Attributes:
        model: The float network; whoever changes it takes a copy.
        batches: Pairs of inputs and targets.
        task: What it is for.
        name: What pictures call it.
    """

    model: nn.Module
    batches: tuple[tuple[Tensor, Tensor], ...]
    task: Task
    name: str

    @property
    def calibration(self) -> Tensor:
        """Inputs without targets."""
        return torch.cat([inputs for inputs, _ in self.batches[:4]])

    @property
    def sample(self) -> Tensor:
        """Inputs of one call."""
        return self.batches[0][0]

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """The batch of a training step."""
        return self.batches[step % len(self.batches)]


def specimen_for(info: MethodInfo) -> Specimen:
    """The network that a method is shown on: that of super-resolution for its section, else that of digits."""
    return upscaling() if info.section == "super_resolution" else digits()


@functools.cache
def digits() -> Specimen:
    """The digits network."""
    dataset = load_data("digits", split="calibration").dataset
    drawn = [dataset[index] for index in range(BATCH * BATCHES)]
    images, labels = torch.stack([image for image, _ in drawn]), torch.tensor([int(label) for _, label in drawn])
    pairs = zip(images.split(BATCH), labels.split(BATCH), strict=True)
    return Specimen(load_default(), tuple(pairs), Classification(), "digits")


@functools.cache
def upscaling() -> Specimen:
    """The embedded EDSR, which doubles pictures, and patches of two photographs."""
    dataset = load_pairs("sample-photographs", scale=SCALE, split="calibration", patch=PATCH).dataset
    drawn = [dataset[index] for index in range(PATCHES * BATCHES)]
    small, large = (torch.stack([torch.as_tensor(pair[place]).float() for pair in drawn]) for place in (0, 1))
    model = load_model("edsr_small", upscaling_weights(), scale=SCALE).eval()
    return Specimen(model, tuple(zip(small.split(PATCHES), large.split(PATCHES), strict=True)), SuperResolution(scale=SCALE), "edsr_small")


@dataclass(frozen=True)
class Place:
    """A layer of a quantized network, with real values for both of its quantizers.

    Attributes:
        layer: The layer's name.
        weight: Its float weight.
        weight_quantizer: The quantizer of that weight.
        activations: Values that its activation quantizer sees; ``None`` without one.
        activation_quantizer: That quantizer.
    """

    layer: str
    weight: Tensor
    weight_quantizer: Quantizer
    activations: Tensor | None = None
    activation_quantizer: Quantizer | None = None


def place_of(model: nn.Module, inputs: Tensor, weight_bits: int, activation_bits: int | None) -> Place:
    """The first layer inside the network whose weight has ``weight_bits``, preferably one whose input has ``activation_bits``.

    Where no such layer quantizes its input, its activation quantizer is the first of the network with these bits.
    """
    sites = {name: site for name, site in insert.quantized_weights(model).items() if _width(site.quantizer) == weight_bits}
    inner = [name for name in sites if name not in _ends(model)] or list(sites)
    own = [name for name in inner if _width(insert.input_quantizer(sites[name].layer)) == activation_bits]
    name = next(iter(own or inner))
    site, quantizer = sites[name], None
    if activation_bits is not None:
        quantizer = insert.input_quantizer(site.layer) if own else _first(insert.activation_quantizers(model).values(), activation_bits)
    assert site.quantizer is not None
    seen = None if quantizer is None else _values_at(model, quantizer, inputs)
    return Place(name, site.original.detach().clone(), site.quantizer, seen, quantizer)


def _width(quantizer: Quantizer | None) -> int | None:
    return None if quantizer is None else quantizer.bit_width


def _ends(model: nn.Module) -> set[str]:
    names = list(insert.weight_sites(model))
    return {names[0], names[-1]}


def _first(quantizers: Iterable[Quantizer], bits: int) -> Quantizer | None:
    return next((quantizer for quantizer in quantizers if quantizer.bit_width == bits), None)


@torch.no_grad()
def _values_at(model: nn.Module, quantizer: Quantizer, inputs: Tensor) -> Tensor | None:
    """What ``quantizer`` sees of four samples."""
    seen: list[Tensor] = []
    handle = quantizer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()(inputs[:4])
    finally:
        handle.remove()
        for module, mode in modes.items():
            module.training = mode
    return seen[0] if seen else None
