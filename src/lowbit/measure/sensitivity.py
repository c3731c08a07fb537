"""Sensitivity: how far a network's outputs move when single layers are quantized and everything else stays in float.

Source: Cai et al. 2020 (ZeroQ), section 3.3, for the divergence of the softmax outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from torch import Tensor, nn

from lowbit.errors import DataError, LayerError, unknown_name
from lowbit.inputs import Inputs, sample_count
from lowbit.measure.agreement import has_classes, kl_divergence
from lowbit.measure.outputs import device_of, output_tensor
from lowbit.measure.replay import Replay
from lowbit.network.calls import Call, input_of, on_input, with_input
from lowbit.network.insert import WeightSite, weight_sites
from lowbit.network.layers import evaluating
from lowbit.progress import Progress
from lowbit.quantizers import Quantizer, UniformQuantizer
from lowbit.quantizers.ranges.observers import MinMaxObserver
from lowbit.spec import LayerBits

Predict = Callable[[nn.Module, Any], object]  # runs the network on a batch of any structure


class Distance(Protocol):
    """How far a network's output on a batch is from the float network's, on average over the batch."""

    def __call__(self, reference: object, output: object, batch: Any) -> float:
        """The distance; ``reference`` is the float network's output."""


@dataclass(frozen=True)
class QuantizedLayer:
    """What one layer computes with while all others stay in float.

    Attributes:
        weight: Its weight after quantization; ``None``: the float weight.
        activation: Quantizer of what it reads; ``None``: float.
    """

    weight: Tensor | None = None
    activation: Quantizer | None = None


def softmax_divergence(reference: object, output: object, batch: Any) -> float:
    """``KL(softmax(reference) || softmax(output))`` in nats, on average over predictions; never below 0.

    Raises:
        DataError: The outputs are no logits of two or more classes.
    """
    wanted, got = output_tensor(reference), output_tensor(output)
    if not has_classes(wanted):
        raise DataError(
            f"outputs of shape {tuple(wanted.shape)} are no logits of two or more classes, so their softmax says nothing. "
            "Measure the squared error or the loss instead."
        )
    return max(0.0, float(kl_divergence(wanted, got).mean()))


def squared_error(reference: object, output: object, batch: Any) -> float:
    """Mean squared difference of all output values."""
    return float((output_tensor(output).double() - output_tensor(reference).double()).square().mean())


@dataclass(frozen=True)
class LossIncrease:
    """``loss(output) - loss(reference)``: by how much the task's loss grows; below 0 where quantization helps by chance.

    Attributes:
        loss: ``loss(output, batch)``, a scalar mean over samples.
    """

    loss: Callable[[Any, Any], Tensor]

    def __call__(self, reference: object, output: object, batch: Any) -> float:
        return float(self.loss(output, batch)) - float(self.loss(reference, batch))


def run_batch(model: nn.Module, batch: Any) -> object:
    """The network's output for those members of ``batch`` that it takes."""
    inputs = Inputs.of(batch, model).to(device_of(model))
    return model(*inputs.args, **inputs.kwargs)


class SensitivityMeter:
    """Measures how far outputs move from those of one float network, which runs once, as do its parts before a layer (see ``Replay``).

    Args:
        model: The float network; it is the same again after each measurement.
        batches: Samples.
        distance: What is measured on each batch.
        predict: Runs the network on a batch.

    Example:
        >>> import torch
        >>> model = nn.Linear(2, 2, bias=False)
        >>> meter = SensitivityMeter(model, [torch.eye(2)], squared_error)
        >>> round(meter.of({"": QuantizedLayer(weight=model.weight + 0.5)}), 6)
        0.25
    """

    def __init__(self, model: nn.Module, batches: Iterable[Any], distance: Distance, predict: Predict = run_batch) -> None:
        self.model, self.batches, self.distance = model, list(batches), distance
        if not self.batches:
            raise DataError("the sensitivity of layers needs samples: there is no batch.")
        self._replay = Replay(model, self.batches, predict)

    def of(self, quantized: Mapping[str, QuantizedLayer]) -> float:
        """The distance on average over samples, with these layers quantized at once.

        Raises:
            LayerError: The network's outputs are not finite then.
        """
        total, samples = 0.0, 0
        with evaluating(self.model), quantized_in(self.model, quantized):
            outputs = self._replay.outputs(quantized)
        for batch, reference, output in zip(self.batches, self._replay.references, outputs, strict=True):
            count = sample_count(batch)
            total += self.distance(reference, output, batch) * count
            samples += count
        if not math.isfinite(total):
            raise LayerError(
                f"layer {', '.join(map(repr, quantized))}: quantized alone it makes the network's outputs overflow (distance {total}). "
                "Leave out this width."
            )
        return total / samples


def layer_sensitivity(
    model: nn.Module,
    quantized: Mapping[str, Mapping[LayerBits, QuantizedLayer]],
    batches: Iterable[Any],
    distance: Distance = softmax_divergence,
    *,
    predict: Predict = run_batch,
    progress: Progress | None = None,
) -> dict[str, dict[LayerBits, float]]:
    """How far outputs move when one layer is quantized at one width and all else stays in float.

    Args:
        model: The float network.
        quantized: For each weight, by the name of its site, what it is at each width.
        batches: Samples, and targets where ``distance`` needs them.
        distance: ``softmax_divergence``, ``squared_error`` or ``LossIncrease(loss)``.
        predict: Runs the network on a batch.
        progress: Progress display; default: silent.

    Returns:
        The distance by layer and width, on average over samples.

    Raises:
        UnknownNameError: The network has no such weight.
        LayerError: A weight of another shape, or outputs that are not finite.
    """
    meter = SensitivityMeter(model, batches, distance, predict)
    found: dict[str, dict[LayerBits, float]] = {}
    with (progress or Progress.silent()).stage("sensitivity", total=sum(map(len, quantized.values()))) as stage:
        for name, widths in quantized.items():
            found[name] = {}
            for bits, layer in widths.items():
                found[name][bits] = meter.of({name: layer})
                stage.advance(note=name)
    return found


@contextmanager
def quantized_in(model: nn.Module, quantized: Mapping[str, QuantizedLayer]) -> Iterator[None]:
    """Within the context these weights of the float network, and what their layers read, are quantized."""
    sites = weight_sites(model)
    with ExitStack() as stack:
        for name, layer in quantized.items():
            if name not in sites:
                raise unknown_name("layer", name, sites)
            stack.enter_context(_quantized(sites[name], layer))
        yield


@contextmanager
def _quantized(site: WeightSite, layer: QuantizedLayer) -> Iterator[None]:
    original = site.original
    if layer.weight is not None and layer.weight.shape != original.shape:
        raise LayerError(f"layer {site.name!r}: its weight has the shape {tuple(original.shape)}, got {tuple(layer.weight.shape)}")
    handle = (
        None
        if layer.activation is None
        else site.layer.register_forward_pre_hook(partial(_quantize_input, layer.activation), with_kwargs=True)
    )
    try:
        if layer.weight is not None:  # set by name, as recurrent layers hold their weights in a second place, which follows
            setattr(site.layer, site.parameter, nn.Parameter(layer.weight.detach().to(original), requires_grad=False))
        yield
    finally:
        setattr(site.layer, site.parameter, original)
        if handle is not None:
            handle.remove()


def _quantize_input(quantizer: Quantizer, _layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
    x = input_of(args, kwargs)
    return None if x is None else with_input(args, kwargs, quantizer(x))


def input_quantizers(
    model: nn.Module, names: Iterable[str], batches: Iterable[Any], predict: Predict = run_batch
) -> dict[str, UniformQuantizer]:
    """For each layer an affine quantizer of what it reads, its range the smallest and largest value over all batches, 0 included.

    ``set_bit_width`` gives it another width over the same range. Layers that no batch reaches are left out.
    """
    sites = weight_sites(model)
    found = {name: UniformQuantizer(8, signed=False, symmetric=False, observer=MinMaxObserver()) for name in names}
    handles = [on_input(sites[name].layer, quantizer.observer.observe) for name, quantizer in found.items()]
    try:
        with evaluating(model):
            for batch in batches:
                predict(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    reached = {name: quantizer.to(sites[name].original.device) for name, quantizer in found.items() if quantizer.observer.lo is not None}
    for quantizer in reached.values():
        quantizer.take_observed(())
    return reached
