"""Problems: what is made and what stays, parts, and networks and shapes that are refused."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.synthesis.networks import seen, small, two_inputs
from torch import Tensor, nn

from lowbit.errors import CalibrationError, LayerError, SpecError
from lowbit.inputs import Inputs
from lowbit.synthesis.problem import make_problem, normal

SAMPLE = Inputs((torch.zeros(1, 2, 6, 6),))


def test_only_floats_with_samples_are_made_and_all_else_is_repeated() -> None:
    model, given = two_inputs()
    problem = make_problem(model, Inputs(given), count=4)
    start = problem.draw(normal)
    assert [tuple(tensor.shape) for tensor in start.tensors] == [(4, 1, 5, 6), (4, 5), (4,), (5, 6)]
    assert problem.is_free(start) == [True, True, False, False]
    assert torch.equal(start.args[2], torch.tensor([0, 1, 2, 0])) and torch.equal(start.args[3], given[3])
    assert problem.norms == ("norm", "norm1")


def test_parts_cover_all_samples_and_none_is_much_smaller_than_the_others() -> None:
    problem = make_problem(small(), SAMPLE, count=33)
    start = problem.draw(normal)
    parts = list(problem.batches(start, 16))
    assert [list(places) for places, _ in parts] == [list(range(11)), list(range(11, 22)), list(range(22, 33))]
    assert torch.equal(torch.cat([part.args[0] for _, part in parts]), start.args[0])


def test_random_numbers_depend_on_the_seed_and_the_purpose_alone() -> None:
    first, second = (make_problem(small(), SAMPLE, count=4, seed=3) for _ in range(2))
    torch.rand(5)
    assert torch.equal(first.draw(normal).args[0], second.draw(normal).args[0])
    assert not torch.equal(first.draw(normal).args[0], first.draw(normal, "noise").args[0])
    assert not torch.equal(first.draw(normal).args[0], make_problem(small(), SAMPLE, count=4, seed=4).draw(normal).args[0])


def test_the_given_network_is_left_alone_and_the_copy_asks_for_no_gradients() -> None:
    model = small().train()
    model[0].weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    problem = make_problem(model, SAMPLE, count=2)
    problem.statistics(problem.draw(normal))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.training and [p.requires_grad for p in model.parameters()].count(False) == 1
    assert not any(p.requires_grad for p in problem.model.parameters()) and not problem.model.training


def test_networks_of_half_and_double_precision_get_inputs_of_their_type() -> None:
    for dtype, wide in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        problem = make_problem(small().to(dtype), Inputs((torch.zeros(1, 2, 6, 6, dtype=dtype),)), count=2)
        start = problem.draw(normal)
        assert start.args[0].dtype == wide and problem.cast(start).args[0].dtype == dtype
        assert all(one.mean.dtype == wide for one in problem.statistics(start))


def test_norms_of_one_and_three_dimensions() -> None:
    flat = seen(nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU()), torch.randn(32, 5))
    problem = make_problem(flat, Inputs((torch.zeros(1, 5),)), count=6)
    assert problem.statistics(problem.draw(normal))[0].mean.shape == (1, 8)
    assert problem.input_statistics(problem.draw(normal))[0][0].shape == (1, 5)
    with pytest.raises(SpecError, match=r"norm '1': one sample has no deviation.*count=2"):
        one = make_problem(flat, Inputs((torch.zeros(1, 5),)), count=1)
        one.statistics(one.draw(normal))
    for conv, norm, shape in ((nn.Conv1d, nn.BatchNorm1d, (3, 9)), (nn.Conv3d, nn.BatchNorm3d, (3, 4, 5, 6))):
        model = seen(nn.Sequential(conv(3, 4, 3), norm(4)), torch.randn(8, *shape))
        problem = make_problem(model, Inputs((torch.zeros(1, *shape),)), count=2)
        assert problem.statistics(problem.draw(normal))[0].std.shape == (2, 4)


def test_a_norm_that_such_inputs_do_not_reach_is_left_out_with_a_note() -> None:
    class Optional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.other = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            return self.norm(x) + (self.other(x) if self.training else 0)

    problem = make_problem(seen(Optional(), torch.randn(8, 2, 6, 6)), SAMPLE, count=2)
    assert problem.norms == ("norm",) and list(problem.kept) == ["norm"]
    assert problem.notes == ("left out: other: not called with such inputs",)


def test_what_cannot_be_made_is_refused_with_the_reason() -> None:
    with pytest.raises(SpecError, match="count=0: at least one"):
        make_problem(small(), SAMPLE, count=0)
    with pytest.raises(CalibrationError, match=r"Sequential cannot take inputs of shape 3 x 6 x 6 .*Pass shape="):
        make_problem(small(), Inputs((torch.zeros(1, 3, 6, 6),)), count=2)
    broken = small()
    broken[3].weight.data[0] = float("nan")
    with pytest.raises(LayerError, match=r"'3\.weight' holds NaN"):
        make_problem(broken, SAMPLE, count=2)

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.norm = nn.Embedding(9, 4), nn.BatchNorm1d(4)

        def forward(self, ids: Tensor) -> Tensor:
            return self.norm(self.table(ids).transpose(1, 2))

    tokens = seen(Tokens(), torch.randint(9, (16, 5)))
    with pytest.raises(CalibrationError, match=r"integers, such as token ids.*calibration data instead"):
        make_problem(tokens, Inputs((torch.zeros(2, 5, dtype=torch.int64),)), count=2)
    with pytest.raises(CalibrationError, match="token ids"):
        make_problem(tokens, Inputs((torch.zeros(1, 5),)), count=2)

    class Rounded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(2)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x.detach())

    with pytest.raises(LayerError, match="does not depend on the inputs"):
        make_problem(seen(Rounded(), torch.randn(8, 2, 6, 6)), SAMPLE, count=2)
