"""``lowbit doctor``: what this machine has, and which kernels low-bit layers run on."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer

from lowbit.cli.console import show_table
from lowbit.errors import LowbitError
from lowbit.runtime.cpu import compiled
from lowbit.runtime.cpu.target import active_target, processor_features
from lowbit.runtime.cuda.target import cuda_target
from lowbit.runtime.layers.binary import compiled_loops

app = typer.Typer(add_completion=False)
PACKAGES = ("torch", "numba", "llvmlite", "triton", "onnx", "onnxruntime", "openvino", "lightning", "transformers", "timm")
FEATURES = ("sse4.2", "avx2", "avx512f", "avx512vnni", "avxvnni", "avx512vpopcntdq", "amx-int8", "neon", "dotprod")
_FORMS = {"count": "differing bits counted in words", "lookup": "differing bits looked up, four at a time"}
_FIRST_USE = """
import time
from lowbit.runtime.layers.binary import compiled_loops
start = time.perf_counter()
compiled_loops()
print(time.perf_counter() - start)
"""


@app.command("doctor")
def doctor(
    times: Annotated[
        bool, typer.Option("--time", help="Also time the first use of the kernels, with an empty cache and a filled one.")
    ] = False,
) -> None:
    """Show what is installed, what the processor can do, and which kernels low-bit layers run on and why."""
    show_table(("package", "version"), ((name, _version(name)) for name in ("lowbit", *PACKAGES)))
    show_table(("\nkernels", ""), _kernels())
    if times:
        show_table(("\nfirst use of the kernels", "seconds"), _first_use())


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _kernels() -> Iterator[tuple[str, object]]:
    target, why = active_target()
    yield "active", f"{target.name}: {why}"
    if target.lanes:
        yield "tile", f"{target.rows} positions x {target.lanes * target.columns} channels, {_FORMS[target.form]}"
    else:
        yield "what that means", "signs are unpacked and computed by torch in float: exact, and no faster than float"
    try:
        found = processor_features()
        yield "processor", ", ".join(name for name in FEATURES if name in found) or None
    except ImportError:
        yield "processor", torch.backends.cpu.get_cpu_capability()
    on_cuda, why = cuda_target()
    yield "on CUDA", f"{'triton' if on_cuda else 'reference'}: {why}"
    yield "threads", torch.get_num_threads()
    start = time.perf_counter()
    loops = compiled_loops()
    if loops is None:
        return
    yield "loaded in", f"{time.perf_counter() - start:.2f} s"
    yield "cache", f"{loops.FOLDER} ({_state(loops.FOLDER)})"


def _state(folder: Path) -> str:
    if compiled.is_sound(folder):
        return "filled"
    return "cannot be written: each process compiles again" if not os.access(compiled.cache_root(), os.W_OK) else "empty"


def _first_use() -> Iterator[tuple[str, object]]:
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, compiled.VARIABLE: folder}
        for state in ("empty cache", "filled cache"):
            done = subprocess.run([sys.executable, "-c", _FIRST_USE], env=environment, capture_output=True, text=True, check=False)
            if done.returncode:
                raise LowbitError(f"the kernels cannot be loaded: {done.stderr.strip().splitlines()[-1]}")
            yield state, f"{float(done.stdout):.2f}"
