"""State dicts, read without running code and loaded into a network only if they fit."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lowbit.errors import FileFormatError
from lowbit.reading import check_readable

WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "state_dict_ema")  # keys that checkpoints keep the weights under
PREFIXES = ("module.", "_orig_mod.")  # what DataParallel and compile put before each name


def load_weights(model: nn.Module, path: Path) -> None:
    """Load the state dict in ``path`` into ``model``; FileFormatError when it cannot be read safely or does not fit."""
    state = _without_prefix(read_state_dict(path))
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
    """Tensors by name from ``.safetensors``, from ``.pt`` / ``.pth`` as torch.save writes them, or from a ``model.json`` of TensorFlow.js.

    Nothing in the file is run.

    Raises:
        FileFormatError: There is no such file, it is damaged, or it holds anything but tensors.
    """
    check_readable(path, error=FileFormatError)
    try:
        content = READERS.get(path.suffix, _load_tensors)(path)
    except Exception as error:  # a damaged or hostile file can make a reader stumble in any way
        if isinstance(error, UnpicklingError) and "Unsupported global" in str(error):
            raise FileFormatError(
                f"weights {path}: the file holds Python objects besides tensors, and making them would run code from the file. "
                "Save the state dict alone, torch.save(model.state_dict(), path), or write .safetensors."
            ) from error
        reason = str(error).splitlines()[0] if str(error) and not isinstance(error, UnpicklingError) else type(error).__name__
        raise FileFormatError(
            f"weights {path}: cannot be read as {FORMATS.get(path.suffix, 'a state dict of torch.save')}; "
            f"it is truncated, corrupt or of another format ({reason})"
        ) from error
    if isinstance(content, Mapping):
        content = next((content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)), content)
    if not isinstance(content, Mapping) or not content or not all(isinstance(value, Tensor) for value in content.values()):
        what = (
            f"{type(content).__name__} with {', '.join(map(str, list(content)[:5]))}"
            if isinstance(content, Mapping)
            else type(content).__name__
        )
        raise FileFormatError(f"weights {path}: expected a state dict (names to tensors), found {what}")
    return dict(content)


def _load_tensors(path: Path) -> object:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about pickle protocols: what cannot be read is an error anyway
        content: object = torch.load(path, map_location="cpu", weights_only=True)
    return content


def _load_tfjs(path: Path) -> dict[str, Tensor]:
    """Convolutions ``[kh, kw, in, out]`` and biases of a TensorFlow.js layers model, from ``model.json`` and the files that it names, as torch has them."""
    found: dict[str, Tensor] = {}
    for group in json.loads(path.read_text(encoding="utf-8"))["weightsManifest"]:
        parts = [check_readable(path.parent / Path(name).name, error=FileFormatError).read_bytes() for name in group["paths"]]
        values, start = np.frombuffer(b"".join(parts), "<f4"), 0
        for entry in group["weights"]:
            if entry["dtype"] != "float32" or "quantization" in entry:
                raise ValueError(
                    f"{entry['name']} is {entry['dtype']}{' in quantized form' if 'quantization' in entry else ''}, not float32"
                )
            count = math.prod(entry["shape"])
            tensor = torch.from_numpy(values[start : start + count].reshape(entry["shape"]).copy())
            layer, _, kind = entry["name"].rpartition("/")
            found[f"{layer}.{'weight' if kind == 'kernel' else kind}"] = (
                tensor.permute(3, 2, 0, 1).contiguous() if tensor.dim() == 4 else tensor
            )
            start += count
    return found


READERS: Mapping[str, Callable[[Path], object]] = {".safetensors": load_file, ".json": _load_tfjs}  # by suffix; others are torch.save's
FORMATS = {".safetensors": "safetensors", ".json": "a layers model of TensorFlow.js"}


def _without_prefix(state: dict[str, Tensor]) -> dict[str, Tensor]:
    while prefix := next((prefix for prefix in PREFIXES if state and all(name.startswith(prefix) for name in state)), None):
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state
