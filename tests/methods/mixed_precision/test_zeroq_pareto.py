"""The sensitivity against another computation, the choice against all combinations."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.methods.mixed_precision.residual import X, combinations, network, problem
from torch import nn
from torch.nn import functional as F

import lowbit
from lowbit.errors import DataError, SpecError
from lowbit.methods.mixed_precision.zeroq_pareto import ZeroqPareto, sensitivity
from lowbit.network.insert import set_input_quantizer
from lowbit.quantizers import UniformQuantizer
from lowbit.quantizers.running_range import MinMaxWeightQuantizer
from lowbit.spec import LayerBits


def test_omega_is_the_mean_divergence_with_one_weight_quantized_and_norms_and_activations_in_float() -> None:
    asked = problem()
    omega = sensitivity(asked, "kl")
    for name, bits in (("block1.conv2", 2), ("head", 4)):
        other = copy.deepcopy(asked.model)
        weight = other.get_submodule(name).weight.data
        lo, hi = weight.flatten(1).amin(1), weight.flatten(1).amax(1)
        s = (2**bits - 1) / (hi - lo)  # the program's arithmetic: codes per unit, signed codes
        z = (s * lo).round() + 2 ** (bits - 1)
        s, z = (t.view(-1, *(1 for _ in weight.shape[1:])) for t in (s, z))
        weight.copy_(((s * weight - z).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) + z) / s)
        with torch.no_grad():
            expected = F.kl_div(other(X).log_softmax(1), asked.model(X).softmax(1), reduction="batchmean")
        assert omega({name: LayerBits(bits, 8)}) == pytest.approx(float(expected), rel=1e-3)


def test_omega_is_zero_in_float_and_falls_with_the_bits() -> None:
    asked = problem("average=4", candidates=(2, 4, 8, 32))
    found = ZeroqPareto().search(asked)
    for widths in found.sensitivity.values():
        assert widths[LayerBits(None, 8)] == 0.0
        assert 0 < widths[LayerBits(8, 8)] < widths[LayerBits(4, 8)] < widths[LayerBits(2, 8)]


@pytest.mark.parametrize("budget", ["average=3.5", "size=30%,bops=6%"])
def test_no_combination_within_the_budget_has_a_smaller_sum(budget: str) -> None:
    asked = problem(budget)
    found = ZeroqPareto().search(asked)
    best = min(sum(found.sensitivity[name][width] for name, width in bits.items()) for bits in combinations(asked))
    assert asked.fits(found.bits) and found.loss == pytest.approx(best)


def test_the_frontier_is_monotone_and_whole_without_a_budget() -> None:
    found = ZeroqPareto().search(problem())
    costs, losses = [option.cost for option in found.frontier], [option.loss for option in found.frontier]
    assert costs == sorted(set(costs)) and losses == sorted(set(losses), reverse=True)
    assert {bits.weight for bits in found.frontier[0].bits.values()} == {2}
    assert found.frontier[-1].bits == found.bits
    assert len(ZeroqPareto(options=5).search(problem()).frontier) == 5


def test_activations_are_quantized_too_where_their_widths_are_searched() -> None:
    asked = problem(activation_bits=(8, 2))
    omega = sensitivity(asked, "mse")
    other = network()
    quantizer = UniformQuantizer(2, signed=False, symmetric=False)
    with torch.no_grad():
        quantizer.initialize(other.block1(other.stem(X)))
        expected = other(X)
        set_input_quantizer(other.block2.conv1, quantizer)
        other.block2.conv1.weight.data = MinMaxWeightQuantizer(8)(other.block2.conv1.weight)
        error = (other(X) - expected).square().mean()
    assert omega({"block2.conv1": LayerBits(8, 2)}) == pytest.approx(float(error), rel=1e-4)
    assert omega({"block2.conv1": LayerBits(8, 8)}) < 0.1 * float(error)


def test_the_loss_increase_needs_labels_and_is_that_of_the_task() -> None:
    with pytest.raises(DataError, match="zeroq_pareto with distance='loss' needs labels"):
        ZeroqPareto(distance="loss").search(problem())
    labels = torch.arange(len(X)) % 5
    asked = problem("average=4", batches=[(X, labels)], has_labels=True)
    found = ZeroqPareto(distance="loss").search(asked)
    other = copy.deepcopy(asked.model)
    other.stem.weight.data = MinMaxWeightQuantizer(2)(other.stem.weight.detach())
    with torch.no_grad():
        expected = F.cross_entropy(other(X), labels) - F.cross_entropy(asked.model(X), labels)
    assert found.sensitivity["stem"][LayerBits(2, 8)] == pytest.approx(float(expected), abs=1e-6)


def test_outputs_that_are_no_probabilities_of_classes_are_refused() -> None:
    with pytest.raises(SpecError, match=r"a network for Regression gives none\. Pass distance='mse'"):
        ZeroqPareto().search(problem(task=lowbit.Regression()))
    assert ZeroqPareto(distance="mse").search(problem("average=3", task=lowbit.Regression())).loss > 0


def test_the_public_function_gives_the_same_each_time_and_leaves_the_network_alone() -> None:
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first, second = (lowbit.search(model, method="zeroq_pareto", budget="size=30%", calibration=X, progress=False) for _ in range(2))
    assert first.found == second.found and first.frontier == second.frontier
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert isinstance(model.stem, nn.Conv2d)
