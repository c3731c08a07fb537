"""Processes for tests that need real ones: split off from one that has imported everything once."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["lowbit.workflows.train", "lowbit.cli", "lightning_fabric", "tests.qat.companions", "tests.qat.training"])
SECONDS = 240


def start(target: Callable[..., None], *arguments: Any) -> ForkServerProcess:
    """A process in which ``target`` runs."""
    process = CONTEXT.Process(target=target, args=arguments)
    process.start()
    return process


def end(process: ForkServerProcess) -> int:
    """The exit code of the process: minus the signal where one ended it."""
    process.join(SECONDS)
    if process.exitcode is None:
        process.kill()
        raise AssertionError(f"the process does not end within {SECONDS} s")
    return process.exitcode
