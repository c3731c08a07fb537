from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowbit
from lowbit.errors import LayerError, SpecError
from lowbit.methods.binary.binary_connect import (
    BinaryConnect,
    BinaryConnectWeight,
    fans,
    glorot_scales,
    hard_sigmoid,
    squared_hinge,
    take_step,
)
from lowbit.network import insert
from lowbit.network.record import record_of
from lowbit.qat import Classification, OptimizerSpec, Recipe, Slot, TrainRun
from lowbit.qat.prepare import method_of
from lowbit.spec import BitPolicy


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stochastic(limit: float = 1.0, seed: int = 0) -> BinaryConnectWeight:
    return BinaryConnectWeight(limit, binarization="stochastic", evaluation="real", seed=seed).train()


# Weights


@pytest.mark.parametrize("limit", [1.0, 0.25])
def test_weights_are_the_limit_with_their_sign_and_zero_counts_as_positive(limit: float) -> None:
    q = BinaryConnectWeight(limit)
    weight = torch.tensor([-3.0, -1e-30, -0.0, 0.0, 0.4, 7.0])
    assert q(weight).tolist() == [-limit, -limit, limit, limit, limit, limit]
    assert torch.equal(q.encode(weight).decode(), q(weight)) and torch.equal(q.eval()(weight), q.train()(weight))


@pytest.mark.parametrize("make", [BinaryConnectWeight, stochastic])
def test_the_gradient_passes_unchanged_whatever_the_size_of_the_weight(make: Any) -> None:
    weight, upstream = (random(200) * 3).requires_grad_(), random(200, seed=1)
    make(0.5)(weight).backward(upstream)
    assert weight.grad is not None and torch.equal(weight.grad, upstream)


def test_the_probability_is_linear_between_the_limits() -> None:
    assert hard_sigmoid(torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.5, 3.0])).tolist() == [0.0, 0.0, 0.25, 0.5, 0.75, 1.0]
    assert stochastic(0.5).probability(torch.tensor([-0.5, -0.25, 0.25])).tolist() == [0.0, 0.25, 0.75]


@pytest.mark.parametrize("limit", [1.0, 0.2])
def test_the_mean_of_many_draws_is_the_weight(limit: float) -> None:
    q, weight = stochastic(limit), limit * torch.linspace(-0.95, 0.95, 20)
    draws = torch.stack([q(weight) for _ in range(4000)])
    assert draws.unique().tolist() == pytest.approx([-limit, limit])
    torch.testing.assert_close(draws.mean(0) / limit, weight / limit, atol=0.08, rtol=0)  # five standard deviations of the mean


def test_weights_at_and_beyond_the_limit_are_not_left_to_chance() -> None:
    q, weight = stochastic(0.5), torch.tensor([-2.0, -0.5, 0.5, 0.7])
    for _ in range(200):
        assert q(weight).tolist() == [-0.5, -0.5, 0.5, 0.5]


def test_every_forward_pass_draws_anew_and_the_draws_go_on_from_a_saved_state() -> None:
    q, weight = stochastic(seed=11), torch.zeros(500)
    draws = [q(weight) for _ in range(3)]
    assert not torch.equal(draws[0], draws[1]) and not torch.equal(draws[1], draws[2])
    saved = copy.deepcopy(q.state_dict())
    expected = [q(weight) for _ in range(2)]
    resumed = stochastic(seed=11)
    resumed.load_state_dict(saved)
    assert all(torch.equal(resumed(weight), y) for y in expected)
    assert torch.equal(stochastic(seed=11)(weight), draws[0]) and not torch.equal(stochastic(seed=12)(weight), draws[0])


def test_the_drawn_weights_serve_the_backward_pass_too() -> None:
    layer = nn.Linear(6, 6, bias=False)
    insert.set_weight_quantizer(layer, stochastic())
    x = torch.eye(6, requires_grad=True)
    y = layer.train()(x)  # the drawn weight, transposed
    upstream = random(6, 6)
    y.backward(upstream)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, upstream @ y.detach().T)


def test_evaluation_is_binary_or_real() -> None:
    weight = random(50)
    real, binary = stochastic().eval(), BinaryConnectWeight(binarization="stochastic").eval()
    assert torch.equal(real(weight), weight)
    assert torch.equal(binary(weight), torch.where(weight >= 0, 1.0, -1.0))
    with pytest.raises(SpecError, match="evaluation=real uses the real weights, which have no codes"):
        real.encode(weight)


# Steps


def test_scales_follow_from_the_fans_and_their_product_is_1() -> None:
    assert fans((2048, 784)) == (784, 2048)
    assert fans((256, 128, 3, 3)) == (1152, 2304)
    assert fans((128, 256, 3, 3), is_transposed=True) == (1152, 2304)
    scale, limit = glorot_scales(784, 2048)
    assert scale == pytest.approx(math.sqrt(2832 / 1.5)) and limit == pytest.approx(math.sqrt(1.5 / 2832))
    assert scale * limit == pytest.approx(1)
    layer = nn.ConvTranspose2d(8, 6, 3, groups=2)  # weight [8, 3, 3, 3]
    assert BinaryConnect.glorot(layer) == pytest.approx(glorot_scales(8 * 9, 3 * 9))


def test_a_step_is_scaled_and_then_clipped() -> None:
    before, after = torch.tensor([0.0, 0.9, -0.9, 0.5]), torch.tensor([0.1, 1.0, -1.0, 0.4])
    torch.testing.assert_close(take_step(after, before, 3.0, 1.0), torch.tensor([0.3, 1.0, -1.0, 0.2]))


def test_the_hinge_is_squared_and_flat_beyond_the_margin() -> None:
    scores, targets = torch.tensor([[2.0, -0.5], [0.5, 0.0]]), torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    assert squared_hinge(scores, targets).item() == pytest.approx((0 + 0.25 + 2.25 + 1) / 4)


X, LABELS = random(32, 6), torch.arange(32) % 3


def prepared(**options: object) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    policy = BitPolicy.uniform(1, None, first_last=None)
    return lowbit.prepare(net, method="binary_connect", sample=X, policy=policy, **options)


def step(run: TrainRun) -> None:
    if run.step == 0:
        run.start_phase()
    run.before_step()
    run.loss((X, LABELS)).backward()
    run.after_backward()
    run.optimizer_step()
    run.after_step()


def trained(steps: int, optimizer: OptimizerSpec, **options: object) -> nn.Module:
    model = prepared(**options).train()
    run = TrainRun(model, method_of(model), Classification(), Recipe(1, optimizer=optimizer), steps)
    for _ in range(steps):
        step(run)
    return model


def test_the_loss_is_the_squared_hinge_where_it_is_asked_for() -> None:
    model = prepared(squared_hinge=True).train()
    run = TrainRun(model, method_of(model), Classification(), Recipe(1), 1)
    run.start_phase()
    targets = torch.where(torch.nn.functional.one_hot(LABELS, 3) == 1, 1.0, -1.0)
    assert run.loss((X, LABELS)).item() == pytest.approx(squared_hinge(model(X), targets).item())


def plain_sgd(rate: float) -> OptimizerSpec:
    return OptimizerSpec("sgd", rate, momentum=0.0, weight_decay=0.0, schedule="constant")


def test_with_sgd_scaling_steps_is_scaling_the_learning_rate_of_the_weights_alone() -> None:
    scaled = trained(1, plain_sgd(0.001), learning_rate_scale=5.0)
    faster = trained(1, plain_sgd(0.005), learning_rate_scale=1.0)
    plain = trained(1, plain_sgd(0.001), learning_rate_scale=1.0)
    for index in (0, 2, 4):
        torch.testing.assert_close(insert.float_weight(scaled[index]), insert.float_weight(faster[index]))
        assert torch.equal(scaled[index].bias, plain[index].bias)
        assert not torch.equal(scaled[index].bias, faster[index].bias)


def test_with_adam_the_step_is_scaled_and_not_the_gradient() -> None:
    start = insert.float_weight(prepared()[2]).detach()
    optimizer = OptimizerSpec("adam", 0.001, weight_decay=0.0, schedule="constant")
    one, many = (trained(1, optimizer, learning_rate_scale=factor) for factor in (1.0, 40.0))
    moved = insert.float_weight(one[2]).detach() - start
    assert float(moved.abs().max()) == pytest.approx(0.001, rel=1e-2)
    torch.testing.assert_close(insert.float_weight(many[2]).detach() - start, 40 * moved, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("limit", [1.0, "glorot"])
def test_stored_weights_are_clipped_to_the_limit_and_come_to_lie_on_it(limit: float | str) -> None:
    model = trained(30, plain_sgd(1.0), limit=limit)
    for index in (0, 2, 4):
        weight = insert.float_weight(model[index]).detach()
        bound = 1.0 if limit == 1.0 else glorot_scales(*fans(tuple(weight.shape)))[1]
        assert float(weight.abs().max()) == pytest.approx(bound)
        torch.testing.assert_close(model[index].weight.detach().abs(), torch.full_like(weight, bound))


def test_biases_are_not_clipped() -> None:
    model = prepared().train()
    for index in (0, 2, 4):
        insert.float_weight(model[index]).data.fill_(-3.0)
        model[index].bias.data.fill_(5.0)
    run = TrainRun(model, method_of(model), Classification(), Recipe(1, optimizer=plain_sgd(0.0)), 1)
    step(run)
    for index in (0, 2, 4):
        assert insert.float_weight(model[index]).unique().tolist() == [-1.0]
        assert model[index].bias.unique().tolist() == [5.0]


def test_layers_draw_apart_from_each_other_and_as_the_seed_says() -> None:
    def drawn(seed: int) -> list[Tensor]:
        model = prepared(binarization="stochastic", seed=seed).train()
        for layer in (model[0], model[2]):
            insert.float_weight(layer).data.zero_()
        return [model[0].weight.detach()[:, :6].clone(), model[2].weight.detach().flatten()[:48].reshape(8, 6).clone()]

    first, second = drawn(0)
    assert not torch.equal(first, second)
    assert torch.equal(drawn(0)[0], first) and not torch.equal(drawn(1)[0], first)
    assert set(drawn(2**40 + 1)[0].flatten().tolist()) == {-1.0, 1.0}


def test_options_out_of_range_are_refused() -> None:
    for name in ("limit", "learning_rate_scale"):
        for value in (0.0, -1.0, math.inf, math.nan):
            with pytest.raises(SpecError, match=f"binary_connect: {name} must be above 0 or 'glorot'"):
                BinaryConnect(**{name: value})
    with pytest.raises(SpecError, match="the limit H must be positive"):
        BinaryConnectWeight(0.0)


def test_options_are_the_papers_hyper_parameters_alone() -> None:
    record = record_of(prepared())
    assert record is not None
    own = set(record.options) - {"quantizer_learning_rate", "quantizer_weight_decay"}
    assert own == {"binarization", "evaluation", "limit", "learning_rate_scale", "squared_hinge"}


def test_inputs_cannot_be_quantized() -> None:
    with pytest.raises(SpecError, match="leaves inputs in float"):
        BinaryConnect().activation_quantizer(Slot("layer", nn.Linear(2, 2), 1, True, "inner"))
    with pytest.raises(LayerError, match=r"leaves inputs in float\. Pass activation_bits=None"):
        lowbit.prepare(nn.Linear(6, 3), method="binary_connect", sample=X, policy=BitPolicy.uniform(1, 1, first_last=None))
