"""One example for each kind of method, run while its page is written."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Mapping

import torch

from lowbit.errors import LowbitError
from lowbit.options import hyper_parameters_of
from lowbit.qat.method import generates_samples
from lowbit.registry import MethodInfo

_PICTURES = """\
import lowbit
from lowbit.data import load_data, loader
from lowbit.models import load_default

model = load_default()
train = list(loader(load_data("digits"), 32, shuffle=True))[:12]
test = loader(load_data("digits", split="test"), 200)
"""
_ENLARGING = """\
import lowbit
from lowbit.data import load_pairs, loader
from lowbit.models import load_model, upscaling_weights

model = load_model("edsr_small", upscaling_weights(), scale=2).eval()
pairs = load_pairs("sample-photographs", scale=2, split="calibration", patch=24)
train = [batch for batch, _ in zip(loader(pairs, 4), range(4))]
test = train[:1]
"""
_SCORE = """\
print(f"float: {{lowbit.evaluate(model, test{task}).value:{form}")
print(f"{name}, {bits}: {{lowbit.evaluate(quantized, test{task}).value:{form}")
"""


def example(info: MethodInfo, reference: str | None = None) -> str:
    """Python that works with the method on an embedded network, and prints what comes out.

    Args:
        info: The method.
        reference: What a user would type for it; default: its name.
    """
    word = json.dumps(reference or info.name)
    is_enlarging = info.section == "super_resolution"
    start, task = (_ENLARGING, ", task=lowbit.SuperResolution(scale=2)") if is_enlarging else (_PICTURES, "")
    weight, activation = _few(info)
    bits = f"{weight}/{'float' if activation is None else activation} bits"
    score = _SCORE.format(name=info.name, bits=bits, task=task, form=".2f} dB" if is_enlarging else ".1%}")
    trial = _trial(info)
    if info.kind == "training":
        widths = f"bits=[{_above(weight)}, {weight}]" if _is_adaptive(info) else f"weight_bits={weight}, activation_bits={activation}"
        data = "None" if _makes_samples(info) else "train"
        more = "sample=train[0][0], steps_per_epoch=4, " if _makes_samples(info) else ""
        return start + (
            f"recipe = lowbit.Recipe(2, optimizer=lowbit.OptimizerSpec(learning_rate={'1e-5' if is_enlarging else '0.01'}))\n"
            f"quantized = lowbit.train(\n    model, {data}, method={word}, {widths},\n    {more}recipe=recipe{task}, progress=False,\n)\n{score}"
        )
    if info.kind == "post_training":
        options = "".join(f", {name}=50" for name in hyper_parameters_of(info) if name in ("iterations", "activation_iterations"))
        return start + (
            f"quantized = lowbit.quantize(\n    model, method={word}, weight_bits={weight}, activation_bits={activation},\n"
            f"    calibration=train[:4]{options},\n)\n{score}"
        )
    if info.kind == "search":
        return _PICTURES + (
            f'found = lowbit.search(model, method={word}, budget="average=5", data=train[:2], progress=False{trial})\n'
            "for layer in found.searched:\n"
            '    print(f"{layer:22} {found.found.bits[layer].weight} bits")\n'
        )
    return _PICTURES + (
        f"data = lowbit.synthesize(model, method={word}, shape=(1, 8, 8), count=12, progress=False{trial})\n"
        "print(data)\n"
        'quantized = lowbit.quantize(model, method="round_to_nearest", weight_bits=8, activation_bits=8, calibration=data)\n'
        + _SCORE.format(name="calibrated on them", bits="8/8 bits", task="", form=".1%}")
    )


def run_example(code: str) -> str:
    """What ``code`` prints; an error of lowbit is raised, as an example must run."""
    out = io.StringIO()
    with torch.random.fork_rng(devices=[]), contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        torch.manual_seed(0)
        exec(compile(code, "<example>", "exec"), {"__name__": "example"})
    if not out.getvalue().strip():
        raise LowbitError("an example printed nothing, so it shows nothing")
    return out.getvalue()


def _few(info: MethodInfo) -> tuple[int, int | None]:
    nearest = lambda supported: min(supported, key=lambda bits: abs(bits - 4))  # noqa: E731
    return nearest(info.weight_bits), None if info.activation_bits is None else nearest(info.activation_bits)


def _above(bits: int) -> int:
    return min(2 * bits, 8)


def _is_adaptive(info: MethodInfo) -> bool:
    return getattr(info.method, "switching", None) is not None


def _makes_samples(info: MethodInfo) -> bool:
    return info.kind == "training" and generates_samples(info)


def _trial(info: MethodInfo) -> str:
    values: Mapping[str, object] = getattr(info.method, "trial", {})
    return "".join(f", {name}={value!r}" for name, value in values.items())
