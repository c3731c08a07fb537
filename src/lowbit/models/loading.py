"""Networks by name, by ``module:factory``, or from timm and torchvision."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import sys
import textwrap
import typing
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
from torch import nn

from lowbit.errors import SpecError, missing_extra, unknown_name
from lowbit.files import may_download
from lowbit.models.bireal import bireal_resnet18, bireal_resnet20
from lowbit.models.bsrn import bsrn
from lowbit.models.digits import digits_net
from lowbit.models.edsr import edsr, edsr_baseline, edsr_small
from lowbit.models.mobilenet import mobilenet_v2_small
from lowbit.models.rdn import rdn_a, rdn_b
from lowbit.models.rdn_esrgan import esrgan_medium, esrgan_slim
from lowbit.models.reactnet import reactnet_a
from lowbit.models.resnet import resnet8, resnet18, resnet20, resnet32, resnet56
from lowbit.models.srresnet import srresnet
from lowbit.models.vdsr import vdsr
from lowbit.models.vgg_small import vgg_small
from lowbit.models.weights import load_weights

BUILT_IN: dict[str, tuple[Callable[..., nn.Module], str]] = {
    "digits": (digits_net, "the embedded default: residual and depthwise blocks for 8x8 digits, trained weights included"),
    "resnet8": (resnet8, "residual network of 8 layers for 28- to 40-pixel images"),
    "resnet20": (resnet20, "residual network of 20 layers for 28- to 40-pixel images"),
    "resnet32": (resnet32, "residual network of 32 layers for 28- to 40-pixel images"),
    "resnet56": (resnet56, "residual network of 56 layers for 28- to 40-pixel images"),
    "resnet18": (resnet18, "residual network of 18 layers for large images, 224 pixels as a rule"),
    "bireal_resnet20": (bireal_resnet20, "resnet20 with a shortcut around each convolution and no ReLU, for binary training"),
    "bireal_resnet18": (bireal_resnet18, "resnet18 with a shortcut around each convolution and no ReLU, for binary training"),
    "reactnet_a": (reactnet_a, "MobileNet of ordinary convolutions with shortcuts and shifted PReLUs, for binary training on large images"),
    "vgg_small": (vgg_small, "six convolutions and a classifier for 32-pixel images"),
    "mobilenet_v2_small": (mobilenet_v2_small, "inverted residuals with depthwise convolutions and ReLU6 for 28- to 40-pixel images"),
    "edsr_small": (edsr_small, "super-resolution x2, x3, x4: EDSR of 4 blocks of 24 channels, trained weights for x2 included"),
    "edsr_baseline": (edsr_baseline, "super-resolution x2, x3, x4: EDSR of 16 blocks of 64 channels"),
    "edsr": (edsr, "super-resolution x2, x3, x4: EDSR of 32 blocks of 256 channels"),
    "srresnet": (srresnet, "super-resolution x2, x3, x4: residual blocks with batch norm"),
    "rdn_a": (rdn_a, "super-resolution x2, x3, x4: 20 dense blocks of 6 layers"),
    "rdn_b": (rdn_b, "super-resolution x2, x3, x4: 16 dense blocks of 8 layers"),
    "esrgan_slim": (
        esrgan_slim,
        "super-resolution x2, x3, x4: the RDN of npm's @upscalerjs/esrgan-slim; its models/x2/model.json are weights",
    ),
    "esrgan_medium": (esrgan_medium, "super-resolution x2, x3, x4: the RDN of npm's @upscalerjs/esrgan-medium"),
    "vdsr": (vdsr, "super-resolution x2, x3, x4: 20 plain convolutions behind bicubic enlarging"),
    "bsrn": (bsrn, "super-resolution x2, x3, x4: 3x3 and 1x1 convolutions without activations, for binary training"),
}
TRAINED_WORDS = ("pretrained", "weights")  # options of factories that load trained weights
_modules_of_files: set[str] = set()  # names in sys.modules that stand for a file, which the next file of that name replaces
_torchvision_schemas: list[torch.library.Library] = []  # schemas live as long as their library object


def load_model(spec: str, weights: Path | str | None = None, **options: object) -> nn.Module:
    """The network that ``spec`` names, in evaluation mode.

    Args:
        spec: A built-in name, ``package.module:factory``, ``file.py:factory``, ``timm:NAME`` or ``torchvision:NAME``. A file alone,
            ``file.py``, will do where ``full_name`` finds the factory.
        weights: State dict as ``.safetensors`` or ``.pt`` / ``.pth``.
        **options: Passed to the factory (``num_classes``, ``in_channels``...).

    Raises:
        UnknownNameError: No such built-in network.
        SpecError: The module, the factory or its result cannot be used.
        FileFormatError: The weights cannot be read safely or do not fit.
        MissingExtraError: timm or torchvision is not installed.
    """
    source, colon, name = spec.rpartition(":")
    if not colon and spec.endswith(".py"):
        return load_model(full_name(spec), weights, **options)
    if not colon and Path(spec).suffix in (".pt", ".pth", ".safetensors", ".ckpt"):
        raise SpecError(
            f"model {spec}: a file of weights. Name the network as file.py:factory, or a built-in one ({', '.join(BUILT_IN)}), and this file with weights=."
        )
    if not colon:
        if spec not in BUILT_IN:
            raise unknown_name(
                "model", spec, BUILT_IN, "Other forms: package.module:factory, file.py:factory, timm:NAME, torchvision:NAME."
            )
        model = _call(BUILT_IN[spec][0], spec, options)
    elif source == "timm":
        timm = _import_vision("timm")
        if not timm.is_model(name):
            raise unknown_name("timm model", name, timm.list_models())
        options = _without_weights(options)
        model = _call(partial(timm.create_model, name), spec, options)
    elif source == "torchvision":
        models = _import_vision("torchvision").models
        if name not in models.list_models():
            raise unknown_name("torchvision model", name, models.list_models())
        options = _without_weights(options)
        model = _call(partial(models.get_model, name), spec, options)
    else:
        model = _call(find_factory(source, name), spec, options)
    if weights is not None:
        load_weights(model, Path(weights))
    return model.eval()


def _without_weights(options: dict[str, object]) -> dict[str, object]:
    """``options`` without those that download trained weights, where nothing may be downloaded."""
    return options if may_download() else {name: value for name, value in options.items() if name not in TRAINED_WORDS}


def find_factory(source: str, name: str) -> Callable[..., Any]:
    """The function or class ``name`` of a module or a Python file.

    Raises:
        SpecError: There is no such module or file, or importing it fails.
        UnknownNameError: It defines no such function.
    """
    module = _import(source)
    factory = getattr(module, name, None)
    if not callable(factory):
        raise unknown_name(f"factory in {source}", name, factories_in(module))
    return cast(Callable[..., Any], factory)


def _import(source: str) -> ModuleType:
    """The module of that name or file."""
    path = Path(source) if source.endswith(".py") else None
    if path is not None and not path.is_file():
        raise SpecError(f"model {source}: there is no such file in {path.parent.resolve()}. Name one as file.py:factory.")
    try:
        return _module_named(source) if path is None else _module_of_file(path)
    except (Exception, SystemExit) as error:  # whatever the user's code raises
        raise SpecError(f"model {source}: importing it failed with {_description(error)}") from error


def factories_in(module: ModuleType) -> list[str]:
    """Names of the functions, classes and networks that a module defines itself."""
    defined = {key: value for key, value in vars(module).items() if callable(value) and not key.startswith("_")}
    return [key for key, value in defined.items() if getattr(value, "__module__", None) == module.__name__ or isinstance(value, nn.Module)]


def full_name(spec: str) -> str:
    """``spec`` itself, or for a Python file alone ``file.py:factory`` with the one factory in it that needs no arguments.

    That is a function that returns something (and does not say that this is no network), else a class of networks, or a network.

    Raises:
        SpecError: There is none, or several; the message lists what the file has.
    """
    if not spec.endswith(".py"):
        return spec
    module = _import(spec)
    found = {name: getattr(module, name) for name in factories_in(module)}
    usable = {name: factory for name, factory in found.items() if _needs_nothing(factory)}
    functions = [name for name, factory in usable.items() if inspect.isfunction(factory) and _may_return_network(factory)]
    networks = [name for name, factory in usable.items() if isinstance(factory, nn.Module) or _is_network_type(factory)]
    chosen = functions or networks
    if len(chosen) == 1:
        return f"{spec}:{chosen[0]}"
    reason = f"{', '.join(chosen)} need no arguments" if chosen else "none of them makes a network without arguments"
    raise SpecError(f"model {spec}: name the function or class in it, as {spec}:NAME. It has: {', '.join(found) or 'none'} ({reason}).")


def _needs_nothing(factory: Callable[..., object]) -> bool:
    """Whether ``factory`` is a network already, or can be called without arguments."""
    if isinstance(factory, nn.Module):
        return True
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):
        return False
    return all(p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)


def _may_return_network(function: Callable[..., object]) -> bool:
    """Whether a function declares that it returns a network, or declares nothing and has a ``return`` with a value."""
    try:
        declared = typing.get_type_hints(function).get("return")
        source = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except Exception:  # hints may name what is not there, and code may have no source
        return False
    if declared is not None:
        return _is_network_type(declared)
    return any(isinstance(node, ast.Return) and node.value is not None for node in ast.walk(source))


def _is_network_type(value: object) -> bool:
    return inspect.isclass(value) and issubclass(value, nn.Module)


def _description(error: BaseException) -> str:
    """The error in words, even if its own text cannot be produced."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:
        return f"{type(error).__name__}, without a readable message"


def _module_named(name: str) -> ModuleType:
    if "" not in sys.path:
        sys.path.insert(0, "")  # modules in the current folder, as `python -m` finds them
    return importlib.import_module(name)


def _module_of_file(path: Path) -> ModuleType:
    path = path.resolve(strict=True)
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # modules beside the file, as `python file.py` finds them
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None  # the name ends in .py
    module = importlib.util.module_from_spec(spec)
    if path.stem in _modules_of_files or path.stem not in sys.modules:
        sys.modules[path.stem] = module  # pickle looks classes up there
        _modules_of_files.add(path.stem)
    spec.loader.exec_module(module)
    return module


def _call(factory: Callable[..., nn.Module], spec: str, options: dict[str, object]) -> nn.Module:
    if isinstance(factory, nn.Module):
        if options:
            raise SpecError(f"model {spec} is a network, not a factory: it takes no options, got {', '.join(options)}")
        return factory
    try:
        model: object = factory(**options)
    except (Exception, SystemExit) as error:  # whatever the user's code raises
        raise SpecError(
            f"model {spec}: calling the factory with {options or 'no options'} failed with {_description(error)}. "
            f"It takes {_signature(factory)}."
        ) from error
    if not isinstance(model, nn.Module):
        raise SpecError(f"model {spec}: the factory returned {type(model).__name__}, expected a torch.nn.Module")
    return model


def _signature(factory: Callable[..., nn.Module]) -> str:
    try:
        return str(inspect.signature(factory))
    except (TypeError, ValueError):  # written in C
        return "unknown arguments"


def _import_vision(package: str) -> Any:
    """Import timm or torchvision.

    torchvision's compiled operators are built for one build of torch; beside another its import stops at operators that were
    never defined, although the networks do not need them, so their schemas are defined here.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise missing_extra((error.name or package).partition(".")[0], "models", f"a model from {package}") from error
    except RuntimeError as error:
        if "torchvision::" not in str(error) or _torchvision_schemas:
            raise
        for name in [key for key in sys.modules if key.partition(".")[0] in ("torchvision", "timm")]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _torchvision_schemas.append(library)
        return importlib.import_module(package)
