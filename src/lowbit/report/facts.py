"""Facts of a run: the command, the time, the machine, the versions and the data."""

from __future__ import annotations

import os
import platform
import shlex
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import torch

from lowbit.qat.engine.curve import PACKAGES, versions

RUNTIMES = ("onnx", "onnxruntime", "numba")  # what files are checked and timed with


def run_facts(started: float, data: Mapping[str, str]) -> dict[str, object]:
    """The facts, for ``Report.run``.

    Args:
        started: When the run began, as returned by ``time.time``; its duration is counted from there to now.
        data: What each data set was, in words, by what it was used for.
    """
    return {
        "command": command_line(sys.argv),
        "started": datetime.fromtimestamp(started, UTC).isoformat(timespec="seconds"),
        "seconds": round(time.time() - started, 1),
        "machine": {
            "processor": processor_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "system": platform.platform(),
            "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "versions": versions((*PACKAGES, *RUNTIMES)),
        "data": dict(data),
    }


def command_line(arguments: list[str]) -> str | None:
    """The command as it was typed: ``lowbit quantize -w 4``, ``python train.py``; ``None`` where no script was run, as in a notebook."""
    program, *rest = arguments or [""]
    path = Path(program)
    if path.stem == "lowbit" or (path.name == "__main__.py" and path.parent.name == "lowbit"):
        return shlex.join(["lowbit", *rest])
    return shlex.join(["python", program, *rest]) if path.suffix == ".py" else None


def processor_name() -> str:
    """The processor's name if the system reports it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()
