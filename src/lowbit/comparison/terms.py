"""The terms on which a network was quantized: measured on the network itself, and compared before rows share a table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from lowbit.comparison.cells import FLOAT, Result, Track
from lowbit.measure.cost import layer_bits
from lowbit.measure.macs import count_macs
from lowbit.network.bits import layer_quantizers
from lowbit.network.layers import NORMS
from lowbit.network.record import record_of
from lowbit.network.surgery.switchable_norm import resting_norms
from lowbit.quantizers import Quantizer

# What rows of one table must have in common, beside network, data and bits.
EQUAL: dict[Track, tuple[str, ...]] = {
    "aligned": (
        "settings", "weights", "data", "split", "metric", "first_layer", "last_layer", "inner_layers", "merges", "float_share", "images",
        "calibration_images", "configurations", "selection",
    ),
    "published": ("settings", "weights", "data", "split", "metric", "configurations", "selection"),
}  # fmt: skip
# What is only shown, and may be asked to be equal as well.
SHOWN = (
    "granularity", "symmetry", "norms", "first_layer", "last_layer", "inner_layers", "float_share", "images", "calibration_images",
    "calibration",
)  # fmt: skip


def equal_terms(model: nn.Module, float_model: nn.Module, sample: object) -> dict[str, object]:
    """The terms that can be read from a quantized network.

    Returns:
        ``first_layer``, ``last_layer``: bits of weight and input, ``8/8``; ``inner_layers``: those of all others, each once; ``merges``: bits
        of sums and concatenations; ``float_share``: share of multiplications with an operand in float, rounded to 0.1 %;
        ``granularity`` and ``symmetry`` of weights and inputs; ``norms``: ``folded`` into weights, ``kept``, or ``none`` in the network.
    """
    record, bits = record_of(model), layer_bits(model)
    positions = {} if record is None else record.table.positions
    first = [name for name, place in positions.items() if place == "first"] or list(bits)[:1]  # a recurrent layer has several weights
    last = [name for name, place in positions.items() if place == "last"] or list(bits)[-1:]
    macs = count_macs(float_model, sample)
    total = sum(macs.values())
    in_float = sum(count for name, count in macs.items() if None in bits.get(name, (None, None)))
    quantizers = layer_quantizers(model).values()
    weights = [found.weight for found in quantizers if found.weight is not None and found.weight.enabled]
    inputs = [found.activation for found in quantizers if found.activation is not None and found.activation.enabled]
    return {
        "first_layer": _listed(_pair(bits[name]) for name in first),
        "last_layer": _listed(_pair(bits[name]) for name in last),
        "inner_layers": _listed(_pair(pair) for name, pair in bits.items() if name not in (*first, *last)),
        "merges": None if record is None else record.policy.merges,
        "float_share": round(in_float / total, 3) if total else 0.0,
        "granularity": f"{_listed(str(q.granularity) for q in weights)} / {_listed(str(q.granularity) for q in inputs)}",
        "symmetry": f"{_listed(map(_symmetry, weights))} / {_listed(map(_symmetry, inputs))}",
        "norms": _norms(model, float_model),
    }


def _pair(bits: Sequence[int | None]) -> str:
    return "/".join(FLOAT if value is None else str(value) for value in bits[:2])


def _listed(words: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(words)) or "none"


def _symmetry(quantizer: Quantizer) -> str:
    """Whether the grid is symmetric, by what the quantizer says of itself; codebooks and learned levels go by their class."""
    symmetric = getattr(quantizer, "symmetric", None)
    if symmetric is None:
        signed = getattr(quantizer, "signed", None)
        return type(quantizer).__name__ if signed is None else "signed" if signed else "unsigned"
    return "symmetric" if symmetric else "asymmetric"


def _norms(model: nn.Module, float_model: nn.Module) -> str:
    """What became of the norms; those of several widths count as the one that is selected."""
    resting = resting_norms(model)
    before, after = (sum(isinstance(m, NORMS) and m not in resting for m in network.modules()) for network in (float_model, model))
    if before == 0:
        return "none"
    return "kept" if after == before else "folded" if after == 0 else f"{before - after} of {before} folded"


def term_of(result: Result, name: str) -> object:
    """One term of a result, wherever it is recorded; ``settings`` are those of the suite, flat."""
    if name == "metric":
        return result.metric
    if name == "settings":
        return _flat(result.cell.terms)
    if name == "weights" and result.facts.get("weights_follow_seed"):
        return "random, by seed"
    return result.facts.get(name, result.terms.get(name))


def compared_term(result: Result, name: str) -> object:
    """What a term counts as where rows are compared: layers with bits of their own, at the cost of a uniform network, as that network's."""
    return result.cell.bits if name == "inner_layers" and result.cell.search else term_of(result, name)


def differing(results: Iterable[Result], names: Iterable[str]) -> dict[str, list[object]]:
    """The terms among ``names`` that are not the same in all results, with their values."""
    results = list(results)
    found = {name: list(dict.fromkeys(map(_hashable, (compared_term(result, name) for result in results)))) for name in names}
    return {name: values for name, values in found.items() if len(values) > 1}


def grouped(results: Iterable[Result], names: Iterable[str]) -> list[list[Result]]:
    """Results in groups that have all terms among ``names`` in common, in the order of their first members."""
    names, groups = tuple(names), dict[object, list[Result]]()
    for result in results:
        groups.setdefault(tuple(_hashable(compared_term(result, name)) for name in names), []).append(result)
    return list(groups.values())


def _flat(values: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    found: dict[str, object] = {}
    for name, value in values.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) and value else {f"{prefix}{name}": value}
    return found


def _hashable(value: object) -> object:
    if isinstance(value, Mapping):
        return tuple((key, _hashable(entry)) for key, entry in value.items())
    return tuple(map(_hashable, value)) if isinstance(value, (list, tuple)) else value
