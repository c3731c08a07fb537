"""What to try for a quantizer that hurts, and the findings of a diagnosis in plain words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from lowbit.measure.diagnosis import Diagnosis, Remedy, Suspect
from lowbit.quantizers import Quantizer, UniformQuantizer
from lowbit.quantizers.ranges.observers import make_observer
from lowbit.spec import Granularity

FLOAT_DB = 60.0  # from here on two networks differ by rounding of float32 only
UNEVEN = 4.0  # widest over median channel from which equalization is suggested
OUTLYING = 3.0  # largest value over the bulk from which another range is suggested
WIDE = 8  # bits that cure nearly everything
NAMED = 5  # suspects that get a line of their own

_WORDS = {
    "mse": "range of least squared error",
    "percentile": "range without the outermost values",
    "min_max": "range from smallest to largest value",
}

Candidate = tuple[str, UniformQuantizer, Mapping[str, object] | None]


def candidates(suspect: Suspect, quantizer: Quantizer, axis: int) -> Iterator[Candidate]:
    """Quantizers to try instead of ``quantizer``: a description, the quantizer (without a range yet), and the policy rule for it.

    Args:
        suspect: The findings about the quantizer.
        quantizer: The current quantizer.
        axis: Output channel axis of a weight.
    """
    is_weight, bit_width = suspect.kind == "weight", suspect.bit_width
    if isinstance(quantizer, UniformQuantizer):
        for observer in ("mse", "min_max") if is_weight else ("mse", "percentile", "min_max"):
            yield _WORDS[observer], _uniform(bit_width, is_weight, quantizer.granularity, observer), None
        if is_weight and quantizer.granularity.kind == "per_tensor":
            yield "one scale per output channel", _uniform(bit_width, is_weight, Granularity.channel(axis), "mse"), None
    if bit_width < WIDE:
        granularity = Granularity.channel(axis) if is_weight else Granularity.tensor()
        rule = {"match": suspect.layers[0], suspect.kind: WIDE} if len(suspect.layers) == 1 else None
        yield f"{WIDE} bits", _uniform(WIDE, is_weight, granularity, "mse"), rule


def _uniform(bit_width: int, is_weight: bool, granularity: Granularity, observer: str) -> UniformQuantizer:
    made = make_observer(observer, granularity)
    return UniformQuantizer(bit_width, signed=is_weight, symmetric=is_weight, granularity=granularity, observer=made)


def findings(diagnosis: Diagnosis, *, has_reference: bool) -> list[str]:
    """The diagnosis in plain words: is the conversion sound, weights or activations, then the worst quantizers."""
    off, weights, activations, everything = (diagnosis.setting(name) for name in ("off", "weights", "activations", "all"))
    lines = []
    if has_reference and off.sqnr_db < FLOAT_DB:
        lines.append(
            f"With all quantizers off the network is {_db(off.sqnr_db)} from the float one; above {FLOAT_DB:.0f} dB was expected. "
            "Methods that rewrite weights or biases (learned rounding, bias correction) or replace ReLU6 do that on purpose. With any "
            "other method the conversion itself changed the network: look for that first. The figures of single quantizers below "
            "compare with the network whose quantizers are off."
        )
    elif has_reference:
        lines.append("With all quantizers off the network computes what the float one computes, so the conversion is sound.")
    if everything.sqnr_db >= FLOAT_DB:
        return [*lines, f"Everything quantized: {_db(everything.sqnr_db)} from float. There is nothing to repair."]
    worse, other = ("weights", "activations") if weights.sqnr_db <= activations.sqnr_db else ("activations", "weights")
    lines.append(
        f"Everything quantized: {_db(everything.sqnr_db)} from float. Weights alone: {_db(weights.sqnr_db)}, activations alone: "
        f"{_db(activations.sqnr_db)}, so the {worse} cost more than the {other}."
    )
    lines += [_about(suspect, diagnosis) for suspect in diagnosis.suspects[:NAMED] if suspect.share > 0]
    lines += [f"Tried on the whole network: {r.action}: {_gain(r.gain_db)}." for r in diagnosis.remedies if r.suspect == "whole network"]
    return lines


def _about(suspect: Suspect, diagnosis: Diagnosis) -> str:
    tried = [remedy for remedy in diagnosis.remedies if remedy.suspect == suspect.name]
    what = f"{suspect.kind}, {suspect.bit_width} bits, {suspect.granularity.replace('_', ' ')}"
    parts = [f"{suspect.name} ({what}) makes {suspect.share:.0%} of the noise"]
    if suspect.gain_db > 0.05:
        parts[0] += f"; in float it would bring {_gain(suspect.gain_db)}"
    parts += _causes(suspect)
    helpful = sorted((remedy for remedy in tried if remedy.gain_db > 0.1), key=lambda remedy: -remedy.gain_db)
    if helpful:
        parts.append("Tried: " + ", ".join(f"{r.action} {_gain(r.gain_db)}{_rule(r)}" for r in helpful))
    elif tried:
        parts.append(f"Tried without gain: {', '.join(remedy.action for remedy in tried)}")
    return ". ".join(parts) + "."


def _causes(suspect: Suspect) -> list[str]:
    seen, found = suspect.range, []
    if seen is None:
        return ["The data never reaches it"]
    if seen.channel_ratio is not None and seen.channel_ratio > UNEVEN and suspect.granularity == "per_tensor":
        found.append(
            f"Its widest output channel is {seen.channel_ratio:.1f} times the median one, and all share one scale: equalize the layers "
            "(method dfq) or give each channel its scale (weight_granularity=per_channel)"
        )
    if seen.outlier_ratio > OUTLYING:
        what = "weight_observer" if suspect.kind == "weight" else "activation_observer"
        found.append(
            f"Outliers: the largest magnitude is {seen.outlier_ratio:.1f} times what 99.9 % of the values stay below; a range that clips "
            f"them ({what}=mse or percentile) leaves finer steps for the rest"
        )
    if seen.clipped > 0.01:
        found.append(
            f"{seen.clipped:.1%} of its values lie outside its grid ({seen.grid_low:.3g} to {seen.grid_high:.3g}): its range is too narrow"
        )
    if suspect.kind == "weight" and suspect.bit_width <= 4:
        found.append("Learned rounding (methods adaround, brecq) usually helps at so few bits")
    return found


def _db(value: float) -> str:
    return "exactly equal" if value == float("inf") else f"{value:.1f} dB"


def _gain(value: float) -> str:
    return f"{value:+.1f} dB"


def _rule(remedy: Remedy) -> str:
    if remedy.rule is None:
        return ""
    return " (policy rule: {" + ", ".join(f"{key}: {value}" for key, value in remedy.rule.items()) + "})"
