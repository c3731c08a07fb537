"""Errors of blocks by hand, interactions against joint measurements, the genetic search against all combinations."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from tests.methods.mixed_precision.residual import X, combinations, network, problem
from tests.networks import ReusedNet
from torch import nn

import lowbit
from lowbit.assignment.budget import Budget
from lowbit.assignment.problem import SearchProblem, make_problem
from lowbit.errors import SpecError
from lowbit.inputs import Calibration, Inputs
from lowbit.methods.mixed_precision.brecq_genetic import BrecqGenetic, Prediction, drawn_residual, unit_errors
from lowbit.spec import LayerBits

TWO, FOUR, EIGHT = LayerBits(2, 8), LayerBits(4, 8), LayerBits(8, 8)
nearest = partial(BrecqGenetic, reconstruct=False)  # in a moment
BLOCKS = {"stem": ("stem",), "block1": ("block1.conv1", "block1.conv2"), "block2": ("block2.conv1", "block2.conv2"), "head": ("head",)}


def folded(asked: SearchProblem, method: BrecqGenetic) -> tuple[SearchProblem, partial[object]]:
    calibrated = method.calibrate(asked)
    return replace(asked, model=calibrated.model), partial(unit_errors, calibrated=calibrated)


def test_residuals_have_the_fisher_information_as_their_covariance() -> None:
    asked, logits = problem(), torch.tensor([[2.0, 0.0, -1.0]]).repeat(40_000, 1)
    p = logits[0].softmax(0)
    drawn = drawn_residual(asked, logits, torch.Generator().manual_seed(0))
    torch.testing.assert_close(drawn.mean(0), torch.zeros(3), atol=0.01, rtol=0)
    torch.testing.assert_close(drawn.T @ drawn / len(drawn), torch.diag(p) - torch.outer(p, p), atol=0.01, rtol=0)
    maps = drawn_residual(asked, logits.T.reshape(1, 3, 200, 200), torch.Generator().manual_seed(0))  # classes at each pixel
    torch.testing.assert_close(maps[0].square().mean((1, 2)), p * (1 - p), atol=0.01, rtol=0)
    labels = drawn_residual(replace(asked, task=lowbit.MultiLabel()), logits, torch.Generator().manual_seed(0))
    torch.testing.assert_close(labels.square().mean(0), logits[0].sigmoid() * (1 - logits[0].sigmoid()), atol=0.01, rtol=0)
    values = drawn_residual(replace(asked, task=lowbit.Regression()), logits, torch.Generator().manual_seed(0))
    torch.testing.assert_close(values.square().mean(0), torch.ones(3), atol=0.03, rtol=0)


def test_blocks_of_the_network_are_the_units_and_norms_are_folded() -> None:
    asked = problem()
    calibrated = nearest().calibrate(asked)
    assert dict(calibrated.units) == BLOCKS
    assert {name: list(widths) for name, widths in calibrated.weights.items()} == {name: [2, 4, 8] for name in asked.choices}
    torch.testing.assert_close(calibrated.model(X), asked.model(X), atol=1e-4, rtol=1e-4)
    norm = asked.model.block1.bn1
    scale = (norm.weight / (norm.running_var + norm.eps).sqrt())[:, None, None, None]
    torch.testing.assert_close(
        calibrated.weights["block1.conv1"][8], (asked.model.block1.conv1.weight * scale).detach(), atol=0.02, rtol=0.02
    )


def test_an_error_is_that_of_the_block_output_with_one_layer_quantized() -> None:
    asked, measure = folded(problem(), nearest())
    weights, model = measure.keywords["calibrated"].weights, asked.model
    other = copy.deepcopy(model)
    other.block1.conv1.weight.data = weights["block1.conv1"][2]
    with torch.no_grad():
        read = model.stem(X)
        difference = other.block1(read.clone()) - model.block1(read.clone())
    assert measure(asked, loss="mse")({"block1.conv1": TWO}) == pytest.approx(float(difference.square().mean()), rel=1e-4)


def test_fisher_weights_are_residuals_carried_back_to_the_block_output() -> None:
    asked, measure = folded(problem(batches=(X,)), nearest())
    model, weights = asked.model, measure.keywords["calibrated"].weights
    found = measure(asked, loss="fisher")({"block1.conv2": TWO})
    other = copy.deepcopy(model)
    other.block1.conv2.weight.data = weights["block1.conv2"][2]
    output = model.block1(model.stem(X)).detach().requires_grad_()
    logits = model.head(model.block2(output.clone()).mean((2, 3)))
    residual = drawn_residual(asked, logits, asked.generator("gradients block1"))
    (gradient,) = torch.autograd.grad((logits * residual).sum(), output)
    with torch.no_grad():
        difference = other.block1(model.stem(X)) - output
    assert found == pytest.approx(float((difference * gradient).square().sum() / 2 / len(X)), rel=1e-3)


def test_the_fisher_error_of_the_last_layer_is_the_divergence_to_second_order() -> None:
    asked, measure = folded(problem(batches=(X.repeat(40, 1, 1, 1),), candidates=(4, 8)), nearest())
    model = copy.deepcopy(asked.model)
    model.head.weight.data = measure.keywords["calibrated"].weights["head"][4]
    with torch.no_grad():
        logits, others = asked.model(X), model(X)
        p = logits.softmax(1)
        expected = ((others - logits).square() * p * (1 - p)).sum(1).mean() / 2  # the diagonal of the Fisher information
    assert measure(asked, loss="fisher")({"head": FOUR}) == pytest.approx(float(expected), rel=0.15)


def test_two_bits_in_a_whole_block_are_predicted_as_they_were_measured_together() -> None:
    asked = problem()
    method = nearest()
    prediction = method.predict(asked)
    inner, measure = folded(asked, method)
    error = measure(inner, loss="fisher")
    both = {"block1.conv1": TWO, "block1.conv2": TWO}
    bits = {**dict.fromkeys(asked.choices, EIGHT), **both}
    rest = sum(prediction.diagonal[name][EIGHT] for name in asked.choices if name not in both)
    assert prediction(bits) - rest == pytest.approx(error(both), rel=1e-9)
    alone = prediction.diagonal["block1.conv1"][TWO] + prediction.diagonal["block1.conv2"][FOUR]
    assert prediction({**bits, "block1.conv2": FOUR}) - rest == pytest.approx(alone, rel=1e-9)
    assert set(prediction.joint) == {BLOCKS["block1"], BLOCKS["block2"]}
    assert abs(prediction.joint[BLOCKS["block1"]]) > 1e-3 * error(both)


def test_large_blocks_add_the_interactions_of_pairs() -> None:
    names = ("a", "b", "c")
    diagonal = {name: {TWO: 1.0, FOUR: 0.25} for name in names}
    pairs = {("a", "b"): 0.5, ("a", "c"): -0.25, ("b", "c"): 0.125}
    prediction = Prediction(diagonal, pairs, [names])
    assert prediction(dict.fromkeys(names, TWO)) == 3.0 + 0.375
    assert prediction({"a": TWO, "b": FOUR, "c": TWO}) == 2.25 - 0.25
    whole = Prediction(diagonal, {**pairs, names: 2.0}, [names])
    assert whole(dict.fromkeys(names, TWO)) == 5.0
    assert nearest(joint_layers=2)._joint(names) == list(pairs)
    assert nearest(joint_layers=3)._joint(names) == [*pairs, names]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("budget", ["average=3", "average=4.5", "size=35%,bops=5%"])
def test_no_combination_within_the_budget_is_predicted_to_lose_less(budget: str, seed: int) -> None:
    asked = problem(budget, seed=seed)
    method, prediction = nearest(), table(seed)
    bits, history = method.evolve(asked, prediction)
    best = min(map(prediction, combinations(asked)))
    assert asked.fits(bits) and prediction(bits) == pytest.approx(best)
    assert history == sorted(history, reverse=True) and history[-1] == prediction(bits)


def table(seed: int) -> Prediction:
    """A table with interactions of both signs as large as the losses themselves."""
    generator = torch.Generator().manual_seed(seed)
    losses = torch.rand(6, 3, generator=generator).sort(descending=True).values * torch.randn(6, 1, generator=generator).exp()
    names = [name for block in BLOCKS.values() for name in block]
    diagonal = {name: dict(zip((TWO, FOUR, EIGHT), row, strict=True)) for name, row in zip(names, losses.tolist(), strict=True)}
    return Prediction(diagonal, {BLOCKS["block1"]: 1.0, BLOCKS["block2"]: -0.3}, list(BLOCKS.values()))


def test_a_larger_budget_never_loses_more() -> None:
    found = [nearest().evolve(problem(f"average={bits}"), table(7)) for bits in (2, 2.5, 3, 3.5, 4, 5, 6, 8)]
    losses = [table(7)(bits) for bits, _ in found]
    assert losses == sorted(losses, reverse=True) and losses[0] > losses[-1]


def test_the_same_seed_finds_the_same() -> None:
    model = network()
    first, second = (
        lowbit.search(
            model,
            method="brecq_genetic",
            budget="average=3",
            calibration=X,
            first_last_bits=None,
            progress=False,
            seed=3,
            generations=5,
            reconstruct=False,
        )
        for _ in range(2)
    )
    assert first.to_dict() == second.to_dict()
    assert first.facts["interactions"].keys() == {"block1.conv1 + block1.conv2", "block2.conv1 + block2.conv2"}


def test_reconstruction_lowers_the_error_at_two_bits_and_a_killed_search_keeps_it(tmp_path: Path) -> None:
    asked = problem(candidates=(2,), work_dir=tmp_path, first_last=8)  # errors of a stem at 2 bits would be compensated too
    learned = BrecqGenetic(iterations=60, loss="mse")
    weights = learned.calibrate(asked).weights
    assert list((tmp_path / "brecq_2_bits").rglob("*.safetensors"))
    again = learned.calibrate(asked).weights
    assert all(torch.equal(again[name][2], weights[name][2]) for name in weights)
    errors = []
    for method in (nearest(loss="mse"), learned):
        inner, measure = folded(asked, method)
        errors.append(measure(inner, loss="mse")(dict.fromkeys(BLOCKS["block1"], TWO)))
    assert errors[1] < 0.9 * errors[0]


def test_layers_that_run_twice_are_measured_at_the_output_of_the_network() -> None:
    model = ReusedNet().eval()
    x = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    asked = make_problem(
        model, Inputs.of(x, model), budget=Budget.of("average=4"), candidates=(2, 8), activation_bits=(None,), first_last=None,
        task=lowbit.Classification(), calibration=Calibration.of(x, model), batches=(x,),
    )  # fmt: skip
    method = nearest(loss="mse")
    assert method.calibrate(asked).units == {"stem": ("stem",), "head": ("head",), "": ("block.0",)}
    found = method.search(asked)
    other = copy.deepcopy(asked.model)
    other.block[0].weight.data = method.calibrate(asked).weights["block.0"][2]
    with torch.no_grad():
        expected = (other(x) - asked.model(x)).square().mean()
    assert found.sensitivity["block.0"][LayerBits(2, None)] == pytest.approx(float(expected), rel=1e-4)


def test_weights_that_are_only_stored_in_few_bits_are_searched_too() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.memory, self.head = nn.Embedding(20, 8), nn.GRU(8, 6, batch_first=True), nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.memory(self.words(x))[0].mean(1))

    torch.manual_seed(0)
    tokens = torch.randint(20, (8, 5))
    found = lowbit.search(
        Words(), method="brecq_genetic", reconstruct=False, budget="average=5", calibration=tokens, first_last_bits=None, progress=False
    )
    assert set(found.found.bits) == {"words", "memory.weight_ih_l0", "memory.weight_hh_l0", "head"}
    assert all(
        losses[min(losses, key=lambda b: b.weight)] > losses[max(losses, key=lambda b: b.weight)] for losses in found.sensitivity.values()
    )


def test_what_it_cannot_do_is_an_error() -> None:
    with pytest.raises(SpecError, match=r"pass budget=, such as budget='size=10%'"):
        nearest().search(problem())
    with pytest.raises(SpecError, match=r"supports 2 to 8 weight bits, got candidates \[1, 4\]"):
        nearest().search(problem("average=4", candidates=(1, 4)))
    with pytest.raises(SpecError, match="mutation must be"):
        BrecqGenetic(mutation=0.0)
