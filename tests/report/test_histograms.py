from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lowbit
from lowbit.measure import sqnr_db
from lowbit.models import load_default
from lowbit.network.insert import activation_quantizers, set_input_quantizer, set_weight_quantizer
from lowbit.quantizers import CodebookQuantizer, Quantizer, UniformQuantizer
from lowbit.report.histograms import BINS, MOST_LEVELS, activation_histograms, weight_histograms
from lowbit.spec import Granularity


def quantized(weight: torch.Tensor, bit_width: int, **options: object) -> tuple[nn.Module, nn.Module]:
    """A linear layer with ``weight`` between two others that stay at 8 bits: quantized, and float."""
    out_features, in_features = weight.shape
    model = nn.Sequential(nn.Linear(3, in_features), nn.Linear(in_features, out_features, bias=False), nn.Linear(out_features, 2))
    with torch.no_grad():
        model[1].weight.copy_(weight)
    data = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    result = lowbit.quantize(
        model, method="round_to_nearest", weight_bits=bit_width, calibration=data, weight_observer="min_max", **options
    )
    return result, model


def test_every_float_weight_and_every_level_is_counted() -> None:
    weight = torch.tensor([[-1.0, -0.4, 0.0, 0.3], [0.1, 0.6, 1.0, 1.0]])
    model, reference = quantized(weight, 2, weight_granularity="per_tensor")
    histogram = weight_histograms(model, reference)[1]
    assert (histogram.name, histogram.bit_width, histogram.unit) == ("1", 2, "weight")
    assert len(histogram.counts) == BINS and sum(histogram.counts) == 8
    assert histogram.counts[0] == 1 and histogram.counts[-1] == 2
    assert (histogram.low, histogram.high) == (-1.0, 1.0)
    assert histogram.levels == (-1.0, 0.0, 1.0)
    assert histogram.level_counts == (1, 4, 3)


def test_channels_of_different_scale_share_the_grid_of_their_own_steps() -> None:
    row = torch.tensor([-1.0, -0.2, 0.4, 1.0])
    model, reference = quantized(torch.stack([row, 1000 * row]), 2, weight_granularity="per_channel")
    histogram = weight_histograms(model, reference)[1]
    assert histogram.unit == "scale"
    assert histogram.levels == (-1.0, 0.0, 1.0)
    assert histogram.level_counts == (2, 4, 2)


def test_float_weights_come_from_the_reference_where_there_is_one() -> None:
    model, reference = quantized(torch.tensor([[-1.0, 1.0], [0.5, 0.25]]), 4, weight_granularity="per_tensor")
    moved = copy.deepcopy(reference)
    with torch.no_grad():
        moved[1].weight.mul_(3)
    assert weight_histograms(model, moved)[1].high == pytest.approx(3.0)
    assert weight_histograms(model)[1].high == pytest.approx(1.0)


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_equal_weights_are_one_bar(value: float) -> None:
    model, reference = quantized(torch.full((3, 4), value), 3, weight_granularity="per_tensor")
    histogram = weight_histograms(model, reference)[1]
    assert sum(histogram.counts) == 12
    assert histogram.low < histogram.high
    assert sum(histogram.level_counts) == 12 and len(histogram.levels) == 1


def test_no_more_levels_are_kept_than_can_be_drawn() -> None:
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    model, reference = quantized(weight, 8, weight_granularity="per_channel")
    histogram = weight_histograms(model, reference)[1]
    assert 200 < len(histogram.levels) <= MOST_LEVELS
    assert list(histogram.levels) == sorted(histogram.levels)


def test_a_float_network_has_no_histograms() -> None:
    assert weight_histograms(nn.Linear(2, 2)) == []


def with_quantizer(weight: torch.Tensor, quantizer: Quantizer) -> nn.Module:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    with torch.no_grad():
        layer.weight.copy_(weight)
    quantizer.initialize(weight)
    set_weight_quantizer(layer, quantizer)
    return nn.Sequential(layer).eval()


def test_channels_with_zero_points_of_their_own_share_the_codes_of_one_grid() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 64, generator=generator) + torch.linspace(-3, 3, 16)[:, None]
    quantizer = UniformQuantizer(3, signed=False, symmetric=False, granularity=Granularity.channel(0))
    (histogram,) = weight_histograms(with_quantizer(weight, quantizer))
    assert histogram.unit == "code"
    assert histogram.levels == tuple(range(8))  # in steps of each channel's own scale there would be 15
    assert 5 <= histogram.used[0] <= histogram.used[1] <= 8
    assert histogram.per_scale == 64


@pytest.mark.parametrize("granularity", [Granularity.tensor(), Granularity.channel(0), Granularity.group(8)], ids=str)
def test_no_scale_uses_more_levels_than_its_grid_has(granularity: Granularity) -> None:
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(1))
    for quantizer in (
        UniformQuantizer(3, signed=True, symmetric=True, granularity=granularity),
        CodebookQuantizer(3, granularity=granularity),
    ):
        (histogram,) = weight_histograms(with_quantizer(weight, quantizer))
        rows = quantizer.granularity.flatten(quantizer(weight))
        assert histogram.used == (min(len(row.unique()) for row in rows), max(len(row.unique()) for row in rows))
        assert 1 < histogram.used[1] <= 8


def test_errors_of_many_bits_lie_within_half_a_step_and_coarse_grids_have_none() -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(2))
    fine, coarse = (
        weight_histograms(with_quantizer(weight, UniformQuantizer(bits, signed=True, symmetric=True, granularity=Granularity.channel(0))))[
            0
        ]
        for bits in (8, 4)
    )
    assert (sum(fine.error_counts), fine.error_unit, fine.error_span) == (512, "step", pytest.approx(0.5, abs=0.51 / 127))
    quarters = [sum(fine.error_counts[start : start + BINS // 4]) for start in range(0, BINS, BINS // 4)]
    assert all(90 < count < 170 for count in quarters)  # evenly, as a fine grid does
    assert coarse.error_counts == ()


def test_activations_are_counted_with_the_ends_of_their_grid_and_what_lies_beyond() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    quantizer = UniformQuantizer(2, signed=False, symmetric=False)
    quantizer.initialize(torch.tensor([0.0, 3.0]))
    set_input_quantizer(model[0], quantizer)
    data = torch.tensor([[0.0, 1.0, 2.0, 3.4], [0.0, 1.0, 2.0, 6.0]])
    (histogram,) = activation_histograms(model, data)
    found = histogram.result
    assert (found.name, found.role, found.bit_width) == ("0.input", "merge", 2)  # no record says which layer it is for
    assert (found.low, found.high, found.clip_low, found.clip_high) == (0.0, 6.0, 0.0, 3.0)
    assert found.clipped == 1 / 8  # 3.4 is rounded, 6 is clipped
    assert found.sqnr_db == pytest.approx(sqnr_db(data, data.clamp(max=3.0)))
    assert sum(histogram.counts) == 8 and (histogram.low, histogram.high) == (0.0, 6.0)
    assert not quantizer._forward_pre_hooks


def test_activations_belong_to_the_layers_that_read_them_or_to_a_merge() -> None:
    model = load_default()
    data = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    small = lowbit.quantize(model, method="round_to_nearest", calibration=data)
    found = {histogram.result.name: histogram.result for histogram in activation_histograms(small, data)}
    assert (found["conv.input"].role, found["conv.input"].layers) == ("input", ("conv",))
    assert found["block1.relu2.output"].layers == ("block2.conv1", "block2.downsample.0")
    assert (found["block1.conv2.output"].role, found["block1.conv2.output"].layers) == ("merge", ())
    assert all(one.bit_width == 8 and one.clip_low <= one.clip_high for one in found.values())


@pytest.mark.parametrize("name", [info.name for info in lowbit.list_methods(kind="training")])
def test_every_trained_method_can_be_drawn_and_uses_no_more_levels_than_it_has(name: str) -> None:
    info = lowbit.get_method(name, kind="training")
    weight_bits = 3 if 3 in info.weight_bits else max(info.weight_bits)
    activation_bits = None if info.activation_bits is None else 3 if 3 in info.activation_bits else max(info.activation_bits)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 3)
    )
    data = torch.randn(8, 1, 8, 8)
    small = lowbit.prepare(model, method=name, weight_bits=weight_bits, activation_bits=activation_bits, sample=data).eval()
    for weights in weight_histograms(small):
        assert 1 <= weights.used[0] <= weights.used[1] <= 2**weights.bit_width, weights.name
        assert sum(weights.counts) == sum(weights.level_counts) == small.get_submodule(weights.name).weight.numel()  # type: ignore[operator, union-attr]
    drawn = activation_histograms(small, data)
    assert len(drawn) == len(activation_quantizers(small))
    for activations in drawn:
        found = activations.result
        assert found.clip_low <= found.clip_high and 0 <= found.clipped <= 1
        assert activations.low <= min(found.low, found.clip_low) and max(found.high, found.clip_high) <= activations.high
