"""Observers: their ranges in numbers, streams, odd data."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lowbit.errors import CalibrationError, SpecError, UnknownNameError
from lowbit.quantizers import UniformQuantizer, fake_quantize
from lowbit.quantizers.ranges import range_search
from lowbit.quantizers.ranges.observers import (
    BINS,
    OBSERVERS,
    WAITING,
    HistogramObserver,
    MovingAverageObserver,
    make_observer,
    range_from_statistics,
)
from lowbit.quantizers.ranges.range_search import entropy_threshold, shrink_search
from lowbit.spec import Granularity

GRANULARITIES = [Granularity.tensor(), Granularity.channel(0), Granularity.channel(1), Granularity.group(6)]
MAKERS: dict[str, Callable[[int], Tensor]] = {
    "normal": torch.randn,
    "relu": lambda n: torch.randn(n).relu(),
    "far from zero": lambda n: torch.randn(n).abs() + 3,
}
every_observer = pytest.mark.parametrize("name", OBSERVERS)
SEARCHES = ["mse", "omse", "entropy", "percentile"]


def observed(
    name: str, *batches: Tensor, granularity: Granularity | None = None, bits: int = 4, symmetric: bool = False
) -> tuple[Tensor, Tensor]:
    """Scale and zero point after a stream of batches."""
    observer = make_observer(name, granularity)
    for batch in batches:
        observer.observe(batch)
    qmin, qmax = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)
    return observer.parameters(qmin, qmax, symmetric=symmetric)


def squared_error(x: Tensor, parameters: tuple[Tensor, Tensor], qmin: int, qmax: int) -> float:
    return float((fake_quantize(x, *parameters, qmin, qmax) - x).double().square().sum())


def test_min_max_takes_the_ends_of_everything_seen() -> None:
    scale, zero_point = observed("min_max", torch.tensor([0.0, 1.0]), torch.tensor([-0.5, 0.2]), torch.tensor([0.25]), bits=4)
    assert scale.item() == pytest.approx(1.5 / 15)
    assert zero_point.item() == 5
    scale, zero_point = observed("min_max", torch.tensor([-1.4, 1.0]), bits=4, symmetric=True)
    assert scale.item() == pytest.approx(0.2) and zero_point.item() == 0


def test_moving_average_weighs_old_batches_by_the_momentum() -> None:
    observer = MovingAverageObserver()
    for low, high in ((-1.0, 1.0), (-2.0, 3.0), (0.0, 1.0)):
        observer.observe(torch.tensor([low, high]))
    lo, hi = observer.range(0, 15)
    assert lo.item() == pytest.approx(0.9 * (0.9 * -1 + 0.1 * -2) + 0.0)
    assert hi.item() == pytest.approx(0.9 * (0.9 * 1 + 0.1 * 3) + 0.1)


def test_percentile_cuts_the_tail_it_is_told_to() -> None:
    x = torch.linspace(-1, 1, 20001)
    observer = make_observer("percentile", percentile=90.0)
    observer.observe(x, is_all=True)
    lo, hi = observer.range(0, 255)
    assert lo.item() == pytest.approx(-0.9, abs=2 / BINS)
    assert hi.item() == pytest.approx(0.9, abs=2 / BINS)


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
def test_mse_search_finds_what_a_plain_loop_over_channels_finds(granularity: Granularity, symmetric: bool) -> None:
    x = torch.randn(4, 3, 2, 6) * torch.tensor([1.0, 5.0, 0.1, 2.0]).reshape(4, 1, 1, 1)
    qmin, qmax = (-4, 3) if symmetric else (0, 7)
    observer = make_observer("mse", granularity)
    observer.observe(x, is_all=True)
    scale, zero_point = observer.parameters(qmin, qmax, symmetric=symmetric)
    for row, (values, found, zero) in enumerate(zip(granularity.flatten(x), scale, zero_point, strict=True)):
        errors = []
        for step in range(80):
            lo, hi = min(values.min().item(), 0) * (1 - step / 100), max(values.max().item(), 0) * (1 - step / 100)
            s = torch.tensor(max(-lo, hi) / qmax if symmetric else (hi - lo) / (qmax - qmin))
            z = torch.tensor(0.0) if symmetric else (qmin - lo / s).round().clamp(qmin, qmax)
            errors.append(squared_error(values, (s, z), qmin, qmax))
        assert squared_error(values, (found, zero), qmin, qmax) == pytest.approx(min(errors), rel=1e-3), row


def test_a_search_in_chunks_equals_a_search_of_each_row() -> None:
    rows = torch.randn(40, 3000)
    together = shrink_search(rows, -8, 7, symmetric=True, power=2.4)
    alone = [shrink_search(row[None], -8, 7, symmetric=True, power=2.4) for row in rows]
    assert torch.equal(together[0], torch.cat([scale for scale, _ in alone]))


@pytest.mark.parametrize("power", [2.0, 2.4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_search_that_stops_early_finds_what_all_candidates_give(symmetric: bool, power: float, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(40, 700, generator=generator) ** 3 * torch.rand(40, 1, generator=generator)
    rows[0], rows[1], rows[2] = 0, 1.5, rows[2].abs()
    qmin, qmax = (-128, 127) if symmetric else (0, 255)
    early = shrink_search(rows, qmin, qmax, symmetric=symmetric, power=power)
    monkeypatch.setattr(range_search, "_FEW_CODES", 1000)
    for one, other in zip(early, shrink_search(rows, qmin, qmax, symmetric=symmetric, power=power), strict=True):
        assert torch.equal(one, other)


def test_a_higher_power_clips_less() -> None:
    x = torch.randn(1, 4000)
    narrow, _ = shrink_search(x, -8, 7, symmetric=True, power=1.0)
    middle, _ = shrink_search(x, -8, 7, symmetric=True, power=2.0)
    wide, _ = shrink_search(x, -8, 7, symmetric=True, power=4.0)
    assert narrow < middle < wide


@pytest.mark.parametrize("name", ["mse", "omse"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_least_squares_ranges_lose_no_more_than_min_max(name: str, bits: int) -> None:
    x = torch.distributions.Laplace(0.0, 1.0).sample((20000,))
    found, plain = observed(name, x, bits=bits), observed("min_max", x, bits=bits)
    assert squared_error(x, found, 0, 2**bits - 1) <= squared_error(x, plain, 0, 2**bits - 1)


@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize("kind", MAKERS)
def test_a_streamed_histogram_gives_nearly_the_range_of_all_values(name: str, kind: str) -> None:
    batches = [MAKERS[kind](40000) * size for size in (0.3, 1.0, 0.7, 1.2, 1.1)]  # the range grows twice
    whole = make_observer(name)
    whole.observe(torch.cat(batches), is_all=True)
    everything = torch.cat(batches)
    streamed = squared_error(everything, observed(name, *batches, bits=6), 0, 63)
    exact = squared_error(everything, whole.parameters(0, 63, symmetric=False), 0, 63)
    assert streamed <= 1.05 * exact


def test_memory_of_a_stream_is_constant() -> None:
    observer = make_observer("mse")
    assert isinstance(observer, HistogramObserver)
    batch = torch.randn(8, 3, 50, 50)
    for size in range(1, 8):
        observer.observe(batch * size)
        assert sum(map(len, observer._waiting)) <= WAITING + batch.numel()
    observer.histogram()
    assert not observer._waiting
    held = [value.numel() for value in vars(observer).values() if isinstance(value, Tensor)]
    assert sum(held) == BINS + 2


def test_counts_survive_growth_and_stand_for_every_element() -> None:
    observer = make_observer("mse")
    assert isinstance(observer, HistogramObserver)
    for size in (1.0, 4.0, 16.0):
        observer.observe(torch.rand(3, 5000) * size)
    centers, counts = observer.histogram()
    assert counts.sum().item() == pytest.approx(45000)
    assert float((centers * counts).sum() / counts.sum()) == pytest.approx((0.5 + 2 + 8) / 3, rel=0.02)


def test_rare_large_values_are_in_the_range() -> None:
    x = torch.rand(1, 400_000)
    x[0, 123_457] = 50.0
    observer = make_observer("mse")
    observer.observe(x)
    observer.observe(torch.rand(1, 1000))
    assert observer.extremes()[1].item() == 50.0
    assert observed("min_max", x, bits=8)[0].item() == pytest.approx(50 / 255)


def test_channels_last_and_strided_tensors_are_seen_whole() -> None:
    x = torch.randn(2, 3, 8, 8)
    expected = observed("mse", x)
    assert torch.equal(observed("mse", x.to(memory_format=torch.channels_last))[0], expected[0])
    padded = torch.zeros(2, 3, 8, 16)
    padded[..., ::2] = x
    assert torch.equal(observed("mse", padded[..., ::2])[0], expected[0])


@every_observer
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("granularity", [Granularity.tensor(), Granularity.channel(0)], ids=str)
def test_values_that_are_not_finite_are_counted_in_the_error(name: str, bad: float, granularity: Granularity) -> None:
    x = torch.randn(3, 4)
    x[1, 2] = x[2, 0] = bad
    observer = make_observer(name, granularity)
    with pytest.raises(CalibrationError, match="2 of 12 values are NaN or infinite"):
        observer.observe(x)


@every_observer
def test_nothing_seen_is_an_error_also_after_a_reset(name: str) -> None:
    observer = make_observer(name)
    with pytest.raises(CalibrationError, match="no value was seen"):
        observer.parameters(0, 15, symmetric=False)
    observer.observe(torch.randn(5))
    observer.reset()
    with pytest.raises(CalibrationError, match="no value was seen"):
        observer.parameters(0, 15, symmetric=False)
    observer.observe(torch.empty(0, 3))
    with pytest.raises(CalibrationError, match="no value was seen"):
        observer.range(0, 15)


@every_observer
@pytest.mark.parametrize("is_all", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("value", [0.0, 0.75, -0.75, 1e-30, 1e20])
def test_constant_tensors_come_back(name: str, is_all: bool, symmetric: bool, value: float) -> None:
    x = torch.full((64,), value)
    observer = make_observer(name)
    observer.observe(x, is_all=is_all)
    qmin, qmax = (-8, 7) if symmetric else (0, 15)
    scale, zero_point = observer.parameters(qmin, qmax, symmetric=symmetric)
    assert torch.isfinite(scale).all() and (scale > 0).all() and torch.isfinite(zero_point).all()
    error = (fake_quantize(x, scale, zero_point, qmin, qmax) - x).abs().max().item()
    allowed = 0.5 * scale.item() if name in ("percentile", "entropy") else 0.11 * abs(value)
    assert error <= max(allowed, 1e-6 if abs(value) < 1e-6 else 0)


@every_observer
def test_a_dead_channel_does_not_disturb_the_others(name: str) -> None:
    x = torch.randn(4, 500)
    alive = x.clone()
    x[2] = 0
    found = observed(name, x, granularity=Granularity.channel(0), symmetric=True)[0]
    expected = observed(name, alive, granularity=Granularity.channel(0), symmetric=True)[0]
    assert found[2] == 1
    assert torch.equal(found[[0, 1, 3]], expected[[0, 1, 3]])


@every_observer
def test_half_precision_activations_are_calibrated_in_float32(name: str) -> None:
    x = torch.randn(2000).relu()
    half, full = observed(name, x.bfloat16()), observed(name, x)
    assert half[0].dtype == torch.float32
    assert half[0].item() == pytest.approx(full[0].item(), rel=0.03)


def test_entropy_keeps_the_bulk_and_drops_a_far_tail() -> None:
    x = torch.cat([torch.randn(100_000), torch.full((3,), 40.0)])
    scale, _ = observed("entropy", x, bits=8, symmetric=True)
    assert 2 < scale.item() * 127 < 10


def test_entropy_threshold_is_the_best_of_all_widths() -> None:
    counts = torch.histc(torch.randn(20000).abs(), 256, 0, 6).double()
    levels = 16

    def divergence(width: int) -> float:
        p, q = counts[:width].clone(), counts[:width].clone()
        p[-1] += counts[width:].sum()
        for level in range(levels):
            inside = [i for i in range(width) if i * levels // width == level and q[i] > 0]
            for i in inside:
                q[i] = counts[inside].sum() / len(inside)
        p, q = p / p.sum(), q / q.sum()
        return sum(float(a) * math.log(float(a) / max(float(b), 1e-12)) for a, b in zip(p, q, strict=True) if a > 0)

    widths = range(levels, 257, 2)
    assert divergence(entropy_threshold(counts, levels)) == pytest.approx(min(divergence(w) for w in widths), rel=1e-9)


def test_range_from_statistics_covers_n_sigma_and_stops_at_zero_after_a_relu() -> None:
    mean, std = torch.tensor([0.0, 2.0]), torch.tensor([1.0, 0.5])
    assert [v.item() for v in range_from_statistics(mean, std)] == [-6.0, 6.0]
    assert [v.item() for v in range_from_statistics(mean, std, n_sigma=2.0, after_relu=True)] == [0.0, 3.0]
    assert [v.item() for v in range_from_statistics(mean, std, after_relu=True, upper=4.0)] == [0.0, 4.0]


def test_omse_on_an_affine_grid_fixes_the_zero_point() -> None:
    assert observed("omse", torch.randn(1000), bits=4)[1].item() == 8
    assert observed("omse", torch.randn(1000).relu(), bits=4)[1].item() == 0


def test_unknown_names_and_settings_are_refused() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'percentile'"):
        make_observer("percentil")
    with pytest.raises(SpecError, match="'min_max' has no setting 'percentile'"):
        make_observer("min_max", percentile=99.0)


def test_a_weight_is_searched_from_its_own_values() -> None:
    weight = torch.randn(6, 50)
    granularity = Granularity.channel(0)
    quantizer = UniformQuantizer(4, signed=True, symmetric=True, granularity=granularity, observer=make_observer("mse", granularity))
    quantizer.initialize(weight)
    assert torch.equal(quantizer.scale.flatten(), shrink_search(weight, -8, 7, symmetric=True)[0])
