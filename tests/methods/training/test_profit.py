"""PROFIT: its quantizers by hand, negative padding, and what is trained and frozen in which phase."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.qat.recording import BATCHES, network
from tests.qat.training import RECIPE, assert_same, data, killed, network as conv_network, state, train
from torch import nn

import lowbit
from lowbit.errors import LowbitError
from lowbit.files import read_tensors
from lowbit.methods.training.profit import (
    LOWEST_HSWISH,
    METRIC,
    ROUNDS,
    SAMPLING,
    DuqActivation,
    DuqQuantizer,
    Profit,
    freezing_groups,
)
from lowbit.network import insert
from lowbit.network.bits import get_bits
from lowbit.network.record import record_of
from lowbit.qat import Classification, GivenNetworks, OptimizerSpec, Recipe, TrainRun
from lowbit.quantizers import Quantizer
from lowbit.spec import BitPolicy, LayerBits

SHORT: dict[str, Any] = {"float_length": 0, "norm_length": 0, "last_norm_length": 0, "sample_length": 15}


def at(quantizer: DuqQuantizer, clip_range: float, scale: float) -> DuqQuantizer:
    with torch.no_grad():
        quantizer.get_parameter("raw_range").fill_(math.log(math.expm1(clip_range)))
        quantizer.get_parameter("raw_scale").fill_(math.log(math.expm1(scale)))
    return quantizer.train()


def test_weights_are_clipped_at_the_range_and_stand_for_the_scale() -> None:
    quantizer = at(DuqQuantizer(3, signed=True), 1.5, 0.6)
    x = torch.tensor([-9.0, -1.5, -0.6, -0.2, 0.0, 0.3, 1.1, 2.0], requires_grad=True)
    y = quantizer(x)
    torch.testing.assert_close(y.detach(), torch.tensor([-3.0, -3, -1, 0, 0, 1, 2, 3]) * 0.2)
    y.sum().backward()
    assert x.grad is not None  # nothing at the end of the clip and beyond; 0.6 / 1.5 inside
    assert x.grad.tolist() == pytest.approx([0, 0, 0.4, 0.4, 0.4, 0.4, 0.4, 0])
    # dy/dA = -C u / A inside, u = x / A; times the derivative of softplus
    expected = -sum(0.6 * u / 1.5 for u in (-0.4, -0.2 / 1.5, 0, 0.2, 1.1 / 1.5)) * (1 - math.exp(-1.5))
    assert quantizer.get_parameter("raw_range").grad.item() == pytest.approx(expected, rel=1e-4)  # type: ignore[union-attr]
    assert quantizer.get_parameter("raw_scale").grad.item() == pytest.approx(sum([-3, -3, -1, 0, 0, 1, 2, 3]) / 3 * (1 - math.exp(-0.6)), rel=1e-4)  # type: ignore[union-attr]  # fmt: skip


@pytest.mark.parametrize(("bits", "levels"), [(2, 3), (3, 7), (4, 15), (8, 255)])
def test_weights_have_an_exact_zero_and_one_level_less_than_codes(bits: int, levels: int) -> None:
    found = at(DuqQuantizer(bits, signed=True), 1.0, 0.7)(torch.linspace(-2, 2, 5001)).unique()
    assert len(found) == levels and 0 in found
    assert len(at(DuqQuantizer(bits, signed=False), 1.0, 0.7)(torch.linspace(-1, 2, 5001)).unique()) == 2**bits


def test_an_input_at_the_lower_end_gets_no_gradient() -> None:
    x = torch.tensor([-0.1, 0.0, 0.1], requires_grad=True)
    at(DuqQuantizer(4, signed=False), 1.0, 1.0)(x).sum().backward()
    assert x.grad is not None and x.grad.tolist() == pytest.approx([0, 0, 1])


def test_behind_h_swish_the_lowest_code_is_its_lowest_value() -> None:
    quantizer = at(DuqActivation(4, signed=False, low=LOWEST_HSWISH), 2.0, 1.5)
    x = nn.functional.hardswish(torch.linspace(-6, 6, 400))
    y = quantizer(x)
    assert y.min().item() == pytest.approx(-3 / 8, abs=1e-7) and y.max().item() == pytest.approx(1.5 - 3 / 8)
    assert quantizer.encode(torch.tensor([-3 / 8, -1.0, 9.0])).codes.tolist() == [0, 0, 15]
    torch.testing.assert_close(quantizer.eval()(x), quantizer.encode(x).decode(), rtol=0, atol=0)


def test_with_equal_range_and_scale_and_many_levels_it_is_the_identity_on_the_range() -> None:
    x = torch.linspace(-0.99, 0.99, 101)
    torch.testing.assert_close(at(DuqQuantizer(8, signed=True), 1.0, 1.0)(x), x, rtol=0, atol=0.5 / 127 + 1e-6)


def test_range_and_scale_start_from_the_largest_weight_and_from_most_of_the_positive_activations() -> None:
    weights, activations = DuqQuantizer(4, signed=True), DuqActivation(4, signed=True)
    weights.initialize(torch.tensor([0.5, -2.0, 1.0]))
    assert weights.clip_range.item() == pytest.approx(1.8) and weights.output_scale.item() == pytest.approx(1.8)
    activations.initialize(torch.cat([torch.arange(1.0, 101), -torch.arange(500.0)]))
    assert activations.clip_range.item() == pytest.approx(96)  # p[95]
    magnitudes = DuqActivation(4, signed=True, start="magnitude")
    magnitudes.initialize(-torch.arange(1.0, 101))
    assert magnitudes.clip_range.item() == pytest.approx(96)
    behind = DuqActivation(4, signed=False, low=LOWEST_HSWISH, start="magnitude")
    behind.initialize(torch.full((20,), 1.0))
    assert behind.clip_range.item() == pytest.approx(1.375)
    for quantizer in (weights, activations):
        quantizer.initialize(torch.zeros(7))
        assert quantizer.clip_range.item() == pytest.approx(1e-3)


def test_fewer_bits_keep_range_and_scale() -> None:
    quantizer = at(DuqQuantizer(8, signed=True), 1.5, 0.6)
    quantizer.forget_grid_for(3)
    quantizer.set_bit_width(3)
    assert quantizer.clip_range.item() == pytest.approx(1.5) and quantizer.qmax == 3


class Mobile(nn.Module):
    """A depthwise convolution behind h-swish as a module, one behind it as a function, and one behind ReLU."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.norm = nn.Conv2d(2, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.swish = nn.Hardswish()
        self.first, self.norm1 = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8)
        self.second, self.norm2 = nn.Conv2d(8, 8, (1, 3), padding="same", groups=8, bias=False), nn.BatchNorm2d(8)
        self.third, self.relu, self.head = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.ReLU(), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(self.swish(self.norm(self.stem(x))))
        x = self.second(nn.functional.hardswish(self.norm1(x)))
        return self.head(self.third(self.relu(self.norm2(x))).mean((2, 3)))


def test_convolutions_behind_h_swish_pad_with_its_lowest_value_and_others_with_zero(tmp_path: Path) -> None:
    x = data().tensors[0][:8]
    model = lowbit.prepare(Mobile(), method="profit", weight_bits=4, activation_bits=4, sample=x).eval()
    assert model.lowbit_method.base.behind_hardswish == ["first", "second"]  # type: ignore[union-attr]
    assert (model.first.padding, model.second.padding, model.third.padding) == ((0, 0), (0, 0), (1, 1))
    with torch.no_grad():
        swish = nn.functional.hardswish(model.norm(model.stem(x)))
        y = model.first.input_quantizer(swish)  # type: ignore[operator, union-attr]
        padded = nn.functional.pad(y, (1, 1, 1, 1), value=-0.375)
        torch.testing.assert_close(model.first(swish), nn.functional.conv2d(padded, model.first.weight, groups=8))
    assert float(y.detach().min()) >= -0.375 - 1e-6 and len(y.unique()) <= 16
    lowbit.export(model, tmp_path / "model.lowbit", sample=x)
    torch.testing.assert_close(lowbit.load(tmp_path / "model.lowbit")(x), model(x), rtol=1e-4, atol=1e-5)
    zeros = lowbit.prepare(Mobile(), method="profit", negative_padding=False, sample=x)
    assert zeros.first.padding == (1, 1) and not hasattr(zeros.first, "input_padding")


def test_thirds_of_the_layers_are_frozen_by_their_metric() -> None:
    metric = {"a": 0.2, "b": 0.9, "c": 0.5, "d": 0.7, "e": 0.1, "f": 0.3, "g": 0.8}
    assert freezing_groups(metric) == (["b", "g"], ["d", "c"])
    assert freezing_groups({"a": 1.0, "b": 2.0}) == ([], ["b"])
    assert freezing_groups({"a": 1.0}) == ([], []) == freezing_groups({})


def prepared(weight_bits: int | None = 4, activation_bits: int | None = 4, **asked: Any) -> nn.Module:
    policy = BitPolicy.uniform(weight_bits, activation_bits, first_last=None)
    return lowbit.prepare(conv_network(), policy=policy, sample=data().tensors[0][:16], **{"method": "profit", **asked}).train()


BATCH = [(data().tensors[0][i : i + 16], data().tensors[1][i : i + 16]) for i in (0, 16, 32)]


def run_of(model: nn.Module, epochs: int, learning_rate: float = 0.05, teacher: nn.Module | None = None) -> TrainRun:
    recipe = Recipe(epochs, optimizer=OptimizerSpec(learning_rate=learning_rate))
    given = GivenNetworks(teacher, conv_network())
    return TrainRun(model, model.lowbit_method, Classification(), recipe, len(BATCH), given=given)  # type: ignore[arg-type]


def steps(run: TrainRun, each: Any = None) -> None:
    for _ in run.each_epoch():
        if each is not None:
            each()
        for batch in BATCH:
            run.before_step()
            for loss in run.losses(batch):
                loss.backward()
            run.after_backward()
            run.optimizer_step()
            run.after_step()


def test_activations_come_down_before_weights_and_norms_learn_alone_in_between() -> None:
    run, seen = run_of(prepared(), 200), {}

    for index in range(len(run.phases)):
        run.phase_index = index
        run.start_phase()
        (bits,) = set(get_bits(run.model).values())
        roles = {role for role in ("weights", "others.norms", "others.biases", "quantizers") if run.phase.key(role) is not None}
        seen[run.phase.name] = (bits.weight, bits.activation, "weights" in roles)
        assert roles >= {"others.norms", "others.biases", "quantizers"}
    assert seen == {
        "float": (None, None, True),
        "activations at 8 bits, norms": (None, 8, False), "activations at 8 bits": (None, 8, True),
        "activations at 8 bits, settling norms": (None, 8, False),
        "activations at 5 bits, norms": (None, 5, False), "activations at 5 bits": (None, 5, True),
        "activations at 5 bits, settling norms": (None, 5, False),
        "activations, norms": (None, 4, False), "activations": (None, 4, True), "activations, settling norms": (None, 4, False),
        "weights at 8 bits, norms": (8, 4, False), "weights at 8 bits": (8, 4, True), "weights at 8 bits, settling norms": (8, 4, False),
        "weights at 5 bits, norms": (5, 4, False), "weights at 5 bits": (5, 4, True), "weights at 5 bits, settling norms": (5, 4, False),
        "weights, norms": (4, 4, False), SAMPLING: (4, 4, True),
        "all layers": (4, 4, True), "stable two thirds": (4, 4, True), "stable third": (4, 4, True),
        "weights, settling norms": (4, 4, False),
    }  # fmt: skip
    last = [phase for phase in run.phases if seen[phase.name][:2] == (4, 4)]
    assert sum(phase.epochs for phase in last) == pytest.approx(100, abs=2) and run.epochs == 200


def test_rates_follow_the_papers_schedule() -> None:
    recipe = replace(Profit().default_recipe(), epochs=200)
    phases = {phase.name: phase for phase in Profit().phases(recipe)}
    tuned, norms, sampled = (phases[name].optimizers for name in ("activations", "activations, norms", SAMPLING))
    assert tuned["weights"].rate_at(0) == pytest.approx(0.0005) and tuned["weights"].rate_at(0.2) == pytest.approx(0.005)
    assert tuned["weights"].rate_at(1) == pytest.approx(5e-6)
    assert norms["others.norms"].rate_at(0) == pytest.approx(0.005) and set(norms) == {"others.norms", "others.biases", "quantizers"}
    assert {sampled["weights"].rate_at(f) for f in (0.0, 0.1, 0.5, 1.0)} == {0.005}
    assert tuned["quantizers"].learning_rate == pytest.approx(5e-5)
    assert [tuned[role].weight_decay for role in ("weights", "others.norms", "others.biases", "quantizers")] == [4e-5, 0, 0, 0]


def test_frozen_layers_keep_their_weights_while_quantizers_and_norms_learn() -> None:
    model = prepared(2, 3, progressive=False, **SHORT)
    run, at_start = run_of(model, 20, 1.0), {}

    def note() -> None:
        at_start.setdefault(run.phase.name, {name: value.detach().clone() for name, value in model.named_parameters()})

    steps(run, note)
    assert [name for name in at_start if name in (SAMPLING, *ROUNDS)] == [SAMPLING, *ROUNDS]
    method = model.lowbit_method
    assert isinstance(method, Profit) and set(method.meter.metric) == {"0", "3", "5"}
    assert all(0 < value < 1 for value in method.meter.metric.values())
    record = record_of(model)
    assert record is not None and record.measured[METRIC] == method.meter.metric
    (first,), (second,) = freezing_groups(method.meter.metric)
    changed = {
        phase: {name for name in values if not torch.equal(values[name], after[name])}
        for (phase, values), after in zip(at_start.items(), [*list(at_start.values())[1:], dict(model.named_parameters())], strict=True)
    }
    weight = "{}.parametrizations.weight.original".format
    assert {weight(first), weight(second)} <= changed[ROUNDS[0]]
    assert weight(first) not in changed[ROUNDS[1]] and weight(second) in changed[ROUNDS[1]]
    assert not {weight(first), weight(second)} & changed[ROUNDS[2]] and weight("9") in changed[ROUNDS[2]]
    for name in (first, second):
        assert f"{name}.parametrizations.weight.0.quantizer.raw_scale" in changed[ROUNDS[2]]
    assert {"1.weight", "1.bias"} <= changed[ROUNDS[2]]


def test_the_teacher_learns_nothing_but_its_norms_statistics() -> None:
    run = run_of(prepared(progressive=False), 6)
    teacher = run.networks["teacher"]
    steps(run)
    before = conv_network().state_dict()
    after = teacher.state_dict()
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        "1.running_mean",
        "1.running_var",
        "1.num_batches_tracked",
    }
    assert "teacher" not in run_of(prepared(kd_weight=0), 6).networks


def test_the_distance_to_the_teacher_counts_as_the_task_does() -> None:
    found, teacher = {}, conv_network()
    with torch.no_grad():
        teacher.get_parameter("9.weight").mul_(50)
    for weight in (1.0, 2.0, 3.0):
        run = run_of(prepared(progressive=False, kd_weight=weight), 1, teacher=teacher)
        run.start_phase()
        (found[weight],) = (loss.item() for loss in run.losses(BATCH[0]))
    assert found[2.0] > found[1.0]
    assert found[3.0] - found[2.0] == pytest.approx(found[2.0] - found[1.0], rel=1e-4)


def test_weights_start_again_from_what_was_learned_before_they_are_quantized() -> None:
    model = prepared(progressive=False, freezing=False, **SHORT)
    run, seen = run_of(model, 12, 0.5), []
    steps(run, lambda: seen.append((run.phase.name, _range(model[3]), insert.float_weight(model[3]).abs().max().item())))
    (_, before, _), *_ = seen
    name, after, largest = next(entry for entry in seen if entry[0] == "weights")
    assert after == pytest.approx(0.9 * largest, rel=1e-4) and after != pytest.approx(before, rel=1e-4), name


def _range(layer: nn.Module) -> float:
    quantizer = insert.weight_quantizer(layer)
    assert isinstance(quantizer, DuqQuantizer)
    return quantizer.clip_range.item()


@pytest.mark.parametrize(
    ("method", "bits", "options"),
    [
        ("lq_nets", (2, 3), {"widths": (4, 3)}),
        ("lsq", (3, 3), {}),
        ("dsq", (2, 3), {}),
        ("twn", (2, None), {"progressive": False}),
    ],
)
def test_quantizers_of_other_methods_go_through_it(method: str, bits: tuple[int, int | None], options: dict[str, Any]) -> None:
    model = prepared(*bits, method=method, procedure="profit", procedure_options={**SHORT, **options})
    before = insert.float_weight(model[3]).detach().clone()
    run = run_of(model, 12)
    steps(run)
    assert set(get_bits(model).values()) == {LayerBits(*bits)}
    assert bool(torch.isfinite(model(BATCH[0][0])).all())
    assert not torch.equal(insert.float_weight(model[3]), before)
    assert isinstance(run.method, Profit) and set(run.method.meter.metric) == {"0", "3", "5"}


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"widths": (5, 8)}, "widths must descend, got 5, 8"),
        ({"widths": (9,)}, "widths must be .*2.*8"),
        ({"tune_length": 0}, "tune_length must be above 0"),
        ({"method": "twn", "activation_bits": None, "weight_bits": 2, "procedure": "profit"}, "lowers weight bits over 8, 5, 2, and TernaryQuantizer has 2 alone"),
        ({"weight_bits": 1}, "weight bits"),
        ({"method": "binary_connect", "weight_bits": 1, "activation_bits": None, "squared_hinge": True, "procedure": "profit"}, "trains on a loss of its own"),
    ],
)  # fmt: skip
def test_what_cannot_work_says_why(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(LowbitError, match=message):
        prepared(**asked)


@pytest.mark.parametrize("method", ["profit", "lsq"])
def test_a_kill_in_any_phase_changes_no_bit_of_network_or_teacher(method: str, tmp_path: Path) -> None:
    options = {"widths": (5,), "norm_length": 7, "last_norm_length": 4, "sample_length": 12}
    asked: dict[str, Any] = {
        "method": method,
        "weight_bits": 3,
        "recipe": replace(RECIPE, epochs=14, average_weights=0.9),
        "save_every": "1",
    }
    asked |= options if method == "profit" else {"procedure": "profit", "procedure_options": options}
    whole = train(out=tmp_path / "whole", **asked)
    phases = [phase.name for phase in Profit(**options).phases(asked["recipe"])]
    assert SAMPLING in phases and {*ROUNDS} <= {*phases} and any("norms" in name for name in phases)
    for index, step in enumerate((3, 14, 24, 34, 41, 43, 47, 52, 58, 63, 68)):
        folder = tmp_path / str(index)
        killed(step, folder, **asked)
        found = train(out=folder, **asked)
        assert_same(found, whole)
        assert record_of(found).measured == record_of(whole).measured != {}  # type: ignore[union-attr]
        one, other = (read_tensors(path / ".work" / "last.safetensors")[0] for path in (tmp_path / "whole", folder))
        teacher = [name for name in one if name.startswith("networks.teacher.")]
        assert len(teacher) == len(conv_network().state_dict())
        assert all(torch.equal(one[name], other[name]) for name in teacher)


def test_nothing_of_teacher_and_metric_is_exported(tmp_path: Path) -> None:
    plain = train(weight_bits=4, method="profit", kd_weight=0, progressive=False, freezing=False)
    full = train(weight_bits=4, method="profit")
    assert state(full).keys() == state(plain).keys()
    assert not any(hook for module in full.modules() if isinstance(module, Quantizer) for hook in module._forward_hooks.values())
    for name, model in (("plain", plain), ("full", full)):
        lowbit.export(model, tmp_path / f"{name}.lowbit", sample=data().tensors[0][:4])
    assert abs((tmp_path / "full.lowbit").stat().st_size - (tmp_path / "plain.lowbit").stat().st_size) < 128


def test_a_linear_network_has_no_metric_and_freezes_nothing() -> None:
    policy = BitPolicy.uniform(4, 4, first_last=None)
    model = lowbit.prepare(network(), method="profit", policy=policy, sample=BATCHES[0][0], **SHORT).train()
    given = GivenNetworks(None, network())
    run = TrainRun(model, model.lowbit_method, Classification(), Recipe(20), len(BATCHES), given=given)  # type: ignore[arg-type]
    for _ in run.each_epoch():
        for batch in BATCHES:
            run.before_step()
            run.loss(batch).backward()
            run.optimizer_step()
            run.after_step()
    assert isinstance(run.method, Profit) and run.method.meter.metric == {} and run.frozen == []
