from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lowbit.errors import SpecError
from lowbit.quantizers import LearnedScaleQuantizer, UniformQuantizer
from lowbit.quantizers.staircase import staircase
from lowbit.spec import Granularity


def uniform() -> UniformQuantizer:
    quantizer = UniformQuantizer(2, signed=False, symmetric=False)
    quantizer.initialize(torch.tensor([0.0, 3.0]))
    return quantizer


def test_values_are_those_of_the_quantizer() -> None:
    quantizer = uniform()
    found = staircase(quantizer, torch.tensor([0.0, 1.0, 3.0]), points=13)
    assert found.x[0] == 0.0 and found.x[-1] == 3.0 and list(found.x) == sorted(found.x)
    assert list(found.y) == quantizer(torch.tensor(found.x)).tolist()
    assert set(found.y) == {0.0, 1.0, 2.0, 3.0}


def test_there_are_more_points_where_the_value_jumps() -> None:
    found = staircase(uniform(), torch.tensor([0.0, 1.0, 3.0]), points=13)
    jumps = [(first, second) for first, second in zip(found.x[:-1], found.x[1:], strict=True) if round(first) != round(second)]
    assert len(found.x) == 13 + 3 * 5
    assert all(second - first < 0.05 for first, second in jumps)


def test_gradients_are_autograds_by_the_same_element_alone() -> None:
    class Centred(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x - x.mean()

    found = staircase(Centred(), torch.tensor([0.0, 1.0, 2.0, 5.0]), points=3)
    assert found.up == found.down == (0.75, 0.75, 0.75)  # d(x - mean)/dx of one of four elements


def test_the_gradient_of_a_learned_step_ends_where_it_clips() -> None:
    quantizer = LearnedScaleQuantizer(2, signed=True)
    quantizer.initialize(torch.tensor([-1.0, 1.0]))
    with torch.no_grad():
        quantizer.scale.fill_(1.0)
    found = staircase(quantizer, torch.tensor([-4.0, 0.0, 4.0]), points=9)
    whole = {x: (y, slope) for x, y, slope in zip(found.x, found.y, found.up, strict=True) if x == int(x)}
    assert [whole[x][0] for x in range(-4, 5)] == [-2.0, -2.0, -2.0, -1.0, 0.0, 1.0, 1.0, 1.0, 1.0]
    assert [x for x in range(-4, 5) if whole[x][1]] == [-2, -1, 0, 1]


def test_state_that_training_moves_does_not_run_on_and_the_quantizer_is_left_alone() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += self.training  # type: ignore[operator]
            return x * self.calls  # type: ignore[operator]

    module = Counting()
    found = staircase(module, torch.tensor([1.0, 2.0]), points=4)
    assert found.trained == found.x and set(found.up) == {1.0} and set(found.y) == {0.0}
    assert found.differs_in_training and float(module.calls) == 0  # type: ignore[arg-type]


def test_the_element_lies_in_the_channel_of_the_largest_value() -> None:
    quantizer = UniformQuantizer(8, signed=True, symmetric=True, granularity=Granularity.channel(0))
    weight = torch.tensor([[0.1, 0.2, 0.3], [-9.0, 1.0, 5.0]])
    quantizer.initialize(weight)
    found = staircase(quantizer, weight)
    assert found.x[0] == -9.0 and found.x[-1] == 5.0


def test_a_tensor_that_is_not_finite_is_refused() -> None:
    with pytest.raises(SpecError, match="finite values"):
        staircase(uniform(), torch.tensor([float("nan")]))


def test_a_quantizer_draws_itself() -> None:
    quantizer = uniform()
    curve = quantizer.plot((-1.0, 4.0)).axes[0].lines[1]
    assert set(curve.get_ydata()) == {0.0, 1.0, 2.0, 3.0}  # type: ignore[arg-type]
    shown = quantizer._repr_html_()
    assert shown is not None and "<svg" in shown and "UniformQuantizer" in shown
    assert UniformQuantizer(2, signed=False, symmetric=False)._repr_html_() is None  # not initialized
    channels = UniformQuantizer(2, signed=True, symmetric=True, granularity=Granularity.channel(0))
    channels.initialize(torch.randn(3, 4))
    assert channels._repr_html_() is None
    with pytest.raises(SpecError, match="a scale for each index of axis 0: pass the tensor"):
        channels.plot()
    assert len(channels.plot(torch.randn(3, 4)).axes) == 2
