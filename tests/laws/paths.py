"""Which functions of lowbit run when users work with a method, and which of them an adapter calls itself."""

from __future__ import annotations

import contextlib
import functools
import sys
import tempfile
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FrameType

import torch
from torch import Tensor, nn

import lowbit
from lowbit.errors import LowbitError
from lowbit.measure.macs import count_macs
from lowbit.models.loading import load_model
from lowbit.network.layers import replace_modules
from lowbit.options import hyper_parameters_of
from lowbit.qat import OptimizerSpec, Recipe
from lowbit.registry import MethodInfo, list_methods
from lowbit.spec import BitPolicy
from lowbit.testing import post_training

SOURCE = str(Path(lowbit.__file__).parent)
NETWORKS = {
    "resnet8": (4, 8),
    "mobilenet_v2_small": (8, 8),
    "reactnet_a": (2, 32),
    "mobilenet_v2_small+hswish": (8, 8),
}  # width, and pixels of the images
STEPS, BATCH = 2, 8
MORE_OPTIONS: dict[str, list[dict[str, object]]] = {  # numbers that switch something on, and choices that belong together
    "bi_real_net": [{"pretraining": 0.5, "retrain_norms": 1}],
    "dorefa": [{"gradient_bits": 6}],
    "brecq": [{"loss": "fisher_diag", "fisher": "released"}],
    "ewgs": [{"delta_interval": 1, "delta_probes": 2}],
    "haq": [{"finetune_epochs": 1, "activation_bits": (4, 8)}, {"finetune_epochs": 1, "weights": "kmeans"}],
    "hawq_v2": [{"fraction": 0.5}, {"activation_bits": (4, 8)}],
    "pact": [{"weights": "sawb", "sawb_zero": True, "sawb_clip_gradient": True}],
    "proxquant": [{"two_bits": "mean"}, {"two_bits": "median"}],
}
SHORT: dict[str, dict[str, object]] = {  # of methods that make their own batches, as large and as many as their defaults say
    "zaq": {"rounds": 1, "network_steps": 1, "latent": 8, "width": 4},
}


def _name(code: CodeType) -> str:
    return f"{Path(code.co_filename).relative_to(SOURCE)}:{code.co_qualname}"


@contextlib.contextmanager
def _watching(is_meant: Callable[[FrameType], bool]) -> Iterator[set[str]]:
    """Collect the functions of lowbit that are called within, of those frames that ``is_meant`` says yes to."""
    seen: dict[int, CodeType] = {}
    names: set[str] = set()

    def note(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event == "call" and id(code) not in seen and code.co_filename.startswith(SOURCE) and is_meant(frame):
            seen[id(code)] = code
            names.add(_name(code))

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        yield names
    finally:
        sys.setprofile(before)


def called_by(adapter: Path, work: Callable[[], object]) -> set[str]:
    """The functions of lowbit that ``work`` calls from the file ``adapter``, with nothing of lowbit in between.

    Backward passes count as autograd's; their forward passes are held to the law.
    """

    def is_direct(frame: FrameType) -> bool:
        caller = None if frame.f_code.co_name == "backward" else frame.f_back
        while caller is not None:
            if caller.f_code.co_filename == str(adapter):
                return True
            if caller.f_code.co_filename.startswith(SOURCE):
                return False
            caller = caller.f_back
        return False

    with _watching(is_direct) as found:
        work()
    return {name for name in found if not name.startswith("lazy.py:")}  # names of the package, looked up as users do


def variants(info: MethodInfo) -> Iterator[dict[str, object]]:
    """Each choice other than the default of each of its options, one at a time."""
    assert info.method is not None
    for name, setting in hyper_parameters_of(info).items():
        kinds = [setting.type, *typing.get_args(setting.type)]
        choices = [choice for kind in kinds if typing.get_origin(kind) is typing.Literal for choice in typing.get_args(kind)]
        if setting.type is bool:
            choices = [not setting.default]
        if name == "weight_granularity":
            choices = ["per_tensor", "per_channel", "group:4"]
        yield from ({name: choice} for choice in choices if choice != setting.default)


@functools.cache
def _network(name: str) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    width, pixels = NETWORKS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plain, _, has_hswish = name.partition("+")
        model = load_model(plain, num_classes=4, in_channels=3, width=width)
        if has_hswish:
            replace_modules(model, nn.ReLU6, nn.Hardswish)
        return model, (torch.randn(STEPS * BATCH, 3, pixels, pixels), torch.arange(STEPS * BATCH) % 4)


def _made(info: MethodInfo, network: str, policy: BitPolicy, options: dict[str, object]) -> nn.Module:
    model, data = _network(network)
    if info.kind == "post_training":
        return lowbit.quantize(
            model, method=info.name, policy=policy, calibration=data[0], **{**post_training.budget(info.name, 4), **options}
        )
    average = info.method.with_hyper_parameters({}).default_recipe().average_weights  # type: ignore[union-attr]
    recipe = Recipe(4, batch_size=BATCH, optimizer=OptimizerSpec(learning_rate=0.01), average_weights=average)
    teacher = model if "teacher" in info.needs else None
    options = {**SHORT.get(info.name, {}), **options}
    return lowbit.train(model, data, method=info.name, policy=policy, recipe=recipe, teacher=teacher, **options)


def _own_loop(info: MethodInfo, policy: BitPolicy) -> None:
    """One step in a loop of the user's own, as the documentation writes it, with a rule for a layer."""
    model, data = _network("resnet8")
    policy = policy.with_rule(match="conv", weight="float", activation="float")
    qat = lowbit.prepare(model, method=info.name, policy=policy, sample=data[0]).train()
    run = lowbit.training(qat, steps_per_epoch=1, epochs=4, float_network=model)
    optimizer = torch.optim.SGD(run.parameter_groups(learning_rate=0.01))
    run.before_step(optimizer)
    run.loss(data).backward()
    run.after_backward()
    optimizer.step()
    run.after_step()


def _several_widths(info: MethodInfo, options: dict[str, object]) -> Iterator[None]:
    """One network for two widths, trained, switched to the lower one, and exported where the options are new to the file."""
    model, data = _network("resnet8")
    recipe = Recipe(4, batch_size=BATCH, optimizer=OptimizerSpec(learning_rate=0.01))
    trained = lowbit.train(model, data, method=info.name, bits=[4, 2], recipe=recipe, **options)
    lowbit.set_bits(trained, 2)
    yield
    if not options or "weight_sharing" in options:
        _through_a_file(trained, data[0][:2])
    if getattr(info.method, "switching", None) == "layer":
        for budget in ({"budget_average_bits": 3.5}, {"budget_bit_operations": 1e9, "sample": data[0]}):
            lowbit.select_bits(trained, lambda network: float(network(data[0])[0, 0]), **budget)  # type: ignore[arg-type]


def _searched(info: MethodInfo, options: dict[str, object]) -> None:
    """Bits for a network that is small enough for every option, searched while keeping what a killed search needs."""
    layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.Flatten(), nn.Linear(32, 4)]
    data, method = _network("resnet8")[1], info.method
    assert method is not None
    settings = {**method.trial, **options}  # type: ignore[attr-defined]
    with tempfile.TemporaryDirectory() as folder:
        lowbit.search(nn.Sequential(*layers), method=info.name, budget="average=4", data=[data], work_dir=folder, **settings)


def _through_a_file(model: nn.Module, images: Tensor) -> None:
    """Export, load, and run what was loaded."""
    with tempfile.TemporaryDirectory() as folder:
        lowbit.export(model, Path(folder) / "model.lowbit", sample=images)
        with torch.no_grad():
            lowbit.load(Path(folder) / "model.lowbit")(images)


def _enlarging(info: MethodInfo) -> Iterator[None]:
    """Networks for super-resolution, prepared as the paper has it and with each of its options, a step of training, and binary kernels."""
    made = {"edsr_small": {"blocks": 1}, "srresnet": {"blocks": 1}, "vdsr": {"depth": 4}, "bsrn": {"blocks": 1}}
    picture = 255 * torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for name, size in made.items():
        model = load_model(name, width=8, scale=2, **size)
        count_macs(model, picture)
        for options in ({}, *([{"blocks_only": True, "block_input": "float"}, *variants(info)] if name == "edsr_small" else ())):
            with contextlib.suppress(LowbitError):
                few = {"weight_bits": _nearest(2, info.weight_bits), "activation_bits": _nearest(4, info.activation_bits or range(1, 2))}
                qat = lowbit.prepare(model, method=info.name, policy="paper", sample=picture, **few, **options).train()  # type: ignore[arg-type]
                run = lowbit.training(qat, steps_per_epoch=1, epochs=4, float_network=model, task=lowbit.SuperResolution(scale=2))
                optimizer = torch.optim.SGD(run.parameter_groups(learning_rate=1e-6))
                run.before_step(optimizer)
                run.loss((picture, picture.repeat_interleave(2, 2).repeat_interleave(2, 3))).backward()
                run.after_backward()
                optimizer.step()
                run.after_step()
                if "surgery" in info.axes and not options:
                    lowbit.compile_runtime(qat.eval(), sample=picture)
            yield


def _in_integers(info: MethodInfo) -> None:
    """Compile the network for every arithmetic of integers, run it, and write it in C."""
    model, (images, _) = _made(info, "resnet8", BitPolicy.uniform(8, 8).with_merges(8), {}), _network("resnet8")[1]
    for requantizer, rounding in (("fixed_point", "double"), ("fixed_point", "single"), ("dyadic", "double"), ("onnx", "double")):
        lowbit.compile_integer(model, requantizer, sample=images, rounding=rounding)(images)  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as folder:
        lowbit.export(model, Path(folder) / "net.c", sample=images)


def _nearest(wanted: int, supported: range) -> int:
    return wanted if wanted in supported else supported[0]


def not_reached_by_users(name: str, functions: set[str]) -> set[str]:
    """Those that do not run when networks are built, quantized or trained by the method, exported, loaded and run, over its bits and options.

    It stops as soon as all of them have run.
    """
    with _watching(lambda _: True) as found:
        for info in list_methods(name):
            for _ in _uses(info):
                if functions <= found:
                    return set()
    return functions - found


def _uses(info: MethodInfo) -> Iterator[None]:
    """What users do with a method of this kind, piece by piece."""
    if info.kind == "search":
        for options in ({}, *variants(info), *MORE_OPTIONS.get(info.name, [])):
            _searched(info, options)
            yield
    elif info.kind == "synthesis":
        yield from _synthesized(info)
    else:
        yield from _quantized_or_trained(info)


def _quantized_or_trained(info: MethodInfo) -> Iterator[None]:
    few = _nearest(2, info.weight_bits), None if info.activation_bits is None else _nearest(4, info.activation_bits)
    lowest = info.weight_bits[0], None if info.activation_bits is None else info.activation_bits[0]
    _network.__wrapped__("resnet8")
    model = _made(info, "resnet8", BitPolicy.uniform(few[0], few[1]), {})
    yield
    if info.kind == "training":
        _own_loop(info, BitPolicy.uniform(few[0], few[1]))
        yield
    for bits in {1, 2, 3, 4, 8} - {few[0]}:
        with contextlib.suppress(LowbitError):
            _made(info, "resnet8", BitPolicy.uniform(bits, bits), {})
        yield
    asked = [(options, (lowest, few)) for options in variants(info)] + [(options, (few,)) for options in MORE_OPTIONS.get(info.name, [])]
    for options, widths in asked:
        for weight_bits, activation_bits in widths:  # some choices need more bits than others, and some another choice beside them
            with contextlib.suppress(LowbitError):
                _made(info, "resnet8", BitPolicy.uniform(weight_bits, activation_bits, first_last=None), options)
                break
        yield
    _through_a_file(model, _network("resnet8")[1][0][:2])
    yield
    if 4 in (info.activation_bits or ()):
        _made(info, "resnet8", BitPolicy.uniform(few[0], few[1]).with_merges(4), {})
        yield
    more = {
        "mobilenet_v2_small+hswish": info.name == "profit",
        "mobilenet_v2_small": "graph" in info.needs,
        "reactnet_a": info.section == "binary",
    }
    for network in (network for network, is_used in more.items() if is_used):
        _network.__wrapped__(network)
        _made(info, network, BitPolicy.uniform(few[0], few[1]), {})
        yield
    if getattr(info.method, "switching", None) is not None:
        for options in ({}, *variants(info)):
            yield from _several_widths(info, options)
            yield
    if "arithmetic" in info.axes:
        _in_integers(info)
        yield
    if info.section == "super_resolution" and info.kind == "training":
        yield from _enlarging(info)


def _synthesized(info: MethodInfo) -> Iterator[None]:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    model(torch.randn(8, 1, 6, 6))  # in training mode, so that the norm sees data
    trial = {**info.method.trial, "iterations": 2}  # type: ignore[union-attr]
    for options in ({}, *variants(info), *MORE_OPTIONS.get(info.name, [])):
        with tempfile.TemporaryDirectory() as folder:
            lowbit.synthesize(model, method=info.name, shape=(1, 6, 6), count=3, work_dir=folder, **{**trial, **options})
        yield
