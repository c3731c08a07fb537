from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lowbit
from lowbit.errors import SpecError
from lowbit.inputs import Inputs
from lowbit.measure.loss_surface import LossSurface
from lowbit.methods.mixed_precision.hawq import perturbation
from lowbit.methods.mixed_precision.hawq_quantizers import HawqActivation
from lowbit.methods.mixed_precision.hawq_v2 import HawqV2, activation_perturbations, limit_between, same_input, select

X = torch.randn(24, 6, generator=torch.Generator().manual_seed(0))
LABELS = torch.randint(3, (24,), generator=torch.Generator().manual_seed(1))


class Branches(nn.Module):
    """A residual block whose first layer and shortcut read the same tensor, between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 7), nn.Linear(7, 4)
        self.shortcut, self.head, self.act = nn.Linear(5, 4), nn.Linear(4, 3), nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem(x))
        return self.head(self.act(self.second(self.act(self.first(x))) + self.shortcut(x)))


NAMES = ("stem", "first", "second", "shortcut", "head")


def network() -> Branches:
    torch.manual_seed(0)
    return Branches()


def search(**given: object) -> lowbit.SearchResult:
    settings = {"method": "hawq_v2", "budget": "average=4", "data": [(X, LABELS)], "first_last_bits": None, "progress": False, **given}
    return lowbit.search(network(), **settings)  # type: ignore[arg-type]


def exact_average_trace(name: str) -> float:
    model = network().double()
    weight = model.get_parameter(name).detach()

    def loss(values: Tensor) -> Tensor:
        return nn.functional.cross_entropy(torch.func.functional_call(model, {name: values}, X.double()), LABELS)

    matrix = torch.autograd.functional.hessian(loss, weight).reshape(weight.numel(), -1)
    return float(matrix.trace()) / weight.numel()


# Selection


def best_of_all(losses: list[list[float]], costs: list[list[float]], limit: float) -> float:
    rows = itertools.product(range(len(losses[0])), repeat=len(losses))
    return min(
        sum(losses[i][c] for i, c in enumerate(row)) for row in rows if sum(costs[i][c] for i, c in enumerate(row)) <= limit * (1 + 1e-12)
    )


def test_the_selection_loses_least_of_all_and_less_the_more_is_allowed() -> None:
    generator = torch.Generator().manual_seed(4)
    losses, counts = torch.rand(6, 3, generator=generator).sort(1).values, torch.randint(10, 99, (6, 1), generator=generator)
    costs = (counts * torch.tensor([8.0, 4.0, 2.0])).tolist()
    found = []
    for fraction in (0.0, 0.1, 0.3, 0.5, 0.9, 1.0):
        limit = limit_between(costs, fraction)
        choices = select(losses.tolist(), [costs], [limit])
        found.append(sum(losses.tolist()[i][c] for i, c in enumerate(choices)))
        assert found[-1] == pytest.approx(best_of_all(losses.tolist(), costs, limit))
    assert found == sorted(found, reverse=True)


def test_an_order_restricts_the_selection() -> None:
    losses, costs = [[0.0, 1.0], [0.0, 5.0], [0.0, 3.0]], [[[8.0, 4.0]] * 3]
    assert select(losses, costs, [16]) == (1, 0, 1)
    assert select(losses, costs, [16], order=[2, 1, 0]) == (1, 1, 0)
    assert select(losses, costs, [20], order=[2, 1, 0]) == (1, 0, 0)
    assert select(losses, costs, [20], [(0, 1)], order=[2, 1, 0]) == (1, 1, 0)
    with pytest.raises(SpecError, match="no assignment along the order"):
        select(losses, [[[8.0, 4.0], [8.0, 4.0], [4.0, 8.0]]], [12], order=[0, 1, 2])


def test_a_limit_that_cannot_be_met_is_named() -> None:
    with pytest.raises(SpecError, match="size: at most 7 is allowed, and no choice costs less than 8"):
        select([[0.0, 1.0]] * 2, [[[8.0, 4.0]] * 2], [7], names=["size"])


# Networks


def test_layers_that_read_the_same_tensor_are_found() -> None:
    assert same_input(network(), Inputs((X,)), NAMES) == [(1, 3)]
    assert same_input(network(), Inputs((X,)), ("stem", "second", "shortcut")) == []


def test_the_perturbation_of_activations_is_the_mean_over_samples() -> None:
    model = network()
    batches = list(zip(X.split([15, 9]), LABELS.split([15, 9]), strict=True))
    surface = LossSurface(model, batches, lambda output, batch: nn.functional.cross_entropy(output, batch[1]))
    found = activation_perturbations(surface, ["first", "head"], (2, 8))
    hidden = model.act(model.stem(X)).detach()
    for width in (2, 8):
        quantizer = HawqActivation(width, is_signed=True).eval()
        quantizer.initialize(hidden)
        assert found["first"][width] == pytest.approx(float((quantizer(hidden) - hidden).square().sum(1).mean()), rel=1e-5)
    assert found["head"][8] < found["head"][2]


# The search


def test_traces_are_those_of_the_exact_hessian() -> None:
    exact, estimated = search(probes="exact"), search(min_probes=400, max_probes=400, joint=False)
    for name in NAMES:
        wanted = exact_average_trace(f"{name}.weight")
        assert exact.facts["average_traces"][name] == pytest.approx(wanted, rel=1e-3)  # type: ignore[index]
        assert estimated.facts["average_traces"][name] == pytest.approx(wanted, rel=0.15)  # type: ignore[index]


def test_what_is_found_is_the_least_omega_within_the_budget() -> None:
    found = search(budget=["average=4", "bops=4.5%"], probes="exact")
    widths = list(found.sensitivity["stem"])
    for name in NAMES:
        trace, weight = max(found.facts["average_traces"][name], 0), network().get_parameter(f"{name}.weight")  # type: ignore[index]
        assert [found.sensitivity[name][bits] for bits in widths] == pytest.approx(
            [trace * perturbation(weight, bits.weight or 8) for bits in widths]
        )
    counts = {name: network().get_parameter(f"{name}.weight").numel() for name in NAMES}
    allowed = []
    for row in itertools.product(widths, repeat=5):
        chosen = dict(zip(NAMES, row, strict=True))
        average = sum(counts[name] * (bits.weight or 8) for name, bits in chosen.items()) / sum(counts.values())
        operations = sum(counts[name] * (bits.weight or 8) * 8 for name, bits in chosen.items())
        if average <= 4 and operations <= found.limits["bops"]:
            allowed.append(sum(found.sensitivity[name][bits] for name, bits in chosen.items()))
    assert found.found.loss == pytest.approx(min(allowed))


def test_the_frontier_holds_what_the_search_finds() -> None:
    found = search(probes="exact")
    best = max((one for one in found.frontier if one.cost["average"] <= 4), key=lambda one: one.cost["average"])
    assert best.loss == pytest.approx(found.found.loss)
    assert found.frontier[0].cost["average"] == 2 and found.frontier[-1].loss == pytest.approx(
        sum(min(row.values()) for row in found.sensitivity.values())
    )


def test_layers_that_read_one_tensor_can_be_tied() -> None:
    found = search(tie="same_input", budget="average=3.5", probes="exact")
    assert found.found.bits["first"] == found.found.bits["shortcut"]
    assert found.found.loss >= search(budget="average=3.5", probes="exact").found.loss - 1e-12  # type: ignore[operator]


def test_an_ordered_selection_never_gives_a_flatter_layer_more_bits() -> None:
    found = search(selection="ordered", probes="exact")
    order = sorted(NAMES, key=lambda name: -found.facts["average_traces"][name])  # type: ignore[index]
    bits = [found.found.bits[name].weight or 8 for name in order]
    assert bits == sorted(bits, reverse=True)
    assert found.found.loss >= search(probes="exact").found.loss - 1e-12  # type: ignore[operator]
    with pytest.raises(SpecError, match="several widths of activations"):
        search(selection="ordered", activation_bits=(4, 8))


def test_a_fraction_limits_the_cost_between_the_cheapest_and_the_dearest() -> None:
    found = search(budget="average=8", fraction=0.25, probes="exact")
    assert 2 <= found.cost["average"] <= 2 + 0.25 * 6 + 1e-9


def test_bits_of_activations_are_chosen_by_their_traces() -> None:
    found = search(activation_bits=(2, 8), budget="bops=1.5%", probes="exact")
    chosen = {name: found.found.bits[name] for name in NAMES}
    assert {bits.activation for bits in chosen.values()} == {2, 8}
    traces = found.facts["average_activation_traces"]
    batch = [(X, LABELS)]
    surface = LossSurface(network(), batch, lambda output, pair: nn.functional.cross_entropy(output, pair[1]))
    errors = activation_perturbations(surface, NAMES, (2, 8))
    for name in NAMES:
        low, high = lowbit.LayerBits(8, 2), lowbit.LayerBits(8, 8)
        assert found.sensitivity[name][low] - found.sensitivity[name][high] == pytest.approx(
            max(traces[name], 0) * (errors[name][2] - errors[name][8]),
            rel=1e-4,
            abs=1e-9,  # type: ignore[index]
        )


def test_all_layers_can_be_probed_at_once() -> None:
    found = search(joint=True, min_probes=300, max_probes=300)
    for name in NAMES:
        assert found.facts["average_traces"][name] == pytest.approx(exact_average_trace(f"{name}.weight"), rel=0.3, abs=0.002)  # type: ignore[index]


def test_a_negative_trace_counts_as_none() -> None:
    class Concave(lowbit.Classification):
        def loss(self, output: Tensor, batch: object) -> Tensor:
            return -super().loss(output, batch)

    found = search(task=Concave(), probes="exact")
    assert "head" in found.facts["negative"]  # type: ignore[operator]
    assert set(found.sensitivity["head"].values()) == {0.0} and all(
        value >= 0 for row in found.sensitivity.values() for value in row.values()
    )


def test_bounds_of_probes_are_checked() -> None:
    with pytest.raises(SpecError, match="min_probes must be at most max_probes, 5; got 10"):
        HawqV2(max_probes=5)


@pytest.mark.parametrize("joint", [False, True])
def test_probes_are_kept_for_a_search_that_was_killed(joint: bool, tmp_path: Path) -> None:
    whole = search(joint=joint, max_probes=25, work_dir=tmp_path)
    (file,) = tmp_path.glob("traces*.json")
    kept = json.loads(file.read_text())
    assert len(kept["found"]) == (3 if joint else len(NAMES))
    first = next(iter(kept["found"]))
    kept["found"] = {first: kept["found"][first]}  # what a search holds that was killed behind its first job
    file.write_text(json.dumps(kept))
    again = search(joint=joint, max_probes=25, work_dir=tmp_path)
    assert again == whole == search(joint=joint, max_probes=25)
