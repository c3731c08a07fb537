"""The kernels that suit this processor."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

from lowbit.errors import SpecError, install_command
from lowbit.lazy import without_collection

VARIABLE = "LOWBIT_KERNELS"


@dataclass(frozen=True)
class Target:
    """A kind of processor and the shape of the micro-kernels that suit it.

    Attributes:
        name: Name of the target; ``reference`` is plain torch.
        features: Features that a processor must have, by LLVM's names.
        form: How products are added up: ``count`` or ``lookup`` of ``micro_kernel``.
        lanes: Output channels in a vector; 0 if there is no kernel.
        rows: Output positions that a tile keeps in registers.
        columns: Vectors of output channels in a tile.
        floats: Numbers in a vector of float32.
        peak: One-bit products per core and cycle, from the instruction count; 0 if unknown.
    """

    name: str
    features: tuple[str, ...] = ()
    form: Literal["count", "lookup"] = "count"
    lanes: int = 0
    rows: int = 0
    columns: int = 0
    floats: int = 1
    peak: float = 0.0


REFERENCE = Target("reference")
TARGETS = (
    Target("avx512_vpopcntdq", ("avx512f", "avx512bw", "avx512vl", "avx512vpopcntdq"), "count", 16, 7, 2, 16, 512 / 1.5),
    Target("avx512", ("avx512f", "avx512bw", "avx512vl"), "lookup", 64, 4, 2, 16),
    Target("avx2", ("avx2",), "lookup", 32, 2, 2, 8, 1024 / 5.5),
    Target("neon", ("neon",), "count", 4, 4, 4, 4),
    Target("sse42", ("sse4.2",), "lookup", 16, 2, 2, 4),
    REFERENCE,
)


@functools.cache
def active_target() -> tuple[Target, str]:
    """The target in use and the reason; determined by the first call.

    It is the first of ``TARGETS`` that the processor can run, unless the environment variable ``LOWBIT_KERNELS`` names another one.

    Raises:
        SpecError: ``LOWBIT_KERNELS`` names no target, or one that this processor cannot run.
    """
    wanted = os.environ.get(VARIABLE, "")
    names = [target.name for target in TARGETS]
    if wanted and wanted not in names:
        raise SpecError(f"{VARIABLE}={wanted}: there are no such kernels. Allowed: {', '.join(names)}.")
    if wanted == REFERENCE.name:
        return REFERENCE, f"{VARIABLE} asks for it"
    if importlib.util.find_spec("numba") is None:
        return REFERENCE, f"numba is not installed: {install_command('kernels')}"
    try:
        found = processor_features()
    except Exception as error:  # whatever a broken installation raises
        warnings.warn(f"numba does not work here ({type(error).__name__}: {error}), low-bit layers run in float", stacklevel=2)
        return REFERENCE, f"numba does not work here ({type(error).__name__})"
    able = [target for target in TARGETS if found.issuperset(target.features)]
    if wanted:
        chosen = next(target for target in TARGETS if target.name == wanted)
        if chosen not in able:
            raise SpecError(f"{VARIABLE}={wanted}: this processor lacks {', '.join(sorted(set(chosen.features) - found))}.")
        return chosen, f"{VARIABLE} asks for it"
    return able[0], f"this processor has {', '.join(able[0].features)}" if able[
        0
    ].features else "this processor has no supported vector unit"


def processor_features() -> frozenset[str]:
    """Features of this processor, by LLVM's names."""
    import llvmlite.binding as llvm

    features = {name for name, is_there in llvm.get_host_cpu_features().items() if is_there}
    if llvm.get_default_triple().startswith(("aarch64", "arm64")):
        features.add("neon")  # part of the architecture
    return frozenset(features)


@functools.cache
def target_loops(name: str) -> ModuleType | None:
    """The module of compiled loops of this name; ``None`` where there are none for the active target. The first call compiles or reads them."""
    with without_collection():
        if not active_target()[0].lanes:
            return None
        try:
            return importlib.import_module(f"lowbit.runtime.cpu.{name}")
        except ImportError:
            return None
