"""The IDX format of MNIST and its relatives: a typed array of bytes with its sizes in front.

Layout, big-endian: two zero bytes, the type (8 = unsigned byte), the number of dimensions, one 32-bit size per dimension, the values.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lowbit.errors import DataError

MAX_BYTES = 2**30  # a hostile file could unpack to any size


def read_idx(path: Path, *, dimensions: int) -> Tensor:
    """The uint8 array in ``path`` (``.gz`` is unpacked); DataError when its magic number, type, rank or length is wrong."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read or unpacked ({error}). Get the file again.") from error
    if len(content) > MAX_BYTES:
        raise DataError(f"{path}: unpacks to more than {MAX_BYTES:,} bytes, which no IDX file of images here has")
    header = 4 + 4 * dimensions
    magic = content[:4].hex()
    if magic != f"000008{dimensions:02x}" or len(content) < header:
        raise DataError(
            f"{path}: {len(content)} bytes that start with magic number 0x{magic}, "
            f"expected 0x000008{dimensions:02x} (unsigned bytes, {dimensions} dimensions) and {dimensions} sizes"
        )
    sizes = struct.unpack(f">{dimensions}I", content[4:header])
    if len(content) - header != math.prod(sizes):
        said = f"{' x '.join(map(str, sizes))} = {math.prod(sizes):,}"
        raise DataError(f"{path}: the header says {said} bytes, the file holds {len(content) - header:,}")
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=header).reshape(sizes).copy())
