from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import lowbit
from lowbit.errors import SpecError
from lowbit.methods.binary.recu import Recu, RecuActivation, RecuWeight, clamp_tails, laplace_quantile, standardize, tau_at
from lowbit.network import insert
from lowbit.qat import Classification, Recipe, Slot, TrainRun
from lowbit.qat.prepare import method_of
from lowbit.quantizers import LearnedScaleQuantizer
from lowbit.spec import Granularity

FILTERS = Granularity.channel()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def laplace(*shape: int, spread: float = 1.0) -> Tensor:
    u = torch.rand(*shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64) - 0.5
    return (-spread * u.sign() * torch.log1p(-2 * u.abs())).float()


def quantizer(weight: Tensor, scale: Tensor | None = None, tau: float = 1.0) -> RecuWeight:
    q = RecuWeight(granularity=FILTERS, scale_init="magnitude")
    q.initialize(weight)
    if scale is not None:
        q.scale.data.copy_(scale.reshape(q.scale.shape))
    q.tau.fill_(tau)
    return q


def gradient(weight: Tensor, upstream: Tensor, tau: float) -> Tensor:
    weight = weight.clone().requires_grad_()
    quantizer(weight, torch.ones(len(weight)), tau)(weight).backward(upstream)
    assert weight.grad is not None
    return weight.grad


# The rectified clamp unit


def test_standardized_filters_have_mean_0_and_the_deviation_of_a_laplace_distribution_with_spread_2() -> None:
    values = standardize(random(5, 4, 3, 3) * 3 + 7, FILTERS).flatten(1)
    torch.testing.assert_close(values.mean(1), torch.zeros(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(values.std(1), torch.full((5,), 8**0.5))
    small = standardize(torch.tensor([[0.003, -0.003]]), FILTERS)  # variance 1.8e-5, and 1e-5 with it
    assert small.tolist() == [pytest.approx([0.003 * math.sqrt(8 / 2.8e-5), -0.003 * math.sqrt(8 / 2.8e-5)])]


def test_the_quantile_is_that_of_a_laplace_distribution_over_all_filters() -> None:
    values = torch.tensor([[1.0, -1.0], [5.0, -3.0]])  # mean magnitude 2.5
    assert laplace_quantile(values, 0.75).item() == pytest.approx(2.5 * math.log(2))
    assert clamp_tails(values, 0.75).tolist() == [pytest.approx([1, -1]), pytest.approx([2.5 * math.log(2), -2.5 * math.log(2)])]
    quantiles = [laplace_quantile(values, tau).item() for tau in (0.6, 0.85, 0.9, 0.99, 1.0)]
    assert quantiles == sorted(quantiles) and quantiles[-1] == math.inf
    assert torch.equal(clamp_tails(values, 1.0), values)
    assert not laplace_quantile(values.requires_grad_(), 0.9).requires_grad


@pytest.mark.parametrize("tau", [0.85, 0.99])
def test_of_laplace_distributed_weights_twice_one_minus_tau_are_clamped(tau: float) -> None:
    values = standardize(laplace(8, 20_000, spread=0.3), FILTERS)
    share = float((clamp_tails(values, tau) != values).float().mean())
    assert share == pytest.approx(2 * (1 - tau), rel=0.05)


@pytest.mark.parametrize("tau", [0.85, 1.0])
def test_weights_without_spread_have_the_quantile_0_and_stay_finite(tau: float) -> None:
    assert laplace_quantile(torch.zeros(3, 4), tau).item() == 0
    assert clamp_tails(torch.zeros(3, 4), tau).tolist() == [[0.0] * 4] * 3
    assert torch.isfinite(gradient(torch.full((3, 4), 0.5), random(3, 4), tau)).all()


def test_tau_grows_exponentially_between_its_bounds() -> None:
    assert tau_at(0, 600) == pytest.approx(0.85) and tau_at(600, 600) == pytest.approx(0.99, abs=1e-6)
    assert tau_at(50, 100) == pytest.approx(0.85 + 0.14 * (math.exp(0.5) - 1) / 1.71828)
    taus = torch.tensor([tau_at(epoch, 30, 0.7, 0.95) for epoch in range(31)], dtype=torch.float64)
    assert (taus.diff() > 0).all() and (taus.diff().diff() > 0).all()


# Weights


def test_a_filter_is_its_signs_around_the_mean_times_a_scale_of_any_sign() -> None:
    weight = torch.tensor([[1.0, 2.0, 3.0, 6.0], [-4.0, 0.0, 4.0, 0.0]])
    q = quantizer(weight, torch.tensor([0.25, -2.0]), tau=0.9)
    assert q(weight).tolist() == [[-0.25, -0.25, 0.25, 0.25], [2.0, -2.0, -2.0, -2.0]]
    assert torch.equal(q.encode(weight).decode(), q(weight))


def test_scaling_and_shifting_a_filter_and_clamping_change_no_value() -> None:
    weight = random(6, 3, 3, 3)
    scale = random(6, seed=3)
    expected = quantizer(weight, scale)(weight)
    assert torch.equal(quantizer(weight, scale)(weight * 5 + 0.5), expected)
    assert torch.equal(quantizer(weight, scale, tau=0.6)(weight), expected)
    assert all(len(row.unique()) == 2 for row in expected.flatten(1))


def test_codes_decode_to_the_forward_pass_in_every_kind_of_layer() -> None:
    for layer in (nn.Linear(9, 4), nn.Conv1d(4, 6, 3, groups=2), nn.ConvTranspose2d(4, 6, 3), nn.Conv2d(5, 5, 1, groups=5)):
        q, weight = Recu().weight_quantizer(Slot("layer", layer, 1, True, "inner")), layer.weight.detach()
        q.initialize(weight)
        assert torch.equal(q.encode(weight).decode(), q(weight))
        assert q.scale.numel() == weight.shape[1 if isinstance(layer, nn.ConvTranspose2d) else 0]


@pytest.mark.parametrize("tau", [0.7, 0.9, 1.0])
def test_the_gradient_is_masked_in_the_tails_and_goes_through_the_standardization(tau: float) -> None:
    weight, upstream = random(6, 60) * 0.05, random(6, 60, seed=1)
    rows = weight.double()
    w0, variance = rows - rows.mean(1, keepdim=True), rows.var(1, keepdim=True) + 1e-5
    w1 = w0 * (8 / variance).sqrt()
    quantile = math.inf if tau == 1 else float(-w1.abs().mean() * math.log(2 - 2 * tau))
    h = upstream.double() * (w1.abs() <= quantile)
    assert bool((h != upstream).any()) == (tau < 1)
    expected = (8 / variance).sqrt() * (h - h.mean(1, keepdim=True) - w0 * (h * w0).sum(1, keepdim=True) / (59 * variance))
    found = gradient(weight, upstream, tau)
    torch.testing.assert_close(found, expected.float(), rtol=1e-3, atol=1e-3)
    assert (found.sum(1).abs() < 1e-5 * found.abs().sum(1)).all()


def test_clamped_weights_move_through_the_statistics_only() -> None:
    weight = torch.cat([laplace(1, 199), torch.full((1, 1), 30.0)], 1)
    upstream = torch.zeros(1, 200)
    upstream[0, -1] = 1.0
    assert gradient(weight, upstream, 0.9).abs().max() == 0  # all that came is masked
    assert gradient(weight, upstream, 1.0)[0, -1] != 0
    assert gradient(weight, 1 - upstream, 0.9)[0, -1] != 0


def test_without_clamping_the_gradient_is_that_of_the_standardized_sign() -> None:
    weight, upstream = random(4, 30), random(4, 30, seed=1)
    free = weight.clone().requires_grad_()
    standardize(free, FILTERS).backward(upstream)
    assert free.grad is not None and torch.equal(gradient(weight, upstream, 1.0), free.grad)


def test_scales_start_between_0_and_1_or_at_the_mean_magnitude() -> None:
    weight = random(400, 5)
    drawn = [RecuWeight(granularity=FILTERS, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    for q in drawn:
        q.initialize(weight)
    assert torch.equal(drawn[0].scale, drawn[1].scale) and not torch.equal(drawn[0].scale, drawn[2].scale)
    scale = drawn[0].scale.detach()
    assert float(scale.min()) >= 0 and float(scale.max()) < 1
    assert float(scale.mean()) == pytest.approx(0.5, abs=0.05)
    torch.testing.assert_close(quantizer(weight).scale.detach(), weight.abs().mean(1, keepdim=True))


# Inputs


def test_the_input_gradient_is_that_of_approx_sign_in_evaluation() -> None:
    x = torch.tensor([[-1.5, -0.5, 0.0, 0.25, 1.0, 3.0]], requires_grad=True)
    y = RecuActivation().eval()(x)
    assert y.tolist() == [[-1, -1, 1, 1, 1, 1]]
    y.sum().backward()
    assert x.grad is not None and x.grad.tolist() == [[0.0, 1.0, 2.0, 1.5, 0.0, 0.0]]


@pytest.mark.parametrize("shape", [(3, 4, 5, 5), (3, 20)])
def test_the_input_gradient_in_training_goes_through_the_deviation_of_each_sample(shape: tuple[int, ...]) -> None:
    x, upstream = random(*shape) * torch.tensor([0.1, 1.0, 9.0]).reshape(3, *(1,) * (len(shape) - 1)), random(*shape, seed=1)
    trained = x.clone().requires_grad_()
    y = RecuActivation().train()(trained)
    assert torch.equal(y, RecuActivation().eval()(x))
    y.backward(upstream)
    rows, g = x.double().flatten(1), upstream.double().flatten(1)
    n = rows.shape[1]
    deviation = (rows.var(1, keepdim=True) + 1e-5).sqrt()
    h = g * (2 - 2 * (rows / deviation).abs()).clamp(min=0)
    centred = rows - rows.mean(1, keepdim=True)
    expected = h / deviation - (h * rows).sum(1, keepdim=True) * centred / ((n - 1) * deviation**3)
    assert trained.grad is not None
    torch.testing.assert_close(trained.grad.flatten(1), expected.float(), rtol=1e-3, atol=1e-5)


# In a layer and a network


def test_the_gradient_of_a_scale_is_the_sum_over_its_channel_and_evaluation_gives_the_same_output() -> None:
    layer, x, upstream = nn.Conv2d(3, 8, 3, padding=1, bias=False), random(4, 3, 6, 6), random(4, 8, 6, 6, seed=1)
    signs = torch.where(standardize(layer.weight.detach(), FILTERS) >= 0, 1.0, -1.0)
    slot = Slot("layer", layer, 1, True, "inner")
    q = Recu(scale_init="magnitude").weight_quantizer(slot)
    q.initialize(layer.weight.detach())
    insert.set_weight_quantizer(layer, q)
    insert.set_input_quantizer(layer, Recu().activation_quantizer(slot))
    y = layer.train()(x)
    y.backward(upstream)
    plain = functional.conv2d(torch.where(x >= 0, 1.0, -1.0), signs, padding=1)
    torch.testing.assert_close(q.scale.grad.flatten(), (upstream * plain).sum((0, 2, 3)), rtol=1e-4, atol=1e-3)
    assert torch.equal(layer.eval()(x), y)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.first, self.second, self.head = nn.ReLU(), nn.ReLU(), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.norm(self.body(self.first(self.stem(x)))))
        return self.head(x.mean((2, 3)))


X, LABELS = random(16, 3, 6, 6, seed=1), torch.arange(16) % 4


def prepared(activation_bits: int | None = 1, **options: object) -> nn.Module:
    torch.manual_seed(0)
    return lowbit.prepare(Network(), method="recu", weight_bits=1, activation_bits=activation_bits, sample=X, **options)


def test_tau_is_that_of_the_epoch_and_scales_are_learned() -> None:
    model = prepared(tau_min=0.8, tau_max=0.95).train()
    q = insert.weight_quantizer(model.body)
    assert isinstance(q, RecuWeight) and isinstance(insert.weight_quantizer(model.stem), LearnedScaleQuantizer)
    assert float(q.tau) == 1.0
    before = q.scale.detach().clone()
    run = TrainRun(model, method_of(model), Classification(), Recipe(3), steps_per_epoch=1)
    for epoch in run.each_epoch():
        assert float(q.tau) == pytest.approx(tau_at(epoch, 3, 0.8, 0.95))
        run.before_step()
        run.loss((X, LABELS)).backward()
        run.after_backward()
        run.optimizer_step()
        run.after_step()
    assert q in run.quantizers() and any(parameter is q.scale for parameter in run.parameters_of("quantizers"))
    assert not torch.equal(q.scale, before)
    assert float(model.state_dict()["body.parametrizations.weight.0.quantizer.tau"]) == float(q.tau)


def test_hardtanh_replaces_relu_where_inputs_are_binary_and_can_be_left_out() -> None:
    assert type(prepared().first) is nn.Hardtanh
    assert type(prepared(None).first) is nn.ReLU and type(prepared(hardtanh=False).first) is nn.ReLU


def test_the_seed_decides_the_scales() -> None:
    first, same, other = (insert.weight_quantizer(prepared(seed=seed).body) for seed in (0, 0, 1))
    assert torch.equal(first.scale, same.scale) and not torch.equal(first.scale, other.scale)


@pytest.mark.parametrize(
    "options", [{"tau_min": 0.5}, {"tau_max": 1.01}, {"tau_min": 0.95, "tau_max": 0.9}, {"tau_min": math.nan}, {"tau_max": math.nan}]
)
def test_tau_out_of_range_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(SpecError, match=r"recu: tau_m(in|ax) must be (above 0\.5 to 1|at most tau_max)"):
        Recu(**options)


def test_a_surrogate_is_refused_for_weights_and_taken_for_inputs() -> None:
    model = prepared(surrogate="ste")
    assert insert.input_quantizer(model.body).surrogate is not None
    with pytest.raises(SpecError, match="take no surrogate"):
        prepared(None, surrogate="ste")
