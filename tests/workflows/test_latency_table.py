"""Tables of the time of layers: what is in them, what is measured once, and what a stopped run keeps."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowbit
from lowbit.assignment.problem import make_problem
from lowbit.errors import LayerError, SpecError
from lowbit.formats.packed.network import PackedNetwork
from lowbit.inputs import Inputs
from lowbit.runtime.layers import planes
from lowbit.runtime.layers.binary import compiled_loops
from lowbit.spec import LayerBits
from lowbit.workflows import latency_table as workflow, layer_times
from lowbit.workflows.latency_table import NOT_CALLED, latency_table, open_latency_table
from lowbit.workflows.layer_times import Candidate, CapturedCall, LayerTime, Variant, captured_calls, time_call, turn_by_turn, variants_of

FEW: dict[str, Any] = {"weight_bits": [1, 4], "activation_bits": [1, 8, None], "runtime": "lowbit", "runs": 1}
PAIRS = ["1/1", "1/8", "1/float", "4/1", "4/8", "4/float", "8/8", "float/float"]


class Net(nn.Module):
    """Two convolutions of one shape, one of another that is called twice, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.twice = nn.Conv2d(8, 8, 1)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.second(torch.relu(self.first(x))))
        out: Tensor = self.fc(self.twice(self.twice(x)).mean((2, 3)))
        return out


class Words(nn.Module):
    """Layers that compute in float, and one whose weight alone is used."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.rnn, self.head = nn.Embedding(9, 4), nn.GRU(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.rnn(self.words(x))[0], self.head.weight)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[CapturedCall]:
    """The calls whose time is asked for, in turn; each takes as many milliseconds as were asked for till then."""
    found: list[CapturedCall] = []

    def count(call: CapturedCall, widths: Iterable[LayerBits], **_: Any) -> dict[LayerBits, LayerTime]:
        found.append(call)
        return {bits: LayerTime(float(len(found)), f"kernel of {bits.weight}") for bits in widths}

    monkeypatch.setattr(workflow, "time_call", count)
    return found


def test_every_layer_has_every_pair_with_its_kernel() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 2))
    table = latency_table(model, torch.rand(3, 8, 6, 6), **FEW)
    assert list(table.times) == list(table.kernels) == ["0", "2", "4"]
    for name in table.times:
        assert list(table.times[name]) == list(table.kernels[name]) == PAIRS
        assert all(time > 0 for time in table.times[name].values())
        assert table.times[name]["4/8"] == table.times[name]["1/8"]  # one kernel, measured once
        assert table.kernels[name]["1/1"] == "lowbit binary"
        assert table.kernels[name]["float/float"] == "lowbit float"
    assert (table.unit, table.facts["threads"], table.facts["batch_size"], table.facts["runtime"]) == ("ms", 1, 1, "lowbit")
    assert {"processor", "versions", "kernels"} <= set(table.facts)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_layers_of_one_shape_share_a_time_and_calls_of_a_layer_add_up(measured: list[CapturedCall]) -> None:
    table = latency_table(Net(), torch.rand(1, 8, 6, 6), **FEW)
    assert len(measured) == 3
    assert {name: times["8/8"] for name, times in table.times.items()} == {"first": 1.0, "second": 1.0, "twice": 2 * 2.0, "fc": 3.0}
    assert table.kernels["twice"]["4/8"] == "kernel of 4"


def test_a_call_has_the_samples_asked_for(measured: list[CapturedCall]) -> None:
    latency_table(nn.Linear(4, 2), torch.rand(3, 4), **{**FEW, "batch_size": 5})
    assert measured[0].args[0].shape == (5, 4)


def test_layers_that_compute_in_float_take_the_same_time_at_all_widths_which_their_weights_share() -> None:
    table = latency_table(Words(), torch.randint(9, (5, 1)), weight_bits=[2], activation_bits=[8], runtime="lowbit", runs=1)
    assert list(table.times) == ["words", "rnn.weight_ih_l0", "rnn.weight_hh_l0", "head"]
    assert list(table.times["words"]) == ["2/8", "8/8", "float/float", "2/float", "8/float"]
    assert list(table.times["head"]) == ["2/8", "8/8", "float/float"]
    reading, remembering = (set(table.times[f"rnn.weight_{part}_l0"].values()) for part in ("ih", "hh"))
    assert len(reading) == len(remembering) == 1
    assert remembering.pop() == pytest.approx(2 * reading.pop())  # 24 x 8 weights and 24 x 4
    assert set(table.kernels["words"].values()) == {"torch in float"}
    assert set(table.times["head"].values()) == {0.0}
    assert set(table.kernels["head"].values()) == {NOT_CALLED}


def stop_after(count: int, patched: pytest.MonkeyPatch) -> None:
    """Let the run be stopped when it has measured one layer more than ``count``, before that one is kept."""
    left, keep = iter(range(count)), workflow._write

    def write(*args: Any) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        keep(*args)

    patched.setattr(workflow, "_write", write)


def test_a_stopped_run_measures_only_what_is_missing_and_a_finished_one_nothing(
    measured: list[CapturedCall], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = Net(), torch.rand(1, 8, 6, 6)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        stop_after(1, patched)
        latency_table(model, x, work_dir=tmp_path, **FEW)
    whole = latency_table(model, x, work_dir=tmp_path, **FEW)
    assert len(measured) == 2 + 2
    assert latency_table(model, x, work_dir=tmp_path, **FEW) == whole
    assert len(measured) == 4
    latency_table(model, x, work_dir=tmp_path, resume=False, **FEW)
    assert len(measured) == 4 + 3


def test_a_stopped_run_is_not_mixed_with_one_of_other_settings(
    measured: list[CapturedCall], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        stop_after(1, patched)
        latency_table(Net(), torch.rand(1, 8, 6, 6), work_dir=tmp_path, **FEW)
    with pytest.raises(SpecError, match="batch_size: 1, now 2"):
        latency_table(Net(), torch.rand(1, 8, 6, 6), work_dir=tmp_path, **{**FEW, "batch_size": 2})


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"weight_bits": [9]}, "weight_bits"),
        ({"activation_bits": []}, "activation_bits must list at least one width"),
        ({"runs": 0}, "runs must be at least 1"),
        ({"threads": 0}, "threads must be at least 1"),
        ({"runtime": "tflite"}, "runtime must be one of fastest, lowbit, onnxruntime"),
    ],
)
def test_what_cannot_be_measured_is_an_error(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        latency_table(nn.Linear(4, 2), torch.rand(1, 4), **{**FEW, **settings})


def test_quantized_networks_and_networks_without_layers_are_refused() -> None:
    quantized = lowbit.quantize(nn.Linear(4, 2), method="round_to_nearest", calibration=torch.rand(8, 4))
    with pytest.raises(LayerError, match="quantized already"):
        latency_table(quantized, torch.rand(1, 4), **FEW)
    with pytest.raises(LayerError, match="no layer to measure"):
        latency_table(nn.ReLU(), torch.rand(1, 4), **FEW)


def test_the_number_of_threads_is_put_back(measured: list[CapturedCall]) -> None:
    before = torch.get_num_threads()
    latency_table(nn.Linear(4, 2), torch.rand(1, 4), **{**FEW, "threads": 2})
    assert torch.get_num_threads() == before


def test_a_pair_takes_the_kernel_of_least_median_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planes, "has_exact_kernels", lambda *_: True)
    seconds = {("lowbit", "8/8"): 3.0, ("onnxruntime", "8/8"): 2.0, ("onnxruntime", "8/4"): 4.0}

    def make(_self: object, variant: Variant) -> Candidate | None:
        found = seconds.get((variant.runtime, f"{variant.bits.weight}/{variant.bits.activation}"))
        return None if found is None else Candidate(variant.runtime, lambda: found)

    monkeypatch.setattr(layer_times._Maker, "make", make)
    call, eight, few = CapturedCall(nn.Linear(4, 2), (torch.rand(1, 4),)), LayerBits(3, 8), LayerBits(8, 5)
    times = time_call(call, [eight, few], runtime="fastest", threads=1, runs=3)
    assert times == {eight: LayerTime(2.0, "onnxruntime"), few: LayerTime(3.0, "lowbit")}
    with pytest.raises(LayerError, match="onnxruntime cannot run it"):
        time_call(call, [LayerBits(4, None)], runtime="onnxruntime", threads=1, runs=1)


def test_all_kernels_are_called_in_turns_and_the_median_is_taken() -> None:
    order: list[str] = []

    def candidate(name: str, values: Iterable[float]) -> Candidate:
        left = iter(values)
        return Candidate(name, lambda: order.append(name) or next(left))  # type: ignore[func-returns-value]

    warm = layer_times.WARMUP
    times = turn_by_turn({name: candidate(name, [9.0] * warm + [5.0] + [9.0] * warm + [1.0] + [9.0] * warm + [2.0]) for name in "ab"}, 3)
    assert times == {"a": 2.0, "b": 2.0}
    assert order == (["a"] * (warm + 1) + ["b"] * (warm + 1)) * 3


@pytest.mark.parametrize(
    ("bits", "pairs", "stand_in"),
    [
        (LayerBits(1, 1), 2, LayerBits(1, 1)),
        (LayerBits(1, 1), 0, LayerBits(1, 1)),
        (LayerBits(2, 2), 2, LayerBits(2, 2)),
        (LayerBits(2, 2), 1, LayerBits(8, 8)),
        (LayerBits(3, 1), 2, LayerBits(3, 1)),
        (LayerBits(3, 2), 2, LayerBits(8, 8)),
        (LayerBits(4, 8), 2, LayerBits(8, 8)),
        (LayerBits(None, 4), 2, LayerBits(None, 8)),
    ],
)
def test_widths_that_have_no_kernel_of_their_own_are_those_of_another_pair(
    bits: LayerBits, pairs: int, stand_in: LayerBits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer_times, "most_pairs", lambda: (pairs, ""))
    monkeypatch.setattr(planes, "has_exact_kernels", lambda *_: True)
    assert variants_of(bits, "lowbit") == [Variant("lowbit", stand_in)]


@pytest.mark.parametrize(
    ("bits", "stand_in"),
    [((4, 8), (7, 8)), ((7, 8), (7, 8)), ((4, 4), (7, 8)), ((8, 4), (8, 7)), ((8, 8), (8, 8))],
)
def test_where_8_bit_products_saturate_widths_of_kernels_stand_for_others_and_8_bits_for_float(
    bits: tuple[int, int], stand_in: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer_times, "most_pairs", lambda: (2, ""))
    monkeypatch.setattr(planes, "has_exact_kernels", lambda most_input, most_weight: 2 * most_input * most_weight < 2**15)
    assert variants_of(LayerBits(*bits), "lowbit") == [Variant("lowbit", LayerBits(*stand_in))]


def test_packed_weights_of_linear_layers_compete_with_decoded_ones_and_fill_their_containers() -> None:
    decoded, packed = Variant("lowbit", LayerBits(None, None)), Variant("lowbit", LayerBits(4, None), "int8")
    assert variants_of(LayerBits(3, None), "lowbit") == [decoded]
    assert variants_of(LayerBits(3, None), "lowbit", is_linear=True) == [decoded, packed]
    assert variants_of(LayerBits(3, None), "onnxruntime", is_linear=True) == [Variant("onnxruntime", LayerBits(None, None))]
    assert variants_of(LayerBits(3, 7), "onnxruntime") == [Variant("onnxruntime", LayerBits(8, 4))]


@pytest.mark.skipif(compiled_loops() is None, reason="there are no compiled kernels here")
@pytest.mark.parametrize("bits", [LayerBits(w, a) for w, a in ((1, 1), (2, 1), (3, 1), (1, 2), (2, 2), (1, 4), (4, 1), (4, 8))], ids=str)
def test_the_kernel_of_a_pair_is_the_one_that_compile_runtime_puts_it_on(bits: LayerBits) -> None:
    maker = layer_times._Maker(CapturedCall(nn.Linear(64, 64), (torch.rand(1, 64),)), 1, Path())
    (variant,) = variants_of(bits, "lowbit")
    own = lowbit.compile_runtime(maker._quantized(bits), sample=torch.rand(1, 64)).report.layers[0].kernel
    assert maker.make(variant).kernel == f"lowbit {own}"  # type: ignore[union-attr]


def test_only_the_operators_of_the_runtime_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a network does around its operators is paid once for all layers."""
    maker = layer_times._Maker(CapturedCall(nn.Linear(4, 4), (torch.rand(1, 4),)), 1, Path())
    candidate = maker.make(Variant("lowbit", LayerBits(8, 8)))
    assert candidate is not None
    monkeypatch.setattr(PackedNetwork, "compute", lambda network, *_: network.packed_observer(None, 0.002, None) or [torch.zeros(1, 4)])
    assert candidate.milliseconds() == candidate.milliseconds() == 2.0


def test_onnx_runtime_computes_layers_on_codes() -> None:
    pytest.importorskip("onnxruntime")
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 4 * 4, 3))
    table = latency_table(model, torch.rand(1, 4, 6, 6), weight_bits=[4], activation_bits=[4, 8], runtime="onnxruntime", runs=2)
    assert table.kernels["0"] == {
        "4/4": "onnxruntime QLinearConv + Clip",
        "4/8": "onnxruntime QLinearConv",
        "8/8": "onnxruntime QLinearConv",
        "float/float": table.kernels["0"]["float/float"],
    }
    assert "Conv" in table.kernels["0"]["float/float"] and "QLinear" not in table.kernels["0"]["float/float"]
    assert table.kernels["3"]["8/8"] == "onnxruntime QGemm"
    assert table.times["0"]["4/8"] == table.times["0"]["8/8"] > 0


def test_without_onnx_runtime_lowbits_kernels_are_measured_and_asking_for_it_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from lowbit.errors import MissingExtraError, missing_extra

    def missing() -> None:
        raise missing_extra("onnxruntime", "onnx", "the ONNX format")

    monkeypatch.setattr(workflow, "require_onnx", missing)
    monkeypatch.setattr(workflow, "time_call", lambda _call, widths, **_: dict.fromkeys(widths, LayerTime(1.0, "")))
    table = latency_table(nn.Linear(4, 2), torch.rand(1, 4), **{**FEW, "runtime": "fastest"})
    assert table.facts["runtime"] == "lowbit"
    with pytest.raises(MissingExtraError):
        latency_table(nn.Linear(4, 2), torch.rand(1, 4), **{**FEW, "runtime": "onnxruntime"})


def test_captured_calls_are_those_of_the_network() -> None:
    calls = captured_calls(Net().eval(), Inputs((torch.rand(1, 8, 6, 6),)))
    assert {name: [tuple(call.args[0].shape) for call in found] for name, found in calls.items()} == {
        "first": [(1, 8, 6, 6)],
        "second": [(1, 8, 6, 6)],
        "twice": [(1, 8, 6, 6), (1, 8, 6, 6)],
        "fc": [(1, 8)],
    }


def test_a_table_is_opened_from_its_file_or_made_by_a_model_of_hardware(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 3)), torch.rand(5, 4)
    found = open_latency_table("bit_serial", model, x, [LayerBits(2, 4)])
    assert found.times == {"0": {"2/4": 8 * 8}, "1": {"2/4": 6 * 8}}
    assert len(open_latency_table("bit_fusion", model, x).times["0"]) == 81
    found.save(tmp_path / "table.json")
    assert open_latency_table(tmp_path / "table.json", model, x) == found
    with pytest.raises(SpecError, match=r"'bit_serail': there is no such file, and no model of hardware .*bit_serial, bit_fusion"):
        open_latency_table("bit_serail", model, x)
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(SpecError, match="no latency table"):
        open_latency_table(str(tmp_path / "other.json"), model, x)


def test_a_search_finds_the_times_of_all_layers_in_a_table(measured: list[CapturedCall]) -> None:
    model, x = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 2)), torch.randint(9, (1, 5))
    table = latency_table(model, x, weight_bits=[2, 4], activation_bits=[4, 8])
    problem = make_problem(
        model, Inputs((x,)), budget=lowbit.Budget(latency="100%"), candidates=(2, 4), activation_bits=(4, 8), first_last=8,
        task=lowbit.Classification(), latency_table=table,
    )  # fmt: skip
    assert problem.costs["latency"].reference == 1.0 + 2.0 + 3.0
