"""The search of HAQ on a small network: budgets, measures, fine-tuning, resuming."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lowbit
from lowbit.assignment.budget import Budget
from lowbit.assignment.ddpg import DdpgAgent
from lowbit.assignment.environment import Environment
from lowbit.assignment.problem import SearchProblem, make_problem
from lowbit.errors import CalibrationError, DataError, LayerError, SpecError
from lowbit.files import read_tensors
from lowbit.inputs import Calibration, Inputs
from lowbit.methods.mixed_precision import haq
from lowbit.methods.mixed_precision.haq import STATE, Haq
from lowbit.spec import LayerBits

FEW = {"episodes": 8, "warmup": 3, "hidden": (8, 8), "batch_size": 8}


@functools.cache
def trained() -> tuple[nn.Module, Tensor, Tensor]:
    """A network that knows where the bright quarter of a picture is, the pictures and the answers."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(192, 1, 8, 8, generator=generator), torch.arange(192) % 4
    for place in range(192):
        row, column = 4 * (int(y[place]) // 2), 4 * (int(y[place]) % 2)
        x[place, 0, row : row + 4, column : column + 4] += 0.12
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU()]
    layers += [nn.Conv2d(8, 16, 1), nn.ReLU(), nn.AvgPool2d(4), nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4)]
    model = nn.Sequential(*layers)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval(), x, y


def problem(budget: str = "average=4", *, labelled: bool = True, **given: object) -> SearchProblem:
    model, x, y = trained()
    calibration = Calibration.of(x[:64], model)
    batches = tuple(zip(x.split(64), y.split(64), strict=True)) if labelled else tuple(calibration)
    settings = {
        "candidates": (2, 4, 8), "activation_bits": (4, 8), "first_last": 8, "task": lowbit.Classification(), "calibration": calibration,
        "batches": batches, "has_labels": labelled, **given,
    }  # fmt: skip
    return make_problem(model, Inputs.of(x[:2], model), budget=Budget.of(budget) if budget else Budget(), **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("weights", ["linear", "kmeans"])
@pytest.mark.parametrize("labelled", [True, False])
def test_bits_are_within_every_budget_and_are_the_best_that_were_measured(weights: str, labelled: bool) -> None:
    asked = problem("average=4,bops=12%", labelled=labelled)
    found = Haq(weights=weights, **FEW).search(asked)  # type: ignore[arg-type]
    assert asked.fits(found.bits)
    assert list(found.bits) == ["3", "5", "9"]
    assert all(bits in asked.choices[name] for name, bits in found.bits.items())
    rewards = found.facts["rewards"]
    assert isinstance(rewards, list)
    assert len(rewards) == 8
    assert found.facts["accuracy"] == pytest.approx(found.facts["float_accuracy"] + 10 * max(rewards))  # type: ignore[operator]
    assert found.loss == pytest.approx(-10 * max(rewards))
    assert found.facts["float_accuracy"] == (pytest.approx(100 * accuracy(trained()[0])) if labelled else 100.0)
    counts = {"3": 72, "5": 128, "9": 2048}
    share = sum(counts[name] * (bits.weight or 32) for name, bits in found.bits.items()) / (32 * sum(counts.values()))
    assert found.facts["share_of_float_codes"] == pytest.approx(share)


def accuracy(model: nn.Module) -> float:
    _, x, y = trained()
    return (model(x).argmax(1) == y).float().mean().item()


def test_accuracy_is_that_of_the_network_with_these_bits() -> None:
    asked, method = problem(), Haq()
    network = haq._Network(asked, method)
    fine = {name: LayerBits(8, 8) for name in asked.choices}
    coarse = {name: LayerBits(2, 4) for name in asked.choices}
    first = [network.accuracy(bits) for bits in (fine, coarse)]
    assert {name: own for name, own in lowbit.get_bits(network.model).items() if name in coarse} == coarse
    assert network.accuracy(coarse) == pytest.approx(100 * accuracy(network.model))
    assert [network.accuracy(bits) for bits in (fine, coarse)] == first
    assert first[0] > network.original - 3
    assert first[1] < first[0]
    other = haq._Network(asked, method)
    assert other.accuracy(coarse) == first[1]  # whatever was measured before


def test_inputs_are_clipped_by_what_the_float_network_gives() -> None:
    asked = problem()
    network = haq._Network(asked, Haq())
    model, x, _ = trained()
    seen = nn.Sequential(*list(model)[:3])(x[:32])  # the first batch of the calibration data
    network.accuracy({name: LayerBits(8, 8) for name in asked.choices})
    clip = network.model[3].input_quantizer.clip  # type: ignore[index, union-attr]
    assert clip.item() == pytest.approx(min(6.0, seen.max().item()))
    assert not network.model[3].input_quantizer.is_signed  # type: ignore[index, union-attr]


@pytest.mark.parametrize("weights", ["linear", "kmeans"])
def test_fine_tuning_repairs_networks_and_leaves_the_next_ones_alone(weights: str) -> None:
    asked = problem()
    rough = {name: LayerBits(2, 4) for name in asked.choices}
    plain = haq._Network(asked, Haq(weights=weights))  # type: ignore[arg-type]
    tuned = haq._Network(asked, Haq(weights=weights, finetune_epochs=4, finetune_learning_rate=0.02))  # type: ignore[arg-type]
    before = {name: value.clone() for name, value in tuned.model.state_dict().items() if "original" in name}
    assert tuned.accuracy(rough) > plain.accuracy(rough) + 3
    assert all(torch.equal(value, tuned.model.state_dict()[name]) for name, value in before.items())
    again = haq._Network(asked, tuned.method)
    assert again.accuracy(rough) == tuned.accuracy(rough)
    trained_copy = tuned._tuned()
    layer = trained_copy[5]  # type: ignore[index]
    assert len(layer.weight.unique()) <= 4  # type: ignore[union-attr, operator]


def test_fine_tuning_needs_labels() -> None:
    with pytest.raises(DataError, match="fine-tuning in haq needs labels"):
        Haq(finetune_epochs=1, **FEW).search(problem(labelled=False))  # type: ignore[arg-type]


def test_codebooks_may_have_one_bit_and_inputs_may_stay_in_float() -> None:
    asked = problem("average=1.2", candidates=(1, 2, 3), activation_bits=(None,), calibration=None)
    found = Haq(weights="kmeans", **FEW).search(asked)  # type: ignore[arg-type]
    assert asked.fits(found.bits)
    assert {bits.activation for bits in found.bits.values()} == {None}
    with pytest.raises(LayerError, match="layer '3': HaqWeight has bit-widths 2, 3, 4, 5, 6, 7, 8, got 1"):
        Haq(**FEW).search(asked)  # type: ignore[arg-type]


def test_a_weight_may_have_float_among_its_widths() -> None:
    asked = problem("average=20", candidates=(4, 32), activation_bits=(None,), first_last=None)
    network = haq._Network(asked, Haq())
    four = network.accuracy(dict.fromkeys(asked.choices, LayerBits(4, None)))
    assert network.accuracy(dict.fromkeys(asked.choices, LayerBits(None, None))) == network.original != four
    found = Haq(**{**FEW, "episodes": 6}).search(asked)  # type: ignore[arg-type]
    assert {bits.weight for bits in found.bits.values()} <= {4, None}


def test_inputs_need_samples() -> None:
    with pytest.raises(CalibrationError, match="haq clips what layers read by samples"):
        Haq(**FEW).search(problem(calibration=None))  # type: ignore[arg-type]


def test_a_search_without_a_budget_is_an_error() -> None:
    with pytest.raises(SpecError, match="haq searches within a budget"):
        Haq(**FEW).search(problem(""))  # type: ignore[arg-type]


def test_a_search_is_repeated_by_its_seed() -> None:
    wanted = Haq(**FEW).search(problem(seed=3))  # type: ignore[arg-type]
    assert Haq(**FEW).search(problem(seed=3)) == wanted  # type: ignore[arg-type]
    assert Haq(**FEW).search(problem(seed=4)).facts["rewards"] != wanted.facts["rewards"]  # type: ignore[arg-type]


def test_a_random_search_never_trains_its_agent(tmp_path: Path) -> None:
    asked = problem(work_dir=tmp_path)
    found = Haq(agent="random", **FEW).search(asked)  # type: ignore[arg-type]
    state, _ = read_tensors(tmp_path / "haq" / STATE)
    assert torch.equal(state["actor.fc1.weight"], state["actor_target.fc1.weight"])
    assert asked.fits(found.bits)


class StoppedError(Exception):
    pass


def stop_at(stop: int, patch: pytest.MonkeyPatch) -> None:
    """Let searches fail before they begin this episode."""
    run_episode = haq.run_episode

    def stopping(environment: Environment, agent: DdpgAgent, episode: int) -> float:
        if episode == stop:
            raise StoppedError
        return run_episode(environment, agent, episode)

    patch.setattr(haq, "run_episode", stopping)


@pytest.mark.parametrize("stop", [1, 4, 6])
def test_a_search_that_was_killed_goes_on_to_the_same_result(stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = Haq(**FEW).search(problem())  # type: ignore[arg-type]
    asked = problem(work_dir=tmp_path)
    with monkeypatch.context() as patch:
        stop_at(stop, patch)
        with pytest.raises(StoppedError):
            Haq(**FEW).search(asked)  # type: ignore[arg-type]
    seen: list[int] = []
    play = haq.run_episode
    monkeypatch.setattr(haq, "run_episode", lambda environment, agent, episode: seen.append(episode) or play(environment, agent, episode))
    assert Haq(**FEW).search(asked) == wanted  # type: ignore[arg-type]
    assert seen == list(range(stop, 8))


def test_the_state_of_another_search_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = problem(work_dir=tmp_path)
    stop_at(2, monkeypatch)
    with pytest.raises(StoppedError):
        Haq(**FEW).search(asked)  # type: ignore[arg-type]
    with pytest.raises(SpecError, match=r"stopped run with other settings \(limits.average: 4.0, now 5.0\)"):
        Haq(**FEW).search(replace(asked, limits={"average": 5.0}))  # type: ignore[arg-type]
