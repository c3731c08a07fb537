"""The ``.lowbit`` file: a quantized network in one safetensors file, with codes packed to exactly their bits.

The tensors of the file are the packed codes (``conv1.weight``), the tables that decode them (``conv1.weight.scale``) and everything that
stayed float. The header's metadata holds ``format``, ``version``, and a ``manifest``: JSON, deflated and written in base 85, with

- ``graph``: the operator calls (``lowbit.export.graph``); reading it evaluates nothing and names no class;
- ``packed``: bit-width, shape, offset and decoder of each packed tensor; ``layouts``: memory formats that are not the default;
- ``numbers``: tensors of one element, such as the scale of an activation quantizer;
- ``checksums``: BLAKE2b of every tensor of the file; the manifest's own stands beside it in the header;
- ``lowbit``: the version that wrote the file; ``info``: method, options, seed and bit policy.
"""
from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import cast

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lowbit.errors import DataError, FileFormatError, GraphError
from lowbit.export.graph import Graph, graph_from_exported, graph_from_json, graph_to_json
from lowbit.export.packed_tensor import PackedTensor, packed_tensor_from
from lowbit.export.program import Program
from lowbit.export.structure import Json
from lowbit.files import replacing
from lowbit.network.record import QuantizationRecord

VERSION = "1"
LARGEST_MANIFEST = 2**24  # bytes of JSON; the largest networks of timm need less than a tenth of it
_LAYOUTS = {"channels_last": torch.channels_last, "channels_last_3d": torch.channels_last_3d}


@dataclass(frozen=True)
class Package:
    """What a packed file holds.

    Attributes:
        graph: The operator calls.
        tensors: Every tensor that the graph reads, packed where it is quantized.
        layouts: Memory format of the tensors that are not row-major.
        info: Method, options, seed and bit policy; empty for a network that lowbit did not quantize.
    """

    graph: Graph
    tensors: Mapping[str, Tensor | PackedTensor]
    layouts: Mapping[str, str] = field(default_factory=dict)
    info: Mapping[str, Json] = field(default_factory=dict)

    def layout_of(self, name: str) -> torch.memory_format:
        """Memory format in which the tensor computed when it was exported."""
        return _LAYOUTS[self.layouts[name]] if name in self.layouts else torch.contiguous_format


def package(program: Program, record: QuantizationRecord | None = None) -> Package:
    """Pack an exported program; tensors of equal content are kept once.

    Raises:
        GraphError: An operator or argument that a file cannot hold.
    """
    exported = program.exported
    values: dict[str, Tensor] = {**exported.state_dict, **{k: v for k, v in exported.constants.items() if isinstance(v, Tensor)}}
    used = graph_from_exported(exported, program.structure, {}).tensors
    tensors: dict[str, Tensor | PackedTensor] = {}
    names: dict[str, str] = {}
    kept: dict[str, str] = {}
    for name in (name for name in values if name in used):
        tensor = PackedTensor.of(program.weights[name]) if name in program.weights else values[name].detach()
        layout = _layout(values[name])
        names[name] = kept.setdefault(_fingerprint(name, tensor) + layout, name)
        if names[name] == name:
            tensors[name] = tensor
    layouts = {name: _layout(values[name]) for name in tensors if _layout(values[name])}
    return Package(graph_from_exported(exported, program.structure, names), tensors, layouts, _info(record))


def write_package(content: Package, path: Path | str) -> int:
    """Write a packed file, complete or not at all, and return its size in bytes.

    Raises:
        OutputError: The file cannot be written; a file that was there before is unchanged.
    """
    arrays: dict[str, Tensor] = {}
    numbers: dict[str, Json] = {}
    for name, tensor in content.tensors.items():
        if isinstance(tensor, Tensor) and tensor.dtype == torch.float32 and tensor.numel() == 1 and bool(torch.isfinite(tensor)):
            numbers[name] = [float(tensor), tensor.dim()]
        else:
            arrays |= _arrays(name, tensor)
    manifest: dict[str, Json] = {
        "lowbit": _lowbit_version(),
        "info": dict(content.info),
        "graph": graph_to_json(content.graph),
        "packed": {name: dict(tensor.describe()) for name, tensor in content.tensors.items() if isinstance(tensor, PackedTensor)},
        "layouts": dict(content.layouts),
        "numbers": numbers,
        "checksums": {name: _checksum(array) for name, array in arrays.items()},
    }
    text = json.dumps(manifest, separators=(",", ":"), allow_nan=False).encode()
    if len(text) > LARGEST_MANIFEST:
        raise GraphError(f"the graph is too large for a packed file: {len(text)} bytes of JSON, at most {LARGEST_MANIFEST} are allowed")
    header = {"format": "lowbit", "version": VERSION, "manifest": base64.b85encode(zlib.compress(text, 9)).decode(), "checksum": _digest(text)}
    data = safetensors.torch.save(arrays, header)
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return len(data)


def read_package(path: Path | str) -> Package:
    """Read a packed file; everything in it is checked before it is used.

    Raises:
        DataError: There is no such file, or it cannot be read.
        FileFormatError: The file is damaged, not a packed file, of another version, or not safe to load; says what is wrong.
    """
    try:
        with open(path, "rb"):
            pass  # a missing file is not a broken one
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            manifest = _manifest(header)
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        return _package_from(manifest, arrays)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    except SafetensorError as error:
        raise FileFormatError(f"{path}: not a safetensors file, or a truncated one ({error}). Copy or export it again.") from error
    except FileFormatError as error:
        raise FileFormatError(f"{path}: {error}") from error


def _manifest(header: Mapping[str, str]) -> Mapping[str, object]:
    if header.get("format") != "lowbit":
        raise FileFormatError("a safetensors file, but not one that lowbit wrote")
    if header.get("version") != VERSION:
        raise FileFormatError(f"format version {header.get('version')!r:.20}, this lowbit reads version {VERSION!r}. Install a matching lowbit.")
    try:
        inflate = zlib.decompressobj()
        text = inflate.decompress(base64.b85decode(header.get("manifest", "")), LARGEST_MANIFEST)
    except (ValueError, binascii.Error, zlib.error) as error:
        raise FileFormatError(f"its manifest cannot be decoded ({error})") from error
    if not inflate.eof:
        raise FileFormatError(f"its manifest is truncated or larger than {LARGEST_MANIFEST} bytes")
    if header.get("checksum") != _digest(text):
        raise FileFormatError("the checksum of its manifest does not match: the file is damaged")
    try:
        manifest = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"its manifest is not valid JSON ({error})") from error
    if not isinstance(manifest, dict) or not all(isinstance(manifest.get(key), dict) for key in _SECTIONS):
        raise FileFormatError(f"its manifest must hold the sections {', '.join(_SECTIONS)}")
    return manifest


_SECTIONS = ("info", "graph", "packed", "layouts", "numbers", "checksums")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not allowed")


def _package_from(manifest: Mapping[str, object], arrays: dict[str, Tensor]) -> Package:
    packed, layouts, numbers, checksums, info = (cast(dict[str, object], manifest[key]) for key in ("packed", "layouts", "numbers", "checksums", "info"))
    if set(checksums) != set(arrays):
        odd = sorted(set(checksums) ^ set(arrays))[0]
        raise FileFormatError(f"tensor {odd!r} is {'missing' if odd in checksums else 'not in the manifest'}")
    for name, array in arrays.items():
        if checksums[name] != _checksum(array):
            raise FileFormatError(f"tensor {name!r}: its checksum does not match, the file is damaged")
    tensors: dict[str, Tensor | PackedTensor] = {name: _number(name, value) for name, value in numbers.items()}
    for name, description in packed.items():
        if name not in arrays:
            raise FileFormatError(f"tensor {name!r}: its codes are missing")
        tables = {key: arrays.pop(key) for key in [key for key in arrays if key.startswith(f"{name}.")]}
        tensors[name] = packed_tensor_from(name, description, arrays.pop(name), {key[len(name) + 1 :]: table for key, table in tables.items()})
    if both := sorted(set(arrays) & set(tensors)):
        raise FileFormatError(f"tensor {both[0]!r} appears twice")
    tensors |= arrays
    for name, layout in layouts.items():
        _check_layout(name, layout, tensors)
    graph = graph_from_json(manifest["graph"], frozenset(tensors))
    return Package(graph, tensors, cast(dict[str, str], layouts), cast(dict[str, Json], info))


def _number(name: str, value: object) -> Tensor:
    if not (isinstance(value, list) and len(value) == 2 and isinstance(value[0], float) and isinstance(value[1], int) and 0 <= value[1] <= 8):
        raise FileFormatError(f"number {name!r}: expected [value, dimensions], got {str(value)[:80]}")
    return torch.tensor(value[0], dtype=torch.float32).reshape((1,) * value[1])


def _check_layout(name: str, layout: object, tensors: Mapping[str, Tensor | PackedTensor]) -> None:
    rank = {"channels_last": 4, "channels_last_3d": 5}.get(layout) if isinstance(layout, str) else None
    if name not in tensors or rank is None:
        raise FileFormatError(f"layout of {name!r}: unknown tensor or memory format {str(layout)[:80]!r}")
    tensor = tensors[name]
    shape = tensor.decoded_shape if isinstance(tensor, PackedTensor) else tuple(tensor.shape)
    if len(shape) != rank:
        raise FileFormatError(f"layout of {name!r}: {layout} needs {rank} dimensions, the tensor has {len(shape)}")


def _arrays(name: str, tensor: Tensor | PackedTensor) -> dict[str, Tensor]:
    """The tensors that a file stores for ``tensor``."""
    if isinstance(tensor, PackedTensor):
        tables = {f"{name}.{key}": table for key, table in tensor.stored_tables().items()}
        return {key: value.detach().cpu().contiguous() for key, value in {name: tensor.packed, **tables}.items()}
    return {name: tensor.cpu().contiguous()}


def _fingerprint(name: str, tensor: Tensor | PackedTensor) -> str:
    parts = [_checksum(array) for array in _arrays(name, tensor).values()]
    return repr((parts, tensor.describe() if isinstance(tensor, PackedTensor) else None))


def _layout(tensor: Tensor) -> str:
    """Name of the memory format in which the strides differ from row-major, or ``""``."""
    for name, layout in _LAYOUTS.items():
        if tensor.dim() == (4 if name == "channels_last" else 5):
            strides = torch.empty(tensor.shape, memory_format=layout, device="meta").stride()
            if tensor.stride() == strides != torch.empty(tensor.shape, device="meta").stride():
                return name
    return ""


def _checksum(array: Tensor) -> str:
    raw = array.reshape(-1).view(torch.uint8).numpy().tobytes()
    return _digest(f"{array.dtype}{list(array.shape)}".encode() + raw)


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def _info(record: QuantizationRecord | None) -> dict[str, Json]:
    if record is None:
        return {}
    facts = {"method": record.method, "options": dict(record.options), "seed": record.seed, "policy": record.policy.to_dict()}
    return cast(dict[str, Json], json.loads(json.dumps(facts, default=str)))


def _lowbit_version() -> str:
    try:
        return version("lowbit")
    except PackageNotFoundError:
        return "0.0.0"
