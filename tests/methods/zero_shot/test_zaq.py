"""ZAQ's losses by hand and by their invariances, what each turn leaves alone, and training without data from end to end."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowbit
from lowbit.data import load_data
from lowbit.errors import DataError, GraphError, LowbitError, SpecError
from lowbit.methods.zero_shot.zaq import (
    View,
    Zaq,
    channel_map,
    feature_discrepancy,
    normalized,
    output_discrepancy,
    position_map,
)
from lowbit.models import load_default
from lowbit.network.taps import Tap
from lowbit.qat import Classification, GivenNetworks, OptimizerSpec, Recipe, TrainRun
from lowbit.qat.prepare import method_of
from lowbit.quantizers.running_range import RunningRangeQuantizer

RELATIONS = ["scrm", "scrm_channel", "crm"]
FEW = {"latent": 8, "width": 4, "network_steps": 2, "rounds": 3}
RECIPE = Recipe(epochs=2, batch_size=8, optimizer=OptimizerSpec(learning_rate=0.01))


def features(seed: int, shape: tuple[int, ...] = (3, 5, 4, 4)) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).relu() + 0.01


def network(channels: int = 1) -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Conv2d(channels, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    ).eval()  # fmt: skip


def run_of(float_network: nn.Module, teacher: nn.Module | None = None, **options: Any) -> TrainRun:
    model = lowbit.prepare(float_network, method="zaq", sample=torch.randn(4, 1, 8, 8), weight_bits=2, **(FEW | options)).train()
    return TrainRun(model, method_of(model), Classification(), RECIPE, 3, given=GivenNetworks(teacher, float_network))


def turn(run: TrainRun) -> Tensor:
    run.before_step()
    loss = run.loss(torch.empty(8, 0))
    loss.backward()
    run.after_backward()
    run.optimizer_step()
    run.after_step()
    return loss.detach()


def test_maps_by_hand() -> None:
    x = torch.tensor([[[1.0, 0.0], [0.6, 0.8]]])
    # E = [[1, 0.6], [0.6, 1]], max - E = [[0, 0.4], [0.4, 0]]
    a = torch.tensor([[0.0, 0.4], [0.4, 0.0]]).softmax(1)
    torch.testing.assert_close(channel_map(x, 0.1), 0.1 * (a @ x) + x)
    # x^T x = [[1.36, 0.48], [0.48, 0.64]]
    b = torch.tensor([[1.36, 0.48], [0.48, 0.64]]).softmax(1)
    torch.testing.assert_close(position_map(x, 0.1), 0.1 * (x @ b.T) + x)


@pytest.mark.parametrize("relation", RELATIONS)
def test_equal_features_have_no_discrepancy_and_the_order_of_two_does_not_matter(relation: Any) -> None:
    first, second = features(0), features(1)
    assert float(feature_discrepancy(first, first, relation)) == 0.0
    forth, back = (float(feature_discrepancy(*pair, relation)) for pair in ((first, second), (second, first)))
    assert forth == pytest.approx(back) and forth > 0.01


def test_a_positive_factor_for_each_position_or_channel_changes_nothing() -> None:
    first, second = features(0), features(1)
    by_position = torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(3)) + 0.5
    by_channel = torch.rand(3, 5, 1, 1, generator=torch.Generator().manual_seed(4)) + 0.5
    for relation, factor in (("scrm", by_position), ("scrm_channel", by_position), ("crm", by_channel)):
        expected = feature_discrepancy(first, second, relation)  # type: ignore[arg-type]
        torch.testing.assert_close(feature_discrepancy(first * factor, second, relation), expected)  # type: ignore[arg-type]
    assert not torch.isclose(feature_discrepancy(first * by_channel, second), feature_discrepancy(first, second))


def test_a_position_without_any_channel_has_no_gradient_and_leaves_others_finite() -> None:
    student = features(0)
    student[:, :, 0, 0] = 0
    student.requires_grad_()
    feature_discrepancy(student, features(1)).backward()
    assert student.grad is not None and bool((student.grad[:, :, 0, 0] == 0).all())
    assert float(student.grad.abs().max()) < 1
    assert normalized(torch.tensor([[3.0, 0.0], [4.0, 0.0]]), 0, 1e-6).tolist() == [[pytest.approx(0.6), 0.0], [pytest.approx(0.8), 0.0]]


def test_features_without_positions_can_be_compared() -> None:
    assert float(feature_discrepancy(features(0, (3, 5)), features(1, (3, 5)))) > 0


def test_losses_by_hand() -> None:
    method = Zaq(alpha=2.0, beta=0.5, relation="crm")
    network = View(torch.tensor([[1.0, 2.0]]), [torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])])
    teacher = View(torch.tensor([[0.0, 4.0]]), [torch.tensor([[[1.0, 0.0], [0.0, 3.0]]])])
    # |1| and |-2|: 1.5; R of the network is all 1, of the teacher the identity: 2 of 4 differ by 1
    assert float(output_discrepancy(network.output, teacher.output)) == 1.5
    assert float(method.relation_loss(network, teacher)) == 0.5
    assert float(method.network_loss(network, teacher)) == 2.5
    assert float(method.generator_loss(network, teacher)) == -2.5 - 0.5 * 1.0


def test_two_equal_networks_leave_nothing_but_the_activation_term() -> None:
    method, view = Zaq(), View({"logits": features(2)}, [features(0), features(1)])
    assert float(method.network_loss(view, view)) == 0.0
    assert float(method.generator_loss(view, view)) == pytest.approx(-0.1 * float(features(1).mean()))


def test_each_turn_leaves_the_other_network_alone_and_the_float_one_never_changes() -> None:
    float_network = network()
    run = run_of(float_network)
    given = {name: value.clone() for name, value in float_network.state_dict().items()}
    run.start_phase()
    assert all(not q.is_initialized for q in run.quantizers() if isinstance(q, RunningRangeQuantizer))
    for expected in ("network", "network", "generator") * 2:
        assert run.turn.name == expected
        before = [{k: v.clone() for k, v in net.named_parameters()} for net in (run.model, run.networks["generator"])]
        norm, upper = run.model[1].running_mean.clone(), run.model[3].input_quantizer.upper.clone()
        turn(run)
        after = [dict(net.named_parameters()) for net in (run.model, run.networks["generator"])]
        same = [all(torch.equal(old[name], new[name]) for name in old) for old, new in zip(before, after, strict=True)]
        assert same == ([False, True] if expected == "network" else [True, False])
        assert not torch.equal(run.model[1].running_mean, norm)  # in both kinds of turns
        assert bool(run.model[3].input_quantizer.upper >= upper)
    for net in (float_network, run.networks["teacher"]):
        assert all(torch.equal(value, given[name]) for name, value in net.state_dict().items())
    assert not run.networks["teacher"].training and run.step == 2


@pytest.mark.parametrize(("statistics", "moves"), [("generated", True), ("float", False)])
def test_norms_learn_from_samples_or_keep_what_the_float_network_knows(statistics: str, moves: bool) -> None:
    float_network = network()
    run = run_of(float_network, norm_statistics=statistics)
    run.start_phase()
    for _ in range(3):
        turn(run)
    kept, now = (net.get_buffer("1.running_mean") for net in (float_network, run.model))
    assert bool((kept != now).any()) == moves
    assert bool((run.model.get_parameter("1.bias") != 0).any())  # norms are trained either way


def test_features_are_those_before_each_smaller_size_behind_the_quantizer_that_reads_them() -> None:
    run = run_of(network())
    method = method_of(run.model)
    assert isinstance(method, Zaq)
    assert [tap.module for tap in method.teacher_taps] == ["2", "5"]
    assert method.network_taps == [Tap("3.input_quantizer"), method.teacher_taps[1]]
    named = method_of(run_of(network(), taps=("1",)).model)
    assert isinstance(named, Zaq) and named.teacher_taps == [Tap("1")]


def test_the_paper_trains_as_its_program_does() -> None:
    method = Zaq()
    recipe = method.default_recipe()
    phase = method.phases(recipe)[0]
    assert [turn.name for turn in phase.turns] == ["network"] * 5 + ["generator"] and method.generated_steps() == 60
    for role, kind, rate in (("weights", "sgd", 0.1), ("generator", "adam", 1e-3)):
        spec = phase.optimizers[role]
        assert spec.kind == kind and [spec.rate_at(epoch / 300) for epoch in (99, 100, 200)] == pytest.approx([rate, rate / 10, rate / 100])
    assert recipe.epochs == 300 and recipe.batch_size == 256 and recipe.optimizer.weight_decay == 5e-4
    assert method.default_policy(lowbit.LayerBits(6, 8)).first_last is None


class Untouchable(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> Any:
        raise AssertionError("a training sample was looked at")


def test_no_training_sample_is_looked_at() -> None:
    trained = lowbit.train(network(), Untouchable(), method="zaq", sample=torch.randn(4, 1, 8, 8), recipe=RECIPE, **FEW)
    again = lowbit.train(network(), None, method="zaq", sample=torch.randn(4, 1, 8, 8), recipe=RECIPE, **FEW)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in trained.state_dict().items())
    ranges = [m for m in trained.modules() if isinstance(m, RunningRangeQuantizer)]
    before = [float(m.upper) for m in ranges]
    trained(100 * torch.randn(4, 1, 8, 8))
    assert [float(m.upper) for m in ranges] == before and all(value > 0 for value in before)


def test_only_the_shape_is_taken_from_data() -> None:
    images, labels = torch.rand(16, 1, 8, 8), torch.arange(16) % 4
    trained, other = (
        lowbit.train(network(), (factor * images, labels), method="zaq", recipe=RECIPE, **FEW).state_dict() for factor in (1.0, 100.0)
    )
    assert all(torch.equal(value, other[name]) for name, value in trained.items())


def test_the_trained_network_is_exported_as_it_computes(tmp_path: Path) -> None:
    trained = lowbit.train(network(), None, method="zaq", sample=torch.randn(4, 1, 8, 8), recipe=RECIPE, merge_bits=8, **FEW)
    x = torch.randn(5, 1, 8, 8)
    lowbit.export(trained, tmp_path / "net.lowbit", sample=x)
    torch.testing.assert_close(lowbit.load(tmp_path / "net.lowbit")(x), trained(x), rtol=1e-4, atol=1e-4)


def test_in_ones_own_loop_batches_say_how_many_samples() -> None:
    float_network = network()
    model = lowbit.prepare(float_network, method="zaq", sample=torch.randn(4, 1, 8, 8), **FEW).train()
    run = lowbit.training(model, steps_per_epoch=2, epochs=1, float_network=float_network)
    optimizer = torch.optim.SGD(run.parameter_groups(learning_rate=0.01), lr=0.01)
    start = copy.deepcopy(run.networks["generator"].state_dict())
    for _ in range(run.total_steps):
        for _ in run.phase.turns:
            run.before_step(optimizer)
            run.loss(torch.empty(8, 0)).backward()
            run.after_backward()
            optimizer.step()
            run.after_step()
    assert run.progress == 1.0
    assert any(not torch.equal(value, start[name]) for name, value in run.networks["generator"].state_dict().items())


def test_networks_of_other_inputs_are_refused() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.linear(x + y)

    with pytest.raises(SpecError, match=r"this one takes float32 \[4, 3\], float32 \[4, 3\]\. Choose a method that is trained on data"):
        lowbit.prepare(Sum(), method="zaq", sample=(torch.zeros(4, 3), torch.zeros(4, 3)))
    words = nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(6, 2))
    with pytest.raises(SpecError, match=r"takes int64 \[4, 2\]"):
        lowbit.prepare(words, method="zaq", sample=torch.zeros(4, 2, dtype=torch.int64))


def test_other_mistakes_are_named() -> None:
    sample = torch.randn(4, 1, 8, 8)
    with pytest.raises(DataError, match="nothing says in which shape: pass sample="):
        lowbit.train(network(), None, method="zaq")
    with pytest.raises(DataError, match=r"'lsq' is trained on data, and there are none.*zaq"):
        lowbit.train(network(), None, method="lsq")
    with pytest.raises(LowbitError, match="float_network="):
        model = lowbit.prepare(network(), method="zaq", sample=sample)
        lowbit.training(model, steps_per_epoch=1, epochs=1)
    with pytest.raises(LowbitError, match=r"unknown module in taps 'relu'"):
        lowbit.prepare(network(), method="zaq", sample=sample, taps=("relu",))
    other = copy.deepcopy(network())
    other[3], other[4] = nn.Conv2d(6, 7, 3, 2, 1), nn.BatchNorm2d(7)
    other[8] = nn.Linear(7, 4)
    with pytest.raises(SpecError, match=r"has the shape \[8, 4, 4\] in the network and \[7, 4, 4\] in its teacher"):
        run_of(network(), teacher=other)


def test_a_network_without_a_dataflow_needs_named_features() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x if float(x.sum()) > -1e9 else -x)

    sample = torch.randn(4, 1, 8, 8)
    with pytest.raises(GraphError, match="name modules with taps= instead"):
        lowbit.prepare(Branching(), method="zaq", sample=sample)
    model = lowbit.prepare(Branching(), method="zaq", sample=sample, taps=("inner.2", "inner.5"), **FEW).train()
    run = TrainRun(model, method_of(model), Classification(), RECIPE, 3, given=GivenNetworks(float_network=Branching()))
    run.start_phase()
    assert bool(torch.isfinite(turn(run)))


@pytest.mark.slow
def test_it_recovers_the_float_accuracy_without_data() -> None:
    """Within 3 points of float at 4 bits of weights and 8 of activations."""
    test = load_data("digits", split="test")
    float_network = load_default()
    recipe = Recipe(6, 64, OptimizerSpec(nesterov=False, weight_decay=5e-4))
    trained = lowbit.train(
        float_network, None, method="zaq", activation_bits=8, sample=torch.randn(8, 1, 8, 8), recipe=recipe, width=32, rounds=20,
        policy=lowbit.BitPolicy.uniform(4, 8, first_last=None),
    )  # fmt: skip
    assert lowbit.evaluate(trained, test)["accuracy"] > lowbit.evaluate(float_network, test)["accuracy"] - 0.03
