"""Readers meet files with bytes changed and ends cut off: they read them, or raise DataError or FileFormatError, and nothing else."""

from __future__ import annotations

import gzip
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from lowbit.data.arrays import load_arrays
from lowbit.data.idx import read_idx
from lowbit.data.images import read_picture
from lowbit.errors import LowbitError
from lowbit.models.weights import read_state_dict

PIXELS = np.random.default_rng(0).integers(0, 255, (20, 20, 3), dtype=np.uint8)
ARRAYS = {"x": np.zeros((3, 4, 4)), "y": np.arange(3)}
READERS: dict[str, tuple[Callable[[Path], object], Callable[[Path], object]]] = {
    **{
        suffix: (lambda path: Image.fromarray(PIXELS).save(path), read_picture)
        for suffix in ("png", "jpg", "gif", "bmp", "tiff", "webp", "ppm")
    },
    "npy": (lambda path: np.save(path, ARRAYS["x"]), load_arrays),
    "npz": (lambda path: np.savez_compressed(path, **ARRAYS), load_arrays),
    "gz": (
        lambda path: path.write_bytes(gzip.compress(bytes([0, 0, 8, 1, 0, 0, 0, 9]) + bytes(9))),
        lambda path: read_idx(path, dimensions=1),
    ),
    "pt": (lambda path: torch.save({"a": torch.zeros(20)}, path), read_state_dict),
    "safetensors": (lambda path: save_file({"a": torch.zeros(20)}, path), read_state_dict),
}


@pytest.mark.parametrize("suffix", READERS)
def test_damage_ends_in_an_error_of_ours(tmp_path: Path, suffix: str) -> None:
    write, read = READERS[suffix]
    path, chance, refused = tmp_path / f"a.{suffix}", random.Random(0), 0
    write(path)
    assert read(path) is not None
    content = path.read_bytes()
    for _ in range(120):
        damaged = bytearray(content)
        for _ in range(chance.choice((1, 3, 10))):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        path.write_bytes(damaged[: chance.randrange(len(damaged))] if chance.random() < 0.3 else damaged)
        try:
            read(path)
        except LowbitError as error:
            refused += 1
            assert str(path) in str(error)
    assert refused >= 20  # most of the cut-off ones
