"""What every synthesis keeps to: the same samples for the same seed, also after a kill, an untouched network, and statistics that come nearer."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.synthesis.networks import small
from torch import nn

import lowbit
from lowbit.data import load_data, loader
from lowbit.errors import LayerError
from lowbit.models import load_default
from lowbit.progress import Stage
from lowbit.synthesis import descent
from lowbit.synthesis.samples import SynthesizedData

METHODS = [info.name for info in lowbit.list_methods(kind="synthesis")]
every_method = pytest.mark.parametrize("name", METHODS)
COUNT = 12


def trial(name: str) -> dict[str, Any]:
    method = lowbit.get_method(name, "synthesis").method
    assert method is not None
    return dict(method.trial)  # type: ignore[attr-defined]


def made(name: str, model: nn.Module | None = None, **given: Any) -> SynthesizedData:
    """Samples for the embedded network."""
    settings = {"shape": (1, 8, 8), "count": COUNT, "progress": False, **trial(name), **given}
    return lowbit.synthesize(load_default() if model is None else model, method=name, **settings)


def test_there_are_methods_to_hold_to_these_laws() -> None:
    assert METHODS


@every_method
def test_the_loss_falls_and_statistics_come_nearer_than_those_of_noise(name: str) -> None:
    data = made(name)
    assert len(data) == COUNT and data[0].shape == (1, 8, 8)  # type: ignore[union-attr]
    assert data.losses[-1] < data.losses[0] / 5
    assert all(bool(torch.isfinite(tensor).all()) for tensor in data.inputs.tensors)
    for quantity in ("mean_error", "std_error"):
        ours, noise = (sum(getattr(getattr(entry, source), quantity) for entry in data.statistics) for source in ("samples", "noise"))
        assert ours < 0.9 * noise, quantity


@every_method
def test_a_seed_decides_the_samples_and_nothing_else_does(name: str) -> None:
    model = load_default()
    first = made(name, model, seed=5)
    torch.rand(9)  # random numbers of others
    state = torch.get_rng_state()
    second, other = made(name, model, seed=5), made(name, model, seed=6)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.inputs.args[0], second.inputs.args[0]) and first.to_dict() == second.to_dict()
    assert not torch.equal(first.inputs.args[0], other.inputs.args[0])
    rows = first.inputs.args[0].flatten(1)
    assert all(not torch.equal(rows[i], rows[j]) for i in range(COUNT) for j in range(i))


@every_method
@pytest.mark.parametrize("training", [False, True])
def test_the_network_is_as_it_was_also_after_an_error(name: str, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_default().train(training)
    model.fc.weight.requires_grad_(False)
    model.norm.eval()
    before, flags = copy.deepcopy(model.state_dict()), [p.requires_grad for p in model.parameters()]
    modes = [module.training for module in model.modules()]

    def check() -> None:
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        assert [p.requires_grad for p in model.parameters()] == flags and all(p.grad is None for p in model.parameters())
        assert [module.training for module in model.modules()] == modes
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())

    made(name, model, count=2)
    check()
    monkeypatch.setattr(Stage, "advance", lambda *_args, **_kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        made(name, model, count=2)
    check()


class Killed(Exception):
    pass


@every_method
@pytest.mark.parametrize("share", [0.1, 0.55, 0.98])
def test_a_killed_synthesis_goes_on_to_the_same_samples(name: str, share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"model": small(), "shape": (2, 6, 6), "count": 5, "batch_size": 2, "seed": 1}
    expected = made(name, **settings)
    advance = Stage.advance

    def deadly(stage: Stage, amount: float = 1, note: str = "") -> None:
        advance(stage, amount, note)
        if stage.name == "synthesis" and stage.done >= share * stage.total:
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(Stage, "advance", deadly)
        patched.setattr(descent, "SAVE_SECONDS", 0.0)
        with pytest.raises(Killed):
            made(name, work_dir=tmp_path, **settings)
    found = made(name, work_dir=tmp_path, **settings)
    assert torch.equal(found.inputs.args[0], expected.inputs.args[0]) and found.to_dict() == expected.to_dict()


@every_method
def test_what_it_makes_calibrates_a_network(name: str) -> None:
    model, data = load_default(), made(name)
    quantized = lowbit.quantize(model, method="round_to_nearest", weight_bits=8, activation_bits=8, calibration=data)
    test = loader(load_data("digits", split="test"), 200)
    assert lowbit.evaluate(quantized, test).value > lowbit.evaluate(model, test).value - 0.02


@every_method
def test_a_network_without_norms_is_told_what_to_use_instead(name: str) -> None:
    plain = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU())
    with pytest.raises(LayerError, match=r"it has none\. Pass calibration data instead"):
        made(name, plain)


@every_method
def test_double_precision_and_the_devices_of_this_machine(name: str, device: torch.device) -> None:
    model = small().to(device)
    data = lowbit.synthesize(model, method=name, shape=(2, 6, 6), count=3, **trial(name))
    assert data.inputs.args[0].device.type == "cpu" and data.losses[-1] < data.losses[0]
    data = lowbit.synthesize(model.cpu().double(), method=name, shape=(2, 6, 6), count=3, **trial(name))
    assert data.inputs.args[0].dtype == torch.float64 and data.losses[-1] < data.losses[0]
