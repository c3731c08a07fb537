"""Checks whether an exported file computes what the quantized network computes.

The verdict comes from the outputs. Two networks that round the same numbers differ where a number lies on the boundary between two
codes: a runtime adds in a different order and rounds biases to integers, so a few codes in a thousand are off by one. What matters is
the effect on the answers: on at least ``SAMPLES`` samples (the given ones and seeded variations of them) a fraction ``EQUAL_ANSWERS`` of
the predictions must be the same, where there is one prediction for each sample or, if the output is a map, for each of its pixels. In
addition, the outputs must agree to ``CLOSE_DB``, or differ only by the rounding of ties.

Layers explain the verdict. The network is run in torch on a few samples, the result of every activation quantizer is compared with the
file's and then replaced by it, so that an error can neither hide behind earlier ones nor be attributed to later layers. The excess is
twice the distance, in steps, of the value in torch from the range that rounds to the file's code: 0 for equal codes, close to 0 for a tie,
larger for wrong codes, and up to 1 for values that are not levels. Ties stay below ``EXCESS_LIMIT`` plus the effect of rounding biases to
the integers of the accumulator. The float outputs behind the last quantizers agree to a thousandth of their range, plus that rounding.

A packed file contains the same operators and weights, so its outputs must agree to ``CLOSE_DB`` whatever the layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from lowbit.errors import DataError, GraphError, ParityError
from lowbit.formats.checks.tolerance import accumulator_step, excess_of, is_quantizer, is_rounding, since_quantizers
from lowbit.formats.onnx.sessions import load_onnx
from lowbit.formats.program.naming import name_inputs
from lowbit.formats.program.program import Program
from lowbit.formats.program.structure import flatten
from lowbit.inputs import Inputs
from lowbit.measure.agreement import AgreementMeter
from lowbit.measure.outputs import class_dimension
from lowbit.network.layers import evaluating

SAMPLES = 256
EQUAL_ANSWERS = 0.99
CLOSE_DB = 60.0  # outputs that agree to this ratio count as equal, whatever the layers
EXCESS_LIMIT = 0.1  # in quantization steps
OUTPUT_LIMIT = 1e-3  # as a fraction of the largest output value
FOLLOWED_SAMPLES = 4  # the comparison of each quantizer keeps all of their activations in memory
_VARIATION = 0.1  # noise, in standard deviations of the input
_CALL = 32  # minimum number of samples in a call, where the batch size is open
_LISTED = 4  # layers named in a message


@dataclass(frozen=True)
class Difference:
    """A layer, activation or operation where the file's codes differ from the network's on equal inputs.

    Attributes:
        place: The layer, activation or operation.
        steps: Largest distance of a value in torch from the range that rounds to the file's code, in quantization steps.
        changed: Fraction of codes that differ.
    """

    place: str
    steps: float
    changed: float

    def __str__(self) -> str:
        return f"{self.place}: {self.steps:.2f} quantization steps off, {self.changed:.2%} of codes differ"


@dataclass(frozen=True)
class Parity:
    """Comparison of the file's outputs with the quantized network's.

    Attributes:
        samples: Number of samples compared.
        max_abs_error: Largest difference of an output value.
        top1_agreement: Fraction of equal predictions; ``None`` if no output contains classes.
        sqnr_db: ``10 log10(var(outputs) / mean squared difference)``; infinite if equal.
        passed: Whether the file computes what the network computes.
        changed_codes: Largest fraction of codes at one quantizer that differ on equal inputs.
        excess: Largest distance, in quantization steps, of a value from the range that rounds to the file's code.
        diverging: The first place where the two differ by more than the rounding of ties; if there is none in a file that did not pass,
            the most likely place.
        differences: Places where codes differ on equal inputs, in the order of the network.
        is_within_ties: Whether the rounding of ties explains the differences of each layer. A deep network, especially one with random
            weights, can turn such differences into other answers: then ``passed`` is false although the file is correct.
    """

    samples: int
    max_abs_error: float
    top1_agreement: float | None
    sqnr_db: float
    passed: bool
    changed_codes: float = 0.0
    excess: float = 0.0
    diverging: str | None = None
    differences: tuple[Difference, ...] = ()
    is_within_ties: bool = False

    def __str__(self) -> str:
        verdict = "passed" if self.passed else f"FAILED at {self.diverging}"
        return f"{verdict}: {self.figures}"

    @property
    def figures(self) -> str:
        """The figures of the comparison as text."""
        agreement = "" if self.top1_agreement is None else f", top-1 agreement {self.top1_agreement:.1%}"
        return f"largest difference {self.max_abs_error:.3g}, {self.sqnr_db:.1f} dB{agreement} on {self.samples} samples"

    @property
    def has_equal_answers(self) -> bool:
        """Whether enough predictions are the same, if there are any."""
        return self.top1_agreement is None or self.top1_agreement >= EQUAL_ANSWERS

    def require(self, path: Path | str) -> None:
        """Raise ParityError, naming the first layer that diverges, unless ``passed`` or the rounding of ties explains all differences."""
        if self.passed or self.is_within_ties:
            return
        largest = sorted(self.differences, key=lambda difference: -difference.steps)[:_LISTED]
        layers = f" Largest differences on equal inputs: {'; '.join(map(str, largest))}." if largest else ""
        needed = "" if self.has_equal_answers else f" At least {EQUAL_ANSWERS:.0%} of the answers must be the same."
        raise ParityError(
            f"{path} does not compute what the quantized network computes: it first diverges at {self.diverging} "
            f"({self.figures}).{needed}{layers} Keep that layer in float, or export to .lowbit."
        )


def check_onnx_parity(model: nn.Module, program: Program, path: Path | str) -> Parity:
    """Compare an ONNX file, run by ONNX Runtime with all optimizations, with the network on the program's sample and variations of it.

    Args:
        model: The quantized network.
        program: The program that the file was written from; its node names are the names of the file's inner values.
        path: The ONNX file.

    Raises:
        GraphError: The file takes the sample, but not another batch size, although its graph leaves that open.
    """
    network = load_onnx(path)

    def run(inputs: Inputs) -> list[Tensor]:
        try:
            return list(network(inputs).values())
        except DataError as error:
            if inputs is program.sample:
                raise
            dim = inputs.batch_dim
            raise GraphError(
                f"dimension {dim} of the inputs cannot stay open as the batch: ONNX Runtime cannot run the file on {inputs.batch_size} entries "
                f"in place of {program.sample.batch_size}. Where another dimension holds the samples, pass batch_dim={1 - min(dim, 1)}; "
                "else export to .lowbit, or let the network take its inputs with the samples first (batch_first=True)."
            ) from error

    parity = compare_outputs(model, program, run)
    quantizers = tuple(node.name for node in program.exported.graph.nodes if is_quantizer(node) or is_rounding(node))
    inputs = program.sample
    if program.is_batch_dynamic and inputs.batch_size > FOLLOWED_SAMPLES:
        inputs = inputs.take(0, FOLLOWED_SAMPLES)
    observed = load_onnx(path, observe=quantizers)(inputs)
    follower = _Follower(program, {name: observed[name] for name in quantizers if name in observed})
    outputs = follower.outputs(inputs)
    beyond_ties = follower.diverging or _diverging_output(program, outputs, list(observed.values()))
    is_close, is_within_ties = parity.sqnr_db >= CLOSE_DB, beyond_ties is None
    passed = parity.has_equal_answers and (is_close or beyond_ties is None)
    if not passed and beyond_ties is None:
        beyond_ties = _most_different(follower.differences)
    return replace(
        parity,
        passed=passed,
        changed_codes=max((difference.changed for difference in follower.differences), default=0.0),
        excess=max((difference.steps for difference in follower.differences), default=0.0),
        diverging=beyond_ties,
        differences=tuple(difference for difference in follower.differences if difference.changed),
        is_within_ties=is_within_ties,
    )


def check_packed_parity(model: nn.Module, program: Program, loaded: nn.Module, weights: Mapping[str, Tensor]) -> Parity:
    """Compare the network loaded from a packed file with the original one on the program's sample and variations of it.

    Args:
        model: The quantized network.
        program: The program that the file was written from.
        loaded: The network that ``load`` returned.
        weights: The file's decoded weights by parameter name, to identify the layer if the outputs differ.
    """

    def run(inputs: Inputs) -> list[Tensor]:
        with evaluating(loaded):
            return _leaves(loaded(*inputs.args, **inputs.kwargs))

    parity = compare_outputs(model, program, run)
    if parity.sqnr_db >= CLOSE_DB and parity.has_equal_answers:
        return replace(parity, passed=True)
    wrong = [name for name, weight in program.weights.items() if name in weights and not torch.equal(weights[name], weight.decode())]
    return replace(parity, diverging=f"the weight {wrong[0]!r}" if wrong else "the outputs, though all weights are equal")


def _most_different(differences: Sequence[Difference]) -> str:
    """The place with the largest difference, for when no single layer explains a failure."""
    if not differences:
        return "the outputs, though no quantizer's codes differ on equal inputs"
    most = max(differences, key=lambda difference: (difference.steps, difference.changed))
    return f"{most}, the largest difference of all layers, although the rounding of ties could explain each of them"


def compare_outputs(model: nn.Module, program: Program, run: Callable[[Inputs], list[Tensor]]) -> Parity:
    """Compare the outputs; the caller sets ``passed``."""
    meter = AgreementMeter()
    samples, equal, answers = 0, 0, 0
    for inputs in variations(program.sample, is_batch_open=program.is_batch_dynamic):
        with evaluating(model), parametrize.cached():
            wanted = _leaves(model(*inputs.args, **inputs.kwargs))
        samples += inputs.batch_size
        for want, got in zip(wanted, run(inputs), strict=True):
            if want.is_floating_point():
                meter.add(want.cpu(), got.to(want.dtype), 0)
            same = _same_answers(want.cpu(), got, inputs)
            if same is not None:
                equal, answers = equal + int(same.sum()), answers + same.numel()
    agreement = meter.result()
    sqnr = _alike(agreement.sqnr_db, agreement.max_abs_error)
    return Parity(samples, agreement.max_abs_error, equal / answers if answers else None, sqnr, passed=False)


def _same_answers(want: Tensor, got: Tensor, inputs: Inputs) -> Tensor | None:
    """Mask of equal predictions; ``None`` for an output without classes: numbers, or pictures like the inputs."""
    if not want.is_floating_point():
        return want == got
    dim = class_dimension(want)
    if want.dim() < 2 or want.shape[dim] < 2:
        return None
    if want.dim() == 4 and any(x.dim() == 4 and x.shape[1] == want.shape[1] and x.shape[2:] <= want.shape[2:] for x in inputs.tensors):
        return None
    return want.argmax(dim) == got.argmax(dim)


def variations(sample: Inputs, *, is_batch_open: bool, samples: int = SAMPLES) -> Iterator[Inputs]:
    """Yield the sample, then seeded variations of it until there are ``samples``.

    Floats get noise of a tenth of their standard deviation, clamped to their range; integers, such as tokens, are permuted along the last
    axis; booleans do not change.

    Example:
        >>> calls = list(variations(Inputs((torch.zeros(100, 2),)), is_batch_open=True))
        >>> [call.batch_size for call in calls]
        [100, 100, 100]
    """
    yield sample
    size = sample.batch_size
    if is_batch_open and size < _CALL:
        sample = sample.repeat(-(-_CALL // size))
    generator = torch.Generator().manual_seed(0)
    count = size
    while count < samples:
        yield sample.map(lambda t: _varied(t, generator))
        count += sample.batch_size


def _varied(x: Tensor, generator: torch.Generator) -> Tensor:
    if x.is_floating_point() and x.numel() > 1:
        noise = torch.randn(x.shape, generator=generator).to(x.dtype)
        return (x + noise * x.std() * _VARIATION).clamp(x.min(), x.max())
    if x.dim() > 1 and x.dtype != torch.bool and not x.is_floating_point():
        return x.roll(int(torch.randint(x.shape[-1], (), generator=generator)), -1)
    return x


def _alike(ratio: float, error: float) -> float:
    """The ratio, or infinity for equal outputs: a constant output has no variance, so that its ratio is meaningless."""
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
        self.differences: list[Difference] = []
        self.diverging: str | None = None
        self._followed: dict[fx.Node, list[tuple[Tensor, Tensor]]] = {}

    def outputs(self, inputs: Inputs) -> list[Tensor]:
        """The network's outputs, computed from the file's last codes."""
        with torch.no_grad():
            return [value for value in self.run(*graph_arguments(self.program, inputs)) if isinstance(value, Tensor)]

    def run_node(self, node: fx.Node) -> object:
        result: object = super().run_node(node)
        if not (is_quantizer(node) or is_rounding(node)):
            return result
        assert isinstance(result, Tensor)
        source = node.args[0]
        assert isinstance(source, fx.Node)
        followed = self._followed.setdefault(source, [])
        if node.name not in self.observed:  # identical quantizers of one tensor were merged in the file
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
        changed = (ours != theirs).float().mean().item() if ours.shape == theirs.shape else 1.0
        difference = Difference(describe(self.program, node), excess, changed)
        self.differences.append(difference)
        if self.diverging is None and excess > EXCESS_LIMIT + accumulator_step(self.program, node) / step:
            self.diverging = str(difference)

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
        if not error <= limit:  # also fails for NaN
            return f"{describe(program, nodes[name])}: its output is off by {error:.3g}"
    return None


def describe(program: Program, node: fx.Node) -> str:
    """A name for messages: ``layer 'conv1'`` if that layer computes ``node`` since the last quantizers, else the quantizer or operation."""
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


def graph_arguments(program: Program, inputs: Inputs) -> list[Tensor]:
    """The values of all placeholders of the program's graph."""
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
