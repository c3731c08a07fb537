"""``lowbit doctor``: what this machine has, and which kernels low-bit layers run on."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from lowbit.cli.console import say, show_json, show_table
from lowbit.cli.settings import Json
from lowbit.errors import LowbitError, install_command

app = typer.Typer(add_completion=False)
FEATURES = ("sse4.2", "avx2", "avx512f", "avx512vnni", "avxvnni", "avx512vpopcntdq", "amx-int8", "neon", "dotprod")
DEVELOPERS = ("all", "docs", "test", "dev")  # extras that gather others, or that only working on lowbit needs
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
_FORMS = {"count": "differing bits counted in words", "lookup": "differing bits looked up, four at a time"}
_FIRST_USE = """
import time
from lowbit.runtime.layers.binary import compiled_loops
start = time.perf_counter()
compiled_loops()
print(time.perf_counter() - start)
"""


@dataclass(frozen=True)
class Part:
    """A package that lowbit uses.

    Attributes:
        name: The package.
        extra: The extra that installs it; empty where lowbit needs it.
        version: The installed one, or ``None``.
        problem: Why it does not work, and what to do.
    """

    name: str
    extra: str
    version: str | None
    problem: str = ""


@app.command("doctor")
def doctor(
    times: Annotated[
        bool, typer.Option("--time", help="Also time the first use of the kernels, with an empty cache and a filled one.")
    ] = False,
    json: Json = False,
) -> None:
    """Show the installed packages, the processor's instructions, and the kernels that low-bit layers run on and why."""
    found, kernels = parts(), dict(_kernels())
    seconds = dict(_first_use()) if times else {}
    missing = dict.fromkeys(part.extra for part in found if part.version is None)
    if json:
        packages = {part.name: {"version": part.version, "extra": part.extra or None, "problem": part.problem or None} for part in found}
        installs = {extra: install_command(extra) for extra in missing}
        timed = {"first_use_seconds": seconds} if times else {}
        show_json({"packages": packages, "install": installs, "kernels": kernels, **timed})
        return
    show_table(("package", "version", "extra"), ((part.name, part.version, part.extra or "needed") for part in found))
    for part in found:
        if part.problem:
            say(f"\n{part.name}: {part.problem}")
    if missing:
        say(f"\nto install what is missing of an extra ({', '.join(missing)}): {install_command(next(iter(missing)))}")
    show_table(("\nkernels", ""), kernels.items())
    if times:
        show_table(("\nfirst use of the kernels", "seconds"), ((state, f"{value:.2f}") for state, value in seconds.items()))


def parts() -> list[Part]:
    """Every package that lowbit needs or can use, as its own metadata say; lowbit itself first."""
    found = {"lowbit": Part("lowbit", "", _version("lowbit"))}
    for line in importlib.metadata.requires("lowbit") or ():
        name, extra = re.match(r"[\w.-]+", line), re.search(r"""extra == ['"](\w+)['"]""", line)
        if name is not None and name[0] not in found and (extra is None or extra[1] not in DEVELOPERS):
            found[name[0]] = Part(name[0], "" if extra is None else extra[1], _version(name[0]), _problem(name[0]))
    return list(found.values())


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _problem(package: str) -> str:
    """What is wrong with an installed package; only torchvision depends on the build of another one."""
    if package != "torchvision" or _version(package) is None:
        return ""
    done = subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return ""
    torch_version = _version("torch") or ""
    reason = done.stderr.strip().splitlines()[-1]
    index = f" --index-url {CPU_INDEX}" if torch_version.endswith("+cpu") else ""
    return (
        f"does not import beside torch {torch_version} ({reason}), as it was built for another build of torch. lowbit makes its networks "
        f"and timm's work all the same; to have it whole: {sys.executable} -m pip install --force-reinstall --no-deps{index} "
        f"torchvision=={(_version(package) or '').partition('+')[0]}"
    )


def _kernels() -> Iterator[tuple[str, object]]:
    import torch

    from lowbit.runtime.cpu.target import active_target, processor_features
    from lowbit.runtime.cuda.target import cuda_target
    from lowbit.runtime.layers.binary import compiled_loops

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
    from lowbit.runtime.cpu import compiled

    if compiled.is_sound(folder):
        return "filled"
    return "cannot be written: each process compiles again" if not os.access(compiled.cache_root(), os.W_OK) else "empty"


def _first_use() -> Iterator[tuple[str, float]]:
    from lowbit.runtime.cpu import compiled

    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, compiled.VARIABLE: folder}
        for state in ("empty cache", "filled cache"):
            done = subprocess.run([sys.executable, "-c", _FIRST_USE], env=environment, capture_output=True, text=True, check=False)
            if done.returncode:
                raise LowbitError(f"the kernels cannot be loaded: {done.stderr.strip().splitlines()[-1]}")
            yield state, float(done.stdout)
