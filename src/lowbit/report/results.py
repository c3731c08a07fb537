"""The figures of one quantization, and ``report.json``.

Names that scripts rely on: ``method``, ``weight_bits``, ``activation_bits``, ``seed``, ``metric`` (the name of the one that
selects), ``metrics.<name>.float|quantized|unit``, ``quantized.agreement``, ``quantized.sqnr_db``, ``size_bytes.float|packed|onnx|packed_singly``,
``parity.onnx|packed.max_abs_error|top1_agreement|passed|samples|sqnr_db``, ``latency_ms.float_onnx|quantized_onnx``,
``layers[].name|kind|weight_bits|activation_bits|sqnr_db|status|reason``, ``others[].name|kind|status|reason|stored_bytes``, ``noise_reference``,
``stored[].name|total_bytes|code_bytes|table_bytes|value_bytes|header_bytes`` (which add up to ``size_bytes.packed``),
``activations[].name|role|layers|bit_width|low|high|clip_low|clip_high|clipped|sqnr_db``,
``disagreements[].sample|float|quantized|label``, ``run.command|started|seconds|machine|versions|data``, and where the network was trained
``training.metric``, ``training.recipe``, ``training.task``,
``training.curve[].epoch|phase|step|loss|metrics|learning_rate|seconds``, ``training.measured.<name>.<layer>``;
``switches[].weight_bits|activation_bits|accuracy|bops|latency_ms|single_bytes`` for each width of a network with several (``size_bytes.packed`` is
that of one file with all of them, ``packed_singly`` of a file for each), and where its layers have their own ``selection.layers|trace|average_bits|
accuracies|samples``; ``provenance`` holds what is known of ``lowbit.Provenance``.
What was not measured is ``null``, and without labelled data ``metrics`` is
empty; nothing else is ever left out or NaN.
"""

from __future__ import annotations

import builtins
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from lowbit.files import write_text
from lowbit.report.json_text import to_json
from lowbit.spec import LayerBits, switch_name

FORMAT_VERSION = 2


@dataclass(frozen=True)
class LayerResult:
    """One layer: its quantization, its noise and its cost.

    Attributes:
        sqnr_db: Layer output in the quantized network against that in the report's ``noise_reference``, noise of earlier layers included.
        weight_sqnr_db: Quantized weight against the weight of the report's ``noise_reference``.
        stored_bytes, float_bytes: Packed codes with tables and bias, as in the file where one was written; the same layer in float32.
        macs, bops: For one sample; ``bops = macs x weight bits x activation bits``, float counting 32 bits.
    """

    name: str
    kind: str
    weight_bits: int | None
    activation_bits: int | None
    sqnr_db: float | None = None
    status: str = "done"
    reason: str = ""
    weight_sqnr_db: float | None = None
    shape: tuple[int, ...] = ()
    quantizer: str = ""
    granularity: str = ""
    stored_bytes: int | None = None
    float_bytes: int | None = None
    macs: float | None = None
    bops: float | None = None
    output_bits: int | None = None


@dataclass(frozen=True)
class StoredPart:
    """Bytes of the packed file that belong together.

    Attributes:
        name: The module that owns the tensors (empty for the network itself), or a section of the file's header.
        code_bytes: Packed codes.
        table_bytes: Scales, zero points and codebooks.
        value_bytes: Tensors that are not quantized: biases, norms, weights left in float.
        header_bytes: Graph, settings, shapes, checksums.
        float_bytes: The same in float32; ``None`` for what is no tensor of the network.
    """

    name: str
    code_bytes: int = 0
    table_bytes: int = 0
    value_bytes: int = 0
    header_bytes: int = 0
    float_bytes: int | None = None

    @property
    def total_bytes(self) -> int:
        """Bytes of all kinds together."""
        return self.code_bytes + self.table_bytes + self.value_bytes + self.header_bytes


@dataclass(frozen=True)
class ActivationResult:
    """One activation quantizer and the values that reached it.

    Attributes:
        name: Its site, such as ``layer1.0.relu.output``.
        role: Whether it quantizes the ``input`` or the ``output`` of ``layers``, or is a ``merge``: sums, concatenations, what is pooled.
        layers: The layers that it belongs to.
        bit_width: Its bits.
        low, high: Smallest and largest value.
        clip_low, clip_high: The ends of the grid.
        clipped: Fraction of the values beyond them.
        sqnr_db: Of this quantizer alone.
    """

    name: str
    role: str
    layers: tuple[str, ...]
    bit_width: int
    low: float
    high: float
    clip_low: float
    clip_high: float
    clipped: float
    sqnr_db: float


@dataclass(frozen=True)
class MetricResult:
    """One metric of the task, of the float and of the quantized network.

    Attributes:
        float, quantized: Values; ``None`` was not measured.
        unit: ``%`` for fractions that are shown in percent.
        meaning: A sentence on it.
    """

    float: builtins.float | None
    quantized: builtins.float | None
    unit: str = ""
    meaning: str = ""


@dataclass(frozen=True)
class SwitchResult:
    """A network with several widths at one of them.

    Attributes:
        weight_bits, activation_bits: The width; ``None`` is float.
        accuracy: The metric that selects, whichever it is.
        bops: Bit operations of one sample over all layers.
        latency_ms: Median time of one call with one sample: the packed file on low-bit kernels, or in float where none of its layers can run
            on them.
        single_bytes: A packed file of this width alone.
    """

    weight_bits: int | None
    activation_bits: int | None
    accuracy: float | None = None
    bops: float | None = None
    latency_ms: float | None = None
    single_bytes: int | None = None

    @property
    def name(self) -> str:
        """``4/8``, as commands take it."""
        return switch_name(LayerBits(self.weight_bits, self.activation_bits))


@dataclass(frozen=True)
class SelectionResult:
    """The greedy path of a network whose layers have widths of their own: one layer after the other goes to the next lower width.

    Attributes:
        layers: Those that have a choice.
        trace: Weight bits of each of them after every move, first those before any.
        average_bits: Their mean after every move.
        accuracies: The metric that selects.
        samples: Number of samples that it was measured on.
    """

    layers: tuple[str, ...]
    trace: tuple[tuple[int, ...], ...]
    average_bits: tuple[float, ...]
    accuracies: tuple[float, ...]
    samples: int


@dataclass(frozen=True)
class ParityResult:
    """How an exported file's outputs compare with the quantized network's."""

    max_abs_error: float | None = None
    top1_agreement: float | None = None
    passed: bool | None = None
    samples: int | None = None
    sqnr_db: float | None = None


@dataclass(frozen=True)
class Report:
    """Everything ``report.json`` holds. Agreement and metrics in ``%`` are fractions from 0 to 1; ``None`` was not measured.

    Attributes:
        model: Name of the network.
        method, weight_bits, activation_bits, seed, options: What was asked for; bits of ``None`` are float.
        metric: The name of the task's metric that selects.
        metrics: Every metric of the task by name, on ``samples`` labelled samples; empty where there were none.
        agreement, sqnr_db, kl, max_abs_error: The quantized network against the float one; see ``measure.Agreement``.
        size_float, size_packed, size_onnx: Bytes of the float parameters and of the files.
        parity_packed, parity_onnx: Checks of the exported files.
        latency_float_onnx, latency_quantized_onnx: Median milliseconds per call in the runtime that ``latency_setting`` names.
        layers: In execution order.
        others: What holds parameters besides the layers (norms, single parameters), and why it stays in float.
        noise_reference: The network that noise of layers is measured against, in words; empty where it was not measured.
        stored: What the bytes of the packed file are spent on, the largest part first; they add up to its size.
        activations: Activation quantizers in execution order.
        disagreements: Some of the samples that the two networks classify differently: ``sample``, ``float``, ``quantized``, ``label``.
        training: Where the network was trained: ``metric`` (the name of the one that selects), ``recipe``, ``task``, and
            ``curve``, a mapping for each epoch, and ``measured``, what the method measured of each layer, by the measure's name.
        switches: What a network with several widths gives and costs at each, from the highest on; empty for one width.
        selection: Where its layers have widths of their own: which of them give up bits first.
        notes: What was skipped and why, for the whole network.
        run: Facts of the run, see ``report.facts.run_facts``.
        extra: More entries for the file, under names of their own.
        provenance: Where the network comes from, as ``lowbit.Provenance.to_json`` says it.
    """

    method: str
    weight_bits: int | None
    activation_bits: int | None
    seed: int
    model: str = ""
    options: Mapping[str, object] = field(default_factory=dict)
    metric: str = ""
    metrics: Mapping[str, MetricResult] = field(default_factory=dict)
    samples: int | None = None
    agreement: float | None = None
    sqnr_db: float | None = None
    kl: float | None = None
    max_abs_error: float | None = None
    size_float: int | None = None
    size_packed: int | None = None
    size_onnx: int | None = None
    parity_packed: ParityResult = ParityResult()
    parity_onnx: ParityResult = ParityResult()
    latency_float_onnx: float | None = None
    latency_quantized_onnx: float | None = None
    latency_setting: str = ""
    layers: Sequence[LayerResult] = ()
    others: Sequence[LayerResult] = ()
    noise_reference: str = ""
    stored: Sequence[StoredPart] = ()
    activations: Sequence[ActivationResult] = ()
    disagreements: Sequence[Mapping[str, int | None]] = ()
    training: Mapping[str, object] | None = None
    switches: Sequence[SwitchResult] = ()
    selection: SelectionResult | None = None
    notes: Sequence[str] = ()
    run: Mapping[str, object] = field(default_factory=dict)
    extra: Mapping[str, object] = field(default_factory=dict)
    provenance: Mapping[str, object] = field(default_factory=dict)

    @property
    def size_packed_singly(self) -> int | None:
        """What packed files of one width each take together; ``None`` where there are none."""
        sizes = [switch.single_bytes for switch in self.switches if switch.single_bytes is not None]
        return sum(sizes) if sizes else None

    def to_dict(self) -> dict[str, object]:
        """The content of ``report.json``."""
        data: dict[str, object] = {
            "format_version": FORMAT_VERSION,
            "model": self.model,
            "method": self.method,
            "weight_bits": self.weight_bits,
            "activation_bits": self.activation_bits,
            "seed": self.seed,
            "options": dict(self.options),
            "samples": self.samples,
            "metric": self.metric or None,
            "metrics": {name: {"float": m.float, "quantized": m.quantized, "unit": m.unit} for name, m in self.metrics.items()},
            "quantized": {
                "agreement": self.agreement,
                "sqnr_db": self.sqnr_db,
                "kl": self.kl,
                "max_abs_error": self.max_abs_error,
                "identical": self.max_abs_error == 0,
            },
            "size_bytes": {
                "float": self.size_float,
                "packed": self.size_packed,
                "onnx": self.size_onnx,
                "packed_singly": self.size_packed_singly,
            },
            "parity": {"onnx": asdict(self.parity_onnx), "packed": asdict(self.parity_packed)},
            "latency_ms": {
                "float_onnx": self.latency_float_onnx,
                "quantized_onnx": self.latency_quantized_onnx,
                "setting": self.latency_setting or None,
            },
            "layers": [asdict(layer) for layer in self.layers],
            "others": [asdict(other) for other in self.others],
            "noise_reference": self.noise_reference or None,
            "stored": [{**asdict(part), "total_bytes": part.total_bytes} for part in self.stored],
            "activations": [asdict(activation) for activation in self.activations],
            "disagreements": [dict(entry) for entry in self.disagreements],
            "training": None if self.training is None else dict(self.training),
            "switches": [asdict(switch) for switch in self.switches],
            "selection": None if self.selection is None else asdict(self.selection),
            "notes": list(self.notes),
            "run": dict(self.run),
            "provenance": dict(self.provenance),
        }
        taken = sorted(set(data) & set(self.extra))
        if taken:
            raise ValueError(f"extra entries of a report must not be called {', '.join(taken)}")
        return data | dict(self.extra)


def write_json(report: Report, path: Path | str) -> None:
    """Write ``report.json``, completely or not at all.

    Raises:
        OutputError: The file cannot be written; one that was there is unchanged.
    """
    write_text(path, to_json(report.to_dict()) + "\n")
