from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

import lowbit
from lowbit import Granularity
from lowbit.errors import SpecError
from lowbit.methods.mixed_precision.hawq import (
    best_within,
    descending,
    omega,
    ordered_assignments,
    perturbation,
    scores,
    totals,
)
from lowbit.methods.mixed_precision.hawq_quantizers import HawqActivation, HawqWeight, activation_range, weight_range

X = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
LABELS = torch.randint(3, (32,), generator=torch.Generator().manual_seed(1))
W = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(2))


def network(scale: float = 1.0) -> nn.Sequential:
    """Linear layers and tanh; the loss is more curved in a layer whose output is scaled up."""
    torch.manual_seed(0)
    layers = [nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)]
    model = nn.Sequential(*layers)
    with torch.no_grad():
        model[6].weight.mul_(scale)
    return model


def search(**given: object) -> lowbit.SearchResult:
    settings = {"method": "hawq", "budget": "average=4", "data": [(X, LABELS)], "first_last_bits": None, "progress": False, **given}
    return lowbit.search(settings.pop("model", network()), **settings)  # type: ignore[arg-type]


# Quantizers


def test_weights_are_scaled_by_the_largest_magnitude_of_a_channel() -> None:
    w = torch.tensor([[1.4, -0.9, 0.1], [0.0, 0.0, 0.0], [-7.0, 3.5, 1.5]])
    quantizer = HawqWeight(4)  # n = 7
    assert quantizer.grid(w).scale.flatten().tolist() == pytest.approx([0.2, 1e-8 / 7, 1.0])
    # -0.9 / 0.2 = -4.5, and 1.5, 3.5 tie: half to even
    torch.testing.assert_close(quantizer(w), torch.tensor([[1.4, -0.8, 0.0], [0.0, 0.0, 0.0], [-7.0, 4.0, 2.0]]))
    assert quantizer.encode(w).codes.tolist() == [[7, -4, 0], [0, 0, 0], [-7, 4, 2]]


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_lowest_code_is_never_used_without_a_percentile(bits: int) -> None:
    codes = HawqWeight(bits).encode(W).codes
    assert int(codes.min()) >= -(2 ** (bits - 1)) + 1 and all(len(channel.unique()) <= 2**bits - 1 for channel in codes)


def test_the_perturbation_shrinks_with_every_bit() -> None:
    found = [perturbation(W, bits) for bits in range(2, 9)]
    assert found == sorted(found, reverse=True)
    assert found[0] == pytest.approx(float((HawqWeight(2)(W) - W).square().sum()), rel=1e-5)
    assert perturbation(W, 2, Granularity.tensor()) > found[0]


def test_the_gradient_passes_whatever_is_clipped() -> None:
    for quantizer in (HawqWeight(3, percentile=80), HawqActivation(3, is_signed=True)):
        quantizer.initialize(W / 10)
        x = W.clone().requires_grad_()
        quantizer.eval()(x).backward(torch.arange(W.numel()).view_as(W).float())
        assert x.grad is not None
        torch.testing.assert_close(x.grad.flatten(), torch.arange(W.numel()).float())


def test_percentiles_are_those_of_the_authors() -> None:
    values = torch.arange(1.0, 11)
    assert [end.item() for end in weight_range(values[None], 75)] == [3, 8]  # ceil(2.5) and ceil(7.5)
    assert [end.item() for end in weight_range(values[None])] == [1, 10]
    assert [end.item() for end in activation_range(values, is_signed=False, percentile=75)] == [0, 8]  # round(7.5), half to even
    assert [end.item() for end in activation_range(values - 6, is_signed=True, percentile=90)] == [-4, 3]  # the ninth from either end
    assert [end.item() for end in activation_range(values, is_signed=False, percentile=1)] == [0, 1]


def test_the_range_runs_with_the_batches_and_stays_in_evaluation() -> None:
    quantizer = HawqActivation(2, momentum=0.75)
    quantizer(torch.tensor([0.0, 3.0]))
    assert (quantizer.lower.item(), quantizer.upper.item()) == (0, 3)
    quantizer.project()
    y = quantizer(torch.tensor([0.0, 0.8, 7.0]))
    assert quantizer.upper.item() == 4  # 3/4 of 3 and 1/4 of 7
    torch.testing.assert_close(y, torch.tensor([0.0, 4 / 3, 4.0]))
    quantizer.eval()(torch.tensor([100.0]))
    assert quantizer.upper.item() == 4


def test_a_step_moves_the_range_once_by_all_that_it_saw() -> None:
    quantizer = HawqActivation(2, momentum=0.75)
    quantizer(torch.tensor([0.0, 3.0]))
    quantizer.project()
    batch = torch.tensor([0.0, 0.8, 7.0])
    assert torch.equal(quantizer(batch), quantizer(batch))
    quantizer(torch.tensor([0.0, 11.0]))
    assert quantizer.upper.item() == 5  # 3/4 of 3 and 1/4 of 11


def test_a_momentum_of_minus_one_keeps_the_extremes() -> None:
    quantizer = HawqActivation(4, is_signed=True, momentum=-1)
    for batch in ([-1.0, 2.0], [0.5, 1.0], [-3.0, 0.0]):
        quantizer(torch.tensor(batch))
    assert (quantizer.lower.item(), quantizer.upper.item()) == (-3, 2)
    assert quantizer.grid(X).scale.item() == pytest.approx(3 / 7)


def test_zeros_stay_zeros() -> None:
    for quantizer in (HawqActivation(4), HawqActivation(4, is_signed=True)):
        assert quantizer(torch.zeros(5)).tolist() == [0] * 5
        assert quantizer.upper.item() == 0


@pytest.mark.parametrize(
    "quantizer", [HawqWeight(4), HawqActivation(4), HawqActivation(4, is_signed=True), HawqWeight(4, granularity=Granularity.group(9))]
)
def test_codes_decode_to_the_forward_pass_at_every_width(quantizer: HawqWeight | HawqActivation) -> None:
    quantizer.initialize(W)
    for bits in (2, 8, 4):
        quantizer.eval().set_bit_width(bits)
        assert torch.equal(quantizer.encode(W).decode(), quantizer(W))


def test_widths_without_a_grid_are_refused() -> None:
    with pytest.raises(SpecError, match="2 to 8 bits, got 1"):
        HawqWeight(1)
    with pytest.raises(SpecError, match="2 to 8 bits, got 1"):
        HawqActivation(1, is_signed=True)
    assert HawqActivation(1).qmax == 1


# Scores and orders


def test_precision_follows_lambda_over_n_and_retraining_lambda_times_the_perturbation() -> None:
    eigenvalues, counts = [8.0, -6.0, 1.0], [100, 10, 10]
    score = scores(eigenvalues, counts)
    assert score == pytest.approx([0.08, 0.6, 0.1]) and descending(score) == [1, 2, 0]
    table = omega([abs(value) for value in eigenvalues], [[4.0, 1.0], [2.0, 0.5], [9.0, 3.0]])
    assert table == [[32, 8], [12, 3], [9, 3]] and descending([row[0] for row in table]) == [0, 1, 2]
    assert descending(scores([3 * value for value in eigenvalues], counts)) == [1, 2, 0]


def test_equal_values_keep_their_order() -> None:
    assert descending([1.0, 2.0, 1.0, 2.0]) == [1, 3, 0, 2]


@pytest.mark.parametrize(("layers", "widths"), [(1, 1), (3, 1), (1, 4), (4, 3), (6, 4)])
def test_all_assignments_along_an_order_are_there_once(layers: int, widths: int) -> None:
    order = list(reversed(range(layers)))
    found = ordered_assignments(order, widths).tolist()
    wanted = [row for row in itertools.product(range(widths), repeat=layers) if sorted(row, reverse=True) == list(row)]
    assert sorted(map(tuple, found)) == sorted(wanted)
    assert len(found) == math.comb(layers + widths - 1, widths - 1)


def test_too_many_assignments_are_refused() -> None:
    with pytest.raises(SpecError, match="pass fewer candidates"):
        ordered_assignments(range(100), 8)


def test_the_assignment_uses_most_of_the_budget_and_of_equal_ones_loses_least() -> None:
    costs = [[[8.0, 4.0], [8.0, 4.0], [8.0, 4.0]]]
    assignments = ordered_assignments([2, 0, 1], 2)
    losses = [[0.0, 1.0]] * 3
    assert assignments[best_within(costs, [17], losses, assignments, "fit")].tolist() == [1, 1, 0]  # type: ignore[index]
    assert assignments[best_within(costs, [20], losses, assignments, "fit")].tolist() == [0, 1, 0]  # type: ignore[index]
    assert best_within(costs, [11], losses, assignments) is None
    both = [*costs, [[1.0, 9.0], [0.0, 0.0], [0.0, 0.0]]]
    assert assignments[best_within(both, [24, 5], losses, assignments, "fit")].tolist() == [0, 0, 0]  # type: ignore[index]
    free = [[[4.0, 4.0]] * 3]
    assert assignments[best_within(free, [12], [[2.0, 1.0]] * 3, assignments, "fit")].tolist() == [1, 1, 1]  # type: ignore[index]
    assert totals(costs[0], assignments).tolist() == [12, 16, 20, 24]


def test_the_assignment_of_least_omega_within_the_budget_is_preferred() -> None:
    costs, assignments = [[[8.0, 4.0, 2.0]] * 2], ordered_assignments([0, 1], 3)
    losses = [[0.0, 5.0, 6.0], [0.0, 1.0, 2.0]]
    assert assignments[best_within(costs, [10], losses, assignments)].tolist() == [0, 2]  # type: ignore[index]
    assert assignments[best_within(costs, [9], losses, assignments)].tolist() == [1, 1]  # type: ignore[index]
    assert assignments[best_within(costs, [99], [[1.0, 1.0, 1.0]] * 2, assignments)].tolist() == [2, 2]  # type: ignore[index]


# The search


def exact_top(model: nn.Module, name: str) -> float:
    double = nn.Sequential(*model).double()
    weight = double.get_parameter(name).detach()

    def loss(values: Tensor) -> Tensor:
        return nn.functional.cross_entropy(torch.func.functional_call(double, {name: values}, X.double()), LABELS)

    values = torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, weight).reshape(weight.numel(), -1))
    return float(values[values.abs().argmax()])


def test_eigenvalues_are_those_of_the_exact_hessian_and_bits_follow_their_order() -> None:
    found = search(tolerance=1e-5, budget="average=3.7")
    top, score = found.facts["eigenvalues"], found.facts["scores"]
    for name in found.searched:
        assert top[name] == pytest.approx(exact_top(network(), f"{name}.weight"), rel=0.01)  # type: ignore[index]
        assert score[name] == pytest.approx(abs(top[name]) / network().get_parameter(f"{name}.weight").numel())  # type: ignore[index]
    ordered = sorted(found.searched, key=lambda name: -score[name])  # type: ignore[index]
    bits = [found.found.bits[name].weight or 32 for name in ordered]
    assert bits == sorted(bits, reverse=True) and len(set(bits)) > 1
    assert found.facts["unsettled"] == []


def test_whole_matrices_give_the_same_eigenvalues() -> None:
    by_power, exact = search(tolerance=1e-5), search(eigenvalues="exact")
    for name, value in exact.facts["eigenvalues"].items():  # type: ignore[attr-defined]
        assert by_power.facts["eigenvalues"][name] == pytest.approx(value, rel=0.01)  # type: ignore[index]


def test_what_is_predicted_is_omega_and_retraining_goes_by_it() -> None:
    found = search()
    for name in found.searched:
        weight, top = network().get_parameter(f"{name}.weight"), abs(found.facts["eigenvalues"][name])  # type: ignore[index]
        for bits, loss in found.sensitivity[name].items():
            assert loss == pytest.approx(top * perturbation(weight, bits.weight or 8))
    lost = {name: found.sensitivity[name][found.found.bits[name]] for name in found.searched}
    assert found.found.loss == pytest.approx(sum(lost.values()))
    assert list(found.order) == sorted(lost, key=lambda name: -lost[name])


def test_a_layer_of_larger_curvature_never_gets_fewer_bits() -> None:
    def place(scale: float) -> int:
        score = search(model=network(scale)).facts["scores"]
        return sorted(score, key=lambda name: -score[name]).index("4")  # type: ignore[arg-type, index]

    assert place(4.0) <= place(1.0)  # the weights behind layer 4 are larger


def test_no_larger_assignment_along_the_order_fits() -> None:
    found = search(budget="average=4.5", prefer="fit")
    score = [found.facts["scores"][name] for name in found.searched]  # type: ignore[index]
    counts = [network().get_parameter(f"{name}.weight").numel() for name in found.searched]
    averages = totals([[count * bits / sum(counts) for bits in (8, 4, 2)] for count in counts], ordered_assignments(descending(score), 3))
    assert found.cost["average"] == pytest.approx(averages[averages <= 4.5].max())


def test_unlabelled_samples_are_enough() -> None:
    found = search(data=None, calibration=X)
    assert min(found.facts["eigenvalues"].values()) > 0  # type: ignore[attr-defined]  # a Gauss-Newton matrix has no negative one


def test_results_do_not_depend_on_what_else_is_searched() -> None:
    every, inner = search(), search(first_last_bits=8)
    assert all(every.facts["eigenvalues"][name] == value for name, value in inner.facts["eigenvalues"].items())  # type: ignore[index, attr-defined]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"activation_bits": (4, 8)}, "several widths of activations"),
        ({"candidates": (1, 4)}, "may have 1 bit"),
    ],
)
def test_what_it_cannot_choose_is_refused(given: dict[str, object], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        search(**given)
