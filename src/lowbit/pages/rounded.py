"""Pictures of post-training methods: weights of a trained network before and after, channel by channel, and ranges of activations."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowbit.network import insert
from lowbit.options import hyper_parameters_of
from lowbit.pages.specimen import Specimen, digits, place_of, specimen_for, upscaling
from lowbit.pages.widths import named_bits, shown_bits, unsupported
from lowbit.plotting import Curve, Panel, Picture
from lowbit.quantizers.staircase import Staircase, staircase, staircase_panels
from lowbit.registry import MethodInfo
from lowbit.workflows.quantize import quantize

ITERATIONS = 60  # of a learned rounding: enough to see where it goes
DOTS = 700
ACTIVATION_BITS = 8  # where weights are shown
NEAREST = "round_to_nearest"  # keyword of the plain method whose folded weights are the "before"


@dataclass(frozen=True)
class Rounded:
    """A weight before and after.

    Attributes:
        bits: Its width.
        before: The float weight, with its batch norm folded unless the method leaves weights as they are.
        plain: ``before`` on the grid of the method, rounded to nearest.
        after: What the quantized network computes with.
        row: The weights that share a scale with the largest one, by their places.
    """

    bits: int
    before: Tensor
    plain: Tensor
    after: Tensor
    row: Tensor

    def panel(self) -> Panel:
        """Value against value; those that ended above or below the nearest level have a colour of their own."""
        distance = (self.after - self.plain).flatten()
        width = (self.after.max() - self.after.min()) / 2**self.bits
        groups = {
            "nearest": distance.abs() <= 1e-3 * width,
            "above": distance > 1e-3 * width,
            "below": distance < -1e-3 * width,
        }
        x, y = self.before.flatten(), self.after.flatten()
        drawn = self.row[torch.randperm(len(self.row), generator=torch.Generator().manual_seed(0))[:DOTS]]
        is_drawn = torch.zeros(len(x), dtype=torch.bool)
        is_drawn[drawn] = True
        low, high = float(x[is_drawn].min()), float(x[is_drawn].max())
        curves = [Curve("", [low, high], [low, high], "identity")]
        for colour, (name, chosen) in enumerate(groups.items()):
            share = 100 * float(chosen.float().mean())
            if bool((chosen & is_drawn).any()):
                kept = chosen & is_drawn
                curves.append(Curve(f"{name} {share:.0f} %", tuple(x[kept].tolist()), tuple(y[kept].tolist()), "points", colour))
        return Panel(f"weights, {named_bits(self.bits)}", tuple(curves), "before", "after")


def rounded_picture(info: MethodInfo) -> Picture:
    """A quantized network beside the float one: weights at two widths, ranges of channels, and activations at several widths."""
    specimen = specimen_for(info)
    weight_bits = [bits for bits in shown_bits(info.weight_bits) if bits > 1][:2] or shown_bits(info.weight_bits)
    found = {bits: _rounded(info, specimen, bits) for bits in weight_bits}
    layer = next(iter(found.values()))[1]
    last = found[weight_bits[-1]][0]
    panels = [rounded.panel() for rounded, _ in found.values()]
    activations = _activations(info, specimen)
    panels.append(_ranges(last))
    if activations:
        panels.append(staircase_panels(activations, "activations")[0])
    notes = (
        f"Layer {layer} of {specimen.name}. Colours say whether a weight ended on the level nearest to the float weight, above or below it; "
        "shares are those of the whole layer, dots the weights of one scale.",
        *unsupported(info),
        *([f"Shown after {ITERATIONS} iterations."] if _budget(info) else []),
    )
    return Picture(f"{info.name}: weights before and after", tuple(panels), notes)


def _rounded(info: MethodInfo, specimen: Specimen, bits: int) -> tuple[Rounded, str]:
    bits_of_activations = None if info.activation_bits is None else max(b for b in info.activation_bits if b <= ACTIVATION_BITS)
    model = _quantized(info, specimen, bits, bits_of_activations)
    place = place_of(model, specimen.sample, bits, None)
    site = insert.quantized_weights(model)[place.layer]
    raw = specimen.model.get_submodule(place.layer).get_parameter("weight").detach()
    before = raw if torch.equal(place.weight, raw) else _folded(specimen.name)[place.layer]
    with torch.no_grad():
        after = getattr(site.layer, site.parameter).detach().clone()
        plain = place.weight_quantizer(before).clone()
    granularity = place.weight_quantizer.granularity
    rows, places = granularity.flatten(before), granularity.flatten(torch.arange(before.numel()).reshape(before.shape))
    return Rounded(bits, before, plain, after, places[int(rows.abs().amax(1).argmax())]), place.layer


@functools.cache
def _folded(name: str) -> dict[str, Tensor]:
    """The float weights of an embedded network with their norms folded, as methods see them that fold."""
    specimen = digits() if name == digits().name else upscaling()
    model = quantize(specimen.model, method=NEAREST, weight_bits=8, activation_bits=8, calibration=specimen.calibration)
    return {layer: site.original.detach().clone() for layer, site in insert.quantized_weights(model).items()}


def _quantized(info: MethodInfo, specimen: Specimen, weight_bits: int, activation_bits: int | None) -> nn.Module:
    return quantize(
        specimen.model,
        method=info.method,  # type: ignore[arg-type]
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        calibration=specimen.calibration,
        **_budget(info),  # type: ignore[arg-type]
    )


def _budget(info: MethodInfo) -> dict[str, int]:
    return {name: ITERATIONS for name in hyper_parameters_of(info) if name in ("iterations", "activation_iterations")}


def _activations(info: MethodInfo, specimen: Specimen) -> list[tuple[str, Staircase]]:
    """Activation quantizers at several widths; a learned rounding of weights is left out, as it does not show here."""
    if info.activation_bits is None:
        return []
    found = []
    for bits in shown_bits(info.activation_bits):
        model = quantize(
            specimen.model,
            method=info.method,  # type: ignore[arg-type]
            weight_bits=max(info.weight_bits),
            activation_bits=bits,
            calibration=specimen.calibration,
            **dict.fromkeys(_budget(info), 1),  # type: ignore[arg-type]
        )
        place = place_of(model, specimen.sample, max(info.weight_bits), bits)
        if place.activations is not None and place.activation_quantizer is not None:
            found.append((named_bits(bits), staircase(place.activation_quantizer, place.activations, span=1.2)))
    return found


def _ranges(rounded: Rounded) -> Panel:
    """The largest magnitude of each output channel before and after, in the order of the one before."""
    before, after = (weight.abs().flatten(1).amax(1) for weight in (rounded.before, rounded.after))
    order = before.argsort()
    channels = tuple(range(len(order)))
    curves = (
        Curve("before", channels, tuple(before[order].tolist()), colour=5),
        Curve("after", channels, tuple(after[order].tolist()), "points", 0),
    )
    return Panel(f"largest |w|, {named_bits(rounded.bits)}", curves, "output channel", "max |w|")
