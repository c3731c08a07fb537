from __future__ import annotations

import pytest
import torch
from torch import nn

from lowbit.errors import SpecError
from lowbit.measure import measure_latency


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls, self.threads = 0, set()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.threads.add(torch.get_num_threads())
        return x


def test_warm_up_calls_are_extra_and_threads_are_restored() -> None:
    model, before = Counting(), torch.get_num_threads()
    result = measure_latency(model, torch.zeros(3, 2), threads=2, warmup=2, runs=5)
    assert model.calls == 7 and model.threads == {2}
    assert torch.get_num_threads() == before
    assert (result.runs, result.threads, result.batch_size) == (5, 2, 3)
    assert 0 < result.p10_ms <= result.median_ms <= result.p90_ms


def test_senseless_settings_are_refused() -> None:
    with pytest.raises(SpecError, match="at least 1"):
        measure_latency(Counting(), torch.zeros(1), runs=0)
