"""Does an exported file compute what the quantized network computes?

Two networks that round the same numbers differ where a number lies on the boundary between two codes: a runtime adds in another
order and rounds biases to integers, so a few codes in a thousand come out one off, and every such code moves later ones. The
difference at the output therefore says little: it grows with depth, and in an untrained network without bound.

So an ONNX file is checked quantizer by quantizer, each on the *file's own* inputs: the network is run in torch, every activation
quantizer's result is compared with the file's and then replaced by it. An error cannot hide behind earlier ones, nor be blamed on
later layers. The excess is twice the distance, in steps, of the value in torch from what the file's code covers: 0 for equal codes,
next to nothing for a tie, and more the more a code is simply wrong; up to 1 for values that are no levels. Measured, it
stays below 0.01 (ResNet-18, EfficientNet-Lite0 at 8 bits); the limit is ``EXCESS_LIMIT`` plus what rounding biases to the integers
of the accumulator (of scale ``x_scale * w_scale``) can do, which counts at 2 and 3 bits. A scale wrong by one part in a hundred
exceeds it. The float outputs behind the last quantizers must agree to a thousandth of their range, plus that rounding.

A packed file holds the same operators and weights: its outputs must agree to ``PACKED_LIMIT_DB`` as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, fx, nn

from lowbit.errors import ParityError
from lowbit.formats.checks.tolerance import accumulator_step, excess_of, is_quantizer, since_quantizers
from lowbit.formats.onnx.sessions import load_onnx
from lowbit.formats.program.naming import name_inputs
from lowbit.formats.program.program import Program
from lowbit.formats.program.structure import flatten
from lowbit.inputs import Inputs
from lowbit.measure.agreement import AgreementMeter
from lowbit.network.layers import evaluating

EXCESS_LIMIT = 0.1  # of a quantization step
OUTPUT_LIMIT = 1e-3  # of the largest output value
PACKED_LIMIT_DB = 60.0
FOLLOWED_SAMPLES = 4  # the check of each quantizer keeps all of their activations in memory


@dataclass(frozen=True)
class Parity:
    """How the file's outputs compare with the quantized network's.

    Attributes:
        samples: Samples compared.
        max_abs_error: Largest difference of an output value.
        top1_agreement: Fraction of equal predictions; ``None`` for outputs with fewer than two classes.
        sqnr_db: ``10 log10(var(outputs) / mean squared difference)``; infinite when equal.
        passed: Whether every quantizer and the outputs are within the limits.
        changed_codes: Largest fraction of codes at one quantizer that differ on equal inputs.
        excess: Largest distance, in quantization steps, of the file's level beyond the nearest one.
        diverging: The first place beyond the limit.
    """

    samples: int
    max_abs_error: float
    top1_agreement: float | None
    sqnr_db: float
    passed: bool
    changed_codes: float = 0.0
    excess: float = 0.0
    diverging: str | None = None

    def __str__(self) -> str:
        agreement = "" if self.top1_agreement is None else f", top-1 agreement {self.top1_agreement:.1%}"
        verdict = "passed" if self.passed else f"FAILED at {self.diverging}"
        return f"{verdict}: largest difference {self.max_abs_error:.3g}, {self.sqnr_db:.1f} dB{agreement} on {self.samples} samples"

    def require(self, path: Path | str) -> None:
        """ParityError, naming the first layer that diverges, unless ``passed``."""
        if not self.passed:
            raise ParityError(
                f"{path} does not compute what the quantized network computes: it first diverges at {self.diverging} "
                f"(largest output difference {self.max_abs_error:.3g}, {self.sqnr_db:.1f} dB). "
                "Keep that layer in float, or export to .lowbit; please report it with the network's code."
            )


def check_onnx_parity(model: nn.Module, program: Program, path: Path | str) -> Parity:
    """Run the program's sample through the quantized network and the file in ONNX Runtime with all optimizations.

    Args:
        model: The quantized network.
        program: What the file was written from; its node names are the names of the file's values.
        path: The ONNX file.
    """
    parity = _compare_outputs(model, program.sample, lambda inputs: list(load_onnx(path)(inputs).values()))
    quantizers = tuple(node.name for node in program.exported.graph.nodes if is_quantizer(node))
    inputs = program.sample
    if program.is_batch_dynamic and inputs.batch_size > FOLLOWED_SAMPLES:
        inputs = inputs.take(0, FOLLOWED_SAMPLES)
    observed = load_onnx(path, observe=quantizers)(inputs)
    follower = _Follower(program, {name: observed[name] for name in quantizers if name in observed})
    outputs = follower.outputs(inputs)
    diverging = follower.diverging or _diverging_output(program, outputs, list(observed.values()))
    return replace(parity, passed=diverging is None, changed_codes=follower.changed, excess=follower.excess, diverging=diverging)


def check_packed_parity(model: nn.Module, program: Program, loaded: nn.Module, weights: Mapping[str, Tensor]) -> Parity:
    """Run the program's sample through the quantized network and the one loaded from a packed file.

    Args:
        model: The quantized network.
        program: What the file was written from.
        loaded: What ``load`` returned.
        weights: The file's decoded weights by parameter name, to name the layer when the outputs differ.
    """

    def run(inputs: Inputs) -> list[Tensor]:
        with evaluating(loaded):
            return _leaves(loaded(*inputs.args, **inputs.kwargs))

    parity = _compare_outputs(model, program.sample, run)
    if parity.sqnr_db >= PACKED_LIMIT_DB:
        return parity
    wrong = [name for name, weight in program.weights.items() if name in weights and not torch.equal(weights[name], weight.decode())]
    return replace(parity, passed=False, diverging=f"the weight {wrong[0]!r}" if wrong else "the outputs, though all weights are equal")


def _compare_outputs(model: nn.Module, inputs: Inputs, run: Callable[[Inputs], list[Tensor]]) -> Parity:
    with evaluating(model):
        wanted = _leaves(model(*inputs.args, **inputs.kwargs))
    meter = AgreementMeter()
    for want, got in zip(wanted, run(inputs), strict=True):
        if want.is_floating_point():
            meter.add(want.cpu(), got.to(want.dtype), inputs.batch_size if meter.samples == 0 else 0)
    agreement = meter.result()
    sqnr = _alike(agreement.sqnr_db, agreement.max_abs_error)
    return Parity(inputs.batch_size, agreement.max_abs_error, agreement.top1, sqnr, passed=sqnr >= PACKED_LIMIT_DB)


def _alike(ratio: float, error: float) -> float:
    """A constant output has no variance, so that the ratio says nothing where the error does."""
    return math.inf if error == 0 else ratio


def _leaves(output: object) -> list[Tensor]:
    leaves: list[Tensor | torch.SymInt] = []
    flatten(output, leaves)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


class _Follower(fx.Interpreter):
    """Runs a program, compares each activation quantizer with what a file computed, and continues with the file's values."""

    def __init__(self, program: Program, observed: Mapping[str, Tensor]) -> None:
        super().__init__(program.exported.graph_module)
        self.program, self.observed = program, observed
        self.changed, self.excess = 0.0, 0.0
        self.diverging: str | None = None
        self._followed: dict[fx.Node, list[tuple[Tensor, Tensor]]] = {}

    def outputs(self, inputs: Inputs) -> list[Tensor]:
        """The network's outputs, computed from the file's last codes."""
        with torch.no_grad():
            return [value for value in self.run(*_arguments(self.program, inputs)) if isinstance(value, Tensor)]

    def run_node(self, node: fx.Node) -> object:
        result: object = super().run_node(node)
        if not is_quantizer(node):
            return result
        assert isinstance(result, Tensor)
        source = node.args[0]
        assert isinstance(source, fx.Node)
        followed = self._followed.setdefault(source, [])
        if node.name not in self.observed:  # the file has one quantizer where several did the same
            return next((theirs for ours, theirs in followed if torch.equal(ours, result)), result)
        theirs = self.observed[node.name].to(result.dtype)
        followed.append((result, theirs))
        self._compare(node, self.env[source], result, theirs)
        return theirs

    def _compare(self, node: fx.Node, x: Tensor, ours: Tensor, theirs: Tensor) -> None:
        excess, step = math.inf, 1.0
        if ours.shape == theirs.shape:
            tables = [self._value(argument) for argument in node.args[1:] if isinstance(argument, fx.Node)]
            excess, step = excess_of(node, x, tables, theirs)
        if self.diverging is None and excess > EXCESS_LIMIT + accumulator_step(self.program, node) / step:
            self.diverging = f"{describe(self.program, node)}: {excess:.2f} quantization steps off"
        self.changed = max(self.changed, (ours != theirs).float().mean().item())
        self.excess = max(self.excess, excess)

    def _value(self, argument: object) -> Tensor:
        assert isinstance(argument, fx.Node)
        value = self.env[argument]
        assert isinstance(value, Tensor)
        return value


def _diverging_output(program: Program, wanted: Sequence[Tensor], got: Sequence[Tensor]) -> str | None:
    results = [value for value in program.exported.graph.output_node().all_input_nodes if isinstance(value.meta.get("val"), Tensor)]
    nodes = {name: node for node in results for name in (node.name,)}
    names = [name for name in program.exported.graph_signature.user_outputs if name in nodes]
    for name, want, theirs in zip(names, wanted, got, strict=False):
        if want.shape != theirs.shape:
            return f"{describe(program, nodes[name])}: shape {tuple(theirs.shape)} instead of {tuple(want.shape)}"
        if not want.is_floating_point() or want.numel() == 0:
            continue
        error, limit = (
            float((want - theirs).abs().max()),
            OUTPUT_LIMIT * float(want.abs().max()) + accumulator_step(program, nodes[name]) / 2,
        )
        if not error <= limit:  # a NaN fails, too
            return f"{describe(program, nodes[name])}: its output is off by {error:.3g}"
    return None


def describe(program: Program, node: fx.Node) -> str:
    """``layer 'conv1'`` for what is computed by that layer since the last quantizers, else the quantizer or operation itself."""
    signature = program.exported.graph_signature
    parameters = signature.inputs_to_parameters
    tables = {**signature.inputs_to_lifted_tensor_constants, **parameters, **signature.inputs_to_buffers}
    for step in since_quantizers(node):
        for source in step.all_input_nodes:
            if source.name in parameters:
                return f"layer {parameters[source.name].rpartition('.')[0]!r}"
    sites = [tables[table.name] for table in node.all_input_nodes if table.name in tables and "_quantizer." in tables[table.name]]
    site = min(sites, default=None) if is_quantizer(node) else None
    return f"activation {site.rpartition('.')[0].replace('_quantizer', '')!r}" if site else f"operation {node.name!r}"


def _arguments(program: Program, inputs: Inputs) -> list[Tensor]:
    """Values of all placeholders of the program's graph."""
    exported, signature = program.exported, program.exported.graph_signature
    named = name_inputs([str(name) for name in signature.user_inputs], inputs)
    values: list[Tensor] = []
    for node in exported.graph.nodes:
        if node.op != "placeholder":
            continue
        name = (
            signature.inputs_to_parameters.get(node.name)
            or signature.inputs_to_buffers.get(node.name)
            or signature.inputs_to_lifted_tensor_constants.get(node.name)
        )
        value = named[node.name] if name is None else exported.state_dict.get(name, exported.constants.get(name))
        assert isinstance(value, Tensor)
        values.append(value)
    return values
