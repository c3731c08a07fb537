"""Weights whose zero points lie far from their codes keep their values, or are refused by layer."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lowbit.errors import LayerError
from lowbit.formats.fixed_point.graph import Buffer, Weight
from lowbit.formats.fixed_point.weights import code_step, layer_weight, stored_bits
from lowbit.formats.onnx.grid import Grid
from lowbit.quantizers import QTensor
from lowbit.quantizers.qtensor import AffineDecoder
from lowbit.spec import Granularity


def _lowered(zero_points: list[float], bias: list[float]) -> tuple[Weight, QTensor]:
    codes = torch.tensor([[0, 255, 7], [3, 200, 11]], dtype=torch.uint8)
    decoder = AffineDecoder(torch.tensor([[0.01], [0.02]]), torch.tensor(zero_points)[:, None], Granularity.channel(0))
    weight = QTensor(codes, decoder, 8)
    grid = Grid.plain(np.float32(0.1), 0, -128, 127)
    source = Buffer("x", (3,), grid, "x")
    lowered = layer_weight("head", "head.weight", weight, np.array(bias), None, None, source, grid, as_onnx=False)
    return lowered, weight


@pytest.mark.parametrize("zero_points", [[0.5, -3.5], [-300.0, 16000.0], [-16127.5, 16383.5]])
def test_a_zero_point_far_from_the_codes_keeps_the_values(zero_points: list[float]) -> None:
    lowered, weight = _lowered(zero_points, [0.0, 0.0])
    found = lowered.codes.double() * lowered.factor.double()[:, None] * lowered.scale.double()[:, None]
    torch.testing.assert_close(found.float(), weight.decode(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("zero_point", [-16200.0, 16400.0, -51000.0, 1e9])
def test_a_zero_point_that_no_integer_holds_is_refused_by_layer(zero_point: float) -> None:
    with pytest.raises(
        LayerError, match=r"layer 'head': a level of its weight lies [\d,]+ steps from zero, farther than an integer network holds"
    ):
        _lowered([0.0, zero_point], [0.0, 0.0])


def test_steps_and_bits_of_codes_from_end_to_end() -> None:
    codes = torch.tensor([-32767, 32766, -32764], dtype=torch.int16)
    assert code_step(codes) == 1 and stored_bits(codes) == 16
    assert code_step(torch.tensor([-30000, 30000], dtype=torch.int16)) == 60000
