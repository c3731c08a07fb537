"""The figures of one quantization, and ``report.json``.

Names that scripts rely on: ``method``, ``weight_bits``, ``activation_bits``, ``seed``, ``metric`` (the name of the one that
selects), ``metrics.<name>.float|quantized|unit``, ``quantized.agreement``, ``quantized.sqnr_db``, ``size_bytes.float|packed|onnx``,
``parity.onnx|packed.max_abs_error|top1_agreement|passed|samples|sqnr_db``, ``latency_ms.float_onnx|quantized_onnx``,
``layers[].name|kind|weight_bits|activation_bits|sqnr_db|status|reason``, and where the network was trained
``training.metric``, ``training.recipe``, ``training.task``,
``training.curve[].epoch|phase|step|loss|metrics|learning_rate|seconds``. What was not measured is ``null``, and without labelled data ``metrics`` is
empty; nothing else is ever left out or NaN.
"""

from __future__ import annotations

import builtins
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from lowbit.files import write_text

FORMAT_VERSION = 2


@dataclass(frozen=True)
class LayerResult:
    """One layer: what was done to it, what it lost, what it costs.

    Attributes:
        sqnr_db: Layer output in the quantized network against the float one, noise of earlier layers included.
        weight_sqnr_db: Quantized weight against float weight.
        stored_bytes, float_bytes: Packed codes with tables and bias; the same layer in float32.
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
        training: Where the network was trained: ``metric`` (the name of the one that selects), ``recipe``, ``task``, and
            ``curve``, a mapping for each epoch.
        notes: What was skipped and why, for the whole network.
        extra: More entries for the file, under names of their own.
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
    training: Mapping[str, object] | None = None
    notes: Sequence[str] = ()
    extra: Mapping[str, object] = field(default_factory=dict)

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
            "size_bytes": {"float": self.size_float, "packed": self.size_packed, "onnx": self.size_onnx},
            "parity": {"onnx": asdict(self.parity_onnx), "packed": asdict(self.parity_packed)},
            "latency_ms": {
                "float_onnx": self.latency_float_onnx,
                "quantized_onnx": self.latency_quantized_onnx,
                "setting": self.latency_setting or None,
            },
            "layers": [asdict(layer) for layer in self.layers],
            "training": None if self.training is None else dict(self.training),
            "notes": list(self.notes),
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


def to_json(data: object) -> str:
    """Strict JSON: NaN and infinities become ``null``; objects that JSON does not know become their text."""
    return json.dumps(_plain(data), allow_nan=False, ensure_ascii=False, indent=2)


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(entry) for entry in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (str, int)) else str(value)
