"""Tensors as a packed file holds them: their arrays, names of their types and layouts, and checksums."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from lowbit.formats.packed.tensor import PackedTensor
from lowbit.formats.program.calls import graph_from_exported
from lowbit.formats.program.program import Program

LAYOUTS = {"channels_last": torch.channels_last, "channels_last_3d": torch.channels_last_3d}


def contents_of(program: Program) -> dict[str, tuple[Tensor | PackedTensor, str]]:
    """The parameters, buffers and constants that a program reads, packed where they have codes, each with the name of its memory format.

    Raises:
        GraphError: An operator or argument that a packed file does not support.
    """
    exported = program.exported
    values: dict[str, Tensor] = {**exported.state_dict, **{k: v for k, v in exported.constants.items() if isinstance(v, Tensor)}}
    read = graph_from_exported(exported, program.structure, {}, {}).tensors
    return {
        name: (PackedTensor.of(program.weights[name]) if name in program.weights else value.detach(), layout_name(value))
        for name, value in values.items()
        if name in read
    }


def arrays_of(name: str, tensor: Tensor | PackedTensor) -> dict[str, Tensor]:
    """The arrays that a file stores for ``tensor``."""
    if isinstance(tensor, PackedTensor):
        tables = {f"{name}.{key}": table for key, table in tensor.stored_tables().items()}
        return {key: value.detach().cpu().contiguous() for key, value in {name: tensor.packed, **tables}.items()}
    return {name: tensor.cpu().contiguous()}


def dtype_name(array: Tensor) -> str:
    """``float32``, ..."""
    return str(array.dtype).removeprefix("torch.")


def fingerprint(name: str, tensor: Tensor | PackedTensor) -> str:
    """The same text for tensors of equal content; ``name`` is that of the tensor."""
    parts = [checksum(array) for array in arrays_of(name, tensor).values()]
    return repr((parts, tensor.describe() if isinstance(tensor, PackedTensor) else None))


def layout_name(tensor: Tensor) -> str:
    """Name of the memory format of a tensor that is not row-major, else ``""``."""
    for name, layout in LAYOUTS.items():
        if tensor.dim() == (4 if name == "channels_last" else 5):
            strides = torch.empty(tensor.shape, memory_format=layout, device="meta").stride()
            if tensor.stride() == strides != torch.empty(tensor.shape, device="meta").stride():
                return name
    return ""


def checksum(array: Tensor) -> str:
    """BLAKE2b of type, shape and values."""
    raw = array.reshape(-1).view(torch.uint8).numpy().tobytes()
    return digest(f"{array.dtype}{list(array.shape)}".encode() + raw)


def digest(data: bytes) -> str:
    """BLAKE2b of 8 bytes, in hexadecimal."""
    return hashlib.blake2b(data, digest_size=8).hexdigest()
