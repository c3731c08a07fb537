"""Costs of a real network, limits, and the policy that comes of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lowbit
from lowbit.assignment.budget import Budget
from lowbit.assignment.problem import SearchProblem, make_problem, own_answers_loss
from lowbit.errors import LayerError, SpecError
from lowbit.inputs import Inputs
from lowbit.measure import compute_cost, model_size
from lowbit.measure.latency_table import LatencyTable

X = torch.rand(8, 2, 6, 6, generator=torch.Generator().manual_seed(0))


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU()]
    layers += [nn.Conv2d(8, 16, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3)]
    return nn.Sequential(*layers).eval()


def problem(budget: object = (), **given: object) -> SearchProblem:
    model = network()
    settings = {"candidates": (2, 4, 8), "activation_bits": (8,), "first_last": 8, "task": lowbit.Classification(), **given}
    return make_problem(model, Inputs.of(X, model), budget=Budget.of(budget), **settings)  # type: ignore[arg-type]


def test_the_first_and_the_last_layer_are_not_searched() -> None:
    found = problem()
    assert list(found.layers) == ["3", "5"]
    assert found.fixed == {"0": lowbit.LayerBits(8, 8), "9": lowbit.LayerBits(8, 8)}
    assert found.choices["3"] == (lowbit.LayerBits(8, 8), lowbit.LayerBits(4, 8), lowbit.LayerBits(2, 8))
    assert list(problem(first_last=None).layers) == ["0", "3", "5", "9"]


def test_costs_are_those_of_the_quantized_network() -> None:
    found = problem()
    for bits in found.uniform().values():
        quantized = lowbit.quantize(network(), method="round_to_nearest", policy=found.policy(bits), calibration=X)
        assert found.costs["size"].of(bits) == model_size(quantized).total_bytes
        assert found.costs["bops"].of(bits) == sum(layer.bops for layer in compute_cost(quantized, X).values())
        assert {name: own for name, own in lowbit.get_bits(quantized).items() if name in bits} == bits


def test_average_bits_weigh_each_layer_by_its_weights() -> None:
    found = problem()
    bits = {"3": lowbit.LayerBits(8, 8), "5": lowbit.LayerBits(2, 8)}
    assert found.costs["average"].of(bits) == pytest.approx((72 * 8 + 128 * 2) / 200)


def test_shares_are_of_the_float_network_and_of_eight_bits_for_time() -> None:
    table = LatencyTable("ms", {name: {"2/8": 1.0, "4/8": 2.0, "8/8": 5.0} for name in "0359"})
    found = problem("size=50%,bops=8%,latency=60%", latency_table=table)
    macs = sum(compute_cost(network(), X)[name].macs for name in "0359")
    assert found.limits == {"size": 0.5 * model_size(network()).float_bytes, "bops": 0.08 * macs * 1024, "latency": 12.0}
    assert found.main == "size"
    assert [found.fits(bits) for bits in found.uniform().values()] == [False, False, True]


def test_a_budget_that_cannot_be_met_names_the_least_possible_cost() -> None:
    with pytest.raises(SpecError, match=r"budget average=1\.5: .* the least that these widths cost is 2 bits"):
        problem("average=1.5")


@pytest.mark.parametrize("candidates", [(), (0, 4), (4, 9), (4, 4)])
def test_candidates_are_different_widths_from_1_to_8(candidates: tuple[int, ...]) -> None:
    with pytest.raises(SpecError, match="candidates"):
        problem(candidates=candidates)


def test_a_latency_budget_needs_a_table_of_this_network() -> None:
    with pytest.raises(SpecError, match="latency_table="):
        problem("latency=60%")
    with pytest.raises(SpecError, match="no layer '3', '5', '9'"):
        problem("latency=60%", latency_table=LatencyTable("ms", {"0": {"8/8": 1.0}}))
    with pytest.raises(SpecError, match="layer '3' at 8/8 bits"):
        problem("latency=60%", latency_table=LatencyTable("ms", {name: {"4/8": 1.0, "2/8": 1.0} for name in "3509"}))


def test_networks_without_a_layer_to_search_are_refused() -> None:
    with pytest.raises(LayerError, match="no layer to search"):
        make_problem(
            nn.Linear(4, 2), Inputs((torch.rand(2, 4),)), budget=Budget(), candidates=(4, 8), activation_bits=(8,), first_last=8,
            task=lowbit.Classification(),
        )  # fmt: skip
    quantized = lowbit.quantize(network(), method="round_to_nearest", calibration=X)
    with pytest.raises(LayerError, match="quantized already"):
        make_problem(
            quantized, Inputs((X,)), budget=Budget(), candidates=(4,), activation_bits=(8,), first_last=8, task=lowbit.Classification()
        )


def test_random_numbers_depend_on_the_seed_and_the_purpose_alone() -> None:
    def draw(seed: int, purpose: str) -> float:
        return float(torch.rand((), generator=problem(seed=seed).generator(purpose)))

    assert draw(0, "a") == draw(0, "a")
    assert len({draw(0, "a"), draw(0, "b"), draw(1, "a")}) == 3


def test_without_labels_the_loss_is_flat_at_the_float_network() -> None:
    logits = torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(own_answers_loss(logits), logits, create_graph=True)
    assert gradient.abs().max() < 1e-15
    p = logits.detach().softmax(-1)[0]
    hessian = torch.autograd.functional.hessian(own_answers_loss, logits.detach())[0, :, 0]
    torch.testing.assert_close(hessian, torch.diag(p) - torch.outer(p, p))
