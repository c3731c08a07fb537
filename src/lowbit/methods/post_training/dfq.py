"""DFQ: ranges of weights equalized across layers, high biases absorbed, biases corrected, ranges from batch norms. No data, no training.

Paper: Nagel, van Baalen, Blankevoort, Welling 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV.
    Section 4.1 (equalization, absorption: ``lowbit.network.surgery.equalize``), section 4.2 and appendix C, D (bias correction), section 5 (ranges).
Symbols: W~ - W -> the rounding error of a weight, beta, gamma -> mean, std of a layer's output before the activation, n -> n_sigma.
Differs from the paper:
    - Weights are symmetric by default, because runtimes compute those fastest; ``symmetric_weights=no`` selects the paper's affine grid.
    - Biases are absorbed only where the next layer does not pad with zeros, because absorption is wrong at borders; ``absorb_bias=all``
      absorbs them everywhere.
    - A ReLU6 between equalized layers gets a limit for each channel by default, because networks that rely on the clip lose accuracy with
      the paper's ReLU (``relu6=replace``).
    - Where no batch norm gives the distribution of a tensor, it is propagated through the layers (``lowbit.network.graph.moments``), so
      that networks without batch norms can be quantized too.
    - With calibration data, ranges come from the data, which is more exact than a normal distribution.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from lowbit.errors import CalibrationError, SpecError
from lowbit.inputs import Calibration
from lowbit.network.graph.channels import by_output_channel, groups_of, response
from lowbit.network.graph.moments import Moments, MomentsWalk
from lowbit.network.insert import float_weight
from lowbit.network.layers import TRANSPOSED, evaluating
from lowbit.network.placement import Placement
from lowbit.network.slot import Slot
from lowbit.network.surgery.equalize import (
    ClipKind,
    RangeKind,
    absorb_bias,
    equalize,
    find_links,
    limit_channels,
    open_clips,
    read_states,
    set_bias,
    sets_of,
    write_states,
)
from lowbit.options import Above, Finite
from lowbit.post_training.pipeline import PostTrainingMethod, PtqJob
from lowbit.post_training.reconstruction.unit_data import call_of
from lowbit.quantizers import Grid, GridQuantizer, Quantizer, UniformQuantizer
from lowbit.quantizers.ranges.observers import make_observer
from lowbit.registry import MethodInfo, register
from lowbit.spec import Granularity
from lowbit.surrogates import straight_through

Absorb = Literal["all", "unpadded", "none"]
Cover = Literal["pairs", "sets"]


def corrected_bias(bias: Tensor, weight: Tensor, quantized: Tensor, input_mean: Tensor, *, groups: int = 1) -> Tensor:
    """``b - (W~ - W) E[x]``: the bias with which the layer's expected output is that of the float weight again.

    The same formula updates a stored mean of the output.

    Args:
        bias: ``[out]``.
        weight, quantized: ``[out, in / groups, ...]``.
        input_mean: ``[in]``.
        groups: Groups of the layer.

    Source: section 4.2, Eq. 17.
    """
    return bias - response(quantized - weight, input_mean, groups)


def empirically_corrected_bias(bias: Tensor, float_mean: Tensor, quantized_mean: Tensor) -> Tensor:
    """``b - (E[y~] - E[y])`` for channel means, ``[out]``, of a layer's outputs before the activation.

    Source: appendix D.
    """
    return bias - (quantized_mean - float_mean)


def channel_mean(x: Tensor, axis: int = 1) -> Tensor:
    """Mean over everything but the channels along ``axis``, float64."""
    return x.detach().double().movedim(axis, 0).flatten(1).mean(1)


class OffsetQuantizer(GridQuantizer):
    """Levels evenly spaced from the least value to the largest: 0 need not be one of them.

    Forward: ``clamp(round((x - lower) / step), 0, 2**k - 1) * step + lower``. Backward: 1 everywhere.

    Args:
        bit_width: 1 to 8.
        granularity: Which elements share a grid.
    """

    tables = ("lower", "step")

    def __init__(self, bit_width: int, *, granularity: Granularity | None = None) -> None:
        super().__init__(bit_width, 0, 2**bit_width - 1, granularity=granularity, surrogate=straight_through)
        self.lower: Tensor
        self.step: Tensor

    def initialize(self, x: Tensor) -> None:
        """The range of ``x``; one of no width gets the width 1."""
        rows = self.granularity.flatten(x.detach().float())
        lower, width = rows.amin(1), rows.amax(1) - rows.amin(1)
        step = torch.where(width > 0, width, torch.ones_like(width)) / self.qmax
        shape = self.granularity.scale_shape(x)
        self._set_table("lower", lower.reshape(shape))
        self._set_table("step", step.reshape(shape))

    def grid(self, x: Tensor) -> Grid:
        return Grid(self.lower, self.step, self.step, -self.lower / self.step)


# Steps on a network, which other methods take too


def equalize_layers(
    job: PtqJob, *, cover: Cover = "pairs", kind: RangeKind = "max_abs", relu6: ClipKind = "scale", absorb: Absorb = "unpadded"
) -> None:
    """Equalize the float network of ``job``, whose batch norms are folded, and absorb high biases; the result is the new reference.

    ``relu6`` says what becomes of ReLU6 between layers (``open_clips``); what was done is noted in the table.
    """
    graph = job.need_graph("equalization")
    found = find_links(job.model, graph)
    links, blocked = open_clips(job.model, graph, found, relu6)
    scaled = [link for link in links if link.limit is not None]
    replaced = {node.owner for link in found for node in link.clips if node.op == "relu"}
    if replaced:
        job.table.note(f"ReLU6 became ReLU in {len(replaced)} places, so that channels can be rescaled across it")
    if scaled:
        job.table.note(f"ReLU6 got a limit for each channel in {len(scaled)} places, so that channels can be rescaled across it")
    if blocked:
        places = ", ".join(sorted({repr(node.owner) if node.owner else "the network" for node in blocked}))
        job.table.note(
            f"layers around a clipped activation of {places} were not equalized: make it an nn.ReLU6 module that runs once, right behind its layer"
        )
    if not links:
        job.table.note("nothing was equalized: no two layers follow one another with only ReLU, padding or pooling between")
    states = read_states(job.model, links, job.statistics)
    sweeps = equalize(states, sets_of(job.model, links, cover), kind=kind)
    moved = 0
    for link in links:
        first, second = states[link.first], states[link.second]
        limit = None if link.limit is None else torch.as_tensor(link.limit / first.scale).expand(len(first.weight))
        if absorb != "none" and first.mean is not None and link.can_absorb and not (absorb == "unpadded" and link.is_padded):
            absorbed = absorb_bias(first, second, activation=link.activation, limit=limit)
            limit = None if limit is None else limit - absorbed
            moved += int((absorbed != 0).sum())
        if limit is not None:
            limit_channels(job.model, graph, link, limit)
    write_states(job.model, states, job.statistics)
    if links:
        job.table.note(f"equalized {len(links)} pairs of layers in {sweeps} sweeps, absorbed the bias of {moved} channels")
    job.update_reference()


def input_moments(job: PtqJob, input_range: tuple[float, ...] | None) -> Moments:
    """Statistics of the network's inputs: from the range that the user gave, else from calibration data, else from the sample."""
    if input_range is not None:
        return Moments.uniform(*input_range)
    if job.calibration is None:
        job.table.note("the range of the network's input was taken from the sample: name it with input_range, or give calibration data")
    source = job.calibration or Calibration([job.sample])
    parts = [
        torch.cat([t.detach().flatten().double().cpu() for t in inputs.tensors if t.is_floating_point()] or [torch.zeros(1)])
        for inputs in source
    ]
    count = sum(len(part) for part in parts)
    mean = sum(float(part.sum()) for part in parts) / count
    variance = sum(float((part - mean).square().sum()) for part in parts) / count
    ends = min(float(part.min()) for part in parts), max(float(part.max()) for part in parts)
    mean_, std, lo, hi = (torch.tensor([value], dtype=torch.float64) for value in (mean, variance**0.5, *ends))
    return Moments(mean_, std, lo, hi)


def correct_biases(job: PtqJob, inputs: Moments, *, n_sigma: float = 6.0, shift_statistics: bool = False) -> None:
    """Remove the expected effect of weight rounding from every layer's bias (``corrected_bias``), in execution order.

    Layers that read the network's input, or channels that no statistics describe, keep their bias.
    """
    graph = job.need_graph("bias correction")
    corrected: list[str] = []

    def correct(name: str, x: Moments) -> None:
        layer = job.layers.get(name)
        if layer is None or x.channels is None or graph.calls(name) != 1:
            return
        old, new = (by_output_channel(layer, w.detach()).cpu().double() for w in (float_weight(layer), layer.weight))  # type: ignore[operator]
        groups, shared = groups_of(layer), torch.tensor(layer.stride).prod() if isinstance(layer, TRANSPOSED) else 1
        bias = old.new_zeros(len(old)) if layer.bias is None else layer.bias.detach().cpu().double()  # type: ignore[operator]
        with torch.no_grad():
            set_bias(layer, corrected_bias(bias, old, new, x.mean / shared, groups=groups))
        if shift_statistics and name in job.statistics:
            mean, std = job.statistics[name]
            moved = corrected_bias(mean.cpu().double(), old, new, x.mean / shared, groups=groups)
            job.statistics[name] = moved.to(mean), std
        corrected.append(name)

    MomentsWalk(job.model, graph, job.statistics, inputs, n_sigma=n_sigma, at_layer=correct)
    job.table.note(f"biases of {len(corrected)} of {len(job.layers)} layers were corrected analytically")


def correct_biases_empirically(job: PtqJob) -> None:
    """Make the mean output of every layer, before its activation, that of the float network on the calibration data.

    Layers are corrected in execution order, so that all preceding ones are quantized and corrected already. Weights and inputs are
    quantized, the layer's own output is not.
    """
    calibration = job.need_calibration("empirical bias correction")
    names = [name for name in job.layers if job.graph is None or job.graph.calls(name) == 1]
    if job.graph is not None and len(names) < len(job.layers):
        job.table.note(
            f"biases of {', '.join(n for n in job.layers if n not in names)} were not corrected: these layers do not run exactly once"
        )
    expected = _float_means(job, calibration, names)
    with job.progress.stage("bias correction", total=len(names)) as stage, torch.no_grad():
        for name in names:
            layer, axis = job.layers[name], _channel_axis(job.layers[name])
            total, count = torch.zeros_like(expected[name]), 0
            for inputs in calibration:
                args, kwargs = call_of(job.model, name, inputs)
                total += channel_mean(layer.forward(*args, **kwargs), axis) * inputs.batch_size  # without the quantizer of its output
                count += inputs.batch_size
            old = layer._parameters["bias"]
            bias = torch.zeros_like(total) if old is None else old.double()
            set_bias(layer, empirically_corrected_bias(bias, expected[name], total / count))
            stage.advance(note=name)


def _channel_axis(layer: nn.Module) -> int:
    return -1 if isinstance(layer, nn.Linear) else 1


def _float_means(job: PtqJob, calibration: Calibration, names: list[str]) -> dict[str, Tensor]:
    """Channel means of the float network's layer outputs over all samples."""
    totals: dict[str, Tensor] = {}
    samples = 0

    def watch(name: str) -> torch.utils.hooks.RemovableHandle:
        layer = job.reference.get_submodule(name)

        def hook(_module: nn.Module, _args: object, output: Tensor) -> None:
            totals[name] = totals.get(name, 0) + channel_mean(output, _channel_axis(layer)) * inputs.batch_size

        return layer.register_forward_hook(hook)

    handles = [watch(name) for name in names]
    try:
        with evaluating(job.reference):
            for inputs in calibration:
                job.reference(*inputs.args, **inputs.kwargs)
                samples += inputs.batch_size
    finally:
        for handle in handles:
            handle.remove()
    return {name: total / samples for name, total in totals.items()}


def ranges_from_statistics(job: PtqJob, inputs: Moments, *, n_sigma: float = 6.0) -> None:
    """Set the range of every activation quantizer without data: ``n_sigma`` deviations around the mean of each channel.

    Raises:
        CalibrationError: Nothing is known about a tensor; the message names the operation that blocks the statistics.
    """
    graph = job.need_graph("activation ranges without data")
    walk = MomentsWalk(job.model, graph, job.statistics, inputs, n_sigma=n_sigma)

    def tensors(placement: Placement) -> Iterator[str]:
        if placement.tensor:
            yield placement.tensor
        elif placement.output_of is not None:
            yield from (node.name for node in graph.of_layer(placement.output_of))
        else:
            yield from (before.name for name in placement.layers for node in graph.of_layer(name) for before in graph.producers(node)[:1])

    def found(placement: Placement) -> tuple[Tensor, Tensor]:
        names = list(tensors(placement))
        unknown = [walk.blocking(name) for name in names if name not in walk.known]
        if unknown or not names:
            place = (
                f"operation {unknown[0].op!r} in {unknown[0].owner or 'the network itself'!r}"
                if unknown
                else "a layer that the dataflow does not show"
            )
            raise CalibrationError(
                f"activation {placement.name!r}: no statistics give its range, because of {place}. Pass calibration= (a loader or tensor of unlabelled "
                "samples), or leave activations in float with activation_bits=None."
            )
        ends = [walk.known[name].range() for name in names]
        return torch.stack([lo for lo, _ in ends]).min(), torch.stack([hi for _, hi in ends]).max()

    job.set_activation_ranges(found)
    job.table.note(f"activation ranges reach {n_sigma:g} deviations around the means given by batch norms and weights; no data was used")


@register(
    MethodInfo(
        name="dfq",
        title="Data-Free Quantization Through Weight Equalization and Bias Correction",
        paper="Nagel, van Baalen, Blankevoort, Welling, ICCV 2019",
        url="https://arxiv.org/abs/1906.04721",
        section="post_training",
        axes=("reconstruction",),
        kind="post_training",
        weight_bits=range(2, 9),
        activation_bits=range(1, 9),
        needs=("graph",),
        fidelity="exact",
        summary="no data: equalizes channels across layers, corrects biases, takes ranges from batch norms",
        evidence="checked against the authors' company's toolkit (AIMET) and an independent program",
        margin_db=10.0,
    )
)
@dataclass
class Dfq(PostTrainingMethod):
    """Cross-layer equalization, bias absorption, bias correction, ranges from statistics.

    Attributes:
        symmetric_weights: Weight grid with zero point 0; the paper's is affine.
        equalize: ``pairs``: all neighbouring layers, repeatedly until nothing changes; ``sets``: AIMET's pairs and depthwise triples;
            ``none``.
        equalize_range: Definition of a channel's range: ``max_abs`` or ``max_minus_min``.
        relu6: Treatment of ReLU6 between equalized layers: ``scale``: a limit for each channel, which preserves the network's function;
            ``replace``: a ReLU, as in the paper; ``keep``: it ends the chain of equalized layers.
        absorb_bias: Move high biases into the next layer: ``all``, ``unpadded`` (only where that is exact up to rare values: no zeros are
            added between), ``none``.
        bias_correction: ``analytic`` from statistics, ``empirical`` on calibration data, ``none``.
        shift_statistics: Let the analytic correction update the stored mean of the layer's output too, as an independent program does.
        real_offset: Let weight grids start at the smallest weight itself, so that 0 need not be a level, as in the same program;
            overrides ``symmetric_weights``.
        weight_clip: Clip weights at plus and minus this value before their range is chosen (15 in the paper's comparison).
        activation_ranges: Source of activation ranges: ``statistics``, ``data``, or ``auto`` (data if there is any).
        n_sigma: Width of activation ranges from statistics, in standard deviations.
        input_range: Lower and upper end of the network's input, if there is no data.
    """

    ends = "same"

    weight_granularity: str = "per_tensor"
    weight_observer: str = "min_max"
    symmetric_weights: bool = True
    equalize: Literal["pairs", "sets", "none"] = "pairs"
    equalize_range: Literal["max_abs", "max_minus_min"] = "max_abs"
    relu6: Literal["scale", "replace", "keep"] = "scale"
    absorb_bias: Literal["all", "unpadded", "none"] = "unpadded"
    bias_correction: Literal["analytic", "empirical", "none"] = "analytic"
    shift_statistics: bool = False
    real_offset: bool = False
    weight_clip: Annotated[float | None, Above(0)] = None
    activation_ranges: Literal["auto", "statistics", "data"] = "auto"
    n_sigma: Annotated[float, Above(0)] = 6.0
    input_range: Annotated[tuple[float, ...] | None, Finite()] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_input_range("dfq", self.input_range)

    def weight_quantizer(self, slot: Slot) -> Quantizer:
        """Symmetric or affine codes, signed; with a real offset unsigned."""
        granularity = Granularity.parse(self.weight_granularity, slot.channel_axis)
        if self.real_offset:
            return OffsetQuantizer(slot.bit_width, granularity=granularity)
        observer = make_observer(self.weight_observer, granularity)
        return UniformQuantizer(slot.bit_width, signed=True, symmetric=self.symmetric_weights, granularity=granularity, observer=observer)

    def quantize(self, job: PtqJob) -> None:
        job.need_graph("dfq")
        if self.bias_correction == "empirical":
            job.need_calibration("empirical bias correction")
        job.fold()
        if self.equalize != "none":
            equalize_layers(job, cover=self.equalize, kind=self.equalize_range, relu6=self.relu6, absorb=self.absorb_bias)
        job.insert_weights(self.weight_quantizer)
        self._clip_weights(job)
        uses_data = self.activation_ranges == "data" or (self.activation_ranges == "auto" and job.calibration is not None)
        inputs = input_moments(job, self.input_range) if self.bias_correction == "analytic" or not uses_data else None
        if inputs is not None and self.bias_correction == "analytic":
            correct_biases(job, inputs, n_sigma=self.n_sigma, shift_statistics=self.shift_statistics)
        job.insert_activations(self)
        if self.bias_correction != "none":
            job.remark_others("no bias is corrected, as only those of convolutions and linear layers are")
        if uses_data or inputs is None:
            job.calibrate_activations()
        else:
            ranges_from_statistics(job, inputs, n_sigma=self.n_sigma)
        if self.bias_correction == "empirical":
            correct_biases_empirically(job)

    def _clip_weights(self, job: PtqJob) -> None:
        """Choose each weight's range from its clipped values; what lies outside is rounded to the ends of the grid."""
        for site in job.weights.values() if self.weight_clip is not None else ():
            assert site.quantizer is not None and self.weight_clip is not None
            site.quantizer.initialize(site.original.detach().clamp(-self.weight_clip, self.weight_clip))


def check_input_range(method: str, input_range: tuple[float, ...] | None) -> None:
    """SpecError unless it is a lower and an upper end."""
    if input_range is not None and (len(input_range) != 2 or not input_range[0] < input_range[1]):
        raise SpecError(f"{method}: input_range must be two ascending numbers, for example -1,1; got {input_range}")
