from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from tests.networks import settled
from torch import Tensor, fx, nn

from lowbit.formats.checks.tolerance import accumulator_step, excess_of, is_quantizer
from lowbit.formats.program.program import export_program
from lowbit.network.insert import set_input_quantizer, set_weight_quantizer
from lowbit.quantizers import UniformQuantizer
from lowbit.spec import Granularity

ours = torch.ops.lowbit


def excess(target: object, x: list[float], theirs: list[float], *tables: list[float] | float, codes: tuple[int, ...] = ()) -> float:
    node = SimpleNamespace(target=target, args=(None, *codes))
    found, _ = excess_of(node, torch.tensor(x), [torch.tensor(table) for table in tables], torch.tensor(theirs))  # type: ignore[arg-type]
    return found


@pytest.mark.parametrize(
    ("x", "theirs", "expected"),
    [
        (0.3, 2.0, 0.0),  # position 1.5: a tie, either code will do
        (0.3, 1.0, 0.0),
        (0.31, 1.0, 0.1),  # a twentieth of a step beyond the boundary
        (0.2, 2.0, 1.0),  # in the middle of another code
        (0.2, 3.0, 3.0),
        (9.0, 3.0, 0.0),  # cut off
        (9.0, 2.0, 1.0),
        (-9.0, 0.0, 0.0),
        (0.2, 1.4, 0.8),  # no level at all
    ],
)
def test_excess_of_an_affine_grid_counts_steps_beyond_the_boundary(x: float, theirs: float, expected: float) -> None:
    value = excess(ours.fake_quantize_affine.default, [x], [0.2 * theirs], 0.2, 0.0, codes=(0, 3))
    assert value == pytest.approx(expected, abs=1e-5)


def test_excess_of_a_grid_looks_at_codes_and_not_at_the_values_they_stand_for() -> None:
    # codes 0 to 3 at -1, -0.5, 0, 0.5 stand for -20, -10, 0, 10
    for theirs, expected in ((0.0, 0.0), (10.0, 0.6), (-10.0, 1.4)):
        value = excess(ours.fake_quantize_grid.default, [0.1], [theirs], -1.0, 0.5, 10.0, 2.0, codes=(0, 3))
        assert value == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("x", "theirs", "expected"),
    [
        (0.15, 0.5, 0.0),  # its level is not the nearest one
        (0.15, 0.0, 2 * 0.05 / 0.1),
        (0.15, 1.0, 2 * 0.05 / 0.1),
        (-5.0, 0.0, 0.0),
        (7.0, 3.0, 0.0),
        (0.15, 0.6, 2 * 0.1 / 0.1),  # no level
    ],
)
def test_excess_of_a_codebook_uses_its_own_boundaries(x: float, theirs: float, expected: float) -> None:
    value = excess(ours.fake_quantize_codebook.default, [x], [theirs], [0.1, 0.2, 1.1], [0.0, 0.5, 1.0, 3.0])
    assert value == pytest.approx(expected, abs=1e-5)


def test_equal_levels_of_a_codebook_share_their_ranges() -> None:
    for x in (-1.0, 0.05, 0.15):
        assert excess(ours.fake_quantize_codebook.default, [x], [0.0], [0.1, 0.2], [0.0, 0.0, 1.0]) == 0.0
    assert excess(ours.fake_quantize_codebook.default, [0.25], [0.0], [0.1, 0.2], [0.0, 0.0, 1.0]) == pytest.approx(1.0)


def test_nan_exceeds_everything() -> None:
    assert excess(ours.fake_quantize_affine.default, [0.3], [math.nan], 0.2, 0.0, codes=(0, 3)) == math.inf


class Behind(nn.Module):
    def __init__(self, rest: nn.Module) -> None:
        super().__init__()
        self.first, self.rest, self.second = nn.Conv2d(2, 2, 1), rest, nn.Conv2d(2, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.rest(self.first(x)))


def unit_behind(rest: nn.Module) -> float:
    """At the quantizer of the second layer; the first has the scale 0.1 of its input and 0.5, 0.25 of its channels."""
    model = settled(Behind(rest), torch.randn(2, 2, 4, 4))
    for layer in (model.first, model.second):
        quantizer = UniformQuantizer(8, signed=False, symmetric=False)
        quantizer.set_parameters(torch.tensor(0.1), torch.tensor(0.0))
        set_input_quantizer(layer, quantizer)  # type: ignore[arg-type]
    weights = UniformQuantizer(4, signed=True, symmetric=True, granularity=Granularity.channel(0))
    weights.set_parameters(torch.tensor([0.5, 0.25]).reshape(2, 1, 1, 1))
    set_weight_quantizer(model.first, weights)  # type: ignore[arg-type]
    program = export_program(model, torch.randn(2, 2, 4, 4))
    last: fx.Node = [node for node in program.exported.graph.nodes if is_quantizer(node)][-1]
    return accumulator_step(program, last)


class Times(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor.abs()


def test_an_accumulators_unit_goes_through_norms_and_products() -> None:
    torch.manual_seed(0)
    assert unit_behind(nn.ReLU()) == pytest.approx(0.05)
    assert unit_behind(Times(-3.0)) == pytest.approx(0.15)
    norm = nn.BatchNorm2d(2, eps=1e-3)
    unit, variance = unit_behind(nn.Sequential(norm, nn.ReLU())), norm.running_var
    assert variance is not None
    gain = (norm.weight / (variance + 1e-3).sqrt()).tolist()
    # of each channel: the scale of its weights times the norm's
    assert unit == pytest.approx(0.1 * max(0.5 * gain[0], 0.25 * gain[1]), rel=1e-5)


def test_an_accumulators_unit_stops_at_what_may_enlarge_differences() -> None:
    class Squared(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * x

    assert unit_behind(Squared()) == 0.0
