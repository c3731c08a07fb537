"""Which layers of a quantized network hurt, and what to try: the debugging chart of the white paper.

Source: Nagel et al. 2021, "A White Paper on Neural Network Quantization", section 3.7 (debugging): quantizers off must give the
float network; weights only and activations only; one tensor at a time; then look at its values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from functools import partial

from torch import Tensor, nn

from lowbit.autograd import records_gradients
from lowbit.errors import LayerError
from lowbit.inputs import Calibration
from lowbit.measure.advice import candidates, findings
from lowbit.measure.agreement import AgreementMeter, run_output
from lowbit.measure.diagnosis import Diagnosis, Remedy, Setting, Suspect
from lowbit.measure.layer_noise import CHUNK, output_noise
from lowbit.measure.noise import Noise
from lowbit.measure.outputs import device_of, pieces
from lowbit.measure.ranges import Range, RangeMeter, range_of_weight
from lowbit.network.batch import calibration_for
from lowbit.network.calls import on_input
from lowbit.network.insert import activation_quantizers, quantization_enabled, quantized_weights
from lowbit.network.layers import evaluating, quantizable_layers
from lowbit.progress import Progress, Stage
from lowbit.quantizers import Quantizer, UniformQuantizer
from lowbit.quantizers.base import disabled, replace_forward
from lowbit.quantizers.uniform import observing

Evaluate = Callable[[nn.Module], float]


@records_gradients
def diagnose(
    model: nn.Module,
    *,
    calibration: object,
    reference: nn.Module | None = None,
    evaluate: Evaluate | None = None,
    alternatives: Mapping[str, Callable[[], nn.Module]] | None = None,
    samples: int = 32,
    remedies: int = 3,
    output: str | int | None = None,
    progress: Progress | None = None,
) -> Diagnosis:
    """Walk the white paper's debugging chart over a quantized network.

    1. All quantizers disabled: the outputs must be the float network's. 2. Weights only, activations only, everything. 3. Each
    quantizer alone, and everything except it. 4. Ranges, outliers and uneven channels of the values each one sees, and the noise of
    each layer's output. 5. Remedies for the worst quantizers; those that exchange one quantizer are tried, and their gain on the whole
    network is measured. All of this takes about ``2 x quantizers + 8`` passes over ``samples`` samples.

    Args:
        model: A quantized network; it is not changed.
        calibration: Batches as for calibration; the first ``samples`` samples are used.
        reference: The float network that ``model`` was made from; default: ``model`` with its quantizers disabled.
        evaluate: Function that scores a network (its accuracy, say; higher is better), called for each setting of steps 1 and 2.
        alternatives: Functions by name that quantize the same network in other ways, such as by equalization or learned rounding; the
            SQNR of each result is measured.
        samples: Number of samples to use.
        remedies: Number of worst quantizers to try remedies for.
        output: Entry of the network's output to measure; default: the first floating-point tensor.
        progress: Progress display; default: silent.

    Raises:
        LayerError: ``model`` has no quantizer.
        CalibrationError: No data, or values that are not finite.

    Example:
        >>> import torch, lowbit
        >>> inputs = torch.rand(32, 8)
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> quantized = lowbit.quantize(model, method="round_to_nearest", weight_bits=3, calibration=inputs)
        >>> diagnosis = lowbit.diagnose(quantized, calibration=inputs, remedies=0)
        >>> diagnosis.setting("weights").sqnr_db > diagnosis.setting("all").sqnr_db
        True
    """
    walk = _Walk(model, calibration_for(reference or model, calibration, limit=samples), reference, evaluate, output)
    alternatives = alternatives or {}
    progress = progress or Progress.silent()
    with evaluating(model), evaluating(reference or model), ExitStack() as stack:
        total = 2 * len(walk.quantizers) + 5 + 4 * remedies + len(alternatives)
        walk.stage = stack.enter_context(progress.stage("diagnose", total=total))
        settings = walk.settings()
        suspects = walk.suspects()
        tried = walk.remedies(suspects[:remedies])
        for name, build in alternatives.items():
            found = walk.against_float(build(), (), name)
            tried.append(Remedy("whole network", f"quantize the network with {name}", found.sqnr_db - settings[-1].sqnr_db))
            walk.stage.advance(note=name)
        outputs = output_noise(model, walk.batches)
    diagnosis = Diagnosis(
        sum(inputs.batch_size for inputs in walk.batches),
        tuple(settings),
        tuple(suspects),
        {name: noise.sqnr_db for name, noise in outputs.items()},
        {name: noise.mse for name, noise in outputs.items()},
        tuple(tried),
    )
    return replace(diagnosis, findings=tuple(findings(diagnosis, has_reference=reference is not None)))


class _Walk:
    """The passes over the network; targets are computed once."""

    def __init__(
        self, model: nn.Module, calibration: Calibration, reference: nn.Module | None, evaluate: Evaluate | None, output: str | int | None
    ) -> None:
        self.model, self.evaluate, self.output = model, evaluate, output
        self.stage: Stage
        device = device_of(model)
        self.batches = [piece for inputs in calibration for piece in pieces(inputs.to(device), CHUNK)]
        self.sites = quantized_weights(model)
        self.weights = {name: _present(site.quantizer) for name, site in self.sites.items()}
        self.activations = activation_quantizers(model)
        self.quantizers = [*self.weights.values(), *self.activations.values()]
        if not self.quantizers:
            raise LayerError(f"{type(model).__name__} has no quantizer to diagnose. Quantize it first: lowbit.quantize(model, ...).")
        with evaluating(model), quantization_enabled(model, weights=False, activations=False):
            self.off = [run_output(model, inputs, output) for inputs in self.batches]
        self.targets = self.off
        if reference is not None:
            with evaluating(reference):
                self.targets = [run_output(reference, inputs, output).to(device) for inputs in self.batches]

    def settings(self) -> list[Setting]:
        """Steps 1 and 2 of the chart, against the float network."""
        off = (("off", self.quantizers), ("weights", self.activations.values()), ("activations", self.weights.values()), ("all", ()))
        found = []
        for name, silent in off:
            found.append(self.against_float(self.model, silent, name))
            self.stage.advance(note=name)
        return found

    def against_float(self, model: nn.Module, silent: Iterable[Quantizer], name: str) -> Setting:
        """``model`` with the quantizers ``silent`` disabled."""
        meter = AgreementMeter()
        with evaluating(model), disabled(silent):
            for inputs, target in zip(self.batches, self.targets, strict=True):
                meter.add(target, run_output(model, inputs, self.output), inputs.batch_size)
            score = self.evaluate(model) if self.evaluate is not None else None
        result = meter.result()
        return Setting(name, result.sqnr_db, result.top1, score)

    def suspects(self) -> list[Suspect]:
        """Steps 3 and 4 of the chart, worst first; noise is measured against the network with its quantizers off."""
        ranges, readers, order = self._observe()
        named = [(name, "weight", q) for name, q in self.weights.items()]
        named += [(name, "activation", q) for name, q in self.activations.items()]
        found: list[tuple[float, Suspect]] = []
        everything = self.noise(disabled(())).sqnr_db
        for name, kind, quantizer in named:
            alone = self.noise(disabled(q for q in self.quantizers if q is not quantizer))
            self.stage.advance(note=f"only {name}")
            without = self.noise(disabled([quantizer]))
            self.stage.advance(note=f"all but {name}")
            layers = (name,) if kind == "weight" else tuple(readers[quantizer])
            suspect = Suspect(
                name,
                kind,
                layers,
                quantizer.bit_width,
                str(quantizer.granularity),
                order[quantizer],
                only_on_db=alone.sqnr_db,
                only_off_db=without.sqnr_db,
                gain_db=without.sqnr_db - everything if math.isfinite(everything) else 0.0,
                share=0.0,
                range=ranges[quantizer],
            )
            found.append((alone.mse, suspect))
        total = sum(mse for mse, _ in found) or 1.0
        found.sort(key=lambda pair: -pair[0])
        return [replace(suspect, share=mse / total) for mse, suspect in found]

    def noise(self, context: AbstractContextManager[None]) -> Noise:
        """Error of the output while ``context`` is active."""
        noise = Noise()
        with context:
            for inputs, target in zip(self.batches, self.off, strict=True):
                noise.add(target, run_output(self.model, inputs, self.output))
        return noise

    def _observe(self) -> tuple[dict[Quantizer, Range | None], dict[Quantizer, list[str]], dict[Quantizer, int]]:
        """The range of each quantizer's input in the float network, the layers that read each activation, and the execution order."""
        order: dict[Quantizer, None] = {}
        ranges: dict[Quantizer, Range | None] = {}
        for name, quantizer in self.weights.items():
            site = self.sites[name]
            ranges[quantizer] = range_of_weight(site.original, quantizer, site.channel_axis)
        meters = {quantizer: RangeMeter(quantizer) for quantizer in self.activations.values()}
        readers: dict[Quantizer, list[str]] = {quantizer: [] for quantizer in meters}
        makers: dict[int, tuple[Tensor, Quantizer]] = {}

        def seeing(quantizer: Quantizer) -> Callable[[Tensor], Tensor]:
            def see(x: Tensor) -> Tensor:
                order.setdefault(quantizer)
                meters[quantizer].add(x)
                seen = x.clone()  # a tensor of its own, so that its readers can be distinguished from those of the unquantized one
                makers[seen.untyped_storage().data_ptr()] = (seen, quantizer)
                return seen

            return see

        def read(name: str, x: Tensor) -> None:
            if name in self.weights:
                order.setdefault(self.weights[name])
            made = makers.get(x.untyped_storage().data_ptr())
            if made is not None and name not in readers[made[1]]:
                readers[made[1]].append(name)

        handles = [on_input(layer, partial(read, name)) for name, layer in quantizable_layers(self.model).items()]
        try:
            with disabled(self.weights.values()), replace_forward({q: seeing(q) for q in meters}):
                for inputs in self.batches:
                    run_output(self.model, inputs, self.output)
                    makers.clear()
        finally:
            for handle in handles:
                handle.remove()
        self.stage.advance(note="ranges")
        order |= dict.fromkeys(self.quantizers)  # those that the data never reaches come last
        ranges |= {quantizer: meter.result() for quantizer, meter in meters.items()}
        return ranges, readers, {quantizer: place for place, quantizer in enumerate(order)}

    def remedies(self, suspects: list[Suspect]) -> list[Remedy]:
        """Step 5: try the remedies for each suspect."""
        found: list[Remedy] = []
        now = self.noise(disabled(())).sqnr_db
        for suspect in suspects:
            quantizer = (self.weights if suspect.kind == "weight" else self.activations)[suspect.name]
            for action, candidate, rule in candidates(suspect, quantizer, self._axis(suspect)):
                self._fit(suspect, quantizer, candidate)
                gain = self.noise(replace_forward({quantizer: candidate.forward})).sqnr_db - now
                found.append(Remedy(suspect.name, action, gain, rule))
                self.stage.advance(note=f"{suspect.name}: {action}")
        return found

    def _axis(self, suspect: Suspect) -> int:
        return self.sites[suspect.name].channel_axis if suspect.kind == "weight" else 0

    def _fit(self, suspect: Suspect, quantizer: Quantizer, candidate: UniformQuantizer) -> None:
        if suspect.kind == "weight":
            candidate.initialize(self.sites[suspect.name].original)
            return
        candidate.to(self.batches[0].tensors[0].device)
        others = [q for q in self.quantizers if q is not quantizer]
        with observing({suspect.name: candidate}), disabled(others), replace_forward({quantizer: candidate.__call__}):
            for inputs in self.batches:
                run_output(self.model, inputs, self.output)
        candidate.take_observed()


def _present(quantizer: Quantizer | None) -> Quantizer:
    assert quantizer is not None
    return quantizer
