"""Networks by name, by ``module:factory``, or from timm and torchvision; weights read without running code."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pickle
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lowbit.errors import FileFormatError, SpecError, missing_extra, unknown_name
from lowbit.models.digits import digits_net
from lowbit.models.mobilenet import mobilenet_v2_small
from lowbit.models.resnet import resnet8, resnet20, resnet32, resnet56
from lowbit.models.vgg_small import vgg_small

BUILT_IN: dict[str, tuple[Callable[..., nn.Module], str]] = {
    "digits": (digits_net, "the embedded default: residual and depthwise blocks for 8x8 digits, trained weights included"),
    "resnet8": (resnet8, "residual network of 8 layers for 28- to 40-pixel images"),
    "resnet20": (resnet20, "residual network of 20 layers for 28- to 40-pixel images"),
    "resnet32": (resnet32, "residual network of 32 layers for 28- to 40-pixel images"),
    "resnet56": (resnet56, "residual network of 56 layers for 28- to 40-pixel images"),
    "vgg_small": (vgg_small, "six convolutions and a classifier for 32-pixel images"),
    "mobilenet_v2_small": (mobilenet_v2_small, "inverted residuals with depthwise convolutions and ReLU6 for 28- to 40-pixel images"),
}
_torchvision_schemas: list[torch.library.Library] = []  # schemas live as long as their library object


def load_model(spec: str, weights: Path | str | None = None, **options: object) -> nn.Module:
    """The network that ``spec`` names, in evaluation mode.

    Args:
        spec: A built-in name, ``package.module:factory``, ``file.py:factory``, ``timm:NAME`` or ``torchvision:NAME``.
        weights: State dict as ``.safetensors`` or ``.pt`` / ``.pth``.
        **options: Passed to the factory (``num_classes``, ``in_channels``...).

    Raises:
        UnknownNameError: No such built-in network.
        SpecError: The module, the factory or its result cannot be used.
        FileFormatError: The weights cannot be read safely or do not fit.
        MissingExtraError: timm or torchvision is not installed.
    """
    source, colon, name = spec.rpartition(":")
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
        model = timm.create_model(name, pretrained=False, **options)
    elif source == "torchvision":
        models = _import_vision("torchvision").models
        if name not in models.list_models():
            raise unknown_name("torchvision model", name, models.list_models())
        model = models.get_model(name, **options)
    else:
        model = _call(_factory(source, name), spec, options)
    if weights is not None:
        load_weights(model, Path(weights))
    return model.eval()


def load_weights(model: nn.Module, path: Path) -> None:
    """Put the state dict in ``path`` into ``model``; FileFormatError when it cannot be read safely or does not fit."""
    state = _without_wrapping(read_state_dict(path))
    expected = model.state_dict()
    missing = [name for name in expected if name not in state and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in state if name not in expected]
    misshapen = [
        f"{name}: file {tuple(state[name].shape)}, model {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if missing or unexpected or misshapen:
        lists = (("missing", missing), ("unexpected", unexpected), ("other shape", misshapen))
        parts = [f"{label} ({len(names)}): {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}" for label, names in lists if names]
        raise FileFormatError(
            f"weights {path} do not fit {type(model).__name__}: {'; '.join(parts)}. "
            "Pass the weights of this very network (same classes, channels, width)."
        )
    model.load_state_dict(state, strict=False)


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Tensors by name from ``.safetensors`` or ``.pt`` / ``.pth``; nothing in the file is run."""
    if not path.is_file():
        raise FileFormatError(f"weights {path}: there is no such file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise FileFormatError(
            f"weights {path}: the file holds more than tensors, and reading it would run code from it. "
            "Save the state dict alone: torch.save(model.state_dict(), path), or as .safetensors."
        ) from error
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise FileFormatError(f"weights {path}: cannot be read, it is truncated, corrupt or of another format ({reason})") from error
    for key in ("state_dict", "model", "model_state_dict", "net", "state_dict_ema"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not content or not all(isinstance(value, Tensor) for value in content.values()):
        raise FileFormatError(f"weights {path}: expected a state dict (names to tensors), found {type(content).__name__}")
    return dict(content)


def _without_wrapping(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names without the ``module.`` that DataParallel and ``_orig_mod.`` that compile put before them."""
    for prefix in ("_orig_mod.", "module."):
        if state and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def _factory(source: str, name: str) -> Callable[..., nn.Module]:
    try:
        if source.endswith(".py"):
            path = Path(source).resolve()
            module_spec = importlib.util.spec_from_file_location(path.stem, path)
            if module_spec is None or module_spec.loader is None or not path.is_file():
                raise SpecError(f"model {source}:{name}: there is no file {path}")
            module = importlib.util.module_from_spec(module_spec)
            sys.modules.setdefault(path.stem, module)
            module_spec.loader.exec_module(module)
        else:
            if "" not in sys.path:
                sys.path.insert(0, "")  # modules in the current folder, as `python -m` finds them
            module = importlib.import_module(source)
    except SpecError:
        raise
    except Exception as error:
        raise SpecError(f"model {source}:{name}: importing {source} failed with {type(error).__name__}: {error}") from error
    factory = getattr(module, name, None)
    if not callable(factory):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise unknown_name(f"factory in {source}", name, known)
    return factory  # type: ignore[no-any-return]


def _call(factory: Callable[..., nn.Module], spec: str, options: dict[str, object]) -> nn.Module:
    try:
        model = factory if isinstance(factory, nn.Module) else factory(**options)
    except TypeError as error:
        raise SpecError(f"model {spec}: calling {factory} with {options} failed: {error}. It takes {_signature(factory)}.") from error
    if not isinstance(model, nn.Module):
        raise SpecError(f"model {spec}: the factory returned {type(model).__name__}, expected a torch.nn.Module")
    return model


def _signature(factory: Callable[..., nn.Module]) -> str:
    try:
        return str(inspect.signature(factory))
    except (TypeError, ValueError):  # written in C
        return "arguments that it does not tell"


def _import_vision(package: str) -> Any:
    """Import timm or torchvision.

    torchvision's compiled operators are built for one build of torch; beside another its import stops at operators that were
    never defined, although the networks do not need them, so their schemas are defined here.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise missing_extra(package, "models", f"a model from {package}") from error
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
