from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from tests.formats.networks import quantized
from tests.networks import TinyNet, settled
from torch import Tensor, nn

import lowbit.methods.post_training.round_to_nearest  # noqa: F401 - registers the method
from lowbit.errors import ParityError
from lowbit.formats.checks.parity import Parity, check_onnx_parity, check_packed_parity
from lowbit.formats.program.program import Program, export_program
from lowbit.workflows.export import export
from lowbit.workflows.quantize import quantize

IMAGE = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Deep(nn.Module):
    """Three layers in a row and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Module()
        self.body.first, self.act1 = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()
        self.body.second, self.act2 = nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()
        self.body.third, self.act3 = nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()
        self.pool, self.flatten, self.head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act1(self.body.first(x))  # type: ignore[operator]
        x = self.act2(self.body.second(x))  # type: ignore[operator]
        x = self.act3(self.body.third(x))  # type: ignore[operator]
        return self.head(self.flatten(self.pool(x)))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Program, Path]:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("parity") / "m.onnx"
    model = quantize(settled(Deep(), IMAGE), method="round_to_nearest", calibration=IMAGE)
    export(model, path, sample=IMAGE, measure_speed=False)
    return model, export_program(model, IMAGE), path


def planted(path: Path, name: str, change: Callable[[np.ndarray], np.ndarray]) -> Path:
    """A copy of the file in which one initializer is changed."""
    model = onnx.load(path)
    (tensor,) = [tensor for tensor in model.graph.initializer if tensor.name == name]
    content = numpy_helper.to_array(tensor)
    tensor.CopyFrom(numpy_helper.from_array(change(content).astype(content.dtype), name))
    wrong = path.with_name("wrong.onnx")
    onnx.save(model, wrong)
    return wrong


def test_a_right_file_passes_with_an_excess_far_below_the_limit(exported: tuple[nn.Module, Program, Path]) -> None:
    parity = check_onnx_parity(*exported)
    assert parity.passed
    assert parity.diverging is None
    assert parity.samples >= 256
    assert parity.excess < 0.02
    assert parity.changed_codes < 0.01
    assert parity.sqnr_db > 35
    assert parity.top1_agreement == 1.0
    parity.require("m.onnx")


@pytest.mark.parametrize(
    ("name", "change", "layer"),
    [
        ("body.first.weight.scale", lambda scale: scale * 1.01, "body.first"),
        ("body.second.weight.scale", lambda scale: scale * 1.1, "body.second"),
        ("body.second.weight.codes", lambda codes: np.flip(codes, 2), "body.second"),
        ("body.second.weight.zero_point", lambda zeros: zeros + 3, "body.second"),
        ("body.third.weight.scale", lambda scale: np.roll(scale, 1), "body.third"),
        ("conv2d_2.bias.codes", lambda codes: codes * 0, "body.third"),
        ("head.weight.scale", lambda scale: scale * 1.01, "head"),
        ("linear.bias.codes", lambda codes: codes * 0, "head"),
    ],
)
def test_a_planted_error_fails_and_names_its_layer(
    exported: tuple[nn.Module, Program, Path], name: str, change: Callable[[np.ndarray], np.ndarray], layer: str
) -> None:
    model, program, path = exported
    parity = check_onnx_parity(model, program, planted(path, name, change))
    assert not parity.passed
    assert parity.diverging is not None
    assert parity.diverging.startswith(f"layer '{layer}':")
    with pytest.raises(ParityError, match=f"wrong.onnx does not compute .* first diverges at layer '{layer}'"):
        parity.require("wrong.onnx")


def test_a_wrong_activation_scale_fails_where_it_is_first_used(exported: tuple[nn.Module, Program, Path]) -> None:
    model, program, path = exported
    first = next(node.name for node in program.exported.graph.nodes if "fake_quantize" in node.name)
    parity = check_onnx_parity(model, program, planted(path, f"{first}.scale", lambda scale: scale * 1.05))
    assert parity.diverging is not None
    assert parity.diverging.startswith("activation 'body.first.input': ")


def test_an_error_that_gives_nan_fails(exported: tuple[nn.Module, Program, Path]) -> None:
    model, program, path = exported
    parity = check_onnx_parity(model, program, planted(path, "head.weight.scale", lambda scale: scale * np.nan))
    assert not parity.passed


def test_coarse_accumulators_at_two_bits_are_no_failure(tmp_path: Path) -> None:
    model = quantize(settled(TinyNet(), IMAGE), method="round_to_nearest", weight_bits=2, activation_bits=2, calibration=IMAGE)
    assert export(model, tmp_path / "m.onnx", sample=IMAGE, measure_speed=False).parity.passed


def test_equal_outputs_of_a_packed_network_pass_and_others_name_the_weight() -> None:
    model = quantized(TinyNet(), IMAGE)
    program = export_program(model, IMAGE)
    weights = {name: weight.decode() for name, weight in program.weights.items()}
    same = check_packed_parity(model, program, model, weights)
    assert same.passed
    assert (same.max_abs_error, same.sqnr_db) == (0.0, float("inf"))
    damaged = {**weights, "conv2.weight": weights["conv2.weight"] * 1.1}
    parity = check_packed_parity(model, program, quantized(TinyNet(), IMAGE), damaged)
    assert not parity.passed
    assert parity.diverging == "the weight 'conv2.weight'"


def test_the_verdict_reads_as_a_sentence() -> None:
    parity = Parity(8, 0.5, 0.75, 12.0, passed=False, diverging="layer 'conv1'")
    assert str(parity) == "FAILED at layer 'conv1': largest difference 0.5, 12.0 dB, top-1 agreement 75.0% on 8 samples"
