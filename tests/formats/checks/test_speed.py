from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto, helper

from lowbit.errors import DataError, FileFormatError, SpecError
from lowbit.formats.checks.speed import WARMUP, Speed, compare_speed, latency, time_interleaved
from lowbit.formats.onnx.sessions import load_onnx
from lowbit.inputs import Inputs


@pytest.fixture
def doubling(tmp_path: Path) -> Path:
    """A file that computes ``x + x``."""
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 3]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "double", value[:1], value[1:])
    path = tmp_path / "double.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


class Recorder:
    """A network that writes down when it is called."""

    def __init__(self, name: str, calls: list[str]) -> None:
        self.name, self.calls = name, calls

    def prepare(self, inputs: Inputs) -> object:
        return inputs

    def run(self, prepared: object) -> object:
        self.calls.append(self.name)
        return prepared

    def __call__(self, inputs: Inputs) -> dict[str, torch.Tensor]:
        raise AssertionError("timing must not convert")


def test_networks_are_timed_in_turn_and_the_first_calls_do_not_count() -> None:
    calls: list[str] = []
    times = time_interleaved([Recorder("a", calls), Recorder("b", calls)], Inputs((torch.zeros(1),)), runs=4)
    assert calls == ["a", "b"] * (WARMUP + 4)
    assert [len(mine) for mine in times] == [4, 4]


@pytest.mark.parametrize(
    ("ratio", "words"), [(3.0, "3.00x faster than float"), (1.01, "NOT FASTER than float (1.01x)"), (0.5, "NOT FASTER")]
)
def test_a_file_that_is_not_faster_is_called_so(ratio: float, words: str) -> None:
    speed = Speed(6.0, 6.0 / ratio, ratio, "onnxruntime", 1, 1, 40)
    assert str(speed).startswith(words)
    assert "onnxruntime, 1 thread, batch 1, median of 40 interleaved calls" in str(speed)


def test_two_files_are_compared_on_the_same_inputs(doubling: Path) -> None:
    speed = compare_speed(doubling, doubling, torch.ones(2, 3), runs=3)
    assert (speed.runs, speed.batch_size, speed.threads) == (3, 2, 1)
    assert 0 < speed.ratio < 1000
    assert 0 < speed.quantized_ms < 1000


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_both_runtimes_compute_and_are_timed(doubling: Path, runtime: str) -> None:
    if runtime == "openvino":
        pytest.importorskip("openvino")
    inputs = Inputs((torch.tensor([[1.0, 2.0, 3.0]]),))
    (y,) = load_onnx(doubling, runtime=runtime)(inputs).values()  # type: ignore[arg-type]
    assert y.tolist() == [[2.0, 4.0, 6.0]]
    assert latency(doubling, inputs, runtime=runtime, runs=2) > 0  # type: ignore[arg-type]


def test_unknown_runtimes_threads_and_files_are_refused(doubling: Path) -> None:
    with pytest.raises(SpecError, match=r"unknown runtime 'tvm'\. Allowed: onnxruntime, openvino"):
        load_onnx(doubling, runtime="tvm")  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="threads must be at least 1, got 0"):
        load_onnx(doubling, threads=0)
    with pytest.raises(SpecError, match="runs must be at least 1, got 0"):
        latency(doubling, torch.ones(1, 3), runs=0)
    with pytest.raises(DataError, match=r"there is no file .*absent\.onnx"):
        load_onnx(doubling.with_name("absent.onnx"))


def test_a_broken_file_is_refused(tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"not a model")
    with pytest.raises(FileFormatError, match="ONNX Runtime does not accept it"):
        load_onnx(broken)
