"""Measured time of a torch module on this machine."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import nn

from lowbit.errors import SpecError
from lowbit.inputs import Inputs
from lowbit.measure.outputs import device_of
from lowbit.network.layers import evaluating


@dataclass(frozen=True)
class Latency:
    """Milliseconds per call: the median and the 10 % and 90 % quantiles of ``runs`` calls after warming up."""

    median_ms: float
    p10_ms: float
    p90_ms: float
    runs: int
    threads: int
    batch_size: int


def measure_latency(model: nn.Module, sample: object, *, threads: int = 1, warmup: int = 3, runs: int = 20) -> Latency:
    """Time ``model(sample)`` in evaluation mode without gradients.

    The first ``warmup`` calls are not counted (allocation, kernel choice). The number of processor threads is set for the
    measurement and restored. On an accelerator each call waits until the device is done.

    Raises:
        SpecError: ``threads`` or ``runs`` below 1, or ``warmup`` below 0.
    """
    if threads < 1 or runs < 1 or warmup < 0:
        raise SpecError(f"latency: threads and runs must be at least 1 and warmup at least 0, got {threads}, {runs}, {warmup}")
    device = device_of(model)
    inputs = Inputs.of(sample, model).to(device)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with evaluating(model):
            times = [_timed_call(model, inputs, device) for _ in range(warmup + runs)][warmup:]
    finally:
        torch.set_num_threads(before)
    quantiles = torch.tensor(times, dtype=torch.float64).quantile(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)).tolist()
    return Latency(quantiles[1], quantiles[0], quantiles[2], runs, threads, inputs.batch_size)


def _timed_call(model: nn.Module, inputs: Inputs, device: torch.device) -> float:
    start = time.perf_counter()
    model(*inputs.args, **inputs.kwargs)
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return (time.perf_counter() - start) * 1000
