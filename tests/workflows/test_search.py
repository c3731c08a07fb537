"""Searching bits by a method of one's own: budgets, the frontier, files, and what follows a search."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import nn

import lowbit
from lowbit import registry
from lowbit.assignment.problem import Found, SearchMethod, SearchProblem
from lowbit.assignment.solve import frontier, solve
from lowbit.errors import CalibrationError, DataError, SpecError, UnknownNameError
from lowbit.quantizers import UniformQuantizer
from lowbit.spec import BitPolicy, Granularity, LayerBits
from lowbit.workflows.requests import SearchRequest
from lowbit.workflows.search import search_and_write, spread, uniform_at_cost

X = torch.randn(64, 6, generator=torch.Generator().manual_seed(1))


INFO = lowbit.MethodInfo(
    name="weight_error", title="Squared error of weights", paper="none", section="other", axes=("assignment",), kind="search",
    weight_bits=range(1, 9), activation_bits=range(1, 9), needs=(), fidelity="unverified", summary="the least squared error of weights",
)  # fmt: skip


@dataclass
class WeightError(SearchMethod):
    """Attributes:
    power: Power of the error.
    """

    power: float = 2.0

    def search(self, problem: SearchProblem) -> Found:
        losses = {name: {bits: self._error(problem, name, bits) for bits in widths} for name, widths in problem.choices.items()}
        table = [[losses[name][bits] for bits in widths] for name, widths in problem.choices.items()]
        prices = {
            kind: [[cost.table[n][b] for b in widths] for n, widths in problem.choices.items()] for kind, cost in problem.costs.items()
        }
        limits = [limit - problem.costs[kind].fixed for kind, limit in problem.limits.items()]
        chosen = solve(table, [prices[kind] for kind in problem.limits], limits)

        def bits_of(places: tuple[int, ...]) -> dict[str, LayerBits]:
            return {name: widths[place] for (name, widths), place in zip(problem.choices.items(), places, strict=True)}

        options = tuple(problem.option(bits_of(point.choices), point.loss) for point in frontier(table, prices[problem.main]))
        loss = sum(row[place] for row, place in zip(table, chosen, strict=True))
        return Found(bits_of(chosen), loss, options, losses, order=tuple(problem.layers), facts={"seed": problem.seed})

    def _error(self, problem: SearchProblem, name: str, bits: LayerBits) -> float:
        weight = problem.layers[name].original.detach()
        quantizer = UniformQuantizer(bits.weight or 8, signed=True, symmetric=True, granularity=Granularity.channel(0))
        quantizer.initialize(weight)
        return float((quantizer(weight) - weight).abs().pow(self.power).sum())


with registry._privately():  # other tests list the methods that there are
    lowbit.register(INFO)(WeightError)


def network() -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for width, scale in ((16, 1.0), (16, 8.0), (16, 0.1), (16, 1.0)):
        linear = nn.Linear(6 if not layers else 16, width)
        nn.init.normal_(linear.weight, std=scale)
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(16, 3)).eval()


def labelled() -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        return X, network()(X).argmax(1)


def test_the_cheapest_bits_go_to_the_layers_that_lose_least() -> None:
    found = lowbit.search(network(), method=WeightError, budget="average=4.7", calibration=X)
    weights = {name: bits.weight for name, bits in found.found.bits.items()}
    assert weights == {"0": 8, "2": 8, "4": 2, "6": 4, "8": 8}  # the layer of large weights gets most, that of small ones least
    assert found.cost["average"] <= 4.7
    quantized = lowbit.quantize(network(), method="round_to_nearest", policy=found.policy, calibration=X)
    assert {name: bits.weight for name, bits in lowbit.get_bits(quantized).items()} == weights


def test_uniform_networks_of_every_width_stand_beside_it() -> None:
    found = lowbit.search(network(), method=WeightError, budget="average=3", calibration=X)
    assert [one.name for one in found.uniform] == [f"uniform {bits}/8" for bits in range(8, 0, -1)]
    same = uniform_at_cost(found)
    assert same is not None and same.name == "uniform 3/8" and same.cost["average"] == pytest.approx(3)
    assert found.found.loss is not None and found.uniform[0].loss is not None


def test_several_budgets_hold_together() -> None:
    found = lowbit.search(network(), method=WeightError, budget=["average=5", "bops=3.5%"], calibration=X, candidates=(2, 3, 4, 6, 8))
    assert found.cost["average"] <= 5
    assert found.cost["bops"] <= 0.035 * found.reference["bops"]
    assert found.limits["bops"] == pytest.approx(0.035 * found.reference["bops"])


def test_max_drop_takes_the_cheapest_network_that_is_measured_good_enough() -> None:
    data = labelled()
    loose = lowbit.search(network(), method=WeightError, max_drop=30.0, data=data)
    strict = lowbit.search(network(), method=WeightError, max_drop=2.0, data=data)
    assert loose.cost["size"] <= strict.cost["size"]
    assert strict.float_metric == 1.0
    assert strict.found.metric is not None and strict.found.metric >= 0.98
    cheaper = [one for one in strict.frontier if one.metric is not None and one.cost["size"] < strict.cost["size"]]
    assert all(one.metric is not None and one.metric < 0.98 for one in cheaper)
    quantized = lowbit.quantize(network(), method="round_to_nearest", policy=strict.policy, calibration=[X[:32], X[32:]])
    assert lowbit.evaluate(quantized, data)["accuracy"] == strict.found.metric


def test_max_drop_stays_within_a_budget_that_is_given_beside_it() -> None:
    with pytest.raises(SpecError, match="no network of the frontier"):
        lowbit.search(network(), method=WeightError, max_drop=0.0, budget="average=2.1", data=labelled())
    found = lowbit.search(network(), method=WeightError, max_drop=100.0, budget="average=2.1", data=labelled())
    assert found.cost["average"] <= 2.1


def test_max_drop_that_no_network_meets_says_how_near_the_best_comes() -> None:
    with pytest.raises(SpecError, match="max_drop=0: no network of the frontier"):
        lowbit.search(network(), method=WeightError, max_drop=0.0, data=labelled(), candidates=(2, 3))


def test_what_is_missing_is_said() -> None:
    with pytest.raises(SpecError, match="what the network may cost"):
        lowbit.search(network(), method=WeightError, calibration=X)
    with pytest.raises(CalibrationError, match="sample="):
        lowbit.search(network(), method=WeightError, budget="average=4")
    with pytest.raises(DataError, match="labels"):
        lowbit.search(network(), method=WeightError, max_drop=1.0, calibration=X)
    with pytest.raises(SpecError, match="the least that these widths cost is 2 bits"):
        lowbit.search(network(), method=WeightError, budget="average=1", calibration=X)
    with pytest.raises(UnknownNameError, match="powr"):
        lowbit.search(network(), method=WeightError, budget="average=4", calibration=X, powr=3)


def test_a_method_that_passes_the_budget_is_not_believed() -> None:
    @dataclass
    class Greedy(WeightError):
        def search(self, problem: SearchProblem) -> Found:
            return Found({name: widths[0] for name, widths in problem.choices.items()}, 0.0)

    with pytest.raises(SpecError, match="not within the budget"):
        lowbit.search(network(), method=Greedy, budget="average=4", calibration=X)


def test_spreading_keeps_both_ends() -> None:
    assert spread(list(range(100)), 4) == [0, 33, 66, 99]  # type: ignore[arg-type, comparison-overlap]


def request_for(out: Path, **given: object) -> SearchRequest:
    method = f"{Path(__file__)}:WeightError"
    return SearchRequest(method=method, out=str(out), calibration_samples=32, **given)  # type: ignore[arg-type]


def test_files_hold_what_was_found_and_the_policy_serves_other_commands(tmp_path: Path) -> None:
    searched = search_and_write(request_for(tmp_path, budget=("size=12%",)))
    content = json.loads((tmp_path / "search.json").read_text())
    policy = BitPolicy.from_yaml(tmp_path / "policy.yaml")
    assert policy == searched.result.policy
    assert content["found"]["cost"]["size"] <= content["limits"]["size"] == pytest.approx(0.12 * content["reference"]["size"])
    assert content["sensitivity"].keys() == {name for name, bits in content["found"]["bits"].items() if name not in ("conv", "fc")}
    costs = [one["cost"]["size"] for one in content["frontier"]]
    losses = [one["loss"] for one in content["frontier"]]
    assert costs == sorted(costs) and losses == sorted(losses, reverse=True)
    page = (tmp_path / "report.html").read_text()
    assert "Predicted loss by layer and width" in page and page.count("<svg") == 3
    assert "http" not in page.replace("http://www.w3.org", "")


def test_then_quantizes_what_was_found_and_the_uniform_network_of_that_cost(tmp_path: Path) -> None:
    searched = search_and_write(request_for(tmp_path, budget=("average=4",), then="round_to_nearest"))
    found, uniform = searched.result.found, uniform_at_cost(searched.result)
    assert uniform is not None and uniform.name == "uniform 4/8"
    assert found.metric is not None and uniform.metric is not None and searched.result.float_metric is not None
    assert 0.5 < uniform.metric <= 1
    report = json.loads((tmp_path / "quantized" / "report.json").read_text())
    assert report["metrics"]["accuracy"]["quantized"] == found.metric
    assert "over stored" not in (tmp_path / "report.html").read_text()
    assert "measured</b>" in (tmp_path / "report.html").read_text()


@pytest.mark.slow
def test_a_ray_cluster_finds_the_same() -> None:
    pytest.importorskip("ray")
    settings = {"method": "zeroq_pareto", "budget": "average=4", "calibration": X, "progress": False}
    assert lowbit.search(network(), ray="local", **settings) == lowbit.search(network(), **settings)  # type: ignore[arg-type]


def test_sums_of_layers_are_not_set_beside_a_prediction_that_is_none() -> None:
    @dataclass
    class Interacting(WeightError):
        def search(self, problem: SearchProblem) -> Found:
            found = super().search(problem)
            return replace(found, loss=2 * (found.loss or 0.0))

    alone = lowbit.search(network(), method=WeightError, budget="average=4", calibration=X)
    together = lowbit.search(network(), method=Interacting, budget="average=4", calibration=X)
    assert any(one.loss is not None for one in alone.uniform)
    assert all(one.loss is None for one in together.uniform)
