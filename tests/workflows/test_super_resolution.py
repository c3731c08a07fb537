"""Super-resolution through the public verbs: the embedded network, post-training methods, training, and files for pictures of any size."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lowbit
from lowbit.data import load_pairs
from lowbit.errors import DataError, SpecError
from lowbit.models import load_model, upscaling_weights
from lowbit.network.graph.blocks import find_blocks
from lowbit.network.graph.dataflow import capture
from lowbit.qat.recipe import UPSCALING_RECIPE
from lowbit.workflows.domain import domain_of, scale_of
from lowbit.workflows.quantize import open_quantization
from lowbit.workflows.requests import QuantizeRequest, TrainRequest
from lowbit.workflows.settings import NetworkSettings
from lowbit.workflows.suite import Suite

TASK = "super-resolution"


def embedded() -> nn.Module:
    return load_model("edsr_small", upscaling_weights(), scale=2)


def patches(count: int, side: int = 16) -> tuple[Tensor, Tensor]:
    data = load_pairs("sample-photographs", scale=2, split="calibration", patch=side)
    small, originals = zip(*(data.dataset[index] for index in range(count)), strict=True)
    return torch.stack(small), torch.stack(originals)


@pytest.fixture(scope="module")
def held_out() -> tuple[Tensor, Tensor]:
    """Middles of the two test pictures."""
    data = load_pairs("sample-photographs", scale=2, split="test")
    pairs = [data.dataset[index] for index in range(2)]
    return torch.stack([small[:, 60:108, 60:108] for small, _ in pairs]), torch.stack([whole[:, 120:216, 120:216] for _, whole in pairs])


def test_the_embedded_network_beats_bicubic_enlarging(held_out: tuple[Tensor, Tensor]) -> None:
    found = lowbit.evaluate(embedded(), held_out, task=TASK)
    assert found["PSNR"] > found["bicubic PSNR"] + 0.5
    assert found["SSIM"] > found["bicubic SSIM"]


def test_the_embedded_weights_are_small() -> None:
    assert upscaling_weights().stat().st_size <= 400_000


@pytest.mark.parametrize(("method", "options"), [("adaround", {"iterations": 60}), ("brecq", {"iterations": 60})])
def test_reconstruction_gains_over_rounding_at_3_bits(held_out: tuple[Tensor, Tensor], method: str, options: dict[str, object]) -> None:
    small, _ = patches(16)
    settings = {"weight_bits": 3, "activation_bits": None, "calibration": small}
    rounded = lowbit.quantize(embedded(), method="round_to_nearest", **settings)  # type: ignore[arg-type]
    found = lowbit.quantize(embedded(), method=method, **settings, **options)  # type: ignore[arg-type]
    before, after = (lowbit.evaluate(model, held_out, task=TASK).value for model in (rounded, found))
    assert after > before + 0.5


def test_training_gains_over_rounding_at_2_bits(held_out: tuple[Tensor, Tensor]) -> None:
    data = load_pairs("sample-photographs", scale=2, patch=12)
    recipe = lowbit.Recipe(epochs=3, batch_size=8, optimizer=lowbit.OptimizerSpec(kind="adam", learning_rate=1e-3))
    trained = lowbit.train(embedded(), data, method="lsq", weight_bits=2, activation_bits=8, recipe=recipe, task=TASK)
    rounded = lowbit.quantize(embedded(), method="round_to_nearest", weight_bits=2, calibration=patches(8)[0])
    assert lowbit.evaluate(trained, held_out, task=TASK).value > lowbit.evaluate(rounded, held_out, task=TASK).value + 0.3


@pytest.mark.parametrize("name", ["model.lowbit", "model.onnx"])
def test_files_take_pictures_of_any_size(tmp_path: Path, name: str) -> None:
    if name.endswith("onnx"):
        pytest.importorskip("onnxruntime")
    from lowbit.workflows.evaluate_files import OnnxModule

    small, _ = patches(4)
    quantized = lowbit.quantize(embedded(), method="round_to_nearest", calibration=small)
    lowbit.export(quantized, tmp_path / name, sample=small, dynamic=("H", "W"), measure_speed=False)
    loaded = lowbit.load(tmp_path / name) if name.endswith("lowbit") else OnnxModule(tmp_path / name, 1)
    for height, width in ((16, 16), (21, 34)):
        picture = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0)) * 255
        with torch.no_grad():
            wanted, got = quantized(picture), loaded(picture)
        got = got if isinstance(got, Tensor) else next(iter(got.values()))
        assert got.shape == (1, 3, 2 * height, 2 * width)
        noise = (wanted - got).square().mean()
        assert noise == 0 or 10 * torch.log10(wanted.var() / noise) > 30


@pytest.mark.parametrize(
    ("name", "blocks"), [("edsr_small", ["body.0", "body.1"]), ("srresnet", ["blocks.0", "blocks.1"]), ("rdn_a", ["blocks.0", "blocks.1"])]
)
def test_residual_blocks_of_the_body_are_the_units_of_reconstruction(name: str, blocks: list[str]) -> None:
    model = load_model(name, scale=2, width=8, blocks=2)
    units = find_blocks(model, capture(model, torch.zeros(2, 3, 8, 8)))
    assert [unit.name for unit in units if unit.kind == "block"] == blocks


def test_nothing_named_opens_the_embedded_network_and_pictures() -> None:
    plan = open_quantization(QuantizeRequest(task=TASK, calibration_samples=4))
    assert plan.source.name == "edsr_small"
    assert plan.source.provenance.task == "SuperResolution"
    assert plan.source.provenance.data == "sample-photographs"
    assert plan.source.sample.args[0].shape == (4, 3, 24, 24)
    assert plan.source.task.facts()["scale"] == 2


def test_training_has_a_recipe_of_its_own_that_settings_change() -> None:
    assert TrainRequest(task=TASK).recipe == UPSCALING_RECIPE
    changed = TrainRequest().changed({"task": TASK, "epochs": 3}).recipe
    assert (changed.epochs, changed.batch_size, changed.optimizer.kind) == (3, 16, "adam")
    assert TrainRequest(task=TASK, recipe=lowbit.Recipe(batch_size=4)).recipe.batch_size == 4


def settings(**given: object) -> NetworkSettings:
    return NetworkSettings(task=TASK, **given)  # type: ignore[arg-type]


def test_the_scale_comes_from_the_network_and_goes_to_built_in_ones() -> None:
    domain = domain_of(settings())
    assert domain.filled(settings()).scale == 2
    assert domain.filled(settings(model="vdsr", scale=3)).model_options == {"scale": 3}
    assert domain.filled(settings(model="vdsr", model_options={"scale": 4})).scale == 4
    assert domain.filled(settings(), nn.Upsample(scale_factor=3)).scale == 3


def test_scales_that_do_not_fit_are_refused() -> None:
    domain = domain_of(settings())
    with pytest.raises(SpecError, match="the embedded network is for scale 2"):
        domain.filled(settings(scale=4))
    with pytest.raises(SpecError, match="makes pictures 3 times larger, asked for is scale=2"):
        domain.check_network(nn.Upsample(scale_factor=3), settings(scale=2))
    with pytest.raises(SpecError, match="takes colour pictures of any size"):
        scale_of(nn.Linear(3, 3))
    with pytest.raises(SpecError, match="makes colour pictures larger"):
        scale_of(nn.Conv2d(3, 8, 3))
    with pytest.raises(SpecError, match="belongs to task='super-resolution'"):
        open_quantization(QuantizeRequest(scale=2))
    with pytest.raises(SpecError, match="preprocess= is for classification"):
        domain.filled(settings(preprocess={"size": 8}))


@pytest.mark.slow
def test_the_embedded_network_gains_eight_tenths_of_a_decibel_on_the_24_photographs() -> None:
    try:
        data = load_pairs("photographs", scale=2, split="test")
    except DataError as error:
        pytest.skip(str(error))
    found = lowbit.evaluate(embedded(), data, task=TASK)
    assert found["PSNR"] > found["bicubic PSNR"] + 0.8


def test_comparisons_train_upscalers_with_their_recipe_and_their_own_epochs() -> None:
    for suite in (Suite(task=TASK), Suite().changed({"task": TASK})):
        assert suite.recipe == replace(UPSCALING_RECIPE, epochs=Suite().recipe.epochs)
    assert Suite().changed({"task": TASK, "optimizer": {"learning_rate": 1e-3}}).recipe.optimizer.kind == "adam"


def test_a_file_with_a_grid_for_each_input_becomes_onnx_within_the_rounding_of_ties(tmp_path: Path) -> None:
    sample = patches(4, side=12)[0]
    small = lowbit.quantize(
        load_model("edsr_small", scale=2, blocks=1, width=8), method="daq_sr", weight_bits=4, activation_bits=4, calibration=sample
    )
    lowbit.export(small, tmp_path / "a.lowbit", sample=sample, dynamic=("H", "W"))
    loaded = lowbit.load(tmp_path / "a.lowbit")
    report = lowbit.export(loaded, tmp_path / "a.onnx", sample=sample, dynamic=("H", "W"), measure_speed=False)
    assert report.parity.passed
    assert report.parity.excess < 0.01  # of a step
