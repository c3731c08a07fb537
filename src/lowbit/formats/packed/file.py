"""The ``.lowbit`` file: a quantized network in one safetensors file, with codes packed to exactly their bits.

It contains the packed codes (``conv1.weight``), the tables that decode them (``conv1.weight.scale``) and everything that stayed float,
concatenated in the order of their names into one vector for each dtype, because an entry in safetensors' header takes as much space as a
small table. The header's metadata has one entry, ``lowbit``: a JSON object with ``version``, ``manifest`` and the manifest's ``checksum``.
The ``manifest`` is JSON as well, compressed with deflate and encoded in base 85, with

- ``graph``: the operator calls (``lowbit.formats.program.calls``); reading it evaluates no code and names no class;
- ``tensors``: dtype, shape and BLAKE2b of every tensor;
- ``packed``: bit-width, shape, offset and decoder of each packed tensor; ``layouts``: memory formats that are not the default;
- ``numbers``: tensors of one element, such as the scale of an activation quantizer;
- ``kernels``: true if the loaded network runs on low-bit kernels; absent otherwise;
- ``switches``: where the file holds several widths, what they are and which tensors and arguments belong to each
  (``lowbit.formats.packed.widths``); an entry of ``packed`` with ``cut`` has no codes of its own;
- ``provenance``: origin of the network (``lowbit.provenance``); absent if unknown;
- ``float_bytes`` and ``tied``: the size of the float network, and the weights that are the same tensor as an earlier one there;
- ``lowbit``: the version that wrote the file; ``info``: method, options, seed, bit policy and the treatment of each layer.

Equal networks give equal bytes: keys are sorted, and there is only one metadata entry, as safetensors writes several in random order.
Checksums detect damage; they are not a signature.
"""

from __future__ import annotations

import base64
import json
import math
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import cast

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lowbit.errors import DataError, FileFormatError, GraphError
from lowbit.files import replacing
from lowbit.formats.packed.contents import LAYOUTS, arrays_of, checksum, contents_of, digest, dtype_name, fingerprint
from lowbit.formats.packed.tensor import PackedTensor, packed_tensor_from
from lowbit.formats.packed.widths import Widths, cut_from, cut_packed, widths_from, widths_of
from lowbit.formats.program.calls import LARGEST_RANK, Graph, graph_from_exported, graph_from_json, graph_to_json, is_shape, is_size
from lowbit.formats.program.program import Program
from lowbit.formats.program.structure import Json
from lowbit.network.record import FloatSize, QuantizationRecord
from lowbit.network.table import LayerRecord, LayerTable
from lowbit.provenance import Provenance, provenance_from_json
from lowbit.reading import check_readable
from lowbit.spec import BitPolicy, LayerBits, parse_bits

VERSION = "1"
LARGEST_MANIFEST = 2**24  # bytes of JSON; the largest networks of timm need less than a tenth of it
DEEPEST_NAME = 64  # nested modules; torch recurses over them and would exceed Python's recursion limit


@dataclass(frozen=True)
class Package:
    """The content of a packed file.

    Attributes:
        graph: The operator calls.
        tensors: Every tensor that the graph reads; packed if it is quantized.
        layouts: Memory format of the tensors that are not row-major.
        record: How the network was quantized; ``None`` if unknown.
        runs_on_kernels: Whether ``lowbit.load`` moves the network onto low-bit kernels. The codes in the file are the same either way, as
            their layout for the kernels depends on the processor that loads it.
        provenance: Origin of the network; ``None`` if unknown.
        float_size: Size of the float network; ``None`` if unknown.
        widths: Everything that the file holds, where it holds several widths; graph and tensors are those of one combination.
        places: Which one: the place of the width of each slot.
    """

    graph: Graph
    tensors: Mapping[str, Tensor | PackedTensor]
    layouts: Mapping[str, str] = field(default_factory=dict)
    record: QuantizationRecord | None = None
    runs_on_kernels: bool = False
    provenance: Provenance | None = None
    float_size: FloatSize | None = None
    widths: Widths | None = None
    places: Mapping[str, int] = field(default_factory=dict)

    def layout_of(self, name: str) -> torch.memory_format:
        """Memory format that the tensor had when it was exported."""
        return LAYOUTS[self.layouts[name]] if name in self.layouts else torch.contiguous_format


def package(program: Program, record: QuantizationRecord | None = None, provenance: Provenance | None = None) -> Package:
    """Pack an exported program; tensors with equal content are stored once.

    Raises:
        GraphError: An operator or argument that a packed file does not support.
    """
    tensors: dict[str, Tensor | PackedTensor] = {}
    layouts: dict[str, str] = {}
    names: dict[str, str] = {}
    kept: dict[str, str] = {}
    for name, (tensor, layout) in contents_of(program).items():
        names[name] = kept.setdefault(fingerprint(name, tensor) + layout, name)
        if names[name] == name:
            tensors[name] = tensor
            layouts |= {name: layout} if layout else {}
    graph = graph_from_exported(program.exported, program.structure, names, program.batch_dims)
    return Package(graph, tensors, layouts, record, provenance=provenance, float_size=program.float_size)


def package_widths(
    model: nn.Module, programs: Sequence[Program], record: QuantizationRecord, provenance: Provenance | None = None
) -> Package:
    """Pack a network with several widths, exported at each of its switches from the highest on; it starts with its current widths.

    Raises:
        GraphError: An operator or argument that a packed file does not support, or something between widths of layers that it cannot hold.
    """
    widths, places = widths_of(model, record, programs)
    return at_places(Package(Graph((), (), (), None), {}, {}, record, False, provenance, programs[0].float_size, widths), places)


def at_places(content: Package, places: Mapping[str, int]) -> Package:
    """The package of a network with several widths where its slots (see ``Widths``) have those of these places.

    Raises:
        FileFormatError: As ``Widths.content_at``.
    """
    assert content.widths is not None
    graph, tensors, layouts = content.widths.content_at(places)
    record = None if content.record is None else _with_bits(content.record, content.widths.bits_at(places))
    return replace(content, graph=graph, tensors=tensors, layouts=layouts, record=record, places=dict(places))


def _with_bits(record: QuantizationRecord, bits: Mapping[str, LayerBits]) -> QuantizationRecord:
    """``record`` with the rows of a network that has these bits."""
    table = LayerTable(notes=record.table.notes, others=record.table.others)
    for row in record.table:
        own = bits.get(row.name, LayerBits(row.weight_bits, row.activation_bits, row.output_bits))
        table.add(replace(row, weight_bits=own.weight, activation_bits=own.activation, output_bits=own.output))
    return replace(record, table=table)


def write_package(content: Package, path: Path | str) -> int:
    """Write a packed file atomically and return its size in bytes.

    Raises:
        OutputError: The file cannot be written; an existing file is unchanged.
    """
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(data := package_bytes(content))
        file.flush()
        os.fsync(file.fileno())
    return len(data)


def package_bytes(content: Package) -> bytes:
    """The content of the file that ``write_package`` writes.

    Raises:
        GraphError: The graph is too large for a packed file.
    """
    arrays: dict[str, Tensor] = {}
    numbers: dict[str, Json] = {}
    packed: dict[str, Json] = {}
    widths = content.widths
    stored, cuts = (content.tensors, {}) if widths is None else (widths.tensors, cut_from(widths))
    for name, tensor in stored.items():
        if isinstance(tensor, Tensor) and tensor.dtype == torch.float32 and tensor.numel() == 1 and bool(torch.isfinite(tensor)):
            numbers[name] = [float(tensor), tensor.dim()]
        else:
            arrays |= arrays_of(name, tensor)
        if isinstance(tensor, PackedTensor):
            packed[name] = {**tensor.describe(), **({"cut": list(cuts[name])} if name in cuts else {})}
    for name in cuts:
        del arrays[name]
    manifest: dict[str, Json] = {
        "lowbit": _lowbit_version(),
        "info": _info(content.record),
        "graph": graph_to_json(content.graph) if widths is None else widths.graph,
        "packed": packed,
        "layouts": dict(content.layouts if widths is None else widths.layouts),
        "numbers": numbers,
        "tensors": {name: [dtype_name(array), list(array.shape), checksum(array)] for name, array in arrays.items()},
    }
    if widths is not None:
        manifest["switches"] = {**widths.to_json(), "places": dict(content.places)}
    if content.runs_on_kernels:
        manifest["kernels"] = True
    if content.provenance is not None:
        manifest["provenance"] = cast(Json, content.provenance.to_json())
    if content.float_size is not None:
        manifest["float_bytes"] = content.float_size.total_bytes
        manifest |= {"tied": list(content.float_size.tied)} if content.float_size.tied else {}
    text = _json(manifest).encode()
    if len(text) > LARGEST_MANIFEST:
        raise GraphError(f"the graph is too large for a packed file: {len(text)} bytes of JSON, at most {LARGEST_MANIFEST} are allowed")
    header: Json = {"version": VERSION, "manifest": base64.b85encode(zlib.compress(text, 9)).decode(), "checksum": digest(text)}
    return safetensors.torch.save(_joined(arrays), {"lowbit": _json(header)})


@dataclass(frozen=True)
class FilePart:
    """Bytes of a packed file that belong together.

    Attributes:
        name: The module that owns the tensors (empty for the network itself), or a section of the header.
        code_bytes: Packed codes.
        table_bytes: Scales, zero points and codebooks, which decode them.
        float_bytes: Tensors that are not quantized: biases, norms, weights left in float.
        header_bytes: Share of the header.
    """

    name: str
    code_bytes: int = 0
    table_bytes: int = 0
    float_bytes: int = 0
    header_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """Bytes of all kinds together."""
        return self.code_bytes + self.table_bytes + self.float_bytes + self.header_bytes


HEADER_SECTIONS = {
    "graph": ("graph",),
    "record of the quantization": ("info",),
    "shapes and checksums": ("tensors", "packed", "layouts"),
    "scales of activations": ("numbers",),
    "widths": ("switches",),
}


def file_parts(path: Path | str) -> list[FilePart]:
    """The parts of a packed file, the largest first; their bytes add up to the size of the file.

    The header is compressed as a whole; its bytes are divided in proportion to the size of each section when it is compressed alone.

    Raises:
        DataError, FileFormatError: As for ``read_package``.
    """
    read_package(path)
    with safe_open(path, "pt") as file:
        manifest = _manifest(file.metadata() or {})
    packed = cast(dict[str, object], manifest["packed"])
    parts: dict[str, FilePart] = {}
    for name, (dtype, shape, _) in cast(dict[str, tuple[str, list[int], str]], manifest["tensors"]).items():
        of = next((other for other in packed if name.startswith(f"{other}.")), "")
        owner = (of or name).rpartition(".")[0]
        kind = "code_bytes" if name in packed else "table_bytes" if of else "float_bytes"
        part = parts.get(owner, FilePart(owner))
        parts[owner] = replace(part, **{kind: getattr(part, kind) + math.prod(shape) * getattr(torch, dtype).itemsize})
    header = Path(path).stat().st_size - sum(part.total_bytes for part in parts.values())
    held = {name: [manifest[key] for key in keys] for name, keys in HEADER_SECTIONS.items() if set(keys) <= set(manifest)}
    sizes = [len(zlib.compress(_json(cast(Json, section)).encode(), 9)) for section in held.values()]
    bounds = [round(header * sum(sizes[:count]) / sum(sizes)) for count in range(len(sizes) + 1)]
    sections = [FilePart(name, header_bytes=stop - start) for name, (start, stop) in zip(held, pairwise(bounds), strict=True)]
    return sorted([*parts.values(), *sections], key=lambda part: -part.total_bytes)


def read_package(path: Path | str) -> Package:
    """Read a packed file; everything in it is checked before it is used.

    Raises:
        DataError: There is no such file, or it cannot be read.
        FileFormatError: The file is damaged, not a packed file, of another version, or not safe to load.
    """
    check_readable(path)  # a missing file is not a broken one
    try:
        with safe_open(path, "pt") as file:
            manifest = _manifest(file.metadata() or {})
            vectors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        return _package_from(manifest, vectors)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    except SafetensorError as error:
        raise FileFormatError(f"{path}: not a safetensors file, or a truncated one ({error}). Copy or export it again.") from error
    except RecursionError as error:
        raise FileFormatError(f"{path}: its manifest is nested too deeply") from error
    except ValueError as error:  # FileFormatError, and errors about bits and policies
        raise FileFormatError(f"{path}: {error}") from error


def _manifest(metadata: Mapping[str, str]) -> Mapping[str, object]:
    if "lowbit" not in metadata:
        raise FileFormatError("a safetensors file, but not one that lowbit wrote")
    header = _parsed(metadata["lowbit"], "header")
    if header.get("version") != VERSION:
        written = f"{header.get('version')!r:.20}"
        raise FileFormatError(f"format version {written}, this lowbit reads version {VERSION!r}. Install a matching lowbit.")
    try:
        inflate = zlib.decompressobj()
        text = inflate.decompress(base64.b85decode(str(header.get("manifest", ""))), LARGEST_MANIFEST)
    except (ValueError, zlib.error) as error:
        raise FileFormatError(f"its manifest cannot be decoded ({error})") from error
    if not inflate.eof:
        raise FileFormatError(f"its manifest is truncated or larger than {LARGEST_MANIFEST} bytes")
    if header.get("checksum") != digest(text):
        raise FileFormatError("the checksum of its manifest does not match: the file is damaged")
    manifest = _parsed(text, "manifest")
    if not all(isinstance(manifest.get(key), dict) for key in _SECTIONS):
        raise FileFormatError(f"its manifest must hold the sections {', '.join(_SECTIONS)}")
    return manifest


_SECTIONS = ("info", "graph", "tensors", "packed", "layouts", "numbers")


def _json(value: Json) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False, sort_keys=True)


def _parsed(text: str | bytes, what: str) -> dict[str, object]:
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"its {what} is not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise FileFormatError(f"its {what} must be a JSON object, got {type(value).__name__}")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not allowed")


def _package_from(manifest: Mapping[str, object], vectors: Mapping[str, Tensor]) -> Package:
    described, packed, layouts, numbers, info = (
        cast(dict[str, object], manifest[key]) for key in ("tensors", "packed", "layouts", "numbers", "info")
    )
    arrays = _separated(described, vectors)
    tensors: dict[str, Tensor | PackedTensor] = {name: _number(name, value) for name, value in numbers.items()}
    sources: dict[str, PackedTensor] = {}
    for name, description in sorted(packed.items(), key=lambda item: _is_cut(item[1])):  # what codes are cut from comes first
        if (name not in arrays) != _is_cut(description) or name in numbers:
            raise FileFormatError(f"tensor {name[:80]!r}: {'it appears twice' if name in arrays else 'its codes are missing'}")
        tables = {key.removeprefix(f"{name}."): arrays.pop(key) for key in list(arrays) if key.startswith(f"{name}.")}
        if _is_cut(description):
            tensors[name] = packed_tensor_from(
                name, description, partial(cut_packed, cast(dict[str, object], description), sources), tables
            )
        else:
            tensors[name] = sources[name] = packed_tensor_from(name, description, arrays.pop(name), tables)
    if both := sorted(set(arrays) & set(tensors)):
        raise FileFormatError(f"tensor {both[0][:80]!r}: it appears twice")
    tensors |= arrays
    for name in tensors:
        _check_depth(name)
    for name, layout in layouts.items():
        _check_layout(name, layout, tensors)
    runs_on_kernels = manifest.get("kernels", False)
    if not isinstance(runs_on_kernels, bool):
        raise FileFormatError(f"its entry 'kernels' must be true or false, got {str(runs_on_kernels)[:80]}")
    provenance = provenance_from_json(manifest["provenance"]) if "provenance" in manifest else None
    record, rest = _record_from(info), (runs_on_kernels, provenance, _float_size(manifest))
    if "switches" not in manifest:
        return Package(graph_from_json(manifest["graph"], frozenset(tensors)), tensors, cast(dict[str, str], layouts), record, *rest)
    if record is None:
        raise FileFormatError("it holds several widths and does not say how the network was quantized")
    widths, places = widths_from(manifest["switches"], manifest["graph"], tensors, cast(dict[str, str], layouts))
    for name in widths.names:
        _check_depth(name)
    record = replace(record, switches=widths.switches, switching=widths.switching, tied=widths.tied)
    return at_places(Package(Graph((), (), (), None), {}, {}, record, *rest, widths), places)


def _is_cut(description: object) -> bool:
    return isinstance(description, dict) and "cut" in description


def _check_depth(name: str) -> None:
    if name.count(".") > DEEPEST_NAME:
        raise FileFormatError(f"tensor {name[:80]!r}: its name has more than {DEEPEST_NAME} parts")


def _float_size(manifest: Mapping[str, object]) -> FloatSize | None:
    total, tied = manifest.get("float_bytes"), manifest.get("tied", [])
    if total is None and not tied:
        return None
    if not (is_size(total) and _are_texts(tied)):
        raise FileFormatError(f"the size of the float network: expected a number of bytes and names, got {str((total, tied))[:80]}")
    return FloatSize(cast(int, total), tuple(cast(list[str], tied)))


def _number(name: str, value: object) -> Tensor:
    if not (isinstance(value, list) and len(value) == 2 and isinstance(value[0], float) and is_size(value[1]) and value[1] <= LARGEST_RANK):
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


def _joined(arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One vector for each dtype."""
    vectors: dict[str, list[Tensor]] = {}
    for name in sorted(arrays):
        vectors.setdefault(dtype_name(arrays[name]), []).append(arrays[name].reshape(-1))
    return {dtype: torch.cat(parts) for dtype, parts in vectors.items()}


def _separated(described: Mapping[str, object], vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of ``_joined``, with every checksum compared."""
    arrays: dict[str, Tensor] = {}
    read = dict.fromkeys(vectors, 0)
    for name in sorted(described):
        entry, where = described[name], f"tensor {name[:80]!r}"
        if not (isinstance(entry, list) and len(entry) == 3 and isinstance(entry[0], str) and is_shape(entry[1])):
            raise FileFormatError(f"{where}: it must be described by [dtype, shape, checksum], got {str(entry)[:80]}")
        dtype, shape, expected = entry
        vector, first, count = vectors.get(dtype, torch.empty(0)), read.get(dtype, 0), math.prod(shape)
        if vector.dim() != 1 or first + count > vector.numel():
            raise FileFormatError(f"{where}: the file contains fewer values than its shape {shape} needs")
        arrays[name] = vector[first : first + count].reshape(shape).clone()
        read[dtype] = first + count
        if expected != checksum(arrays[name]):
            raise FileFormatError(f"{where}: its checksum does not match, the file is damaged")
    for dtype, vector in vectors.items():
        if read[dtype] != vector.numel():
            raise FileFormatError(f"{vector.numel() - read[dtype]} values of {dtype[:80]!r} belong to no tensor")
    return arrays


def _info(record: QuantizationRecord | None) -> dict[str, Json]:
    if record is None:
        return {}
    facts = {
        "method": record.method, "options": dict(record.options), "seed": record.seed, "policy": record.policy.to_dict(),
        "layers": [list(astuple(row)) for row in record.table],
        "others": [list(astuple(row)) for row in record.table.others], "notes": record.table.notes,
    }  # fmt: skip
    return cast(dict[str, Json], json.loads(json.dumps(facts, default=str)))


def _record_from(info: Mapping[str, object]) -> QuantizationRecord | None:
    """The inverse of ``_info``; values of options that JSON cannot express come back as strings."""
    if not info:
        return None
    method, options, seed, rows, notes = (info.get(key) for key in ("method", "options", "seed", "layers", "notes"))
    others = info.get("others", [])
    are_rows = isinstance(rows, list) and isinstance(others, list)
    if not (_are_texts([method]) and isinstance(options, dict) and isinstance(seed, int) and are_rows and _are_texts(notes)):
        raise FileFormatError(f"cannot understand how the network was quantized: {str(info)[:80]}")
    table = LayerTable()
    for row in cast(list[object], rows):
        table.add(_row_from(row))
    table.others = [_row_from(row) for row in cast(list[object], others)]
    table.notes.extend(cast(list[str], notes))
    merge_bits = options.pop("merge_bits", None)  # older files have it here instead of in the policy
    policy = BitPolicy.from_dict(info.get("policy")).with_merges(merge_bits)
    return QuantizationRecord(cast(str, method), options, policy, seed, table)


def _row_from(row: object) -> LayerRecord:
    if not (isinstance(row, list) and len(row) in (6, 7) and _are_texts([row[0], row[1], row[5]]) and row[4] in ("done", "skipped")):
        raise FileFormatError(f"what was done to a layer must be [name, kind, bits, bits, status, reason, bits], got {str(row)[:80]}")
    bits = [*row[2:4], *row[6:], None]  # older files have no bits for outputs
    weight_bits, activation_bits, output_bits, *_ = (parse_bits(value, f"layer {row[0][:80]!r}") for value in bits)
    return LayerRecord(row[0], row[1], weight_bits, activation_bits, row[4], row[5], output_bits)


def _are_texts(values: object) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def _lowbit_version() -> str:
    try:
        return version("lowbit")
    except PackageNotFoundError:
        return "0.0.0"
