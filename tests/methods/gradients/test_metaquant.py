from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from tests.networks import BranchNet, TinyNet
from torch import Tensor, nn
from torch.nn import functional as F

import lowbit
from lowbit.errors import SpecError
from lowbit.methods.gradients.metaquant import (
    FcGrad,
    LookAhead,
    LstmFc,
    MetaQuant,
    MetaQuantizer,
    MultiFc,
    meta_weights,
    refined_gradient,
)
from lowbit.network import insert
from lowbit.qat import Classification, OptimizerSpec, Recipe, Slot, TrainRun
from lowbit.qat.prepare import method_of
from lowbit.spec import BitPolicy, Granularity

META: dict[str, Callable[[], nn.Module]] = {
    "fc_grad": lambda: FcGrad(7),
    "multi_fc": lambda: MultiFc(7, 3),
    "multi_fc_relu": lambda: MultiFc(7, 3, "relu"),
    "multi_fc_tanh": lambda: MultiFc(7, 2, "tanh"),
    "lstm_fc": lambda: LstmFc(5),
}
LAYERS = {
    "linear": lambda: nn.Linear(5, 3),
    "conv1d": lambda: nn.Conv1d(4, 3, 3),
    "depthwise": lambda: nn.Conv2d(4, 4, 3, groups=4),
    "transposed": lambda: nn.ConvTranspose2d(3, 4, 3, stride=2),
}
SGD = OptimizerSpec("sgd", 0.05, momentum=0.0, weight_decay=0.0, schedule="constant")


class PassOn(nn.Module):
    """The gradient itself, times a factor."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(()))

    def forward(self, gradient: Tensor, weight: Tensor, state: Tensor | None = None) -> tuple[Tensor, None]:
        return gradient * self.factor, None


def fixed(m: Tensor, update: Tensor, learning_rate: float) -> LookAhead:
    return LookAhead(lambda: m, update, learning_rate, m)


def prepared(model: nn.Module, sample: Tensor, *, bits: int = 1, **options: object) -> nn.Module:
    policy = BitPolicy.uniform(bits, None, first_last=None)
    return lowbit.prepare(model, method="metaquant", sample=sample, policy=policy, **options).train()


def run_of(model: nn.Module, optimizer: OptimizerSpec = SGD) -> TrainRun:
    run = TrainRun(model, method_of(model), Classification(), Recipe(1, optimizer=optimizer), 8)
    run.start_phase()
    run.start_epoch()
    return run


def step(run: TrainRun, *batches: tuple[Tensor, Tensor]) -> None:
    run.before_step()
    for batch in batches:
        (run.loss(batch) / len(batches)).backward()
    run.after_backward()
    run.optimizer_step()
    run.after_step()


def data(count: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, 3, 6, 6, generator=generator), torch.arange(count) % 3


def tiny(**options: object) -> tuple[TrainRun, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    return run_of(prepared(TinyNet(classes=3), data()[0], **options)), data()


def snapshot(run: TrainRun) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in run.model.named_parameters()}


# Quantizers


def test_one_bit_dorefa_weights_are_signs_with_the_calibration_as_gradient() -> None:
    weight, upstream = torch.tensor([0.5, -1.0, 0.25], requires_grad=True), torch.tensor([1.0, 2.0, -3.0])
    quantizer = MetaQuantizer(1, "dorefa")
    y = quantizer(weight)
    assert y.tolist() == [1, -1, 1]
    y.backward(upstream)
    t = torch.tanh(weight.detach())
    torch.testing.assert_close(weight.grad, upstream * (1 - t * t) / torch.tanh(torch.tensor(1.0)))
    torch.testing.assert_close(quantizer.captured, upstream)


def test_two_bit_dorefa_weights_are_thirds() -> None:
    y = MetaQuantizer(2, "dorefa")(torch.tensor([1.0, 0.25, -0.1, -0.8]))
    torch.testing.assert_close(y, torch.tensor([1.0, 1 / 3, -1 / 3, -1.0]))


def test_bwn_weights_end_their_gradient_at_one_and_count_zero_as_positive() -> None:
    weight, upstream = torch.tensor([0.5, -1.0, 0.0, -2.5], requires_grad=True), torch.tensor([1.0, 2.0, 4.0, 8.0])
    y = MetaQuantizer(1, "bwn")(weight)
    assert y.tolist() == [1, -1, 1, -1]
    y.backward(upstream)
    assert weight.grad is not None and weight.grad.tolist() == [1, 2, 4, 0]


@pytest.mark.parametrize("bit_width", [1, 2, 4, 8])
@pytest.mark.parametrize("base", ["dorefa", "bwn", "bwn_f"])
@pytest.mark.parametrize("kind", LAYERS)
def test_codes_decode_to_the_weights_of_any_layer(kind: str, base: str, bit_width: int) -> None:
    layer = LAYERS[kind]()
    slot = Slot("layer", layer, bit_width, True, "inner")
    method = MetaQuant(base=base)  # type: ignore[arg-type]
    if base != "dorefa" and bit_width > 1:
        with pytest.raises(SpecError, match="has 1 bit"):
            method.weight_quantizer(slot)
        return
    quantizer, weight = method.weight_quantizer(slot), layer.weight.detach()
    trained, y = quantizer(layer.weight).detach(), quantizer.eval()(weight)
    torch.testing.assert_close(trained, y)
    assert torch.equal(quantizer.encode(weight).decode(), y)
    assert quantizer(weight.bfloat16()).dtype == torch.bfloat16
    channels = quantizer.granularity.flatten(y)
    assert max(row.unique().numel() for row in channels) <= 2**bit_width
    assert len(channels) == (slot.channel_axis >= 0 and weight.shape[slot.channel_axis] if base == "bwn_f" and kind != "linear" else 1)


@pytest.mark.parametrize("base", ["dorefa", "bwn", "bwn_f"])
@pytest.mark.parametrize("fill", [0.0, 1e-38, 0.3])
def test_equal_weights_stay_finite(base: str, fill: float) -> None:
    weight = torch.full((3, 4), fill, requires_grad=True)
    quantizer = MetaQuantizer(1, base, Granularity.channel(0))  # type: ignore[arg-type]
    quantizer.pending = fixed(torch.ones(3, 4), torch.ones(3, 4), 0.1)
    quantizer(weight).sum().backward()
    assert weight.grad is not None and weight.grad.abs().max() <= 10
    assert quantizer.calibration(weight).abs().max() <= 10


# Meta networks


@pytest.mark.parametrize("kind", META)
def test_every_weight_is_treated_by_itself(kind: str) -> None:
    network, generator = META[kind](), torch.Generator().manual_seed(0)
    gradient, weight = (torch.randn(2, 3, 2, generator=generator) for _ in range(2))
    order = torch.randperm(12, generator=generator)

    def permuted(x: Tensor) -> Tensor:
        return x.reshape(-1)[order].reshape(x.shape)

    state = other = None
    for _ in range(2):
        m, state = network(gradient, weight, state)
        n, other = network(permuted(gradient), permuted(weight), other)
        torch.testing.assert_close(permuted(m), n)
    if state is not None and other is not None:
        assert state.shape == (2, 12, 5) and not state.requires_grad
        torch.testing.assert_close(state[:, order], other)


@pytest.mark.parametrize("activation", ["none", "relu", "tanh"])
def test_multi_fc_multiplies_the_gradient_by_a_function_of_the_weight(activation: str) -> None:
    network = MultiFc(6, 3, activation)  # type: ignore[arg-type]
    gradient, weight = torch.randn(4, 5), torch.rand(4, 5)
    between: Callable[[Tensor], Tensor] = {"none": lambda x: x, "relu": F.relu, "tanh": torch.tanh}[activation]
    first, second, third = (linear.weight for linear in network.network)  # type: ignore[union-attr]
    expected = gradient * (between(between(weight.reshape(-1, 1) @ first.T) @ second.T) @ third.T).view_as(weight)
    torch.testing.assert_close(network(gradient, weight)[0], expected)


def test_fc_grad_starts_as_the_gradient_itself_and_multi_fc_as_its_product_with_the_weight() -> None:
    gradient, weight = torch.randn(20), torch.rand(20)
    for seed in range(5):
        torch.manual_seed(seed)
        torch.testing.assert_close(FcGrad(50)(gradient, weight)[0], gradient)
        torch.testing.assert_close(MultiFc(50, 3)(gradient, weight)[0], gradient * weight)


# The look-ahead


def test_the_pass_runs_at_the_updated_weight_and_the_meta_gradient_learns_of_it() -> None:
    layer = nn.Linear(4, 2, bias=False)
    quantizer = MetaQuantizer(1, "bwn")
    insert.set_weight_quantizer(layer, quantizer)
    weight = insert.float_weight(layer)
    m, update = torch.randn(2, 4, requires_grad=True), torch.randn(2, 4)
    quantizer.pending = fixed(m, update, 0.5)
    x = torch.randn(3, 4)
    ahead = (weight - 0.5 * update).detach()
    torch.testing.assert_close(layer(x), x @ (ahead.abs().mean() * ahead.sign()).T)
    layer(x).square().sum().backward()
    assert weight.grad is not None and m.grad is not None and weight.grad.abs().max() > 0
    torch.testing.assert_close(m.grad, -0.5 * weight.grad)  # the calibration of bwn is 1
    layer.eval()
    assert torch.equal(layer.weight, MetaQuantizer(1, "bwn").eval()(weight))


def test_the_calibration_is_in_the_meta_gradients_gradient() -> None:
    weight, m = torch.tensor([0.3, -0.8, 0.5], requires_grad=True), torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    quantizer = MetaQuantizer(1, "dorefa")
    quantizer.pending = fixed(m, torch.zeros(3), 0.1)
    quantizer(weight).backward(torch.tensor([1.0, -1.0, 2.0]))
    assert weight.grad is not None
    torch.testing.assert_close(m.grad, -0.1 * quantizer.calibration(weight) * weight.grad)


# Training


def test_the_first_step_moves_nothing_and_the_next_moves_everything() -> None:
    run, batch = tiny()
    before = snapshot(run)
    step(run, batch)
    assert all(torch.equal(value, before[name]) for name, value in snapshot(run).items())
    step(run, batch)
    moved = {name for name, value in snapshot(run).items() if not torch.equal(value, before[name])}
    assert moved == set(before)


@pytest.mark.parametrize("look_ahead", ["refined", "stored"])
def test_passing_the_gradient_on_is_straight_through_training_one_step_late(look_ahead: str) -> None:
    torch.manual_seed(0)
    x, labels = torch.randn(6, 4), torch.arange(6) % 3
    float_model = nn.Sequential(nn.Linear(4, 3, bias=False))
    run = run_of(prepared(float_model, x, look_ahead=look_ahead, meta_learning_rate=0.0))
    run.networks["meta"] = PassOn()
    weight = insert.float_weight(run.model.get_submodule("0"))
    straight = MetaQuantizer(1, "dorefa")
    expected = weight.detach().clone()

    def late_gradient(at: Tensor) -> Tensor:
        leaf = at.clone().requires_grad_()
        F.cross_entropy(x @ straight(leaf).T, labels).backward()
        gradient = straight.captured
        straight.forget()
        assert gradient is not None
        return gradient

    step(run, (x, labels))
    seen = late_gradient(expected)
    stored = seen * straight.calibration(expected)
    for _ in range(3):
        update = straight.calibration(expected) * seen
        ahead = expected - 0.05 * (update if look_ahead == "refined" else stored)
        seen, stored = late_gradient(ahead), update
        expected = expected - 0.05 * update
        step(run, (x, labels))
        torch.testing.assert_close(weight.detach(), expected)


@pytest.mark.parametrize(
    "spec",
    [
        OptimizerSpec("sgd", 0.1, momentum=0.9, weight_decay=0.01, schedule="constant"),
        OptimizerSpec("sgd", 0.1, momentum=0.9, nesterov=True, weight_decay=0.01, schedule="constant"),
        OptimizerSpec("adam", 0.1, weight_decay=0.01, schedule="constant"),
    ],
    ids=["momentum", "nesterov", "adam"],
)
def test_the_look_ahead_is_where_the_optimizer_goes(spec: OptimizerSpec) -> None:
    torch.manual_seed(0)
    run, batch = run_of(prepared(TinyNet(classes=3), data()[0]), spec), data()
    for _ in range(4):
        run.before_step()
        run.loss(batch).backward()
        ahead = {
            site: quantizer.look_ahead(site.original).detach()
            for site, quantizer in meta_weights(run.model)
            if quantizer.pending is not None
        }
        run.after_backward()
        run.optimizer_step()
        run.after_step()
        for site, value in ahead.items():
            torch.testing.assert_close(site.original.detach(), value, rtol=1e-5, atol=1e-6)
    assert ahead


def test_refined_gradients_are_the_steps_that_torchs_optimizers_take() -> None:
    makers: list[Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = [
        lambda p: torch.optim.SGD(p, 1.0),
        lambda p: torch.optim.SGD(p, 1.0, momentum=0.9, weight_decay=0.1),
        lambda p: torch.optim.SGD(p, 1.0, momentum=0.9, dampening=0.3),
        lambda p: torch.optim.SGD(p, 1.0, momentum=0.9, nesterov=True),
        lambda p: torch.optim.Adam(p, 1.0, weight_decay=0.1),
    ]
    for make in makers:
        parameter = nn.Parameter(torch.randn(5, generator=torch.Generator().manual_seed(0)))
        optimizer = make([parameter])
        for count in range(3):
            parameter.grad = torch.randn(5, generator=torch.Generator().manual_seed(count))
            state = copy.deepcopy(optimizer.state_dict())
            expected = parameter.detach() - refined_gradient(optimizer, parameter, parameter.grad)
            assert str(optimizer.state_dict()) == str(state)
            optimizer.step()
            torch.testing.assert_close(parameter.detach(), expected)


@pytest.mark.parametrize("look_ahead", ["refined", "stored"])
@pytest.mark.parametrize("meta", ["fc_grad", "multi_fc", "lstm_fc"])
def test_accumulated_gradients_are_those_of_one_batch(meta: str, look_ahead: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(108, 5), nn.ReLU(), nn.Linear(5, 3))
    x, labels = data(8)
    whole = run_of(prepared(model, x, meta=meta, hidden=4, look_ahead=look_ahead))
    parts = run_of(copy.deepcopy(whole.model))
    for _ in range(3):
        step(whole, (x, labels))
        step(parts, (x[:4], labels[:4]), (x[4:], labels[4:]))
    for (name, a), b in zip(snapshot(whole).items(), snapshot(parts).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=name)


def test_gradients_of_a_scaled_loss_are_taken_back_to_its_scale() -> None:
    plain, batch = tiny(look_ahead="stored")
    scaled, _ = tiny(look_ahead="stored")
    for _ in range(3):
        step(plain, batch)
        scaled.before_step()
        scaled.gradient_scale = 1024.0
        (1024 * scaled.loss(batch)).backward()
        for parameter in scaled.model.parameters():
            if parameter.grad is not None:
                parameter.grad /= 1024
        scaled.after_backward()
        scaled.optimizer_step()
        scaled.after_step()
    for (name, a), b in zip(snapshot(plain).items(), snapshot(scaled).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=name)


def test_infinite_gradients_of_a_scaled_loss_are_not_remembered() -> None:
    run, batch = tiny()
    step(run, batch)
    kept = [quantizer.last_gradient.clone() for _, quantizer in meta_weights(run.model)]
    run.before_step()
    run.gradient_scale = 1e38
    (1e38 * run.loss(batch) * 1e30).backward()
    run.after_backward()
    assert all(torch.equal(quantizer.last_gradient, before) for (_, quantizer), before in zip(meta_weights(run.model), kept, strict=True))


def test_layers_that_rest_in_a_step_keep_what_they_have_seen() -> None:
    torch.manual_seed(0)
    x, labels = data()
    run = run_of(prepared(BranchNet(), x + 3))
    bright, dark = (insert.weight_quantizer(run.model.get_submodule(name)) for name in ("bright", "dark"))
    assert isinstance(bright, MetaQuantizer) and isinstance(dark, MetaQuantizer)
    step(run, (x + 3, labels))
    assert bright.has_history and not dark.has_history
    seen, weight = bright.last_gradient.clone(), insert.float_weight(run.model.get_submodule("bright")).detach().clone()
    step(run, (x - 3, labels))
    assert dark.has_history and torch.equal(bright.last_gradient, seen)
    assert torch.equal(insert.float_weight(run.model.get_submodule("bright")), weight)
    step(run, (x + 3, labels))
    assert not torch.equal(insert.float_weight(run.model.get_submodule("bright")), weight)


def test_a_process_whose_layer_rested_takes_the_gradient_of_the_others() -> None:
    weight, theirs = torch.tensor([0.5, -1.0]), torch.tensor([3.0, 4.0])
    quantizer = MetaQuantizer(1, "dorefa")
    assert quantizer.remember(weight, reduce_mean=lambda mine: mine.add_(theirs).div_(2))
    assert quantizer.last_gradient.tolist() == [1.5, 2.0]
    torch.testing.assert_close(quantizer.last_weight, quantizer.preprocess(weight))


def test_the_authors_look_ahead_gives_biases_back_bit_for_bit() -> None:
    run, batch = tiny(look_ahead="stored")
    step(run, batch)
    head = run.model.get_submodule("head")
    before = head.bias.detach().clone()  # type: ignore[union-attr, operator]
    run.before_step()
    assert not torch.equal(head.bias, before)  # type: ignore[arg-type]
    run.loss(batch).backward()
    run.after_backward()
    assert torch.equal(head.bias, before)  # type: ignore[arg-type]


# What stays and what goes


def test_one_meta_network_serves_all_layers_by_an_optimizer_of_its_own() -> None:
    run, batch = tiny(meta="multi_fc", hidden=9)
    assert [type(network) for network in run.networks.values()] == [MultiFc]
    assert not any(isinstance(module, MultiFc) for module in run.model.modules())
    meta = run.parameters_of("meta")
    assert [p.shape for p in meta] == [(9, 1), (1, 9)]
    adam = next(optimizer for optimizer in run.optimizers if isinstance(optimizer, torch.optim.Adam))
    assert [p for group in adam.param_groups for p in group["params"]] == meta
    assert adam.param_groups[0]["weight_decay"] == 0
    step(run, batch)
    before = [p.detach().clone() for p in meta]
    step(run, batch)
    for a, b in zip(meta, before, strict=True):
        torch.testing.assert_close((a - b).abs(), torch.full_like(b, 1e-3), rtol=0.02, atol=0)  # Adam's first step


@pytest.mark.parametrize("meta", ["fc_grad", "lstm_fc"])
def test_a_network_goes_on_from_its_state_to_the_same_weights(meta: str) -> None:
    run, batch = tiny(meta=meta, hidden=4)
    for _ in range(3):
        step(run, batch)
    other, _ = tiny(meta=meta, hidden=4)
    other.model.load_state_dict(run.model.state_dict())
    other.networks["meta"].load_state_dict(run.networks["meta"].state_dict())
    for mine, theirs in zip(run.optimizers, other.optimizers, strict=True):
        theirs.load_state_dict(copy.deepcopy(mine.state_dict()))
    copied = pickle.loads(pickle.dumps(run.model))
    other.step = run.step
    for each in (run, other):
        step(each, batch)
    assert all(torch.equal(a, b) for a, b in zip(snapshot(run).values(), snapshot(other).values(), strict=True))
    assert not torch.equal(copied.eval()(batch[0]), run.model.eval()(batch[0]))


def test_the_meta_network_does_not_take_part_in_inference() -> None:
    run, batch = tiny()
    for _ in range(2):
        step(run, batch)
    model = run.model.eval()
    before = model(batch[0])
    with torch.no_grad():
        for parameter in run.networks["meta"].parameters():
            parameter.mul_(-3)
    assert torch.equal(model(batch[0]), before)
    baked, _ = insert.bake_weights(model)
    assert not any(isinstance(module, FcGrad) for module in baked.modules())
    assert torch.equal(baked(batch[0]), before)
