"""One network of several widths from its files to its report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.methods.adaptive.several import X, network, outputs
from tests.qat.training import data
from torch import nn

import lowbit
from lowbit.errors import LayerError, SpecError
from lowbit.measure.cost import compute_cost
from lowbit.network.bits import bits_restored
from lowbit.progress import Progress
from lowbit.qat import Classification
from lowbit.workflows import switches as module
from lowbit.workflows.switches import measure_selection

TEST = data(50, 5)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """Three convolutions, the inner two of which take 4 or 2 bits each."""
    return lowbit.prepare(network(), method="bit_mixer", bits="4,2", sample=X).eval()


@pytest.fixture(scope="module")
def folder(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("several")
    lowbit.set_bits(model, {"conv2": 2, "conv3": 4})
    lowbit.deliver(model, out, calibration=X, test_data=TEST, onnx=False)
    return out


@pytest.fixture(scope="module")
def report(folder: Path) -> dict[str, object]:
    return dict(json.loads((folder / "report.json").read_text()))


def test_the_report_has_the_figures_of_each_width_and_the_bits_stay_as_they_are(model: nn.Module, folder: Path, report: dict) -> None:  # type: ignore[type-arg]
    assert [bits.weight for bits in lowbit.get_bits(model).values()] == [8, 2, 4, 8]
    assert [(one["weight_bits"], one["activation_bits"]) for one in report["switches"]] == [(4, 4), (2, 2)]
    with bits_restored(model):
        for one in report["switches"]:
            lowbit.set_bits(model, one["weight_bits"])
            assert one["accuracy"] == lowbit.evaluate(model, TEST)["accuracy"]
            assert one["bops"] == sum(cost.bops for cost in compute_cost(model, X).values())
            assert one["latency_ms"] > 0
            single = lowbit.export(model, folder / "single.lowbit", sample=X, bits=one["weight_bits"])
            # the file in the folder also says the network's classes and task
            assert 0 <= one["single_bytes"] - single.size_bytes < 200
    assert report["size_bytes"]["packed"] == (folder / "model.lowbit").stat().st_size
    assert report["size_bytes"]["packed_singly"] == sum(one["single_bytes"] for one in report["switches"])


def test_the_greedy_path_goes_from_the_highest_to_the_lowest_widths(model: nn.Module, report: dict) -> None:  # type: ignore[type-arg]
    path = report["selection"]
    assert path["layers"] == ["conv2", "conv3"] and path["samples"] == 50
    assert path["trace"][0] == [4, 4] and path["trace"][-1] == [2, 2] and len(path["trace"]) == 3
    assert path["average_bits"] == [4.0, 3.0, 2.0]
    middle = dict(zip(path["layers"], path["trace"][1], strict=True))
    with bits_restored(model):
        lowbit.set_bits(model, middle)
        assert path["accuracies"][1] == lowbit.evaluate(model, TEST)["accuracy"]


def test_the_page_shows_the_curve_and_the_bits_of_each_layer(folder: Path) -> None:
    page = (folder / "report.html").read_text()
    assert "Accuracy over bits" in page and "Bits of each layer along the greedy path" in page
    assert "conv3: 2 bits after move 2, 2 on average" in page
    assert "model.lowbit holds all widths in" in page


def test_a_path_that_would_take_too_long_is_left_out_with_the_way_to_find_it(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SELECTION_SECONDS", 0.0)
    found = measure_selection(model, [TEST[:]], Classification(), Progress.silent())
    assert isinstance(found, str) and "lowbit.select_bits finds it" in found


def test_what_was_loaded_is_selected_exported_and_compiled_like_the_network_itself(model: nn.Module, folder: Path, tmp_path: Path) -> None:
    loaded = lowbit.load(folder / "model.lowbit")
    assert lowbit.get_bits(loaded) == lowbit.get_bits(model)
    path = lowbit.select_bits(loaded, lambda one: -float(lowbit.get_bits(one)["conv3"].weight == 2), budget_average_bits=3)
    assert path.bits == (2, 4) and torch.equal(outputs(loaded), outputs(model))
    compiled = lowbit.compile_runtime(loaded)
    for bits in (4, 2, {"conv2": 2, "conv3": 4}, 4):
        for one in (model, loaded, compiled):
            lowbit.set_bits(one, bits)
        assert lowbit.get_bits(compiled) == lowbit.get_bits(model)
        torch.testing.assert_close(outputs(compiled), outputs(model), rtol=1e-5, atol=1e-6)
    lowbit.set_bits(loaded, {"conv2": 2, "conv3": 4})
    again = lowbit.export(loaded, tmp_path / "again.lowbit", sample=X)
    assert (tmp_path / "again.lowbit").read_bytes() == (folder / "model.lowbit").read_bytes()
    assert again.widths is not None and f"{sum(again.widths.single_bytes):,} bytes" in str(again)
    lowbit.set_bits(model, {"conv2": 2, "conv3": 4})


def test_a_file_of_one_width_has_that_alone(model: nn.Module, folder: Path, tmp_path: Path) -> None:
    lowbit.export(model, tmp_path / "two.lowbit", sample=X, bits="2/2")
    loaded = lowbit.load(tmp_path / "two.lowbit", bits=2)
    assert torch.equal(outputs(loaded), outputs(lowbit.load(folder / "model.lowbit", bits=2)))
    with pytest.raises(LayerError, match=r"two\.lowbit: PackedNetwork holds one width, 8/8 and 2/2, as its file does"):
        lowbit.load(tmp_path / "two.lowbit", bits=4)


@pytest.mark.parametrize("bits", [3, "float", "4/2", lowbit.LayerBits(8, 8)])
def test_a_width_that_a_file_does_not_have_is_an_error_with_those_it_has(folder: Path, bits: object) -> None:
    with pytest.raises(SpecError, match=r"model\.lowbit: this network was trained for the widths 4/4, 2/2, got"):
        lowbit.load(folder / "model.lowbit", bits=bits)  # type: ignore[arg-type]


def test_a_compiled_network_follows_bits_that_are_set_between_its_calls(model: nn.Module, folder: Path) -> None:
    torch.compiler.reset()
    loaded = lowbit.load(folder / "model.lowbit")
    for one in (model, loaded):
        compiled = torch.compile(one.eval(), backend="eager")
        for bits in (4, 2, 4):
            lowbit.set_bits(one, bits)
            with torch.no_grad():
                torch.testing.assert_close(compiled(X), outputs(one), rtol=1e-5, atol=1e-6)
    lowbit.set_bits(model, {"conv2": 2, "conv3": 4})


def test_bits_cannot_be_set_on_what_was_loaded_within_a_compiled_graph(folder: Path) -> None:
    loaded = lowbit.load(folder / "model.lowbit")

    def switched(x: torch.Tensor) -> object:
        lowbit.set_bits(loaded, 2)
        return loaded(x)

    torch.compiler.reset()
    with pytest.raises(Exception, match="set_bits"):
        torch.compile(switched, backend="eager", fullgraph=True)(X)
