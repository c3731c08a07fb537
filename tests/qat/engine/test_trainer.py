"""The trainer drives the hooks, the data and the averages as it says, and tells what went wrong."""

from __future__ import annotations

import builtins
import copy
import csv
import json
import random
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.qat.companions import Adversarial, Mutual, method_in_place
from tests.qat.recording import BATCHES, Recorder, recorded
from tests.qat.training import RECIPE, Killing, assert_same, data, network, state, train
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

import lowbit
from lowbit import evaluate
from lowbit.data import load_data
from lowbit.data.augment import Augmentation
from lowbit.data.image_data import ImageData, TensorImages
from lowbit.errors import DataError, DivergedError, MissingExtraError, OutputError, SpecError
from lowbit.files import read_tensors
from lowbit.methods.quantizer_design.lsq import Lsq
from lowbit.models import load_default
from lowbit.progress import Progress
from lowbit.qat import Classification, OptimizerSpec, Phase, Recipe, TrainRun, Turn
from lowbit.qat.engine import trainer as trainer_module
from lowbit.qat.engine.averaging import WeightAverage
from lowbit.qat.engine.batches import DatasetSource, IterableSource, augmentation_for, evaluation_batches, make_source, seeded
from lowbit.qat.engine.checkpoint import Checkpoints
from lowbit.qat.engine.trainer import Trainer
from lowbit.qat.task import Batch
from lowbit.workfolder import LOCK, exclusive_run

INPUTS, LABELS = data().tensors


class InTurn(Mutual):
    """The network and its teacher in turn: two optimizer steps over the same batches."""

    def phases(self, recipe: Recipe) -> list[Phase]:
        phases = super().phases(recipe)
        turns = (Turn("network", ("weights", "quantizers", "others")), Turn("teacher", ("teacher",)))
        return [phases[0], replace(phases[1], turns=turns)]

    def losses(self, run: TrainRun, batch: Batch) -> list[Tensor]:
        output, target = (run.task.predict(model, batch) for model in (run.model, run.networks["teacher"]))
        mine, other = (target, output) if run.turn.name == "teacher" else (output, target)
        return [run.task.loss(mine, batch) + run.task.distillation_loss(mine, other.detach())]


def images(size: int, channels: int = 1) -> ImageData:
    pixels = torch.arange(20 * channels * size * size).reshape(20, channels, size, size) % 251
    mean, std = (0.25,) * channels, (0.5,) * channels
    dataset = TensorImages(pixels.to(torch.uint8), torch.arange(20) % 10, mean, std)
    return ImageData("pixels", dataset, 10, (channels, size, size), mean, std)


# the loop


def test_hooks_are_called_as_a_run_documents_them() -> None:
    model, method = recorded(("first", 1, ("weights", "others")), ("second", 1, ("weights",)), ("last", 0, ("weights",)))
    run = TrainRun(model, method, Classification(), Recipe(epochs=2, batch_size=8), 4)
    inputs, labels = (torch.cat([batch[index] for batch in BATCHES]) for index in (0, 1))
    Trainer().fit(run, make_source((inputs, labels), run.recipe))

    def epoch(first: int) -> list[str]:
        return ["epoch 0", *(call for step in range(first, first + 4) for call in (f"before {step}", "backward", "after"))]

    assert method.calls == ["phase first", *epoch(0), "phase second", *epoch(4), "phase last"]


def test_frozen_roles_stay_as_they_are() -> None:
    model, method = recorded(("only", 1, ("weights",)))
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    run = TrainRun(model, method, Classification(), Recipe(epochs=1, batch_size=8), 4)
    Trainer().fit(run, make_source((torch.cat([b[0] for b in BATCHES]), torch.cat([b[1] for b in BATCHES])), run.recipe))
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert changed == {f"{index}.parametrizations.weight.original" for index in (0, 2, 4)}


def test_training_learns_and_changes_nothing_of_the_callers() -> None:
    model, handler, states = network(), signal.getsignal(signal.SIGTERM), (torch.get_rng_state(), random.getstate())
    before = copy.deepcopy(model)
    trained = train(model, recipe=replace(RECIPE, epochs=40, optimizer=OptimizerSpec("adam", 0.02)))
    assert_same(model, before)
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert signal.getsignal(signal.SIGTERM) is handler
    assert not trained.training
    assert evaluate(trained, DataLoader(data(), 40))["accuracy"] > 0.8
    assert evaluate(model, DataLoader(data(), 40))["accuracy"] < 0.6


def test_the_same_seed_gives_the_same_bits_and_another_one_others() -> None:
    first, second, third = train(), train(), train(recipe=replace(RECIPE, seed=1))
    assert_same(first, second)
    assert any(not torch.equal(a, b) for a, b in zip(state(first).values(), state(third).values(), strict=True))


def test_accumulated_gradients_are_those_of_one_large_batch() -> None:
    whole = train(network(norm=False), recipe=replace(RECIPE, batch_size=30), sample=INPUTS)  # 80 samples: steps of 27, 27 and 26
    parts = train(network(norm=False), recipe=replace(RECIPE, batch_size=10, accumulate=3), sample=INPUTS)
    for name, value in state(whole).items():
        torch.testing.assert_close(state(parts)[name], value, rtol=0, atol=2e-6, msg=name)


def test_a_teacher_is_not_changed_and_stays_in_evaluation_mode_where_it_is_used() -> None:
    teacher = network()
    before = copy.deepcopy(teacher)
    train(teacher=teacher)
    assert_same(teacher, before)  # its norms would have followed the batches
    assert teacher.training and all(parameter.requires_grad for parameter in teacher.parameters())


def test_a_teacher_alone_decides_where_it_is_all_of_the_loss() -> None:
    recipe, teacher = replace(RECIPE, distillation=1.0), network()
    wrong = TensorDataset(INPUTS, (LABELS + 1) % 3)
    assert_same(train(recipe=recipe, teacher=teacher), train(recipe=recipe, teacher=teacher, data=wrong))


def test_clipped_gradients_are_no_longer_than_asked_for() -> None:
    norms: list[float] = []

    class Measuring(Recorder):
        def after_step(self, run: TrainRun) -> None:
            gradients = [p.grad.flatten() for p in run.model.parameters() if p.grad is not None]
            norms.append(float(torch.cat(gradients).norm()))

    for clip_norm in (None, 0.01):
        model, method = recorded(base=Measuring)
        run = TrainRun(model, method, Classification(), Recipe(epochs=1, batch_size=8, clip_norm=clip_norm), 4)
        Trainer().fit(run, make_source((torch.cat([b[0] for b in BATCHES]), torch.cat([b[1] for b in BATCHES])), run.recipe))
    assert min(norms[:4]) > 0.02
    assert all(norm == pytest.approx(0.01, rel=1e-4) for norm in norms[4:])


def test_weights_are_averaged_over_steps_and_the_averages_are_kept() -> None:
    layer = nn.Linear(1, 1, bias=False)
    layer.weight.data.fill_(1.0)
    average = WeightAverage(layer, 0.75)
    for value in (5.0, 3.0):
        layer.weight.data.fill_(value)
        average.update(layer)
    assert average.tensors["weight"].item() == 0.75 * (0.75 * 1 + 0.25 * 5) + 0.25 * 3
    with average.applied(layer):
        assert layer.weight.item() == 2.25
    assert layer.weight.item() == 3.0

    plain, averaged = train(), train(recipe=replace(RECIPE, average_weights=0.9))
    assert not torch.equal(plain[0].weight, averaged[0].weight)  # type: ignore[index]
    assert_same(plain, train(recipe=replace(RECIPE, average_weights=0.0)))


def test_averages_of_a_parameter_that_is_replaced_start_anew_and_go_on_after_loading() -> None:
    layer = nn.Linear(1, 1, bias=False)
    layer.weight.data.fill_(1.0)
    average = WeightAverage(layer, 0.5)
    average.update(layer)
    layer.weight = nn.Parameter(torch.full((1, 1), 5.0))
    average.update(layer)
    assert average.tensors["weight"].item() == 5.0
    layer.weight = nn.Parameter(torch.full((1, 1), 9.0))  # as loading does where a shape differs
    average.resume(layer, {"weight": torch.full((1, 1), 5.0)})
    average.update(layer)
    assert average.tensors["weight"].item() == 7.0


def test_running_statistics_of_norms_are_averaged_too() -> None:
    norm = nn.BatchNorm1d(1)
    average = WeightAverage(norm, 0.75)
    norm(torch.tensor([[2.0], [4.0]]))  # the running mean goes from 0 to 0.3
    average.update(norm)
    with average.applied(norm):
        assert norm.running_mean.item() == pytest.approx(0.25 * 0.3)  # type: ignore[union-attr]
        assert norm.num_batches_tracked == 1
    assert norm.running_mean.item() == pytest.approx(0.3)  # type: ignore[union-attr]


@pytest.mark.parametrize("method", [Mutual, InTurn])
def test_several_passes_over_accumulated_batches_are_those_over_one_large_batch(method: type[Mutual], tmp_path: Path) -> None:
    recipe = replace(RECIPE, optimizer=OptimizerSpec(learning_rate=0.05))
    with method_in_place(method):
        train(network(norm=False), recipe=replace(recipe, batch_size=30), sample=INPUTS, out=tmp_path / "whole")
        train(network(norm=False), recipe=replace(recipe, batch_size=10, accumulate=3), sample=INPUTS, out=tmp_path / "parts")
    whole, parts = (read_tensors(tmp_path / name / ".work" / "last.safetensors")[0] for name in ("whole", "parts"))
    for name in whole:
        if name.startswith(("model.", "networks.")):
            torch.testing.assert_close(parts[name], whole[name], rtol=0, atol=5e-6, msg=name)


@pytest.mark.parametrize("method", [InTurn, Adversarial])
def test_a_gradient_scaler_changes_nothing_but_the_scale(method: type[Lsq], monkeypatch: pytest.MonkeyPatch) -> None:
    with method_in_place(method):
        plain = train(network(norm=False))
        init = trainer_module._Session.__init__

        def with_scaler(session: Any, *arguments: Any) -> None:
            init(session, *arguments)
            session.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

        monkeypatch.setattr(trainer_module._Session, "__init__", with_scaler)
        scaled = train(network(norm=False))
    for name, value in state(plain).items():
        torch.testing.assert_close(state(scaled)[name], value, rtol=0, atol=5e-6, msg=name)


def test_a_companion_that_is_not_finite_is_named() -> None:
    class Exploding(Mutual):
        def after_step(self, run: TrainRun) -> None:
            if run.step == 6:
                run.networks["teacher"][0].weight.data.fill_(torch.nan)  # type: ignore[index, union-attr, operator]

    with (
        method_in_place(Exploding),
        pytest.raises(DivergedError, match=r"step 8: the loss is nan; companion 'teacher': '0\.weight' \(Conv2d\)"),
    ):
        train()


def test_the_metric_is_the_networks_accuracy_on_the_test_data(tmp_path: Path) -> None:
    test = data(50, 5)
    trained = train(out=tmp_path, test_data=test)
    content = json.loads((tmp_path / "train.json").read_text())
    assert content["curve"][-1]["metrics"]["accuracy"] == evaluate(trained, DataLoader(test, 16))["accuracy"]
    assert content["metric"] == "accuracy" and content["is_done"] is True
    assert content["versions"]["torch"] == torch.__version__.partition("+")[0] or content["versions"]["torch"] == torch.__version__
    settings = content["settings"]
    assert (settings["method"], settings["seed"], settings["recipe"]["batch_size"], settings["policy"]["default"]["weight"]) == (
        "lsq",
        0,
        16,
        3,
    )
    rows = list(csv.DictReader((tmp_path / "train.csv").open()))
    assert [int(row["step"]) for row in rows] == [5, 10, 15]
    assert [float(row["loss"]) for row in rows] == [result["loss"] for result in content["curve"]]
    rates = [result["learning_rate"] for result in content["curve"]]
    assert rates[0] == pytest.approx(RECIPE.optimizer.rate_at(4 / 15)) and rates == sorted(rates, reverse=True)


@pytest.mark.parametrize("out", [True, False])
def test_the_best_network_is_given_where_it_is_asked_for(out: bool, tmp_path: Path) -> None:
    test, recipe = data(60, 5), replace(RECIPE, epochs=6, optimizer=OptimizerSpec(learning_rate=0.5))
    train(out=tmp_path / "last", test_data=test, recipe=recipe)
    curve = [result["metrics"]["accuracy"] for result in json.loads((tmp_path / "last" / "train.json").read_text())["curve"]]
    assert max(curve) > curve[-1]  # or the case shows nothing
    best = train(test_data=test, recipe=recipe, select="best", out=tmp_path / "best" if out else None)
    assert evaluate(best, DataLoader(test, 60))["accuracy"] == max(curve)


def test_mixed_precision_trains_float32_weights() -> None:
    plain, mixed = train(), train(precision="bf16")
    assert all(value.dtype == state(plain)[name].dtype for name, value in state(mixed).items())
    assert not torch.equal(plain[0].weight, mixed[0].weight)  # type: ignore[index]
    with torch.no_grad():
        agreement = (plain(INPUTS).argmax(1) == mixed(INPUTS).argmax(1)).float().mean()
    assert agreement > 0.8


def test_progress_goes_over_the_whole_run_with_loss_metric_and_speed(tmp_path: Path) -> None:
    class Watching(Progress):
        def __init__(self) -> None:
            super().__init__(quiet=True)
            self.notes: list[str] = []
            self.stages: list[tuple[str, float, int]] = []

        def stage(self, name: str, total: float, *, done: int = 0) -> Any:
            self.stages.append((name, total, done))
            context = super().stage(name, total, done=done)
            entered = context.__enter__()
            advance = entered.advance
            entered.advance = lambda amount=1, note="": (self.notes.append(note), advance(amount, note))  # type: ignore[method-assign, assignment]
            context.__enter__ = lambda: entered  # type: ignore[method-assign]
            return type("Context", (), {"__enter__": lambda _: entered, "__exit__": lambda *_: None})()

    watching = Watching()
    train(progress=watching, test_data=data(20, 5), out=tmp_path)
    assert watching.stages == [("train", 15, 0)]
    assert len(watching.notes) == 15
    assert watching.notes[0].startswith("epoch 1/3, loss ") and watching.notes[0].endswith(" samples/s")
    assert "accuracy" not in watching.notes[0] and "accuracy" in watching.notes[5] and watching.notes[5].startswith("epoch 2/3")


# what goes wrong


def test_a_loss_that_is_not_finite_names_the_step_and_the_layer_and_keeps_the_last_good_state(tmp_path: Path) -> None:
    class Exploding(nn.Module):
        """Gives NaN from the eighth batch of training on."""

        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += self.training
            return x * torch.nan if self.calls > 8 else x

    model = nn.Sequential(*network()[:2], Exploding(), *network()[3:])
    with pytest.raises(
        DivergedError, match=r"diverged at step 8: the loss is nan; .*output is not finite is '2' \(Exploding\).*last\.safetensors"
    ):
        train(model, out=tmp_path)  # the quantizers were initialized in the first of the eight
    tensors, facts = read_tensors(tmp_path / ".work" / "last.safetensors")
    assert facts["position"]["step"] == 5  # type: ignore[index]
    assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values() if tensor.is_floating_point())


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    class Spoiling(Recorder):
        def after_step(self, run: TrainRun) -> None:
            if run.step == 2:
                run.model[2].bias.data.fill_(torch.inf)  # type: ignore[index]

    model, method = recorded(base=Spoiling)
    run = TrainRun(model, method, Classification(), Recipe(epochs=1, batch_size=8), 4)
    source = make_source((torch.cat([b[0] for b in BATCHES]), torch.cat([b[1] for b in BATCHES])), run.recipe)
    with pytest.raises(DivergedError, match=r"before step 4: '2\.bias' \(Linear\) holds NaN or infinity"):
        Trainer(save_every="1").fit(run, source, checkpoints=Checkpoints(tmp_path))
    assert read_tensors(tmp_path / "last.safetensors")[1]["position"]["step"] == 2  # type: ignore[index]


def test_a_gradient_that_is_not_finite_is_found_before_it_reaches_the_weights(tmp_path: Path) -> None:
    class Root(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x - x.detach()).abs().sqrt() + x  # 0 forward, NaN backward

    with pytest.raises(DivergedError, match=r"step 1: a gradient is not finite; the gradient of the parameter '1\.bias' \(BatchNorm2d\)"):
        train(nn.Sequential(*network()[:2], Root(), *network()[2:]))


def test_inputs_that_are_not_finite_are_blamed_on_the_data() -> None:
    inputs = INPUTS.clone()
    inputs[5] = torch.nan
    with pytest.raises(DivergedError, match="the inputs of the batch hold NaN"):
        train(data=(inputs, LABELS), sample=INPUTS)


def test_a_learning_rate_that_is_far_too_high_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(DivergedError, match="lower learning rate"):
        train(recipe=replace(RECIPE, epochs=20, optimizer=OptimizerSpec(learning_rate=1e25)))


@pytest.mark.parametrize("wrong", [3, 99, -1])
@pytest.mark.parametrize("make", [lambda x, y: (x, y), TensorDataset, lambda x, y: DataLoader(TensorDataset(x, y), 8, sampler=range(80))])
def test_labels_beyond_the_outputs_are_refused(make: Any, wrong: int) -> None:
    labels = LABELS.clone()
    labels[70] = wrong
    with pytest.raises(DataError, match=f"label {wrong}, but the network has 3 outputs"):
        train(data=make(INPUTS, labels))
    with pytest.raises(DataError, match=f"label {wrong}, but the network has 3 outputs"):
        train(test_data=make(INPUTS, labels))


def test_numbers_out_of_range_are_refused_before_anything_is_done(tmp_path: Path) -> None:
    for field, value in (("epochs", 0), ("batch_size", 0), ("accumulate", 0), ("average_weights", 1.0),
                         ("distillation", 1.5), ("clip_norm", -1.0)):  # fmt: skip
        with pytest.raises(SpecError, match=field):
            train(recipe=replace(RECIPE, **{field: value}), out=tmp_path / "out")
    for name, value in (("precision", "8"), ("select", "first"), ("devices", 0), ("save_every", "x"), ("augment", "cut"), ("device", "no")):
        with pytest.raises(SpecError, match=name if name != "device" else "no"):
            train(out=tmp_path / "out", **{name: value})
    with pytest.raises(SpecError, match="fp16 needs a GPU"):
        train(precision="fp16", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_error_at_the_start_leaves_no_state_behind(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        train(data=(INPUTS, LABELS + 5), out=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_without_fabric_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    load = builtins.__import__

    def without(name: str, *arguments: Any) -> Any:
        if name.startswith("lightning_fabric"):
            raise ImportError(name)
        return load(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtraError, match=r"pip install .*\[train\]"):
        train()


# one run in a folder


def test_two_runs_in_one_folder_are_refused_and_one_behind_the_other_is_not(tmp_path: Path) -> None:
    with exclusive_run(tmp_path):
        with pytest.raises(OutputError, match=f"{tmp_path}: another run is working in this folder"):
            train(out=tmp_path)
        with pytest.raises(OutputError, match="is working"), exclusive_run(tmp_path):
            pass
        assert (tmp_path / LOCK).exists()
    assert not (tmp_path / LOCK).exists()
    train(out=tmp_path)
    assert not (tmp_path / LOCK).exists()


@pytest.mark.parametrize("left", ["", "half a fi", '{"pid": 1, "started": null, "host": "elsewhere"}'])
def test_a_lock_file_that_nobody_holds_is_taken_over(left: str, tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text(left)
    train(out=tmp_path)
    assert not (tmp_path / LOCK).exists()


# the data


def test_an_epoch_has_every_sample_once_in_batches_of_nearly_equal_size() -> None:
    numbers = torch.arange(47)
    source = make_source((numbers.float().unsqueeze(1), numbers), Recipe(batch_size=10, seed=4))
    first, second = ([batch for batch, _ in source.epoch(index)] for index in (0, 1))
    assert [len(y) for _, y in first] == [10, 10, 9, 9, 9] and source.steps == 5
    orders = [torch.cat([y for _, y in epoch]) for epoch in (first, second)]
    assert all(order.sort().values.equal(numbers) for order in orders)
    assert not orders[0].equal(orders[1]) and not orders[0].equal(numbers)
    again = make_source((numbers.float().unsqueeze(1), numbers), Recipe(batch_size=10, seed=4))
    assert torch.cat([y for (_, y), _ in again.epoch(1, start=2)]).equal(torch.cat([y for _, y in second[2:]]))


def test_processes_share_the_batches_of_one_process_with_a_larger_batch() -> None:
    numbers = torch.arange(50)

    def batches(rank: int, processes: int, **changes: Any) -> list[tuple[list[int], float]]:
        source = make_source((numbers, numbers), Recipe(**changes), rank=rank, processes=processes)
        return [(y.tolist(), weight) for (_, y), weight in source.epoch(3)]

    whole = batches(0, 1, batch_size=16)
    ranks = [batches(rank, 2, batch_size=8) for rank in (0, 1)]
    assert [len(y) for y, _ in whole] == [13, 13, 12, 12]
    for (members, weight), *parts in zip(whole, *ranks, strict=True):
        assert weight == 1 and [*parts[0][0], *parts[1][0]] == members
        assert [w for _, w in parts] == [len(y) * 2 / len(members) for y, _ in parts]
    accumulated = batches(0, 1, batch_size=8, accumulate=2)
    assert accumulated == [part for parts in zip(*ranks, strict=True) for part in parts]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_data_set_of_samples_is_collated_and_fetched_by_workers(workers: int) -> None:
    dataset = TensorDataset(torch.arange(12.0).unsqueeze(1), torch.arange(12))
    plain = make_source((dataset.tensors[0], dataset.tensors[1]), Recipe(batch_size=4))
    fetched = make_source(dataset, Recipe(batch_size=4), workers=workers)
    for ((x, y), _), ((u, v), _) in zip(plain.epoch(0), fetched.epoch(0), strict=True):
        assert torch.equal(x, u) and torch.equal(y, v)


def test_a_loaders_data_set_is_taken_unless_it_has_an_order_of_its_own() -> None:
    dataset = data(20, 2)
    taken = make_source(DataLoader(dataset, 5, shuffle=True), Recipe(batch_size=10))
    assert isinstance(taken, DatasetSource) and taken.steps == 2
    kept = make_source(DataLoader(dataset, 5, sampler=WeightedRandomSampler([1.0] * 20, 20)), Recipe(batch_size=10))
    assert isinstance(kept, IterableSource) and kept.steps == 4
    batches = [(torch.full((2, 1), float(i)), torch.tensor([i, i])) for i in range(5)]
    given = make_source(batches, Recipe(accumulate=2))
    assert given.steps == 2
    assert [int(y[0]) for (_, y), _ in given.epoch(0, start=1)] == [2, 3]


def test_a_loaders_batch_size_counts_where_there_is_no_recipe(tmp_path: Path) -> None:
    train(data=DataLoader(data(), 20), recipe=None, out=tmp_path)
    assert json.loads((tmp_path / "train.json").read_text())["curve"][0]["step"] == 4


def test_data_of_other_kinds_are_refused() -> None:
    unlabelled = replace(images(8), num_classes=None)
    for wrong, error, told in (
        (5, SpecError, "got int"),
        (iter([]), SpecError, "can be run through only once"),
        (unlabelled, DataError, "no labels"),
        ((INPUTS, LABELS[:3]), DataError, "equally many samples, got 80, 3"),
        (TensorDataset(INPUTS[:2], LABELS[:2]), DataError, "2 training samples cannot be divided into 3"),
    ):
        with pytest.raises(error, match=told):
            make_source(wrong, Recipe(accumulate=3))
    with pytest.raises(SpecError, match="cannot be divided among processes"):
        make_source([1, 2, 3], Recipe(), processes=2)


def test_only_pictures_of_28_pixels_and_more_are_augmented_by_themselves() -> None:
    assert augmentation_for("auto", images(8)) is None
    assert augmentation_for("auto", images(28, 3)) == Augmentation(3, True, (-0.5, -0.5, -0.5))
    assert augmentation_for("none", images(28)) is None
    assert augmentation_for("crop", images(8)) == Augmentation(1, False, (-0.5,))
    assert augmentation_for("auto", data()) is None
    with pytest.raises(SpecError, match="works on pictures"):
        augmentation_for("crop", data())


def test_augmentation_shifts_in_black_and_depends_on_seed_epoch_and_step_alone() -> None:
    pictures = images(28)
    black = -0.5
    source = make_source(pictures, Recipe(batch_size=10))
    (x, y), _ = next(source.epoch(0))
    plain = pictures.dataset.normalized(pictures.dataset.images[[int(i) for i in _order(source)[:10]]])  # type: ignore[attr-defined]
    assert x.shape == plain.shape and not torch.equal(x, plain)
    assert bool((x == black).all(dim=3).any() or (x == black).all(dim=2).any())  # a row or a column came in from outside
    later = [batch for batch, _ in source.epoch(0)][1]
    resumed, _ = next(make_source(pictures, Recipe(batch_size=10)).epoch(0, start=1))
    assert torch.equal(later[0], resumed[0]) and torch.equal(later[1], resumed[1])
    assert not torch.equal(next(source.epoch(1))[0][0], x)
    assert torch.equal(next(iter(source.first(1)))[0], next(iter(make_source(pictures, Recipe(batch_size=10), augment="none").first(1)))[0])
    assert len(y) == 10


def _order(source: Any) -> Tensor:
    return torch.randperm(20, generator=seeded(0, 0)).tensor_split(source.steps)[0]


def test_test_batches_are_in_order_and_can_be_run_through_again() -> None:
    for given in (images(8), (INPUTS, LABELS), data(), DataLoader(data(), 30)):
        batches = evaluation_batches(given, 30)
        first, second = (torch.cat([y for _, y in batches]) for _ in range(2))
        assert torch.equal(first, second)
        if not isinstance(given, ImageData):
            assert torch.equal(first, LABELS)


def test_tensorboard_gets_the_curve(tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with pytest.raises(BaseException):  # noqa: B017 - killed
        train(out=tmp_path, tensorboard=True, test_data=data(20, 5), progress=Killing(11), save_every="9")
    train(out=tmp_path, tensorboard=True, test_data=data(20, 5), save_every="9")
    curve = json.loads((tmp_path / "train.json").read_text())["curve"]
    found = events.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(point.step, round(point.value, 5)) for point in found.Scalars("epoch/accuracy")] == [
        (result["step"], round(result["metrics"]["accuracy"], 5)) for result in curve
    ]
    assert [point.step for point in found.Scalars("loss")] == [1, 10]


def test_the_embedded_network_keeps_its_accuracy_at_two_bits() -> None:
    recipe = Recipe(epochs=3, batch_size=64)
    trained = lowbit.train(load_default(), load_data("digits"), weight_bits=2, activation_bits=2, recipe=recipe)
    assert evaluate(trained, evaluation_batches(load_data("digits", split="test"), 200))["accuracy"] > 0.96
