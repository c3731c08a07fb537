from __future__ import annotations

import pytest
import torch
from tests.networks import TinyNet
from torch import nn

from lowbit.errors import CalibrationError, LayerError, SpecError
from lowbit.inputs import Inputs
from lowbit.network import insert
from lowbit.network.job import NetworkJob, made_for
from lowbit.network.placement import Placement, Site, place_at_layers
from lowbit.network.slot import Slot
from lowbit.quantizers import Quantizer, UniformQuantizer
from lowbit.spec import BitPolicy, LayerBits

IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class WithSpare(TinyNet):
    """A network with a layer that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(2, 2)


def job_of(policy: BitPolicy, model: nn.Module | None = None) -> NetworkJob:
    return NetworkJob(model or WithSpare(), policy, Inputs.of(IMAGE))


def uniform(slot: Slot) -> Quantizer:
    return UniformQuantizer(slot.bit_width, signed=True, symmetric=True)


POLICY = BitPolicy.uniform(4, 6, 7).with_rule(match="conv2", output=5, activation="float")


def test_bits_are_asked_for_weights_inputs_and_outputs_of_layers_that_run() -> None:
    job = job_of(POLICY)
    assert job.bits("stem") == LayerBits(8, 8, 8) and job.bits("conv1") == LayerBits(4, 6, 7)
    assert list(job.layers) == ["stem", "conv1", "conv2", "head", "spare"]
    assert job.activation_bits == {"stem": 8, "conv1": 6, "head": 8}
    assert job.output_bits == {"stem": 8, "conv1": 7, "conv2": 5, "head": 8}
    assert job.positions == {"stem": "first", "head": "last"}


def test_layers_from_a_pixel_shuffle_on_are_last_ones() -> None:
    convolutions = [nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 12, 1), nn.PixelShuffle(2), nn.Conv2d(3, 3, 1)]
    job = job_of(BitPolicy.uniform(4, 4), nn.Sequential(*convolutions))
    assert job.positions == {"0": "first", "2": "last", "4": "last"}
    assert [job.bits(name).activation for name in job.layers] == [8, 4, 8, 8]
    assert job_of(BitPolicy.uniform(4, 4), nn.Sequential(convolutions[0], *convolutions[3:4])).positions == {"0": "last"}


def test_bits_of_merges_are_the_policys_and_float_where_it_says_nothing() -> None:
    assert [job_of(POLICY.with_merges(bits)).merge_bits for bits in (None, "float", 8)] == [None, None, 8]


def test_a_slot_says_what_it_is_for() -> None:
    job = job_of(POLICY)
    weight, (read, given) = job.weight_slot("head"), place_at_layers({"conv1": 6}, {"conv1": 7})
    assert (weight.purpose, weight.bit_width, weight.position, weight.is_signed) == ("weight", 8, "last", True)
    assert [(s.name, s.purpose, s.bit_width, s.is_signed) for s in (job.slot(read, is_signed=False), job.slot(given))] == [
        ("conv1", "input", 6, False), ("conv1", "output", 7, True),
    ]  # fmt: skip
    merge = job.slot(Placement((Site("bn2", "output"), Site("conv1", "input")), 8, (), "n", "sum", None, ("add",), "cat"))
    assert (merge.name, merge.layer, merge.purpose, merge.operand_of, merge.result_of) == (
        "bn2.output", job.model.bn2, "sum", ("add",), "cat",
    )  # fmt: skip


def test_weights_get_quantizers_that_are_initialized_from_them() -> None:
    job = job_of(POLICY)
    job.insert_weights(uniform)
    assert {name: insert.weight_quantizer(layer).bit_width for name, layer in job.layers.items()} == {  # type: ignore[union-attr]
        "stem": 8, "conv1": 4, "conv2": 4, "head": 8, "spare": 4,
    }  # fmt: skip
    peak = insert.float_weight(job.model.conv1).abs().max()  # type: ignore[arg-type]
    torch.testing.assert_close(job.model.conv1.weight.abs().max(), peak, rtol=0.1, atol=0)  # type: ignore[union-attr]


def test_the_table_holds_all_three_bits_and_the_reasons() -> None:
    job = job_of(POLICY.with_rule(match="conv1", weight="float"))
    job.insert_weights(uniform)
    for placement in place_at_layers(job.activation_bits, job.output_bits):
        job.place(placement, uniform(job.slot(placement)))
    rows = {row.name: (row.weight_bits, row.activation_bits, row.output_bits, row.status) for row in job.finish()}
    assert rows == {
        "stem": (8, 8, 8, "done"), "conv1": (None, 6, 7, "skipped"), "conv2": (4, None, 5, "done"), "head": (8, 8, 8, "done"),
        "spare": (4, None, None, "done"),
    }  # fmt: skip
    assert job.table["conv1"].reason == "the policy keeps its weight in float"
    assert "never calls this layer" in job.table["spare"].reason


def test_bits_that_were_asked_for_and_not_given_are_an_error() -> None:
    job = job_of(POLICY)
    with pytest.raises(LayerError, match="layer 'stem': asked for 8 weight bits, got None"):
        job.finish()
    job.insert_weights(uniform)
    with pytest.raises(LayerError, match="layer 'stem': asked for 8 activation bits, but its input could not be quantized"):
        job.finish()
    for placement in place_at_layers(job.activation_bits):
        job.place(placement, uniform(job.slot(placement)))
    with pytest.raises(LayerError, match="layer 'stem': asked for 8 output bits, but its output could not be quantized"):
        job.finish()


def test_a_layer_kept_in_float_is_asked_for_nothing() -> None:
    job = job_of(POLICY)
    job.keep_float("conv2", "too small")
    assert "conv2" not in job.layers and job.bits("conv2") == LayerBits(None, None, None)


def test_a_quantizer_that_cannot_be_made_names_its_place() -> None:
    def refuse(slot: Slot) -> Quantizer:
        raise SpecError("no such grid")

    job = job_of(POLICY)
    with pytest.raises(LayerError, match=r"layer 'conv1' \(Conv2d\): no such grid"):
        made_for(job.weight_slot("conv1"), refuse)
    with pytest.raises(LayerError, match=r"sum 'bn2.output' \(BatchNorm2d\): no such grid"):
        made_for(job.slot(Placement((Site("bn2", "output"),), 8, purpose="sum")), refuse)


def test_networks_that_cannot_be_quantized_are_refused() -> None:
    with pytest.raises(LayerError, match="ReLU has no layer to quantize"):
        job_of(POLICY, nn.ReLU())
    with pytest.raises(LayerError, match="leaves every layer of WithSpare in float"):
        job_of(BitPolicy.uniform(None, 8))
    broken = WithSpare()
    broken.conv1.weight.data[0] = float("nan")
    with pytest.raises(LayerError, match=r"layer 'conv1' \(Conv2d\): its weight holds NaN"):
        job_of(POLICY, broken)
    with pytest.raises(CalibrationError, match=r"WithSpare fails on inputs of shape \(2, 5\)"):
        NetworkJob(WithSpare(), POLICY, Inputs.of(torch.randn(2, 5)))
