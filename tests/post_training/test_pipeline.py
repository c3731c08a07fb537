from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.networks import BranchNet, ReusedNet, TinyNet
from torch import nn

from lowbit.errors import GraphError
from lowbit.inputs import Calibration
from lowbit.methods.post_training.round_to_nearest import RoundToNearest
from lowbit.network.insert import activation_quantizers, output_quantizer
from lowbit.network.record import record_of
from lowbit.network.slot import Slot
from lowbit.post_training.pipeline import PtqJob
from lowbit.quantizers import Quantizer, UniformQuantizer
from lowbit.spec import BitPolicy
from lowbit.workflows.export import export
from lowbit.workflows.load import load
from lowbit.workflows.quantize import quantize

X = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
OUTPUTS = BitPolicy.uniform(4, 8).with_rule(match="conv1", output=5)


def tiny() -> nn.Module:
    torch.manual_seed(0)
    return TinyNet()


def test_an_output_is_calibrated_on_what_the_layer_gives_with_its_norm_folded() -> None:
    model = quantize(tiny(), policy=OUTPUTS, calibration=X, activation_observer="min_max")
    quantizer = output_quantizer(model.conv1)  # type: ignore[arg-type]
    assert isinstance(quantizer, UniformQuantizer) and quantizer.bit_width == 5
    with torch.no_grad():
        given = model.conv1(torch.relu(model.stem(X)))  # type: ignore[operator]
    assert 16 < given.unique().numel() <= 32 and bool((given < 0).any())
    record = record_of(model)
    assert record is not None and [row.output_bits for row in record.table] == [None, 5, None, None]


@pytest.mark.parametrize("method", ["round_to_nearest", "white_paper", "dfq"])
def test_both_files_answer_as_the_network_does(tmp_path: Path, method: str) -> None:
    model = quantize(tiny(), method=method, policy=OUTPUTS, calibration=X)
    for name in ("m.lowbit", "m.onnx"):
        assert export(model, tmp_path / name, sample=X, measure_speed=False).parity.passed
    assert torch.equal(load(tmp_path / "m.lowbit")(X), model(X))


@pytest.mark.parametrize("data", [{"calibration": X}, {"sample": X, "input_range": (-2.0, 2.0)}])
def test_the_output_of_a_layer_that_runs_twice_gets_a_range_from_data_and_from_statistics(data: dict) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), ReusedNet())
    model[3].stem = nn.Conv2d(4, 4, 3, padding=1)
    policy = BitPolicy.uniform(8, 8).with_rule(match="3.block.0", output=8)
    quantizer = output_quantizer(quantize(model, policy=policy, **data).get_submodule("3.block.0"))
    assert isinstance(quantizer, UniformQuantizer)
    low, high = (((code - quantizer.zero_point) * quantizer.scale).item() for code in (quantizer.qmin, quantizer.qmax))
    assert low < 0 < high


def test_sums_have_eight_bits_unless_the_policy_says_otherwise() -> None:
    found = {}
    for bits in (None, "float", 4):
        model = quantize(tiny(), method="round_to_nearest", calibration=X, merge_bits=bits)  # type: ignore[arg-type]
        found[bits] = {site: q.bit_width for site, q in activation_quantizers(model).items()}
    assert found["float"].keys() < found[None].keys() == found[4].keys()
    sums = found[None].keys() - found["float"].keys()
    assert {found[None][site] for site in sums} == {8} and {found[4][site] for site in sums} == {4}


def test_sums_are_quantized_where_inputs_stay_float_if_that_is_said() -> None:
    silent, said = (
        activation_quantizers(quantize(tiny(), activation_bits=None, calibration=X, merge_bits=bits))  # type: ignore[arg-type]
        for bits in (None, 8)
    )
    assert not silent and {q.bit_width for q in said.values()} == {8}


def test_bits_of_sums_that_cannot_be_found_are_an_error_only_if_they_were_asked_for() -> None:
    model = quantize(BranchNet(), calibration=X.abs())
    assert "residual adds and concatenations stay in float" in str(record_of(model).table.notes)  # type: ignore[union-attr]
    with pytest.raises(GraphError, match="quantizing sums and concatenations needs the network's dataflow"):
        quantize(BranchNet(), calibration=X.abs(), merge_bits=8)


class Own(RoundToNearest):
    """Sums stay float, outputs are signed."""

    def merge_quantizer(self, slot: Slot) -> Quantizer | None:
        return None

    def output_quantizer(self, slot: Slot) -> Quantizer:
        return UniformQuantizer(slot.bit_width, signed=True, symmetric=True)


def test_a_method_gives_the_quantizers_of_outputs_and_sums() -> None:
    data = Calibration.of(X)
    job = PtqJob(tiny().eval(), OUTPUTS, data.sample, calibration=data)
    job.fold()
    job.insert_activations(Own())
    assert {p.purpose for p in job.placements} == {"input", "output"}
    quantizer = output_quantizer(job.model.conv1)  # type: ignore[arg-type]
    assert isinstance(quantizer, UniformQuantizer) and quantizer.symmetric
