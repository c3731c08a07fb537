"""Packed files with something in them changed and all checksums made to fit: what an attacker would write."""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import safe_open
from torch import Tensor

Manifest = dict[str, Any]


def read_parts(path: Path) -> tuple[dict[str, Any], Manifest, dict[str, Tensor]]:
    """Header, manifest and vectors of a packed file."""
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["lowbit"])
    return header, json.loads(zlib.decompress(base64.b85decode(header["manifest"]))), safetensors.torch.load_file(path)


def write_parts(path: Path, manifest: Manifest | bytes, vectors: dict[str, Tensor], **header: str) -> Path:
    """A packed file of these parts; ``header`` overrides what is written in front of the manifest."""
    text = manifest if isinstance(manifest, bytes) else json.dumps(manifest).encode()
    full = {
        "version": "1",
        "manifest": base64.b85encode(zlib.compress(text)).decode(),
        "checksum": hashlib.blake2b(text, digest_size=8).hexdigest(),
        **header,
    }
    safetensors.torch.save_file(vectors, path, {"lowbit": json.dumps(full)})
    return path


def tampered(path: Path, change: Callable[[Manifest], object]) -> Path:
    """A copy of the file whose manifest went through ``change``."""
    _, manifest, vectors = read_parts(path)
    change(manifest)
    return write_parts(path.with_name(f"tampered_{path.name}"), manifest, vectors)
