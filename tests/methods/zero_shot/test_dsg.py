"""Slack and emphasis by hand, their limits, and samples that differ more than zeroq's."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tests.synthesis.networks import seen, small
from torch import Tensor, nn

import lowbit
from lowbit.inputs import Inputs
from lowbit.methods.zero_shot.dsg import Dsg, Slack, slack_distance, total_variation
from lowbit.methods.zero_shot.zeroq import ZeroqSamples, statistic_distance
from lowbit.models import load_default
from lowbit.synthesis.problem import SynthesisProblem, make_problem, normal


def problem_of(count: int = 4) -> SynthesisProblem:
    return make_problem(small(), Inputs((torch.zeros(1, 2, 6, 6),)), count=count)


def test_within_the_slack_there_is_no_loss_and_no_gradient() -> None:
    statistic = torch.tensor([[0.5, 3.0], [1.5, -2.0]], requires_grad=True)
    loss = slack_distance(torch.tensor([1.0, 1.0]), statistic, 1.0, torch.tensor([1.0, 2.0]))
    loss.backward()
    assert float(loss.detach()) == (1 * 1 + 2 * 4) / 2
    assert statistic.grad is not None and statistic.grad.tolist() == [[0.0, 1.0], [0.0, -4.0]]


def test_slack_zero_without_emphasis_is_the_loss_of_zeroq_bit_for_bit() -> None:
    target, statistic = torch.randn(7), torch.randn(5, 7)
    assert torch.equal(slack_distance(target, statistic, 0.0), statistic_distance(target, statistic))
    problem = problem_of()
    x = problem.draw(normal)
    plain, zeroq = Dsg(enhance=False, quantile=0.0), ZeroqSamples()
    assert plain.slack(problem) == [Slack(0.0, 0.0)] * 2
    assert torch.equal(plain.loss(problem, x, range(4), plain.slack(problem)), zeroq.loss(problem, x, range(4)))


def test_endless_slack_leaves_the_term_of_the_inputs_and_more_slack_is_never_more_loss() -> None:
    problem, method = problem_of(), Dsg()
    x = problem.draw(normal)
    inputs_alone = torch.stack(method.input_terms(problem, x)).sum()
    assert torch.equal(method.loss(problem, x, range(4), [Slack(math.inf, math.inf)] * 2), inputs_alone)
    losses = [float(method.loss(problem, x, range(4), [Slack(slack, slack)] * 2)) for slack in (0, 0.05, 0.1, 0.3, 1, 10)]
    assert losses == sorted(losses, reverse=True) and losses[0] > losses[-1]


def test_the_slack_is_the_quantile_of_the_gaps_of_noise_and_at_one_noise_has_no_loss() -> None:
    problem, method = problem_of(), Dsg(noise_samples=50, quantile=0.7, batch_size=16)
    noise = problem.with_count(50)
    statistics = noise.statistics(noise.draw(normal, "slack"))
    for slack, one in zip(method.slack(problem), statistics, strict=True):
        assert slack.mean == pytest.approx(np.quantile((one.mean - one.kept.mean).abs().numpy(), 0.7), rel=1e-4)
        assert slack.std == pytest.approx(np.quantile((one.std - one.kept.std).abs().numpy(), 0.7), rel=1e-4)
    widths = [Dsg(noise_samples=50, quantile=quantile).slack(problem)[0].mean for quantile in (0.1, 0.5, 0.9, 1.0)]
    assert widths == sorted(widths)
    free = Dsg(noise_samples=50, quantile=1.0)
    terms = free.norm_terms(noise, noise.draw(normal, "slack"), range(50), free.slack(problem))
    assert float(torch.stack(terms).sum()) < 1e-9


def test_with_as_many_samples_as_norms_the_weights_are_the_unit_matrix_plus_ones() -> None:
    weights = torch.stack([Dsg().emphasis(layer, range(5), 5) for layer in range(5)], 1)
    assert torch.equal(weights, torch.eye(5) + 1)
    assert Dsg().emphasis(1, range(3, 10), 4).tolist() == [1, 1, 2, 1, 1, 1, 2]  # sample j emphasizes norm j mod 4
    released = Dsg(enhance_on_residual=True, layer_num=3)
    assert released.emphasis(1, range(6), 2).tolist() == [1, 4, 1, 1, 1, 1]


def test_samples_that_change_places_with_their_emphasis_leave_the_loss_as_it_is() -> None:
    problem, method = problem_of(2), Dsg()
    x = problem.draw(normal).args[0]
    whole = method.loss(problem, Inputs((x,)), range(2))
    apart = [method.loss(problem, Inputs((x[place : place + 1],)), range(place, place + 1)) for place in (1, 0)]
    torch.testing.assert_close(whole, torch.stack(apart).mean())
    assert not torch.isclose(whole, method.loss(problem, Inputs((x.flip(0),)), range(2)))


def test_norms_without_rows_for_samples_have_no_emphasis() -> None:
    model = seen(nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8)), torch.randn(32, 5))
    problem = make_problem(model, Inputs((torch.zeros(1, 5),)), count=4)
    x = problem.draw(normal)
    assert torch.equal(Dsg().loss(problem, x, range(4)), ZeroqSamples().loss(problem, x, range(4)))


def test_as_many_samples_as_norms_are_made_and_their_slack_is_reported() -> None:
    data = lowbit.synthesize(small(), shape=(2, 6, 6), iterations=3, noise_samples=16)
    assert data.method == "dsg" and len(data) == 2
    assert set(data.facts["slack"]) == {"1", "4"}  # type: ignore[call-overload]


def test_samples_differ_more_than_those_of_zeroq_after_as_many_steps() -> None:
    settings = {"shape": (1, 8, 8), "count": 16, "iterations": 120, "start": "gaussian"}
    dsg, zeroq = (lowbit.synthesize(load_default(), method=name, **settings) for name in ("dsg", "zeroq"))  # type: ignore[arg-type]
    ratios = []
    for ours, others in zip(dsg.statistics, zeroq.statistics, strict=True):
        assert ours.samples.spread is not None and others.samples.spread is not None
        ratios.append(ours.samples.spread / others.samples.spread)
        assert ours.samples.mean_error < ours.noise.mean_error, ours.norm
    assert min(ratios) > 1 and float(np.mean(ratios)) > 1.5


def test_smoothness_counts_differences_in_four_directions() -> None:
    image = torch.tensor([[[[0.0, 1.0], [3.0, 7.0]]]])
    l1, l2 = total_variation(image)
    assert float(l1) == 5 / 2 + 9 / 2 + 7 + 2
    assert float(l2) == pytest.approx((1 + 16) ** 0.5 + (9 + 36) ** 0.5 + 7 + 2)
    problem = problem_of()
    x = problem.draw(normal)

    def terms(**options: object) -> list[Tensor]:
        return Dsg(**options).input_terms(problem, x)  # type: ignore[arg-type]

    for place, name in enumerate(("l1", "l2")):
        torch.testing.assert_close(terms(image_prior=name, image_prior_weight=0.5)[-1], 0.5 * total_variation(x.args[0])[place])
    assert len(terms(image_prior="l2")) == len(terms()) + 1
