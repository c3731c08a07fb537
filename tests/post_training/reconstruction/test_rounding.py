"""Learned rounding: where it starts, what it can reach, its gradients, schedules and codes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lowbit.errors import LayerError
from lowbit.post_training.reconstruction.rounding import (
    AdaptiveRounding,
    BetaSchedule,
    hard_round,
    initial_logits,
    rectified_sigmoid,
    soft_round,
)
from lowbit.quantizers import UniformQuantizer
from lowbit.spec import Granularity

GRANULARITIES = [Granularity.tensor(), Granularity.channel(0), Granularity.channel(1), Granularity.group(9)]
END = math.log(11)  # where the stretched sigmoid reaches 1: 1.2 * 11/12 - 0.1


def grid(bit_width: int, granularity: Granularity, weight: Tensor, *, affine: bool, share: float = 0.8) -> UniformQuantizer:
    """A grid whose ends cut off ``1 - share`` of the weight's range, so that some codes are clipped."""
    quantizer = UniformQuantizer(bit_width, signed=not affine, symmetric=not affine, granularity=granularity)
    quantizer.initialize(weight)
    quantizer.set_parameters(quantizer.scale * share, quantizer.zero_point)
    return quantizer


def started(quantizer: UniformQuantizer, weight: Tensor) -> AdaptiveRounding:
    rounding = AdaptiveRounding(quantizer)
    rounding.initialize(weight)
    return rounding


def test_the_rectified_sigmoid_is_stretched_beyond_zero_and_one() -> None:
    logits = torch.tensor([-50.0, -END - 1e-3, 0.0, END + 1e-3, 50.0], requires_grad=True)
    share = rectified_sigmoid(logits)
    assert share.tolist() == [0.0, 0.0, 0.5, 1.0, 1.0]
    share.sum().backward()
    assert logits.grad.tolist() == pytest.approx([0.0, 0.0, 0.3, 0.0, 0.0])  # 1.2 / 4 in the middle
    near = torch.tensor([END - 0.01], requires_grad=True)
    rectified_sigmoid(near).backward()
    assert near.grad.item() == pytest.approx(1.2 * 11 / 144, rel=0.01)  # no vanishing at the end, unlike a plain sigmoid's
    spread = rectified_sigmoid(torch.linspace(-8, 8, 1001))
    assert spread.min() == 0
    assert spread.max() == 1
    assert (spread.diff() >= 0).all()


def test_logits_start_at_the_fractional_part() -> None:
    scale = torch.tensor(0.5)
    start = initial_logits(torch.tensor([0.0, 0.25, -0.25, 1.0, -1e-9, 0.7]), scale)
    assert start[:5].tolist() == pytest.approx([-END, 0.0, 0.0, -END, END], abs=1e-5)
    assert rectified_sigmoid(start[5]).item() == pytest.approx(0.4, abs=1e-6)  # 0.7 / 0.5 = 1 + 0.4


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("affine", [False, True])
def test_soft_weights_start_at_the_float_weight_clipped_to_the_grid(granularity: Granularity, affine: bool) -> None:
    weight = torch.randn(6, 4, 3, 3)
    quantizer = grid(3, granularity, weight, affine=affine)
    view, low, high = (granularity.broadcast(weight), quantizer.qmin - quantizer.zero_point, quantizer.qmax - quantizer.zero_point)
    clipped = granularity.restore(torch.clamp(view / quantizer.scale, low, high) * quantizer.scale, weight.shape)
    soft = started(quantizer, weight)(weight)
    torch.testing.assert_close(soft, clipped, rtol=0, atol=2e-6)
    assert 0 < (soft - weight).abs().gt(1e-4).sum() < weight.numel() / 2  # both ends cut something off


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("affine", [False, True])
def test_every_code_is_floor_or_ceiling_of_its_weight(granularity: Granularity, affine: bool) -> None:
    weight = torch.randn(6, 4, 3, 3)
    quantizer = grid(3, granularity, weight, affine=affine)
    rounding = started(quantizer, weight)
    rounding.logits.data.copy_(torch.randn_like(rounding.logits) * 3)
    codes = granularity.broadcast(rounding.encode(weight).codes.float())
    position = granularity.broadcast(weight) / quantizer.scale + quantizer.zero_point
    up = rounding.logits.detach() >= 0
    expected = (
        torch.where(up, position.sub(quantizer.zero_point).floor() + 1, position.sub(quantizer.zero_point).floor()) + quantizer.zero_point
    )
    assert torch.equal(codes, expected.clamp(quantizer.qmin, quantizer.qmax))
    inside = (position > quantizer.qmin) & (position < quantizer.qmax)
    assert (codes - position)[inside].abs().max() <= 1
    assert codes.min() == quantizer.qmin
    assert codes.max() == quantizer.qmax


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("bit_width", [2, 4, 8])
def test_decoded_codes_are_the_decided_forward_pass_and_the_grid_keeps_them(granularity: Granularity, affine: bool, bit_width: int) -> None:
    weight = torch.randn(6, 4, 3, 3)
    quantizer = grid(bit_width, granularity, weight, affine=affine)
    rounding = started(quantizer, weight)
    rounding.logits.data.add_(torch.randn_like(rounding.logits))
    rounding.is_soft = False
    decoded = rounding.encode(weight).decode()
    assert torch.equal(decoded, rounding(weight))
    assert torch.equal(quantizer(decoded), decoded)
    assert not torch.equal(decoded, quantizer(weight))  # not rounding to nearest


def test_ties_go_up_and_the_ends_of_the_grid_hold() -> None:
    floor, low, high = torch.tensor([0.0, 0.0, -9.0, 7.0, -4.0]), torch.tensor(-4.0), torch.tensor(3.0)
    assert hard_round(torch.tensor([0.0, -1e-6, 5.0, -5.0, 1.0]), floor, low, high).tolist() == [1.0, 0.0, -4.0, 3.0, -3.0]


@pytest.mark.parametrize("beta", [2.0, 3.7, 20.0])
def test_gradients_agree_with_finite_differences(beta: float) -> None:
    logits = torch.linspace(-2.2, 2.2, 14, dtype=torch.float64).requires_grad_()  # away from the kinks at the ends and at 0
    floor = torch.tensor([-5, -1, 0, 1, 2, 7, 0], dtype=torch.float64).repeat(2)
    scale, low, high = (torch.tensor(v, dtype=torch.float64) for v in (0.3, -4.0, 3.0))
    assert torch.autograd.gradcheck(lambda v: soft_round(v, floor, scale, low, high, beta=beta), (logits,))
    assert torch.autograd.gradcheck(lambda v: soft_round(v, floor, scale, low, high)[0], (logits,))


def test_gradients_by_hand() -> None:
    logits = torch.tensor([0.0, 1.0, 1.0, 5.0], requires_grad=True)
    floor = torch.tensor([1.0, 1.0, 9.0, 1.0])
    weight, penalty = soft_round(logits, floor, torch.tensor(0.5), torch.tensor(-4.0), torch.tensor(3.0), beta=3.0)
    sigmoid = 1 / (1 + math.exp(-1))
    slope, share = 1.2 * sigmoid * (1 - sigmoid), 1.2 * sigmoid - 0.1
    assert weight.tolist() == pytest.approx([0.75, 0.5 * (1 + share), 1.5, 1.0])
    assert penalty.item() == pytest.approx(1 + 2 * (1 - (2 * share - 1) ** 3))
    (by_weight,) = torch.autograd.grad(weight.sum(), logits, retain_graph=True)
    assert by_weight.tolist() == pytest.approx([0.5 * 0.3, 0.5 * slope, 0.0, 0.0])  # clipped code, clipped share
    (by_penalty,) = torch.autograd.grad(penalty, logits)
    assert by_penalty.tolist() == pytest.approx([0.0, *[-6 * (2 * share - 1) ** 2 * slope] * 2, 0.0])


def test_the_regularizer_is_zero_when_decided_and_the_count_when_undecided() -> None:
    arguments = torch.zeros(4, 5), torch.tensor(1.0), torch.tensor(-8.0), torch.tensor(7.0)
    assert soft_round(torch.full((4, 5), 30.0), *arguments, beta=2.0)[1].item() == 0
    assert soft_round(torch.full((4, 5), -30.0), *arguments, beta=20.0)[1].item() == 0
    assert soft_round(torch.zeros(4, 5), *arguments, beta=7.0)[1].item() == 20
    assert soft_round(torch.randn(4, 5), *arguments)[1].item() == 0  # the warm start


def test_the_regularizer_alone_ends_at_rounding_to_nearest() -> None:
    weight = torch.rand(300) * 6 - 3
    weight = weight[(weight / 0.7 - (weight / 0.7).floor() - 0.5).abs() > 0.02]  # no ties
    quantizer = UniformQuantizer(4, signed=True, symmetric=True)
    quantizer.set_parameters(torch.tensor(0.7), torch.tensor(0.0))
    rounding = started(quantizer, weight)
    rounding.beta = 2.0
    optimizer = torch.optim.Adam([rounding.logits], 0.02)
    for _ in range(300):
        rounding(weight)
        optimizer.zero_grad()
        rounding.penalty().backward()
        optimizer.step()
    assert rounding.undecided == 0
    assert torch.equal(rounding.encode(weight).decode(), quantizer(weight))


def test_undecided_counts_shares_more_than_a_hundredth_from_both_ends() -> None:
    rounding = started(grid(4, Granularity.tensor(), torch.randn(4), affine=False), torch.randn(4))
    share = torch.tensor([0.009, 0.011, 0.989, 0.991])
    rounding.logits.data.copy_(-torch.log(1.2 / (share + 0.1) - 1))
    assert rounding.undecided == 2


def test_half_precision_weights_come_back_in_their_type_with_float32_logits() -> None:
    weight = torch.randn(4, 3, 3, 3, dtype=torch.bfloat16)
    rounding = started(grid(4, Granularity.channel(), weight.float(), affine=False), weight)
    assert rounding(weight).dtype == torch.bfloat16
    assert rounding.logits.dtype == torch.float32


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused(value: float) -> None:
    weight = torch.randn(3, 3)
    quantizer = grid(4, Granularity.tensor(), weight, affine=False)
    weight[1, 1] = value
    with pytest.raises(LayerError, match="NaN or infinite"):
        started(quantizer, weight)


def test_the_cosine_schedule_counts_from_zero() -> None:
    schedule = BetaSchedule("cosine", 1000)
    assert [schedule.is_active(t) for t in (0, 199, 200, 999)] == [False, False, True, True]
    assert [schedule.beta(t) for t in (0, 200, 600, 1000)] == pytest.approx([20, 20, 11, 2])
    assert schedule.beta(400) == pytest.approx(2 + 9 * (1 + math.cos(math.pi / 4)))


def test_the_linear_schedule_counts_from_one() -> None:
    schedule = BetaSchedule("linear", 1000)
    assert [schedule.is_active(t) for t in (0, 198, 199, 999)] == [False, False, True, True]
    assert [schedule.beta(t) for t in (0, 199, 599, 999, 5000)] == pytest.approx([20, 20, 11, 2, 2])


@pytest.mark.parametrize("shape", ["cosine", "linear"])
def test_schedules_have_ends(shape: str) -> None:
    assert BetaSchedule(shape, 10, warm_start=0.0).is_active(0)
    whole = BetaSchedule(shape, 10, warm_start=1.0, start=9.0, end=3.0)
    assert [whole.is_active(t) for t in range(9)] == [False] * 9
    assert whole.beta(3) == 9
    falling = [BetaSchedule(shape, 50, 0.1, 12.0, 4.0).beta(t) for t in range(50)]
    assert falling == sorted(falling, reverse=True)
    assert falling[0] == 12
    assert falling[-1] == pytest.approx(4, abs=0.02)
