from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch
from tests.optional import require
from tests.qat.companions import Adversarial, Mutual
from tests.qat.recording import BATCHES, network, prepared, recorded
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset

import lowbit
from lowbit.errors import LoopError, MissingExtraError, SpecError
from lowbit.qat import Procedure
from lowbit.qat.loops.manual import ManualLoop
from lowbit.qat.loops.plan import Planned

X, Y = torch.cat([x for x, _ in BATCHES]), torch.cat([y for _, y in BATCHES])
PHASES = ("first", 1, ("weights", "quantizers")), ("second", 2, ("quantizers", "others"))


class Samples(Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": X[index], "labels": Y[index]}


def loader() -> DataLoader[dict[str, Tensor]]:
    return DataLoader(Samples(), batch_size=8)


def optimizer_of(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(lowbit.parameter_groups(model, learning_rate=0.1), momentum=0.9)


def trained_by_hand(model: nn.Module, epochs: int, accumulate: int = 1) -> dict[str, Tensor]:
    run = lowbit.training(model, steps_per_epoch=4 // accumulate, epochs=epochs)
    optimizer = optimizer_of(model)
    for _ in range(epochs):
        for index, (x, y) in enumerate(BATCHES):
            if index % accumulate == 0:
                optimizer.zero_grad()
                run.before_step(optimizer)
            (cross_entropy(model(x), y) / accumulate).backward()
            if index % accumulate == accumulate - 1:
                run.after_backward()
                optimizer.step()
                run.after_step()
    return values(model)


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def fit_lightning(
    model: nn.Module, folder: Path, epochs: int, resume: Path | None = None, accumulate: int = 1, *, uses_run: bool = False
) -> object:
    """Train for ``epochs`` with Lightning, with a checkpoint after each; the callback."""
    pl = require("lightning.pytorch")
    from lowbit.qat.loops.lightning import LowbitCallback

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = model

        def training_step(self, batch: dict[str, Tensor], _index: int) -> Tensor:
            if uses_run:
                return callback.run.loss((batch["x"], batch["labels"]))
            return cross_entropy(self.network(batch["x"]), batch["labels"]) + lowbit.penalty(self.network)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return optimizer_of(self.network)

    callback = LowbitCallback(float_network=network())
    checkpoints = pl.callbacks.ModelCheckpoint(folder, save_top_k=-1)
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", callbacks=[callback, checkpoints], default_root_dir=folder, logger=False,
        enable_progress_bar=False, enable_model_summary=False, accumulate_grad_batches=accumulate,
    )  # fmt: skip
    trainer.fit(Module(), loader(), ckpt_path=resume, weights_only=False)
    return callback


def fit_huggingface(
    model: nn.Module, folder: Path, epochs: int, resume: Path | None = None, *, uses_run: bool = False, **arguments: object
) -> object:
    """Train for ``epochs`` with transformers; the callback."""
    transformers = require("transformers")
    require("accelerate")
    from lowbit.qat.loops.huggingface import LowbitCallback

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = model

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = self.network(x)
            if uses_run:
                return {"loss": callback.run.loss((x, labels)), "logits": logits}
            return {"loss": cross_entropy(logits, labels) + lowbit.penalty(self.network), "logits": logits}

    class Trainer(transformers.Trainer):
        def get_train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
            return loader()

    optimizer = optimizer_of(model)
    constant = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    callback = LowbitCallback(float_network=network())
    settings = transformers.TrainingArguments(
        str(folder), num_train_epochs=epochs, per_device_train_batch_size=8, max_grad_norm=0.0, report_to=[], use_cpu=True,
        disable_tqdm=True, **{"save_strategy": "no", **arguments},
    )  # fmt: skip
    trainer = Trainer(Model(), settings, train_dataset=Samples(), optimizers=(optimizer, constant), callbacks=[callback])
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return callback


def test_lightning_gives_the_weights_of_a_loop_of_ones_own(tmp_path: Path) -> None:
    model, method = recorded(*PHASES)
    reference, by_hand = recorded(*PHASES)
    callback = fit_lightning(model, tmp_path, epochs=3)
    assert_same(values(model), trained_by_hand(reference, epochs=3))
    assert method.calls == by_hand.calls
    assert method.calls[:5] == ["phase first", "epoch 0", "before 0", "backward", "after"]
    assert callback.run.step == callback.run.total_steps == 12
    assert callback.run.learning_rate == 0.1


def test_lightning_makes_one_step_of_accumulated_batches(tmp_path: Path) -> None:
    model, reference = prepared(), prepared()
    callback = fit_lightning(model, tmp_path, epochs=2, accumulate=2)
    assert callback.run.step == callback.run.total_steps == 4
    assert_same(values(model), trained_by_hand(reference, epochs=2, accumulate=2))


def test_lightning_goes_on_from_its_checkpoint_to_the_same_weights(tmp_path: Path) -> None:
    model, whole = recorded(*PHASES)
    fit_lightning(model, tmp_path, epochs=3)
    again, method = recorded(*PHASES)
    callback = fit_lightning(again, tmp_path, epochs=3, resume=tmp_path / "epoch=1-step=8.ckpt")
    assert callback.run.step == 12
    assert method.calls == whole.calls  # which the checkpoint holds up to there
    assert_same(values(again), values(model))


def test_huggingface_gives_the_weights_of_a_loop_of_ones_own(tmp_path: Path) -> None:
    model, method = recorded(*PHASES)
    reference, by_hand = recorded(*PHASES)
    callback = fit_huggingface(model, tmp_path, epochs=3)
    assert_same(values(model), trained_by_hand(reference, epochs=3))
    assert method.calls == by_hand.calls
    assert callback.run.step == callback.run.total_steps == 12
    assert callback.run.learning_rate == 0.1


def test_huggingface_makes_one_step_of_accumulated_batches(tmp_path: Path) -> None:
    model, reference = prepared(), prepared()
    callback = fit_huggingface(model, tmp_path, epochs=2, gradient_accumulation_steps=2)
    assert callback.run.step == callback.run.total_steps == 4
    expected = trained_by_hand(reference, epochs=2, accumulate=2)
    for name, value in values(model).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5, msg=name)


def test_huggingface_goes_on_from_its_checkpoint_to_the_same_weights(tmp_path: Path) -> None:
    model, whole = recorded(*PHASES)
    fit_huggingface(model, tmp_path, epochs=3, save_strategy="steps", save_steps=8)
    again, method = recorded(*PHASES)
    callback = fit_huggingface(again, tmp_path, epochs=3, resume=tmp_path / "checkpoint-8")
    assert callback.run.step == 12
    assert method.calls == whole.calls  # which the checkpoint holds up to there
    assert_same(values(again), values(model))


def test_huggingface_goes_on_from_a_checkpoint_that_has_the_network_alone(tmp_path: Path) -> None:
    model, _ = recorded(*PHASES)
    fit_huggingface(model, tmp_path, epochs=3, save_strategy="steps", save_steps=8)
    (tmp_path / "checkpoint-8" / "lowbit.safetensors").unlink()
    again, method = recorded(*PHASES)
    callback = fit_huggingface(again, tmp_path, epochs=3, resume=tmp_path / "checkpoint-8")
    assert callback.run.step == 12
    assert method.calls[:4] == ["phase first", "phase second", "epoch 1", "before 8"]
    assert_same(values(again), values(model))  # nothing of this method lies outside of the network


def mutual() -> nn.Module:
    model = prepared()
    model.lowbit_method = Mutual()  # type: ignore[assignment]
    return model


def mutual_by_hand() -> tuple[nn.Module, nn.Module]:
    """The network and its teacher after three epochs in a custom loop."""
    run = run_by_hand(mutual(), epochs=3)
    return run.model, run.networks["teacher"]


def run_by_hand(model: nn.Module, epochs: int) -> ManualLoop:
    """The run after its epochs in a custom loop on the method's own loss."""
    run = lowbit.training(model, steps_per_epoch=4, epochs=epochs, float_network=network())
    optimizer = optimizer_of(run.model)
    for batch in BATCHES * epochs:
        run.before_step(optimizer)
        run.loss(batch).backward()
        run.after_backward()
        optimizer.step()
        run.after_step()
    return run


def test_lightning_trains_companions_and_goes_on_with_them(tmp_path: Path) -> None:
    whole, teacher = mutual_by_hand()
    fit_lightning(mutual(), tmp_path, epochs=3, uses_run=True)
    again = mutual()
    callback = fit_lightning(again, tmp_path, epochs=3, uses_run=True, resume=tmp_path / "epoch=1-step=8.ckpt")
    assert_same(values(again), values(whole))
    assert_same(values(callback.run.networks["teacher"]), values(teacher))
    assert not torch.equal(teacher[0].weight, network()[0].weight)  # type: ignore[index]


def test_huggingface_trains_companions_and_goes_on_with_them(tmp_path: Path) -> None:
    whole, teacher = mutual_by_hand()
    fit_huggingface(mutual(), tmp_path, epochs=3, uses_run=True, save_strategy="steps", save_steps=8)
    again = mutual()
    callback = fit_huggingface(again, tmp_path, epochs=3, uses_run=True, resume=tmp_path / "checkpoint-8")
    assert_same(values(again), values(whole))
    assert_same(values(callback.run.networks["teacher"]), values(teacher))


@pytest.mark.parametrize("procedure", [info.name for info in lowbit.list_methods(axis="procedure") if issubclass(info.method, Procedure)])  # type: ignore[arg-type]
def test_lightning_trains_every_procedure_and_its_companions_as_a_loop_of_ones_own(procedure: str, tmp_path: Path) -> None:
    def made() -> nn.Module:
        bits = {"weight_bits": 3, "activation_bits": None if procedure == "inq" else 3}
        return lowbit.prepare(network(), method="lsq", procedure=procedure, sample=BATCHES[0][0], **bits).train()  # type: ignore[arg-type]

    model = made()
    epochs = len(model.lowbit_method.phases(lowbit.Recipe(epochs=100)))  # type: ignore[operator, union-attr]
    whole = run_by_hand(made(), epochs)
    callback = fit_lightning(model, tmp_path, epochs=epochs, uses_run=True)
    assert [phase.name for phase in callback.run.phases] == [phase.name for phase in whole.phases]  # type: ignore[attr-defined]
    assert_same(values(model), values(whole.model))
    for name, companion in whole.networks.items():
        assert_same(values(callback.run.networks[name]), values(companion))  # type: ignore[attr-defined]


def test_a_method_with_several_optimizer_turns_is_refused() -> None:
    model = prepared()
    model.lowbit_method = Adversarial(shape=(6,))  # type: ignore[assignment]
    with pytest.raises(LoopError, match="'lsq' takes 3 turns with an optimizer step each in every step of its phase 'adversarial'"):
        Planned(float_network=network()).start(model, 8, 2)


@pytest.mark.parametrize(
    ("name", "package", "extra"), [("lightning", "lightning", "lightning"), ("huggingface", "transformers", "huggingface")]
)
def test_a_missing_package_is_said_with_the_install_line(name: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for loaded in [module for module in sys.modules if module.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, package, None)  # makes the import fail
    monkeypatch.delitem(sys.modules, f"lowbit.qat.loops.{name}", raising=False)
    with pytest.raises(MissingExtraError, match=rf"needs {package}, .*pip install .*\[{extra}\]"):
        importlib.import_module(f"lowbit.qat.loops.{name}")


def test_the_run_of_a_callback_is_there_once_training_starts() -> None:
    plan = Planned(teacher=nn.Linear(6, 3))
    with pytest.raises(LoopError, match="the run is made when training starts"):
        _ = plan.run
    with pytest.raises(SpecError, match="need the length of training, got inf steps in 1 epochs"):
        plan.start(prepared(), float("inf"), 1)
    run = plan.start(prepared(), 7, 2)
    assert plan.run is run
    assert (run.steps_per_epoch, run.epochs) == (4, 2)  # the last epoch is a step short
    assert run.networks["teacher"] is plan.teacher
