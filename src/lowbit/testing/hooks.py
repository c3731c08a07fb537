"""Quantizers straight from the hooks of a method, without a network.

Quantizers know tensors, never layers, so most laws can be held on a quantizer and a tensor: at every bit-width, for every kind of layer,
and once for methods that share a quantizer.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.network import insert
from lowbit.network.layers import WEIGHT
from lowbit.network.placement import Purpose
from lowbit.network.slot import MergeFactory, Slot
from lowbit.options import Method
from lowbit.post_training.pipeline import PostTrainingMethod
from lowbit.qat import TrainingMethod
from lowbit.quantizers import Quantizer
from lowbit.spec import Position

EVERY_WIDTH = range(1, 9)
BETWEEN: tuple[Purpose, ...] = ("sum", "concatenation", "pool")


@dataclass(frozen=True)
class Example:
    """A quantizer as a hook made it, not initialized yet, and the tensors of its place.

    Attributes:
        slot: What it was made for.
        quantizer: The quantizer.
        first: What it is initialized with: the weight, or activations.
        values: What it quantizes: the weight, or values that go past both ends of the range.
        initialize_layer: The training method's hook that initializes it; ``None``: its own ``initialize``.
    """

    slot: Slot
    quantizer: Quantizer
    first: Tensor
    values: Tensor
    initialize_layer: Callable[..., None] | None

    @property
    def identity(self) -> Hashable:
        """Equal for quantizers of the same class, settings and state that are initialized alike for equal tensors."""
        initializer = getattr(self.initialize_layer, "__func__", None)
        types = tuple(type(module) for module in self.quantizer.modules())
        return types, initializer, type(self.slot.layer), _by_value((self.quantizer, self.first, self.values))

    def ready(self) -> Quantizer:
        """The quantizer, initialized, in evaluation mode."""
        slot, quantizer = self.slot, self.quantizer
        if self.initialize_layer is None or slot.purpose not in ("weight", "input"):
            quantizer.initialize(self.first)
        elif slot.purpose == "weight":
            insert.set_weight_quantizer(slot.layer, quantizer, slot.parameter)
            self.initialize_layer(slot.layer, inputs_of(slot.layer), slot.parameter)
        else:
            insert.set_input_quantizer(slot.layer, quantizer)
            self.initialize_layer(slot.layer, self.first)
        return quantizer.eval()


class _ByValue(pickle.Pickler):
    """Tensors as their values, and hooks without the numbers that tell them apart in a process."""

    def reducer_override(self, thing: object) -> Any:
        if isinstance(thing, Tensor):
            return torch.tensor, (thing.tolist(), str(thing.dtype))
        if isinstance(thing, OrderedDict):
            return OrderedDict, (list(thing.values()),)
        return NotImplemented


def _by_value(thing: object) -> bytes:
    buffer = io.BytesIO()
    _ByValue(buffer).dump(thing)
    return buffer.getvalue()


def weight_layers() -> dict[str, nn.Module]:
    """Layers of the kinds whose weights differ for a quantizer: in axes, in shape, in values that leave it no range."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = {
            "convolution": nn.Conv2d(3, 8, 3),
            "depthwise": nn.Conv2d(6, 6, 3, groups=6),
            "transposed": nn.ConvTranspose2d(6, 4, 2, groups=2),
            "sequence": nn.Conv1d(5, 7, 3),
            "linear": nn.Linear(12, 8),
            "embedding": nn.Embedding(11, 8),
            "lstm": nn.LSTM(6, 4),
            "zero channel": nn.Conv2d(3, 6, 3),
            "zeros": nn.Conv2d(3, 6, 3),
            "constant": nn.Conv2d(3, 6, 3),
        }
    with torch.no_grad():
        layers["zero channel"].get_parameter("weight")[2] = 0
        layers["zero channel"].get_parameter("weight")[4] = 1e-30
        layers["zeros"].get_parameter("weight").zero_()
        layers["constant"].get_parameter("weight").fill_(0.25)
    return layers


def inputs_of(layer: nn.Module) -> Tensor | None:
    """A batch for ``layer``; ``None`` where only its weight is quantized."""
    generator = torch.Generator().manual_seed(1)
    shapes = {nn.Conv1d: (4, 5, 9), nn.Linear: (4, 12)}
    if isinstance(layer, nn.Embedding | nn.LSTM):
        return None
    channels = getattr(layer, "in_channels", 0)
    return torch.randn(next((shape for kind, shape in shapes.items() if isinstance(layer, kind)), (4, channels, 6, 6)), generator=generator)


def wide_values() -> Tensor:
    """Values that go past both ends of every range, zeros among them."""
    drawn = torch.randn(2003, generator=torch.Generator().manual_seed(2))
    return torch.cat([torch.zeros(4), torch.linspace(-40, 40, 2001), drawn]).reshape(4, 1, -1)


def examples(method: Method) -> Iterator[Example]:
    """What every hook of ``method`` makes, for every kind of layer and every bit-width that it supports."""
    assert isinstance(method, TrainingMethod | PostTrainingMethod)
    info, trained = method.info, isinstance(method, TrainingMethod)
    for kind, layer in weight_layers().items():
        parameter = "weight_ih_l0" if isinstance(layer, nn.LSTM) else WEIGHT
        for bits in info.weight_bits:
            yield from _made(method, method.weight_quantizer, Slot(kind, layer, bits, parameter=parameter))
        if isinstance(method, TrainingMethod):
            yield from _made(method, method.edge_quantizer, Slot(kind, layer, 8, position="first", parameter=parameter))
    layers: dict[str, nn.Module] = {"convolution": nn.Conv2d(3, 8, 3), "linear": nn.Linear(12, 8)}
    ends: tuple[Position, ...] = ("first", "last") if trained else ()
    for kind, layer in layers.items():
        for is_signed in (True, False):
            for bits in info.activation_bits or ():
                yield from _made(method, method.activation_quantizer, Slot(kind, layer, bits, is_signed, purpose="input"))
            for position in ends:
                assert isinstance(method, TrainingMethod)
                yield from _made(method, method.edge_quantizer, Slot(kind, layer, 8, is_signed, position, "input"))
    for bits in EVERY_WIDTH if info.activation_bits is not None else ():
        yield from _made(method, method.output_quantizer, Slot("convolution", layers["convolution"], bits, purpose="output"))
        for purpose in BETWEEN:
            for is_signed in (True, False):
                merges = () if purpose == "pool" else ("merge",)
                yield from _made(method, method.merge_quantizer, Slot("block.output", nn.ReLU(), bits, is_signed, "inner", purpose, merges))


def _made(method: Method, hook: MergeFactory, slot: Slot) -> Iterator[Example]:
    slot = Slot(**{**vars(slot), "layer": copy.deepcopy(slot.layer)})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        quantizer = hook(slot)
    if quantizer is None:
        return
    if slot.purpose == "weight":
        first = values = insert.float_weight(slot.layer, slot.parameter).detach().clone()
    else:
        drawn = inputs_of(nn.Conv2d(3, 8, 3) if slot.purpose != "input" else slot.layer)
        assert drawn is not None
        first, values = drawn if slot.is_signed else drawn.relu(), wide_values()
    yield Example(slot, quantizer, first, values, method.initialize_layer if isinstance(method, TrainingMethod) else None)


def new_examples(method: Method, held: set[Hashable]) -> Iterator[Example]:
    """Those of ``examples`` whose identity is not in ``held``; they enter it once the caller asks for the next."""
    for example in examples(method):
        identity = example.identity
        if identity not in held:
            yield example
            held.add(identity)
