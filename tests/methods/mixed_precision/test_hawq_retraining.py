"""HAWQ's retraining quantizes layers one after the other in the order that the search found."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import lowbit
from lowbit.errors import SpecError
from lowbit.methods.mixed_precision.hawq import descending
from lowbit.methods.mixed_precision.hawq_retraining import HawqRetraining
from lowbit.network.record import record_of
from lowbit.qat.networks import GivenNetworks
from lowbit.qat.recipe import Recipe
from lowbit.qat.run import TrainRun
from lowbit.spec import BitPolicy

X = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
LABELS = torch.randint(3, (64,), generator=torch.Generator().manual_seed(1))
POLICY = BitPolicy.uniform(3, 4)
ORDER = ("4", "2")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    sizes = [6, 8, 7, 6, 3]
    return nn.Sequential(*(part for a, b in itertools.pairwise(sizes) for part in (nn.Linear(a, b), nn.ReLU())))[:-1]


def run_of(policy: BitPolicy, epochs: int, method: str = "hawq", **given: object) -> TrainRun:
    model = lowbit.prepare(network(), method=method, policy=policy, sample=X, **given)  # type: ignore[arg-type]
    return TrainRun(model, model.lowbit_method, lowbit.Classification(), Recipe(epochs), 2, given=GivenNetworks(None, network()))  # type: ignore[arg-type]


def weights_by_phase(run: TrainRun) -> dict[str, list[str]]:
    """The layers whose weights are quantized in each phase, with as many inputs."""
    found = {}
    for index, phase in enumerate(run.phases):
        run.phase_index = index
        run.start_phase()
        bits = lowbit.get_bits(run.model)
        found[phase.name] = [name for name, width in bits.items() if width.weight is not None]
        assert found[phase.name] == [name for name, width in bits.items() if width.activation is not None]
    return found


@pytest.mark.parametrize("procedure", [None, "hawq"])
def test_each_phase_quantizes_the_next_layer_of_the_order(procedure: str | None) -> None:
    method = "hawq" if procedure is None else "lsq"
    run = run_of(replace(POLICY, order=ORDER), 8, method, procedure=procedure)
    assert weights_by_phase(run) == {"4": ["0", "4", "6"], "all layers": ["0", "2", "4", "6"]}
    assert [phase.epochs for phase in run.phases] == [4, 4]
    assert run.phases[0].span == (0.0, 0.5) and run.phases[1].span == (0.5, 1.0)


def test_layers_without_an_epoch_are_quantized_with_the_next_ones() -> None:
    run = run_of(replace(POLICY, first_last=None, order=("4", "0", "6", "2")), 2)
    assert weights_by_phase(run)["all layers"] == ["0", "2", "4", "6"] and len(run.phases) == 2
    assert weights_by_phase(run_of(replace(POLICY, order=ORDER), 1)) == {"all layers": ["0", "2", "4", "6"]}


def test_a_weight_that_has_learned_in_float_gets_its_scale_anew() -> None:
    run = run_of(replace(POLICY, order=ORDER), 8, "lsq", procedure="hawq")
    run.start_phase()
    site = run.model.get_submodule("2")
    before = site.parametrizations.weight[0].quantizer.scale.clone()  # type: ignore[union-attr, index, operator]
    with torch.no_grad():
        site.parametrizations.weight.original.mul_(4)  # type: ignore[union-attr]
    run.phase_index = 1
    run.start_phase()
    torch.testing.assert_close(site.parametrizations.weight[0].quantizer.scale, 4 * before)  # type: ignore[union-attr, index]


def test_without_an_order_the_largest_squared_error_comes_first() -> None:
    model = lowbit.prepare(network(), method="hawq", policy=POLICY, sample=X)
    weights = [model.get_submodule(name) for name in ("2", "4")]
    errors = [float((layer.weight - layer.parametrizations.weight.original).square().sum()) for layer in weights]  # type: ignore[union-attr, operator]
    method, record = model.lowbit_method, record_of(model)
    assert isinstance(method, HawqRetraining) and record is not None
    assert method.order == tuple(("2", "4")[index] for index in descending(errors))
    assert any("no order of retraining" in note for note in record.table.notes)


def test_the_search_writes_the_order_and_training_follows_it(tmp_path: Path) -> None:
    result = lowbit.search(network(), method="hawq", budget="average=4", data=[(X, LABELS)], progress=False)
    assert sorted(result.order) == ["2", "4"] and result.policy.order == result.order
    result.policy.to_yaml(tmp_path / "policy.yaml")
    assert BitPolicy.from_yaml(tmp_path / "policy.yaml") == result.policy
    for policy in (result.policy, replace(result.policy, order=result.order[::-1])):
        phases = weights_by_phase(run_of(policy, 4))
        assert list(phases) == [policy.order[0], "all layers"]


def test_training_ends_with_every_layer_at_the_bits_asked_for() -> None:
    found = [
        lowbit.train(
            network(), (X, LABELS), method="hawq", policy=replace(POLICY, order=order), recipe=Recipe(6, 32), sample=X, progress=False
        )
        for order in (ORDER, ORDER[::-1])
    ]
    bits = [lowbit.get_bits(model) for model in found]
    assert bits[0] == bits[1] and [bits[0][name].weight for name in ("0", "2", "4", "6")] == [8, 3, 3, 8]
    assert not torch.equal(found[0](X), found[1](X))


@pytest.mark.parametrize("order, message", [(("9",), "its order names '9', which is no layer"), (("2", "2"), "each once")])
def test_an_order_that_does_not_fit_is_refused(order: tuple[str, ...], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        lowbit.prepare(network(), method="hawq", policy=BitPolicy.from_dict({**POLICY.to_dict(), "order": list(order)}), sample=X)
