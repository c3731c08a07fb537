from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import lowbit
from lowbit.errors import SpecError
from lowbit.methods.binary.ir_net import IrNet, LibraWeight, standardize
from lowbit.network import insert
from lowbit.qat import Classification, Recipe, Slot, TrainRun
from lowbit.qat.attach.input_norm import InputNorm
from lowbit.qat.prepare import method_of
from lowbit.quantizers import LearnedScaleQuantizer
from lowbit.spec import Granularity
from lowbit.surrogates import ErrorDecay
from lowbit.surrogates.ede import error_decay

FILTERS = Granularity.channel()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def heavy_tailed(filters: int = 12, size: int = 200) -> Tensor:
    """Normal values to the powers 1, 2, ...: the higher, the longer the tails."""
    return torch.stack([random(size, seed=index).pow(2 * (index // 2) + 1) for index in range(filters)])


def quantizer(steepness: float = 1.0) -> LibraWeight:
    weight = LibraWeight(granularity=FILTERS)
    assert isinstance(weight.surrogate, ErrorDecay)
    weight.surrogate.set_curve(max(1 / steepness, 1.0), steepness)
    return weight


def gradient(weight: Tensor, upstream: Tensor, steepness: float = 1.0) -> Tensor:
    weight = weight.clone().requires_grad_()
    quantizer(steepness)(weight).backward(upstream)
    assert weight.grad is not None
    return weight.grad


# Weights


def test_a_filter_is_the_signs_around_its_mean_times_a_power_of_two() -> None:
    # mean 3, unbiased variance 14/3: standardized -0.93 -0.46 0 1.39, whose mean magnitude 0.69 is nearest to 1/2 in its logarithm
    weight = torch.tensor([[1.0, 2.0, 3.0, 6.0]])
    torch.testing.assert_close(standardize(weight, FILTERS), torch.tensor([[-2.0, -1.0, 0.0, 3.0]]) / math.sqrt(14 / 3))
    assert quantizer()(weight).tolist() == [[-0.5, -0.5, 0.5, 0.5]]


def test_the_exponents_are_integers_and_never_positive_and_fall_with_the_tails() -> None:
    weight = heavy_tailed()
    y = quantizer()(weight)
    exponents = y.abs().log2()
    assert torch.equal(exponents, exponents[:, :1].round().expand_as(exponents))
    assert (exponents <= 0).all() and len(exponents[:, 0].unique()) >= 3
    assert all(len(row.unique()) == 2 for row in y)
    expected = [round(math.log2(float(((row - row.mean()) / row.std()).abs().mean()))) for row in weight]
    assert exponents[:, 0].int().tolist() == expected


def test_scaling_and_shifting_a_filter_changes_nothing() -> None:
    weight = heavy_tailed()
    factors, shifts = random(12, 1, seed=50).exp(), random(12, 1, seed=51)
    assert torch.equal(quantizer()(weight * factors), quantizer()(weight))
    shifted = weight * factors + shifts
    changed = quantizer()(shifted) != quantizer()(weight)
    assert (standardize(weight, FILTERS)[changed].abs() < 1e-4).all()  # nothing but what rounding carries over the mean


def test_codes_decode_to_the_forward_pass_in_every_kind_of_layer() -> None:
    for layer in (nn.Linear(9, 4), nn.Conv1d(4, 6, 3, groups=2), nn.ConvTranspose2d(4, 6, 3), nn.Conv2d(5, 5, 3, groups=5)):
        q, weight = IrNet().weight_quantizer(Slot("layer", layer, 1, True, "inner")), layer.weight.detach()
        assert torch.equal(q.encode(weight).decode(), q(weight))
        assert q.scale(weight).numel() == weight.shape[1 if isinstance(layer, nn.ConvTranspose2d) else 0]


@pytest.mark.parametrize("steepness", [0.1, 1.0, 10.0])
def test_the_gradient_goes_through_the_estimator_the_scale_and_the_standardization(steepness: float) -> None:
    weight, upstream = heavy_tailed(), random(12, 200, seed=9)
    rows = weight.double()
    deviation = rows.std(1, keepdim=True)
    ws = (rows - rows.mean(1, keepdim=True)) / deviation
    scale = quantizer()(weight).abs().double()
    h = upstream * scale * max(1 / steepness, 1) * steepness * (1 - torch.tanh(steepness * ws).square())
    expected = (h - h.mean(1, keepdim=True) - ws * (h * ws).sum(1, keepdim=True) / (rows.shape[1] - 1)) / deviation
    torch.testing.assert_close(gradient(weight, upstream, steepness), expected.float(), rtol=1e-3, atol=1e-5)


def test_the_gradient_of_a_filter_sums_to_0_and_is_orthogonal_to_the_standardized_weight() -> None:
    weight = random(6, 3, 3, 3)
    grad = gradient(weight, random(6, 3, 3, 3, seed=1))
    size = grad.abs().flatten(1).sum(1)
    assert (grad.flatten(1).sum(1).abs() < 1e-5 * size).all()
    assert ((grad * standardize(weight, FILTERS)).flatten(1).sum(1).abs() < 1e-5 * size).all()


def test_the_steepness_changes_the_gradient_only() -> None:
    weight, upstream = random(4, 30), random(4, 30, seed=1)
    assert torch.equal(quantizer(0.1)(weight), quantizer(10.0)(weight))
    assert not torch.allclose(gradient(weight, upstream, 0.1), gradient(weight, upstream, 10.0), rtol=0.1)


@pytest.mark.parametrize("value", [0.0, 0.1, -0.7, 1e-30, 123.4])
@pytest.mark.parametrize("size", [2, 9, 576])
def test_weights_that_are_all_alike_are_positive_and_their_rounding_error_is_not_blown_up(value: float, size: int) -> None:
    weight, upstream = torch.full((2, size), value), random(2, size)
    assert quantizer()(weight).tolist() == [[1.0] * size] * 2
    assert gradient(weight, upstream).abs().max() <= 2 * upstream.abs().max()


def test_small_filters_with_spread_are_standardized_as_large_ones() -> None:
    weight = random(3, 40)
    assert torch.equal(quantizer()(weight * 2.0**-40), quantizer()(weight))
    torch.testing.assert_close(standardize(weight * 1e-12, FILTERS).std(1), torch.ones(3))


def test_a_filter_of_one_weight_keeps_its_sign() -> None:
    weight = torch.tensor([[0.9], [-1.1], [0.0]])
    assert quantizer()(weight).sign().tolist() == [[1.0], [-1.0], [1.0]]
    assert torch.isfinite(gradient(weight, torch.ones(3, 1))).all()


# Inputs


def test_inputs_become_signs_and_gradients_reach_those_far_out() -> None:
    q = IrNet().activation_quantizer(Slot("layer", nn.Linear(2, 2), 1, True, "inner"))
    x = torch.tensor([-6.0, -0.0, 0.0, 0.3, 5.0], requires_grad=True)
    y = q(x)
    assert y.tolist() == [-1.0, 1.0, 1.0, 1.0, 1.0]
    y.sum().backward()
    expected = [1 - math.tanh(0.1 * value) ** 2 for value in x.tolist()]  # t 0.1, k 10, as at the start
    assert x.grad is not None and x.grad.tolist() == pytest.approx(expected, rel=1e-4)


# In a network


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.first, self.second = nn.BatchNorm2d(8), nn.ReLU(), nn.ReLU()
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.norm(self.body(self.first(self.stem(x)))))
        return self.head(x.mean((2, 3)))


X, LABELS = random(16, 3, 6, 6, seed=1), torch.arange(16) % 4


def prepared(activation_bits: int | None = 1, **options: object) -> nn.Module:
    torch.manual_seed(0)
    return lowbit.prepare(Network(), method="ir_net", weight_bits=1, activation_bits=activation_bits, sample=X, **options)


def test_hardtanh_replaces_relu_where_inputs_are_binary_and_can_be_left_out() -> None:
    model = prepared()
    assert type(model.first) is nn.Hardtanh and type(model.second) is nn.Hardtanh
    assert insert.input_transform(model.body) is None  # its inputs have both signs now
    assert type(prepared(None).first) is nn.ReLU
    kept = prepared(hardtanh=False)
    assert type(kept.first) is nn.ReLU and isinstance(insert.input_transform(kept.body), InputNorm)


def test_the_first_and_the_last_layer_are_not_binary() -> None:
    model = prepared()
    assert isinstance(insert.weight_quantizer(model.body), LibraWeight)
    for layer in (model.stem, model.head):
        assert isinstance(insert.weight_quantizer(layer), LearnedScaleQuantizer)


def test_the_estimator_is_that_of_the_epoch_in_every_layer() -> None:
    model = prepared(t_min=0.2, t_max=5.0).train()
    run = TrainRun(model, method_of(model), Classification(), Recipe(3), steps_per_epoch=2)
    estimators = [module for module in model.modules() if isinstance(module, ErrorDecay)]
    assert len(estimators) == 2
    for epoch in run.each_epoch():
        k, t = error_decay(epoch, 3, 0.2, 5.0)
        for _ in range(2):
            run.before_step()
            run.loss((X, LABELS)).backward()
            for estimator in estimators:
                assert (float(estimator.height), float(estimator.steepness)) == pytest.approx((k, t), rel=1e-5)
            run.after_backward()
            run.optimizer_step()
            run.after_step()


def test_another_surrogate_takes_the_place_of_the_estimator() -> None:
    model = prepared(surrogate="ste")
    assert not [module for module in model.modules() if isinstance(module, ErrorDecay)]


@pytest.mark.parametrize(
    "options", [{"t_min": 0.0}, {"t_min": -1.0}, {"t_min": 2.0, "t_max": 1.0}, {"t_max": math.inf}, {"t_min": math.nan}]
)
def test_steepness_out_of_range_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(SpecError, match=r"ir_net: t_m(in|ax) must be (above 0|at most t_max)"):
        IrNet(**options)
