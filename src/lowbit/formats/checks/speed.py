"""Speed of an exported file compared with the float network in the same runtime.

Both files are timed alternately in one process, so that other load on the machine affects both; the ratio is the median of the ratios of
neighbouring calls.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path

from lowbit.errors import SpecError
from lowbit.formats.onnx.sessions import Network, Runtime, load_onnx
from lowbit.inputs import Inputs

WARMUP = 3
RUNS = 40
SECONDS = 10.0  # a slow network is timed for about this long, and at least 5 times
FEWEST_RUNS = 5


@dataclass(frozen=True)
class Speed:
    """Median milliseconds per call of the float and the quantized file.

    Attributes:
        float_ms: Time of the float network.
        quantized_ms: Time of the exported file.
        ratio: How many times faster the exported file is; below 1 it is slower.
        runtime, threads, batch_size, runs: Conditions of the measurement.
    """

    float_ms: float
    quantized_ms: float
    ratio: float
    runtime: str
    threads: int
    batch_size: int
    runs: int

    @property
    def is_faster(self) -> bool:
        """Whether the exported file is faster than the float one; differences below 2 % are noise."""
        return self.ratio > 1.02

    @property
    def setting(self) -> str:
        """The conditions of the measurement, in words."""
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        return f"{self.runtime}, {threads}, batch {self.batch_size}, median of {self.runs} interleaved calls"

    def __str__(self) -> str:
        verdict = f"{self.ratio:.2f}x faster than float" if self.is_faster else f"NOT FASTER than float ({self.ratio:.2f}x)"
        return f"{verdict}: {self.quantized_ms:.2f} ms against {self.float_ms:.2f} ms ({self.setting})"


def latency(path: Path | str, sample: object, *, runtime: Runtime = "onnxruntime", threads: int = 1, runs: int = RUNS) -> float:
    """Median milliseconds of one call of an ONNX file, after warming up.

    Raises:
        SpecError: ``runs`` or ``threads`` below 1, or an unknown runtime.
        DataError, FileFormatError: The file is missing or not accepted.
        MissingExtraError: The runtime is not installed.
    """
    inputs = Inputs.of(sample)
    (times,) = time_interleaved([load_onnx(path, runtime=runtime, threads=threads)], inputs, runs=runs)
    return statistics.median(times)


def compare_speed(
    float_path: Path | str,
    quantized_path: Path | str,
    sample: object,
    *,
    runtime: Runtime = "onnxruntime",
    threads: int = 1,
    runs: int = RUNS,
) -> Speed:
    """Time two ONNX files alternately; raises what ``latency`` raises."""
    inputs = Inputs.of(sample)
    networks = [load_onnx(path, runtime=runtime, threads=threads) for path in (float_path, quantized_path)]
    before, after = time_interleaved(networks, inputs, runs=runs)
    ratio = statistics.median(x / y for x, y in zip(before, after, strict=True))
    return Speed(statistics.median(before), statistics.median(after), ratio, runtime, threads, inputs.batch_size, len(before))


def time_interleaved(networks: list[Network], inputs: Inputs, *, runs: int = RUNS) -> list[list[float]]:
    """Milliseconds of each call of each network; the networks are called alternately."""
    if runs < 1:
        raise SpecError(f"runs must be at least 1, got {runs}")
    prepared = [network.prepare(inputs) for network in networks]
    times: list[list[float]] = [[] for _ in networks]
    deadline = time.perf_counter() + SECONDS
    for turn in range(WARMUP + runs):
        for network, values, own_times in zip(networks, prepared, times, strict=True):
            start = time.perf_counter()
            network.run(values)
            own_times.append((time.perf_counter() - start) * 1000)
        if turn + 1 >= WARMUP + min(FEWEST_RUNS, runs) and time.perf_counter() > deadline:
            break
    return [own_times[WARMUP:] for own_times in times]
