"""A stopped training goes on to the same bits; nothing that was saved is lost."""

from __future__ import annotations

import inspect
import json
import os
import signal
import threading
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from tests.qat.companions import Adversarial, Mutual, method_in_place
from tests.qat.training import RECIPE, Killed, Killing, assert_same, data, killed, network, state, train
from torch import nn

import lowbit.files
from lowbit.errors import FileFormatError, OutputError, SpecError, StateError
from lowbit.files import read_tensors
from lowbit.methods.quantizer_design.lsq import Lsq
from lowbit.network import insert
from lowbit.qat import OptimizerSpec, Phase, Recipe, TrainRun
from lowbit.qat.engine.snapshot import Restoration, Snapshot
from lowbit.qat.engine.stopping import SaveEvery, Terminated
from lowbit.quantizers import LearnedScaleQuantizer
from lowbit.registry import MethodInfo, list_methods
from lowbit.spec import Granularity

METHODS = list_methods(kind="training")


def bits_of(info: MethodInfo) -> dict[str, int | None]:
    """Few bits that the method supports."""
    weights, activations = info.weight_bits, info.activation_bits
    return {"weight_bits": weights[min(1, len(weights) - 1)], "activation_bits": None if activations is None else activations[0]}


@pytest.mark.parametrize("info", METHODS, ids=lambda info: info.name)
def test_every_method_goes_on_to_the_same_bits_after_a_kill(info: MethodInfo, tmp_path: Path) -> None:
    settings = {"method": info.name, "recipe": RECIPE, **bits_of(info)}
    whole = train(**settings)
    killed(8, tmp_path, save_every="7", **settings)  # saved in the middle of the second epoch, killed a step later
    assert_same(train(out=tmp_path, save_every="7", **settings), whole)


class Everything:
    """A training with all that has state: dropout, averages, accumulation, a teacher, Adam's moments, test data."""

    recipe = Recipe(
        epochs=2, batch_size=8, accumulate=2, optimizer=OptimizerSpec("adam", 0.01), average_weights=0.8, clip_norm=1.0, distillation=0.3
    )

    @staticmethod
    def model() -> nn.Module:
        return nn.Sequential(*network()[:-1], nn.Dropout(0.3), network()[-1])

    @classmethod
    def train(cls, **arguments: object) -> nn.Module:
        return train(cls.model(), recipe=cls.recipe, teacher=network(), test_data=data(24, 5), **arguments)


@pytest.mark.parametrize("step", [2, 5, 6, 10])
def test_a_training_with_all_that_has_state_goes_on_from_any_step(step: int, tmp_path: Path) -> None:
    whole = Everything.train(out=tmp_path / "whole")
    with pytest.raises(Killed):
        Everything.train(out=tmp_path / "killed", save_every="1", progress=Killing(step))
    assert_same(Everything.train(out=tmp_path / "killed", save_every="1"), whole)
    curves = [json.loads((tmp_path / name / "train.json").read_text())["curve"] for name in ("whole", "killed")]
    assert [(result["epoch"], result["step"]) for result in curves[0]] == [(1, 5), (2, 10)]
    for once, again in zip(*curves, strict=True):
        assert (once["loss"], once["metrics"], once["learning_rate"]) == (again["loss"], again["metrics"], again["learning_rate"])


def test_an_epoch_that_was_interrupted_in_its_evaluation_is_evaluated_again(tmp_path: Path) -> None:
    class Deadly(torch.utils.data.TensorDataset):
        is_deadly = True

        def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
            if self.is_deadly:
                raise Killed
            return super().__getitem__(index)

    test = Deadly(*data(24, 5).tensors)
    with pytest.raises(Killed):
        train(out=tmp_path, test_data=test, save_every="5")
    test.is_deadly = False
    assert_same(train(out=tmp_path, test_data=test, save_every="5"), train(test_data=test))
    curve = json.loads((tmp_path / "train.json").read_text())["curve"]
    assert [result["step"] for result in curve] == [5, 10, 15]
    assert all(0 <= result["metrics"]["accuracy"] <= 1 for result in curve)


@pytest.mark.parametrize(("number", "error", "code"), [(signal.SIGTERM, Terminated, 143), (signal.SIGINT, KeyboardInterrupt, None)])
def test_a_signal_finishes_the_step_saves_and_leaves(
    number: signal.Signals, error: type[BaseException], code: int | None, tmp_path: Path
) -> None:
    class Signalling(Killing):
        def stage(self, name: str, total: float, *, done: int = 0):  # type: ignore[no-untyped-def]
            context = super().stage(name, total, done=done)
            stage = context.__enter__()
            advance = type(stage).advance

            def send(amount: float = 1, note: str = "") -> None:
                try:
                    advance(stage, amount, note)
                except Killed:
                    os.kill(os.getpid(), number)

            stage.advance = send  # type: ignore[method-assign]
            type(context).__enter__ = lambda _: stage  # type: ignore[method-assign]
            return context

    before = signal.getsignal(number)
    with pytest.raises(error) as stopped:
        train(out=tmp_path, progress=Signalling(7))
    assert signal.getsignal(number) is before
    if code is not None:
        assert stopped.value.code == code  # type: ignore[attr-defined]
        assert str(tmp_path / ".work") in str(stopped.value) and "after step 7 of 15" in str(stopped.value)
    _, facts = read_tensors(tmp_path / ".work" / "last.safetensors")
    assert facts["position"] == {"phase_index": 0, "epoch": 1, "step": 7}  # type: ignore[index]
    assert_same(train(out=tmp_path), train())


def test_a_full_disk_keeps_the_checkpoint_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save, calls = lowbit.files.save_file, 0

    def filling(tensors: object, path: Path, **options: object) -> None:
        nonlocal calls
        calls += 1
        if calls > 2:
            path.write_bytes(b"half a file")
            raise OSError(28, "No space left on device")
        save(tensors, path, **options)

    with monkeypatch.context() as patched:
        patched.setattr(lowbit.files, "save_file", filling)
        with pytest.raises(OutputError, match="the disk is full"):
            train(out=tmp_path, save_every="3")
    _, facts = read_tensors(tmp_path / ".work" / "last.safetensors")
    assert facts["position"]["step"] == 5  # type: ignore[index]
    assert [path.name for path in (tmp_path / ".work").iterdir() if path.name.startswith(".")] == []
    assert_same(train(out=tmp_path, save_every="3"), train())


def test_a_write_that_the_system_refuses_keeps_the_checkpoint_that_is_there(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    killed(7, tmp_path)
    before = (tmp_path / ".work" / "last.safetensors").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))  # no file of this process may become larger
    try:
        with pytest.raises(OutputError, match=r"cannot write .*last\.safetensors"):
            train(out=tmp_path, save_every="1")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / ".work" / "last.safetensors").read_bytes() == before
    assert sorted(path.name for path in (tmp_path / ".work").iterdir()) == ["last.safetensors", "run.json"]
    assert_same(train(out=tmp_path), train())


def test_half_a_file_of_a_killed_run_is_removed(tmp_path: Path) -> None:
    killed(7, tmp_path)
    half = tmp_path / ".work" / ".last.99999.safetensors"
    half.write_bytes(b"half")
    train(out=tmp_path)
    assert not half.exists()


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"\x80\x04cos\nsystem\n." + b])
def test_a_damaged_checkpoint_is_named_and_nothing_in_it_runs(damage: object, tmp_path: Path) -> None:
    killed(7, tmp_path)
    path = tmp_path / ".work" / "last.safetensors"
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    with pytest.raises(FileFormatError, match=r"last\.safetensors is damaged"):
        train(out=tmp_path)
    train(out=tmp_path, resume=False)


def test_a_stopped_run_with_other_settings_is_neither_mixed_up_nor_deleted(tmp_path: Path) -> None:
    killed(7, tmp_path)
    saved = (tmp_path / ".work" / "last.safetensors").read_bytes()
    with pytest.raises(SpecError, match=r"recipe\.epochs: 3, now 4.*resume=False"):
        train(out=tmp_path, recipe=replace(RECIPE, epochs=4))
    with pytest.raises(SpecError, match="weights: "):
        train(nn.Sequential(*network()[:-1], nn.Linear(8, 3)), out=tmp_path)
    assert (tmp_path / ".work" / "last.safetensors").read_bytes() == saved
    recipe = replace(RECIPE, epochs=1)
    assert_same(train(out=tmp_path, recipe=recipe, resume=False), train(recipe=recipe))


def test_a_finished_run_is_not_trained_again_and_makes_room_for_another(tmp_path: Path) -> None:
    first = train(out=tmp_path)
    with_ban = Killing(1)  # any step would end it
    assert_same(train(out=tmp_path, progress=with_ban), first)
    train(out=tmp_path, recipe=replace(RECIPE, epochs=1))
    assert json.loads((tmp_path / "train.json").read_text())["settings"]["recipe"]["epochs"] == 1


def test_the_best_network_is_kept_beside_the_last_one(tmp_path: Path) -> None:
    test = data(60, 5)
    train(out=tmp_path, test_data=test)
    curve = json.loads((tmp_path / "train.json").read_text())["curve"]
    _, facts = read_tensors(tmp_path / ".work" / "best.safetensors")
    best = max(curve, key=lambda result: result["metrics"]["accuracy"])
    assert (facts["epoch"], facts["metric"]) == (best["epoch"], best["metrics"]["accuracy"])  # type: ignore[index]


@dataclass
class Growing(Lsq):
    """A method whose phases change the network: the second one has other bits, a module more and a scale for each channel."""

    def phases(self, recipe: Recipe) -> list[Phase]:
        return [Phase("coarse", 1, self.optimizers(recipe)), Phase("fine", recipe.epochs - 1, self.optimizers(recipe)), Phase("end", 0, {})]

    def start_phase(self, run: TrainRun) -> None:
        layer = run.model[0]  # type: ignore[index]
        if run.phase.name == "fine":
            quantizer = LearnedScaleQuantizer(2, signed=True, granularity=Granularity.channel(0))
            quantizer.initialize(insert.float_weight(layer).detach())
            insert.set_weight_quantizer(layer, quantizer)
            layer.gain = nn.PReLU(8)
            self.chosen = {"gain": float(insert.float_weight(layer).detach().abs().mean()), "layers": {"0"}}
        if run.phase.name == "end":
            with torch.no_grad():
                insert.float_weight(layer).mul_(self.chosen["gain"])  # type: ignore[arg-type]

    def after_step(self, run: TrainRun) -> None:
        with torch.no_grad():
            run.model[-1].bias.add_(0.01 * torch.randn(3, generator=run.generator))  # type: ignore[index]


@pytest.mark.parametrize("step", [3, 7, 15])
def test_phases_that_change_the_network_are_gone_on_with(step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Growing, "info", Lsq.info)
    prepare = inspect.unwrap(inspect.unwrap(lowbit.train).__globals__["train_network"]).__globals__["prepare"]

    def growing(model: nn.Module, **options: object) -> nn.Module:
        prepared = prepare(model, **options)
        prepared.lowbit_method = Growing()
        return prepared

    monkeypatch.setitem(inspect.unwrap(inspect.unwrap(lowbit.train).__globals__["train_network"]).__globals__, "prepare", growing)
    whole = train()
    assert insert.weight_quantizer(whole[0]).scale.shape == (8, 1, 1, 1)  # type: ignore[union-attr, index]
    killed(step, tmp_path, save_every="1")
    assert_same(train(out=tmp_path, save_every="1"), whole)


@pytest.mark.parametrize("method", [Mutual, Adversarial])
@pytest.mark.parametrize("step", [3, 7, 15])
def test_networks_that_learn_beside_the_one_go_on_to_the_same_bits(step: int, method: type[Lsq], tmp_path: Path) -> None:
    whole, again = tmp_path / "whole", tmp_path / "again"
    with method_in_place(method):
        expected = train(out=whole)
        killed(step, again, save_every="1")
        assert_same(train(out=again, save_every="1"), expected)
    tensors = [read_tensors(folder / ".work" / "last.safetensors")[0] for folder in (whole, again)]
    learned = [name for name in tensors[0] if name.startswith(("networks.", "optimizer."))]
    assert any("networks.teacher" in name or "networks.generator" in name for name in learned)
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in learned)
    assert not [name for name, _ in expected.named_modules() if "teacher" in name or "generator" in name]


def test_a_plain_teacher_is_given_again_and_not_saved(tmp_path: Path) -> None:
    train(out=tmp_path, teacher=network())
    tensors, _ = read_tensors(tmp_path / ".work" / "last.safetensors")
    assert not [name for name in tensors if name.startswith("networks.")]


@dataclass
class Freezing(Lsq):
    """Freezes a layer's weight when the second epoch starts, and lets go of it when the last one does."""

    def start_epoch(self, run: TrainRun) -> None:
        if run.epoch:
            (run.freeze if run.epoch == 1 else run.release)("0")


@pytest.mark.parametrize("step", [4, 7, 12])
def test_what_was_frozen_on_the_way_is_frozen_again(step: int, tmp_path: Path) -> None:
    with method_in_place(Freezing):
        whole = train()
        killed(step, tmp_path, save_every="1")
        assert_same(train(out=tmp_path, save_every="1"), whole)
    plain = train()
    assert not torch.equal(whole[0].weight, plain[0].weight)  # type: ignore[index]


class Opaque:
    """An object that checkpoints know nothing of."""

    def __init__(self, *entries: object) -> None:
        self.entries = list(entries)


@dataclass
class Hoarding(Lsq):
    """Keeps objects beside the network, as its ``kind`` says."""

    kind: str = "same"

    held: object = None

    def after_step(self, run: TrainRun) -> None:
        if self.kind == "grows":
            self.held.entries.append(run.step)  # type: ignore[attr-defined]


def hoarding(kind: str) -> Hoarding:
    return Hoarding(kind=kind, held={"same": Opaque(1, "a"), "grows": Opaque(), "hidden": threading.Lock()}[kind])


def test_an_object_that_stays_as_it_is_need_not_be_saved(tmp_path: Path) -> None:
    with method_in_place(lambda: hoarding("same")):
        whole = train()
        killed(7, tmp_path)
        assert_same(train(out=tmp_path), whole)


def test_an_object_that_changes_in_the_run_is_an_error_at_the_first_save(tmp_path: Path) -> None:
    where = r"'lowbit_method\.held' of the network is a tests\.qat\.engine\.test_checkpoint\.Opaque, which checkpoints cannot save, and has changed"
    with method_in_place(lambda: hoarding("grows")), pytest.raises(StateError, match=where):
        train(out=tmp_path, save_every="2")
    with method_in_place(lambda: hoarding("grows")):
        train()  # nothing is saved


def test_an_object_that_cannot_be_looked_at_is_an_error_before_the_first_step(tmp_path: Path) -> None:
    with method_in_place(lambda: hoarding("hidden")), pytest.raises(StateError, match=r"'lowbit_method\.held' .*holds a lock"):
        train(out=tmp_path, progress=Killing(1))


def test_an_object_that_a_new_run_makes_otherwise_is_an_error(tmp_path: Path) -> None:
    made = iter((Opaque(1), Opaque(2)))

    def other() -> Hoarding:
        method = hoarding("same")
        method.held = next(made)
        return method

    with method_in_place(other):
        killed(7, tmp_path)
        with pytest.raises(FileFormatError, match=r"lowbit_method\.held \(Opaque\) is not what it was in the saved run"):
            train(out=tmp_path)


def test_a_snapshot_keeps_what_is_shared_shared() -> None:
    def objects(seed: int) -> dict[str, object]:
        generator = torch.Generator().manual_seed(seed)
        tensor = torch.full((2,), float(seed))
        numbers = {"a": (1, float("inf")), 3: [True, None, "x"], "names": {"b", "a"}}
        return {"one": generator, "two": [generator, tensor], "three": {"t": tensor}, "numbers": numbers}

    snapshot = Snapshot()
    saved = objects(7)
    torch.rand(3, generator=saved["one"])  # type: ignore[arg-type]
    tree = json.loads(json.dumps(snapshot.take(saved, "x")))
    tensors = snapshot.owned()
    live = objects(1)
    generator, tensor = live["one"], live["three"]["t"]  # type: ignore[index]
    live["numbers"] = {}
    restored = Restoration(tensors).put(tree, live, "x")
    assert restored is live and restored["one"] is generator and restored["two"][0] is generator
    assert restored["two"][1] is restored["three"]["t"] is tensor
    assert tensor.tolist() == [7, 7]
    assert restored["numbers"] == saved["numbers"]
    assert torch.equal(torch.rand(5, generator=generator), torch.rand(5, generator=saved["one"]))  # type: ignore[arg-type]


def test_a_snapshot_brings_back_tensors_of_other_shapes_and_buffers_that_are_not_saved() -> None:
    class Net(nn.Module):
        def __init__(self, size: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.arange(float(size)))
            self.register_buffer("seen", torch.ones(size), persistent=False)
            self.bit_width, self.hook = size, lambda: size

    old, new = Net(3), Net(2)
    snapshot = Snapshot()
    tree, tensors = snapshot.take(old, "net"), snapshot.owned()
    Restoration(tensors).put(tree, new, "net")
    assert new.weight.tolist() == [0, 1, 2] and isinstance(new.weight, nn.Parameter)
    assert new.seen.tolist() == [1, 1, 1] and "seen" not in new.state_dict()
    assert new.bit_width == 3
    assert new.hook() == 2  # functions belong to the new object


def test_a_snapshot_of_another_network_is_refused() -> None:
    snapshot = Snapshot()
    tree = snapshot.take(nn.Sequential(nn.Linear(2, 2)), "net")
    with pytest.raises(FileFormatError, match="modules not in it: 1"):
        Restoration(snapshot.tensors).put(tree, nn.Sequential(nn.Linear(2, 2), nn.ReLU()), "net")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("300s", SaveEvery(300.0)),
        ("1.5m", SaveEvery(90.0)),
        ("2h", SaveEvery(7200.0)),
        ("50", SaveEvery(steps=50)),
        (7, SaveEvery(steps=7)),
    ],
)
def test_how_often_to_save_is_a_time_or_a_number_of_steps(text: str | float, expected: SaveEvery) -> None:
    assert SaveEvery.parse(text) == expected


@pytest.mark.parametrize("text", ["0", "-1", "often", "1.5", "3d", ""])
def test_other_ways_to_say_how_often_are_refused(text: str) -> None:
    with pytest.raises(SpecError, match="save_every"):
        SaveEvery.parse(text)


def test_the_state_of_a_network_counts_its_buffers() -> None:
    assert {"1.running_mean", "0.bias"} & set(state(network())) == {"1.running_mean"}
