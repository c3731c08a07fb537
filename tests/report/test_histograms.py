from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lowbit
from lowbit.report.histograms import BINS, MOST_LEVELS, weight_histograms


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
