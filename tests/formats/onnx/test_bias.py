from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lowbit.methods.post_training.round_to_nearest  # noqa: F401 - registers the method
from lowbit.formats.onnx.integer_grid import IntegerGrid
from lowbit.formats.onnx.sessions import load_onnx
from lowbit.inputs import Inputs
from lowbit.network.insert import activation_quantizers
from lowbit.network.layers import evaluating
from lowbit.workflows.export import export
from lowbit.workflows.quantize import quantize

IMAGES = torch.randn(64, 3, 12, 12, generator=torch.Generator().manual_seed(0))


class NearTies(nn.Module):
    """Hardswish stem, residual block and GELU; few values are not 0, so that biases are often all there is."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.last, self.head = nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.hardswish(self.stem(x))
        x = torch.relu(x + self.second(torch.relu(self.first(x) - 0.3)))
        return self.head(nn.functional.gelu(self.last(x)).mean((2, 3)))


def near_ties(bits: int, distance: float) -> nn.Module:
    """A quantized network whose inner biases lie ``distance`` steps of the next quantizer above the boundary of two codes."""
    torch.manual_seed(bits)
    model = quantize(NearTies().eval(), method="round_to_nearest", weight_bits=bits, activation_bits=max(bits, 2), calibration=IMAGES)
    steps = [float(quantizer.scale) for quantizer in activation_quantizers(model).values()]
    with torch.no_grad():
        for name in ("first", "second", "last"):
            bias = model.get_submodule(name).bias
            step = min(steps)
            bias.copy_(((bias / step).floor() + 0.5 + distance) * step)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("distance", [0.002, -0.01])
def test_biases_near_ties_leave_the_answers_as_they_are(bits: int, distance: float, tmp_path: Path) -> None:
    model = near_ties(bits, distance)
    report = export(model, tmp_path / "m.onnx", sample=IMAGES, measure_speed=False)
    with evaluating(model):
        wanted = model(IMAGES)
    (got,) = load_onnx(tmp_path / "m.onnx")(Inputs((IMAGES,))).values()
    assert (got.argmax(1) == wanted.argmax(1)).float().mean() >= 0.99
    assert report.parity.passed
    assert report.parity.samples >= 256


def test_codes_are_multiplied_until_the_biases_are_whole_numbers_of_units() -> None:
    codes = torch.tensor([[1, -2], [2, 0]], dtype=torch.int8)
    grid = IntegerGrid(codes, torch.tensor([0.5, 0.25]), torch.zeros(2, dtype=torch.int8), 0)
    finer = grid.holding(torch.tensor([0.5 * 5 / 7, 0.5 * 1 / 3]), 1.0, 64)
    units = finer.scale.double() * 1.0
    torch.testing.assert_close(finer.decode(), grid.decode())
    assert int(finer.codes.abs().max()) <= 64
    misses = torch.tensor([0.5 * 5 / 7, 0.5 / 3]) / units
    assert float((misses - misses.round()).abs().max()) < 1e-4
    assert (units < 0.1).all()  # the finest of those that hold them


def test_full_codes_stay_as_they_are() -> None:
    grid = IntegerGrid(torch.tensor([[127, -3]], dtype=torch.int8), torch.tensor([0.5]), torch.zeros(1, dtype=torch.int8), 0)
    assert torch.equal(grid.holding(torch.tensor([0.2]), 1.0, 64).codes, grid.codes)
