from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from lowbit.errors import SpecError
from lowbit.methods.gradients.ewgs import (
    HALF_NORMAL,
    Ewgs,
    EwgsActivation,
    EwgsWeight,
    estimate_deltas,
    hutchinson_trace,
    scaled_quantizers,
)
from lowbit.network import insert
from lowbit.qat import Classification, Recipe, TrainRun
from lowbit.qat.prepare import method_of, prepare
from lowbit.surrogates import ElementwiseGradientScaling, bounded_straight_through

X = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(1))
LABELS = torch.randint(0, 3, (16,), generator=torch.Generator().manual_seed(2))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 4, 3, bias=False), nn.Conv2d(4, 4, 3)
    return nn.Sequential(first, nn.BatchNorm2d(4), nn.ReLU(), second, nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))


def prepared(**options: object) -> nn.Module:
    return prepare(network(), method="ewgs", weight_bits=2, activation_bits=2, sample=X, **options).train()  # type: ignore[arg-type]


def run_of(model: nn.Module, epochs: int = 4, seed: int = 0) -> TrainRun:
    run = TrainRun(model, method_of(model), Classification(), Recipe(epochs, seed=seed), 2, batches=lambda count: [(X, LABELS)] * count)
    run.start_phase()
    return run


def deltas(model: nn.Module) -> list[float]:
    return [round(float(m.delta), 6) for m in model.modules() if isinstance(m, ElementwiseGradientScaling)]


def interval_gradients(quantizer: EwgsWeight, x: Tensor) -> tuple[Tensor, ...]:
    y = quantizer(x)
    y.sum().backward()
    assert quantizer.lower is not None
    return x.grad, quantizer.lower.grad, quantizer.upper.grad  # type: ignore[return-value]


# The quantizers


def test_discretizing_scales_gradients_by_the_signed_error() -> None:
    x = torch.tensor([0.4, 0.4, 0.1], requires_grad=True)
    quantizer = EwgsActivation(2, delta=0.5)
    quantizer.set_interval(torch.tensor(0.0), torch.tensor(1.0))
    y = quantizer(x)
    torch.testing.assert_close(y, torch.tensor([1 / 3, 1 / 3, 0]))
    y.backward(torch.tensor([1.0, -1.0, 2.0]))
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.tensor([1 + 0.5 * (0.4 - 1 / 3), -1 + 0.5 * (0.4 - 1 / 3), 2 * (1 + 0.5 * 0.1)]))


def test_weights_lie_on_odd_multiples_and_activations_from_zero_to_one() -> None:
    weights, activations = EwgsWeight(2), EwgsActivation(2)
    weights.set_interval(torch.tensor(-1.0), torch.tensor(1.0))
    activations.set_interval(torch.tensor(0.0), torch.tensor(3.0))
    x = torch.linspace(-4, 4, 200)
    torch.testing.assert_close(weights(x).unique(), torch.tensor([-1, -1 / 3, 1 / 3, 1]))
    torch.testing.assert_close(activations(x).unique(), torch.arange(4) / 3)


def test_one_bit_means_minus_one_and_one_for_weights_and_zero_and_one_for_activations() -> None:
    weights, activations = EwgsWeight(1), EwgsActivation(1)
    weights.initialize(torch.randn(50))
    activations.initialize(torch.rand(50))
    assert weights(torch.linspace(-4, 4, 99)).unique().tolist() == [-1, 1]
    assert activations(torch.linspace(-4, 4, 99)).unique().tolist() == [0, 1]


def test_gradients_of_values_and_of_both_ends_follow_the_formula() -> None:
    x = torch.tensor([-2.0, -0.9, 0.2, 0.7, 3.0], requires_grad=True)
    quantizer = EwgsWeight(2, delta=0.3)
    lower, upper = -1.0, 1.5
    quantizer.set_interval(torch.tensor(lower), torch.tensor(upper))
    grad, grad_lower, grad_upper = interval_gradients(quantizer, x)
    n = (x.detach() - lower) / (upper - lower)
    error = n - (n * 3).round() / 3
    h = 2 * (1 + 0.3 * error) * ((n >= 0) & (n <= 1))  # every output has the gradient 1, so q has 2
    torch.testing.assert_close(grad, h / (upper - lower))
    torch.testing.assert_close(grad_upper, (-h * (x.detach() - lower)).sum() / (upper - lower) ** 2)
    torch.testing.assert_close(grad_lower, (h * (x.detach() - upper)).sum() / (upper - lower) ** 2)


def test_a_strength_of_zero_is_straight_through_to_the_bit() -> None:
    x = torch.randn(300, generator=torch.Generator().manual_seed(3))
    found = []
    for surrogate in ("zero", "ste"):
        quantizer = EwgsWeight(3, delta=0.0)
        if surrogate == "ste":
            del quantizer.surrogate
            quantizer.surrogate = bounded_straight_through
        quantizer.initialize(x)
        found.append(interval_gradients(quantizer, x.clone().requires_grad_()))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_scaling_values_and_interval_together_changes_nothing() -> None:
    x = torch.randn(100, generator=torch.Generator().manual_seed(0))
    outputs = []
    for factor in (1.0, 5.0):
        quantizer = EwgsWeight(3)
        quantizer.set_interval(torch.tensor(-2.0 * factor), torch.tensor(1.5 * factor))
        outputs.append(quantizer(x * factor))
    torch.testing.assert_close(*outputs)


def test_intervals_start_at_three_standard_deviations() -> None:
    w, x = torch.tensor([1.0, -1.0, 2.0, -2.0]), torch.tensor([0.5, 0.5, 2.0, 3.0])
    weights, activations = EwgsWeight(4), EwgsActivation(4)
    weights.initialize(w)
    activations.initialize(x)
    assert weights.lower is not None and activations.lower is not None
    assert weights.upper.item() == pytest.approx(3 * w.std().item()) == -weights.lower.item()
    assert activations.lower.item() == 0.5
    assert activations.upper.item() == pytest.approx(3 * x.std().item() / HALF_NORMAL)
    assert pytest.approx(0.60281, abs=1e-5) == HALF_NORMAL


def test_signed_activations_are_not_cut_off_at_zero() -> None:
    quantizer = EwgsActivation(2, is_signed=True)
    x = torch.linspace(-2, 2, 100)  # without 0, where codes tie
    quantizer.initialize(x)
    torch.testing.assert_close(quantizer(x), -quantizer(-x), atol=1e-6, rtol=0)
    assert quantizer(x).min() < -0.3


@pytest.mark.parametrize(
    "values", [torch.zeros(6), torch.full((6,), 0.25), torch.full((6,), -1e30), torch.tensor([2.0]), torch.full((1,), 1e-30)]
)
def test_values_that_are_all_alike_stay_finite_and_keep_their_sign(values: Tensor) -> None:
    for quantizer in (EwgsWeight(2), EwgsActivation(2), EwgsActivation(2, is_signed=True)):
        x = values.clone().requires_grad_()
        quantizer.initialize(x)
        y = quantizer(x)
        y.sum().backward()
        assert all(bool(torch.isfinite(t).all()) for t in (y, x.grad, quantizer.upper.grad))  # type: ignore[union-attr]
        if quantizer.is_centred and values[0].abs() > 0:
            assert torch.equal(y.sign(), values.sign())
    activations = EwgsActivation(2)
    activations.initialize(values.abs())
    assert bool((activations(values.abs()) > 0).all()) == bool(values[0].abs() > 0)


def test_tiny_weights_keep_their_levels() -> None:
    w = 1e-6 * torch.randn(200, generator=torch.Generator().manual_seed(4))
    quantizer = EwgsWeight(2)
    quantizer.initialize(w)
    quantizer.project()
    assert quantizer(w).unique().numel() == 4


@pytest.mark.parametrize("lower", [0.0, 1.0, -1e4, 1e4])
def test_the_interval_cannot_close(lower: float) -> None:
    quantizer = EwgsWeight(8)
    quantizer.set_interval(torch.tensor(lower), torch.tensor(lower + 1))
    quantizer.upper.data.fill_(lower - 3)
    quantizer.project()
    assert quantizer.upper.item() > lower
    assert torch.isfinite(quantizer(torch.linspace(lower - 1, lower + 1, 50))).all()


def test_bfloat16_is_quantized_in_float32_also_while_probed() -> None:
    x = torch.randn(64, generator=torch.Generator().manual_seed(5)).bfloat16()
    quantizer = EwgsWeight(4)
    quantizer.initialize(x)
    plain = quantizer(x)
    quantizer.is_probed = True
    assert plain.dtype == quantizer(x).dtype == torch.bfloat16
    assert torch.equal(plain, quantizer(x)) and torch.equal(plain, quantizer(x.float()).bfloat16())


# The output scale


@pytest.mark.parametrize("bias", [False, True])
def test_the_output_scale_keeps_the_size_of_a_layer_and_scales_its_bias(bias: bool) -> None:
    layer, x = nn.Conv2d(4, 6, 3, bias=bias), torch.rand(8, 4, 9, 9)
    expected, before = layer(x).abs().mean(), None if layer.bias is None else layer.bias.detach().clone()
    insert.set_weight_quantizer(layer, EwgsWeight(4))
    insert.set_input_quantizer(layer, EwgsActivation(4))
    Ewgs().initialize_layer(layer, x)
    torch.testing.assert_close(layer(x).abs().mean(), expected, rtol=1e-4, atol=0)
    quantizer = insert.weight_quantizer(layer)
    assert isinstance(quantizer, EwgsWeight) and quantizer.output_scale is not None
    assert quantizer.output_scale.item() != 1
    if before is not None:
        assert torch.equal(layer.bias, before * quantizer.output_scale.abs())


def test_the_output_scale_gets_the_gradient_of_the_whole_output_and_only_its_magnitude_counts() -> None:
    model = prepared().eval()
    quantizer = insert.weight_quantizer(model[3])  # type: ignore[index]
    assert isinstance(quantizer, EwgsWeight) and quantizer.output_scale is not None
    x = torch.rand(2, 4, 6, 6)
    y = model[3](x)  # type: ignore[index]
    y.sum().backward()
    torch.testing.assert_close(quantizer.output_scale.grad, y.detach().sum() / quantizer.output_scale.detach(), rtol=1e-4, atol=0)
    quantizer.output_scale.data.neg_()
    assert torch.equal(model[3](x), y)  # type: ignore[index]


def test_where_weights_stay_in_float_the_input_holds_the_output_scale() -> None:
    model, expected = network().eval(), network().eval()(X)
    qat = prepare(model, method="ewgs", weight_bits=None, activation_bits=8, sample=X).eval()
    quantizer = insert.input_quantizer(qat[3])  # type: ignore[index]
    assert isinstance(quantizer, EwgsActivation) and quantizer.output_scale is not None
    assert ((qat(X) - expected).norm() / expected.norm()).item() < 0.2


def test_a_network_with_biases_is_baked_to_what_it_computes() -> None:
    model = prepared().eval()
    baked, codes = insert.bake_weights(model)
    assert type(baked[3]) is nn.Conv2d and isinstance(baked[3].bias, nn.Parameter)  # type: ignore[index]
    assert torch.equal(baked(X), model(X)) and set(codes) == {"0.weight", "3.weight", "6.weight"}


# The trace and the strength


def test_the_trace_of_a_quadratic_with_a_diagonal_hessian_is_exact_from_the_first_probe() -> None:
    diagonal = torch.tensor([1.0, 2.0, -0.5, 4.0])
    p = torch.randn(4, requires_grad=True)
    (g,) = torch.autograd.grad((0.5 * diagonal * p * p).sum(), p, create_graph=True)
    probes = torch.randint(0, 2, (50, 4), generator=torch.Generator().manual_seed(0)).float() * 2 - 1
    trace, found = hutchinson_trace(g, p, probes)
    assert trace == pytest.approx(6.5)
    assert len(found) == 2  # one more to see that it has settled


def test_a_negative_trace_ends_at_the_next_probe_as_in_the_authors_program() -> None:
    hessian = torch.tensor([[-3.0, 2.0], [2.0, -1.0]])
    p = torch.randn(2, requires_grad=True)
    (g,) = torch.autograd.grad(0.5 * p @ hessian @ p, p, create_graph=True)
    trace, found = hutchinson_trace(g, p, [torch.tensor([1.0, -1.0]), torch.tensor([1.0, 1.0]), torch.tensor([1.0, 1.0])])
    assert found == [-8.0, 0.0] and trace == -4.0


def test_probes_are_no_more_than_asked_for() -> None:
    hessian = torch.tensor([[3.0, 2.0], [2.0, 1.0]])
    p = torch.randn(2, requires_grad=True)
    (g,) = torch.autograd.grad(0.5 * p @ hessian @ p, p, create_graph=True)

    def probes() -> Iterator[Tensor]:
        while True:
            yield torch.tensor([1.0, 1.0])
            yield torch.tensor([1.0, -1.0])

    assert hutchinson_trace(g, p, probes(), max_iterations=7, tolerance=0.0) == (pytest.approx((4 * 8 + 3 * 0) / 7), [8.0, 0.0] * 3 + [8.0])


def ones(_batch: int, _index: int, shape: torch.Size) -> list[Tensor]:
    return [torch.ones(shape)] * 3


def test_the_strength_is_the_mean_curvature_over_the_size_of_gradients() -> None:
    quantizer = EwgsWeight(2)
    quantizer.set_interval(torch.tensor(-1.0), torch.tensor(1.0))
    w = torch.randn(20, requires_grad=True, generator=torch.Generator().manual_seed(6))
    curvature = torch.linspace(0.5, 2, 20)
    losses: list[Callable[[], Tensor]] = [lambda: 0.5 * (curvature * quantizer(w).square()).sum()]
    q = (quantizer(w).detach() + 1) / 2
    gradient = curvature * (2 * q - 1) * 2  # of the loss with respect to q
    expected = 4 * curvature.sum() / 20 / (3 * gradient.std())
    assert estimate_deltas([quantizer], losses, ones) == [pytest.approx(float(expected))]
    assert quantizer.discretized is None and not quantizer.is_probed


def test_negative_curvature_and_none_give_no_strength() -> None:
    quantizer = EwgsWeight(2)
    quantizer.set_interval(torch.tensor(-1.0), torch.tensor(1.0))
    w = torch.randn(20, requires_grad=True)
    assert estimate_deltas([quantizer], [lambda: (quantizer(w) * torch.arange(20.0)).sum()], ones) == [0.0]
    assert estimate_deltas([quantizer], [lambda: -quantizer(w).square().sum()], ones) == [0.0]


def test_a_quantizer_without_a_part_in_the_loss_gets_no_estimate() -> None:
    quantizers = [EwgsWeight(2) for _ in range(3)]
    for quantizer in quantizers:
        quantizer.set_interval(torch.tensor(-1.0), torch.tensor(1.0))
    w = torch.randn(20, requires_grad=True)

    def loss() -> Tensor:
        quantizers[1](w)  # looked at, but of no effect
        return quantizers[0](w).square().sum()

    found = estimate_deltas(quantizers, [loss], ones)
    assert found[0] is not None and found[0] > 0 and found[1:] == [None, None]


def test_an_error_in_the_loss_leaves_no_quantizer_probed() -> None:
    quantizer = EwgsWeight(2)

    def loss() -> Tensor:
        raise RuntimeError("no data")

    with pytest.raises(RuntimeError, match="no data"):
        estimate_deltas([quantizer], [loss], ones)
    assert not quantizer.is_probed


def test_the_strength_never_changes_the_forward_pass() -> None:
    plain, strong = (prepared(delta=delta).eval() for delta in (0.0, 0.9))
    assert torch.equal(plain(X), strong(X))
    assert deltas(strong) == [0.9, 0.9]  # one of the weight and one of the input of the layer that is neither first nor last


# In the course of training


@pytest.mark.parametrize(
    ("epochs", "interval", "expected"),
    [(4, 10, [2]), (3, 10, [1, 2]), (1, 10, []), (25, 10, [10, 20]), (5, 1, [1, 2]), (6, 0, [])],
    ids=["half of a short run", "three epochs", "one epoch", "longer run", "every epoch", "never"],
)
def test_when_strengths_are_estimated(epochs: int, interval: int, expected: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model = prepared(delta_interval=interval)
    run, found = run_of(model, epochs), []
    monkeypatch.setattr(Ewgs, "update_deltas", lambda self, run: found.append(run.epoch))
    for run.epoch in range(epochs):
        run.start_epoch()
    assert [epoch for epoch in found if epochs != 5 or epoch < 3] == expected


def test_an_update_sets_strengths_from_the_curvature_and_touches_nothing_else() -> None:
    model = prepared()
    run = run_of(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run.epoch = 2
    run.start_epoch()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    norm = {"1.running_mean", "1.running_var", "1.num_batches_tracked"}  # as in the authors' program
    assert changed - norm == {"3.parametrizations.weight.0.quantizer.surrogate.delta", "3.input_quantizer.surrogate.delta"}
    assert all(delta > 0.001 for delta in deltas(model))
    assert all(p.grad is None for p in model.parameters())
    assert all(q.discretized is None and not q.is_probed for q in scaled_quantizers(model))


def test_the_update_depends_on_the_runs_generator_alone() -> None:
    found = []
    for seed in (0, 0, 1):
        model = prepared()
        torch.manual_seed(len(found))
        run = run_of(model, seed=seed)
        run.epoch = 2
        run.start_epoch()
        found.append(deltas(model))
    assert found[0] == found[1] != found[2]


def test_without_batches_the_strength_stays() -> None:
    model = prepared(delta=0.25)
    run = run_of(model)
    run.batches = None
    run.epoch = 2
    run.start_epoch()
    assert deltas(model) == [0.25, 0.25]


class Wrapper(nn.Module):
    """Cannot be differentiated twice, as a compiled network cannot."""

    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError("called in an estimate")


def test_the_estimate_goes_past_a_wrapper_of_the_network() -> None:
    model = prepared()
    run = run_of(model)
    run.wrapped = Wrapper()
    run.epoch = 2
    run.start_epoch()
    assert all(delta > 0.001 for delta in deltas(model))
    assert isinstance(run.wrapped, Wrapper)


def test_strengths_are_averaged_over_processes() -> None:
    model = prepared()
    run = run_of(model)
    run.reduce_mean = lambda tensor: tensor.fill_(0.125)  # type: ignore[assignment, return-value]
    run.epoch = 2
    run.start_epoch()
    assert deltas(model) == [0.125, 0.125]


def test_another_surrogate_leaves_nothing_to_estimate() -> None:
    model = prepared(surrogate="ste")
    assert scaled_quantizers(model) == []
    run = run_of(model)
    run.batches = lambda count: pytest.fail("no estimate is needed")
    run.epoch = 2
    run.start_epoch()


def test_activations_are_treated_before_weights() -> None:
    kinds = [type(q) for q in scaled_quantizers(prepared())]
    assert kinds == [EwgsActivation, EwgsWeight]


def test_intervals_and_output_scales_learn_with_adam_at_a_hundredth_of_the_rate() -> None:
    run = run_of(prepared())
    kinds = {group["role"]: (type(optimizer).__name__, group["spec"]) for optimizer in run.optimizers for group in optimizer.param_groups}
    assert kinds["quantizers"][0] == "Adam" and kinds["weights"][0] == "SGD"
    assert kinds["quantizers"][1].learning_rate == pytest.approx(0.01 * kinds["weights"][1].learning_rate)
    assert kinds["quantizers"][1].weight_decay == 0


@pytest.mark.parametrize(
    "option", [{"delta": -1.0}, {"delta": float("nan")}, {"delta_interval": -1}, {"delta_batches": 0}, {"delta_probes": 0}]
)
def test_numbers_out_of_range_are_refused(option: dict[str, float]) -> None:
    with pytest.raises(SpecError, match=f"ewgs: {next(iter(option))} must be"):
        Ewgs(**option)  # type: ignore[arg-type]
