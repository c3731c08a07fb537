from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lowbit.runtime.activation import Activation, activated

SHIFT, SLOPE, BACK = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
ADD, SUB, PRELU, CLAMP = "aten.add.Tensor", "aten.sub.Tensor", "aten.prelu.default", "aten.clamp.default"


def inputs() -> Tensor:
    x = 4 * torch.randn(2, 6, 5, 5, generator=torch.Generator().manual_seed(1))
    x[0, :, 0, 0], x[1, :, 0, 0], x[1, :, 1, 1] = 0.0, float("nan"), float("inf")
    return x


def built(*steps: tuple[str, tuple[Tensor | float, ...]]) -> Activation | None:
    found: Activation | None = Activation()
    for operator, values in steps:
        assert found is not None
        found = found.followed_by(operator, values)
    return found


@pytest.mark.parametrize(
    ("steps", "function"),
    [
        ([("aten.relu.default", ())], nn.ReLU()),
        ([("aten.relu6.default", ())], nn.ReLU6()),
        ([("aten.hardtanh.default", ())], nn.Hardtanh()),
        ([("aten.hardtanh.default", (-2.0, 0.5))], nn.Hardtanh(-2.0, 0.5)),
        ([("aten.leaky_relu.default", ())], nn.LeakyReLU()),
        ([(CLAMP, (-0.5, None))], lambda x: x.clamp(min=-0.5)),
        ([(PRELU, (SLOPE,))], lambda x: nn.functional.prelu(x, SLOPE)),
        (
            [(ADD, (SHIFT[:, None, None],)), (PRELU, (SLOPE,)), (SUB, (BACK[:, None, None],)), (CLAMP, (-1.0, 2.0))],
            lambda x: (nn.functional.prelu(x + SHIFT[:, None, None], SLOPE) - BACK[:, None, None]).clamp(-1, 2),
        ),
    ],
)
def test_operators_in_a_row_are_one_activation(steps: list[tuple[str, tuple[Tensor | float, ...]]], function: nn.Module) -> None:
    activation = built(*steps)
    assert activation is not None
    assert torch.equal(activated(inputs(), activation.table(6), (-1, 1, 1)).nan_to_num(9), function(inputs()).nan_to_num(9))


@pytest.mark.parametrize(
    "steps",
    [
        [("aten.sigmoid.default", ())],
        [("aten.relu.default", ()), (ADD, (1.0,))],
        [(PRELU, (SLOPE,)), (PRELU, (SLOPE,))],
        [(ADD, (1.0,)), (ADD, (1.0,))],
        [("aten.hardtanh.default", ()), ("aten.relu.default", ())],
    ],
)
def test_what_is_no_such_activation_ends_it(steps: list[tuple[str, tuple[Tensor | float, ...]]]) -> None:
    *first, last = steps
    found = built(*first)
    assert found is not None
    assert found.followed_by(*last) is None


def test_without_a_table_nothing_is_done() -> None:
    x = inputs()
    assert activated(x, None, (-1, 1, 1)) is x
    assert torch.equal(activated(x, Activation().table(6), (-1, 1, 1)).nan_to_num(9), x.nan_to_num(9))
