"""Noise layer by layer: of each weight and of each layer's output."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

from torch import Tensor, nn

from lowbit.errors import LayerError
from lowbit.measure.agreement import run_output
from lowbit.measure.noise import Noise, sqnr_db
from lowbit.measure.outputs import batch_count, pieces
from lowbit.network.batch import calibration_for
from lowbit.network.insert import float_weight, quantization_enabled, quantized_weights, weight_sites
from lowbit.network.layers import evaluating, quantizable_layers
from lowbit.progress import Progress

CHUNK = 8  # samples whose layer outputs are held at once


@dataclass(frozen=True)
class LayerNoise:
    """Noise of one layer in dB (``10 log10(var / mse)``); ``None`` where it was not measured.

    Attributes:
        weight_sqnr_db: The quantized weight against the float weight; ``None`` for a float weight.
        output_sqnr_db: The layer's output in the quantized network against that in the float one, so noise of all layers
            before it included; ``None`` for a layer that was never called or called differently.
        output_mse: Mean squared error of that output.
    """

    weight_sqnr_db: float | None
    output_sqnr_db: float | None
    output_mse: float | None


def weight_noise(model: nn.Module, reference: nn.Module | None = None) -> dict[str, float]:
    """SQNR in dB of each quantized weight against its float weight; see ``original_weights`` for the arguments."""
    found: dict[str, float] = {}
    sites = quantized_weights(model)
    for name, original in original_weights(model, reference).items():
        quantizer = sites[name].quantizer
        assert quantizer is not None
        found[name] = sqnr_db(original, quantizer.encode(sites[name].original).decode())
    return found


def original_weights(model: nn.Module, reference: nn.Module | None = None) -> dict[str, Tensor]:
    """Each float weight of ``model`` that is quantized, by the names of their sites.

    Args:
        model: The quantized network.
        reference: The float network, its batch norms folded as in ``model``; default: the weights behind the
            quantizers, which rounding methods replace by what they learned.

    Raises:
        LayerError: ``reference`` lacks a layer, or its weight has another shape.
    """
    weights = {name: site.original.detach() for name, site in quantized_weights(model).items()}
    if reference is None:
        return weights
    originals = weight_sites(reference)
    for name, weight in weights.items():
        if name not in originals:
            raise LayerError(f"layer {name!r} has no counterpart in the float network; it has {', '.join(originals) or 'no layer'}")
        original = originals[name].original.detach()
        if original.shape != weight.shape:
            raise LayerError(f"layer {name!r}: weight shape {tuple(weight.shape)}, but {tuple(original.shape)} in the float network")
        weights[name] = original.to(weight.device)
    return weights


def has_same_layers(model: nn.Module, reference: nn.Module) -> bool:
    """Whether each layer's output in ``model`` can be compared with that in ``reference``: the same layers, and no norm folded into one."""
    layers, originals = quantizable_layers(model), quantizable_layers(reference)
    if {n: float_weight(layer).shape for n, layer in layers.items()} != {n: float_weight(layer).shape for n, layer in originals.items()}:
        return False
    found = dict(model.named_modules())
    between = {
        name: module for name, module in reference.named_modules() if name not in originals and (module._parameters or module._buffers)
    }
    return all(type(found.get(name)) is type(module) for name, module in between.items())


def output_noise(
    model: nn.Module,
    data: object,
    *,
    reference: nn.Module | None = None,
    layers: Iterable[str] | None = None,
    progress: Progress | None = None,
) -> dict[str, Noise]:
    """Error of each layer's output in the quantized network against the float one on the same inputs.

    A layer that is called several times counts all its calls together. A layer whose calls differ in number or shape between
    the networks (a data-dependent branch took another way) cannot be compared and is left out.

    Args:
        model: The quantized network.
        data: Batches as for calibration.
        reference: The float network, its batch norms folded as in ``model``; default: ``model`` with its quantizers off.
        layers: Names of modules to look at; default: every convolution and linear layer.
        progress: Progress display; default: silent.
    """
    names = list(layers) if layers is not None else list(quantizable_layers(model))
    original = reference or model
    calibration = calibration_for(original, data)
    noise = {name: Noise() for name in names}
    failed: set[str] = set()
    with (
        evaluating(original),
        evaluating(model),
        (progress or Progress.silent()).stage("layer outputs", total=batch_count(data, calibration)) as stage,
    ):
        for batch in calibration:
            for inputs in pieces(batch, CHUNK):
                off = quantization_enabled(model, weights=False, activations=False) if reference is None else nullcontext()
                with off, recorded_outputs(original, names) as wanted:
                    run_output(original, inputs)
                with recorded_outputs(model, names) as got:
                    run_output(model, inputs)
                for name in names:
                    if [t.shape for t in wanted[name]] != [t.shape for t in got[name]]:
                        failed.add(name)
                    else:
                        for before, after in zip(wanted[name], got[name], strict=True):
                            noise[name].add(before, after.to(before.device))
            stage.advance()
    return {name: value for name, value in noise.items() if name not in failed and value.count}


def layer_noise(
    model: nn.Module, data: object, *, reference: nn.Module | None = None, progress: Progress | None = None
) -> dict[str, LayerNoise]:
    """Noise of every weight, and of the outputs of convolutions and linear layers; see ``weight_noise`` and ``output_noise``."""
    weights = weight_noise(model, reference)
    outputs = output_noise(model, data, reference=reference, progress=progress)
    return {
        name: LayerNoise(
            weights.get(name), outputs[name].sqnr_db if name in outputs else None, outputs[name].mse if name in outputs else None
        )
        for name in weight_sites(model)
    }


@contextmanager
def recorded_outputs(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, list[Tensor]]]:
    """Within the context, the tensor outputs of the modules ``names``, one entry for each call."""
    calls: dict[str, list[Tensor]] = {name: [] for name in names}
    handles = [model.get_submodule(name).register_forward_hook(_recorder(calls[name])) for name in calls]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _recorder(into: list[Tensor]) -> Callable[[nn.Module, tuple[object, ...], object], None]:
    def record(_module: nn.Module, _args: tuple[object, ...], output: object) -> None:
        if isinstance(output, Tensor):
            into.append(output.detach().clone())  # an in-place activation function may overwrite it

    return record
