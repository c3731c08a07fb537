"""The white paper's recipe: which steps are taken, and that each does something."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tests.networks import BranchNet, TinyNet, settled
from torch import nn

import lowbit
from lowbit.errors import CalibrationError, GraphError, SpecError
from lowbit.methods.post_training.white_paper import steps_by_size
from lowbit.network.insert import activation_quantizers, weight_quantizer
from lowbit.post_training.reconstruction.adam import ResumableAdam
from lowbit.progress import Progress
from lowbit.quantizers import UniformQuantizer
from lowbit.spec import BitPolicy
from lowbit.testing import tiny

X = torch.randn(128, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def white_paper(model: nn.Module, **options: object) -> nn.Module:
    if "calibration" not in options:
        options = {"sample": X[:2], "input_range": (-4.0, 4.0), **options}
    return lowbit.quantize(model, **options)  # type: ignore[arg-type]


def notes(model: nn.Module) -> str:
    return " ".join(lowbit.summary(model).notes)


def codes(model: nn.Module, layer: str = "conv1") -> torch.Tensor:
    module = model.get_submodule(layer)
    quantizer = weight_quantizer(module)
    assert quantizer is not None
    return quantizer.encode(module.parametrizations.weight.original).codes  # type: ignore[union-attr]


def test_it_is_the_default_and_needs_no_data() -> None:
    model = settled(TinyNet(), X)
    result = white_paper(model)
    assert lowbit.summary(result).method == "white_paper"
    assert tiny.sqnr_db(tiny.outputs(model, X), tiny.outputs(result, X)) > 20
    assert "no data was used" in notes(result)
    assert "were corrected analytically" in notes(result)
    assert "equalized" not in notes(result)  # weights have a scale for each channel


def test_with_data_eight_bits_are_rounded_to_nearest_and_ranges_have_the_least_error() -> None:
    model = settled(TinyNet(), X)
    result = white_paper(model, calibration=X)
    plain = lowbit.quantize(model, method="round_to_nearest", calibration=X)
    assert torch.equal(tiny.outputs(result, X), tiny.outputs(plain, X))
    assert "corrected" not in notes(result)


def test_with_data_fewer_bits_learn_their_rounding_and_biases_stay() -> None:
    model = tiny.trained()
    result = white_paper(model, weight_bits=3, calibration=tiny.calibration(), iterations=400)
    nearest = white_paper(model, weight_bits=3, calibration=tiny.calibration(), rounding="nearest")
    assert not torch.equal(codes(result), codes(nearest))
    assert int((codes(result).int() - codes(nearest).int()).abs().max()) == 1
    images, expected = tiny.held_out(), tiny.outputs(model, tiny.held_out())
    assert tiny.sqnr_db(expected, tiny.outputs(result, images)) > tiny.sqnr_db(expected, tiny.outputs(nearest, images))
    assert "corrected" not in notes(result)


def test_learned_rounding_keeps_the_scales_of_the_range_search() -> None:
    learned, nearest = (
        white_paper(tiny.trained(), weight_bits=3, calibration=tiny.calibration(), iterations=20, rounding=kind)
        for kind in ("adaround", "nearest")
    )
    for name in ("conv1", "conv2"):
        scales = [weight_quantizer(m.get_submodule(name)).scale for m in (learned, nearest)]  # type: ignore[union-attr]
        assert torch.equal(*scales)


def test_one_scale_per_tensor_is_equalized_first() -> None:
    images, expected = tiny.held_out(), tiny.outputs(tiny.trained(), tiny.held_out())
    gains = {
        kind: tiny.sqnr_db(
            expected,
            tiny.outputs(
                white_paper(
                    tiny.trained(),
                    weight_bits=6,
                    weight_granularity="per_tensor",
                    calibration=tiny.calibration(),
                    rounding="nearest",
                    equalize=kind,
                ),
                images,
            ),
        )
        for kind in ("auto", "never", "always")
    }
    assert gains["auto"] == gains["always"] > gains["never"] + 3


def test_each_step_can_be_switched_off() -> None:
    model = settled(TinyNet(), X)
    assert "corrected" not in notes(white_paper(model, bias_correction=False))
    assert "equalized 1 pairs" in notes(white_paper(model, equalize="always"))
    plain = white_paper(model, weight_bits=3, calibration=X, rounding="nearest")
    assert torch.equal(codes(plain), codes(lowbit.quantize(model, method="round_to_nearest", weight_bits=3, calibration=X)))


def test_wide_ranges_reach_as_many_deviations_as_asked() -> None:
    model = settled(TinyNet(), X)
    widths = []
    for n_sigma in (3.0, 6.0):
        quantizer = list(activation_quantizers(white_paper(model, n_sigma=n_sigma)).values())[1]
        assert isinstance(quantizer, UniformQuantizer)
        widths.append(float(quantizer.scale))
    assert 1.3 < widths[1] / widths[0] < 2.2


def test_without_dataflow_it_needs_data_and_says_so() -> None:
    result = white_paper(BranchNet().eval(), calibration=X)
    assert lowbit.summary(result).notes
    with pytest.raises(CalibrationError, match="needs calibration data"):
        white_paper(BranchNet().eval())
    with pytest.raises(GraphError, match="equalization needs the network's dataflow"):
        white_paper(BranchNet().eval(), calibration=X, equalize="always")


def test_impossible_requests_are_refused() -> None:
    with pytest.raises(CalibrationError, match="learned rounding needs calibration data"):
        white_paper(TinyNet().eval(), rounding="adaround")
    with pytest.raises(SpecError, match="iterations must be 0 or more"):
        white_paper(TinyNet().eval(), calibration=X, iterations=-1)
    with pytest.raises(SpecError, match="two ascending numbers"):
        white_paper(TinyNet().eval(), input_range=(3.0, 3.0))


def count_steps(monkeypatch: pytest.MonkeyPatch, kill_at: int | None = None) -> list[int]:
    """The iterations that descents take from here on, in order; the ``kill_at``-th raises KeyboardInterrupt."""
    taken: list[int] = []
    step = ResumableAdam.step

    def counted(self: ResumableAdam, loss: object) -> None:
        if len(taken) == kill_at:
            raise KeyboardInterrupt
        step(self, loss)  # type: ignore[arg-type]
        taken.append(self.iteration)

    monkeypatch.setattr(ResumableAdam, "step", counted)
    return taken


def layer_steps(taken: list[int]) -> list[int]:
    """How many steps each layer took."""
    return [a for a, b in zip(taken, [*taken[1:], 1], strict=True) if b == 1]


def test_steps_follow_the_size_of_the_layer() -> None:
    assert [steps_by_size(n) for n in (1, 625, 676, 2304, 10_000, 10**8)] == [500, 500, 520, 960, 2000, 2000]


def test_a_layer_is_finished_when_its_roundings_are_decided(monkeypatch: pytest.MonkeyPatch) -> None:
    model, options = tiny.trained(), {"weight_bits": 3, "calibration": tiny.calibration()}
    taken = count_steps(monkeypatch)
    sooner = white_paper(model, **options)
    settled_steps = layer_steps(taken)
    taken.clear()
    whole = white_paper(model, settled=None, **options)
    whole_steps = layer_steps(taken)
    assert len(settled_steps) == len(whole_steps)
    assert all(100 < early <= late for early, late in zip(settled_steps, whole_steps, strict=True))
    assert sum(settled_steps) < sum(whole_steps)
    images, expected = tiny.held_out(), tiny.outputs(model, tiny.held_out())
    assert abs(tiny.sqnr_db(expected, tiny.outputs(sooner, images)) - tiny.sqnr_db(expected, tiny.outputs(whole, images))) < 0.5


def test_given_iterations_without_settling_are_those_of_adaround(monkeypatch: pytest.MonkeyPatch) -> None:
    options, policy = {"calibration": tiny.calibration(), "iterations": 60}, BitPolicy.uniform(3, 8)
    taken = count_steps(monkeypatch)
    mine = white_paper(tiny.trained(), settled=None, policy=policy, **options)
    assert set(layer_steps(taken)) == {60}
    theirs = white_paper(tiny.trained(), method="adaround", policy=policy, **options)
    assert torch.equal(codes(mine), codes(theirs))


def test_a_killed_run_that_settles_resumes_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"weight_bits": 3, "calibration": tiny.calibration()}
    expected = white_paper(tiny.trained(), **options).state_dict()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        count_steps(patch, kill_at=950)
        white_paper(tiny.trained(), work_dir=tmp_path, **options)
    resumed = white_paper(tiny.trained(), work_dir=tmp_path, **options).state_dict()
    assert all(torch.equal(resumed[name], value) for name, value in expected.items())


def test_after_the_first_layer_the_time_left_is_said() -> None:
    console = Console(file=io.StringIO(), width=200)
    lowbit.quantize(
        tiny.trained(), method="adaround", weight_bits=3, calibration=tiny.calibration(), iterations=5, progress=Progress(console=console)
    )
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert [line.startswith("weights: about") for line in lines[:3]] == [False, True, False]


@pytest.mark.parametrize("settled", [-0.1, 1.5])
def test_the_settled_share_has_a_range(settled: float) -> None:
    with pytest.raises(SpecError, match="settled must be"):
        white_paper(TinyNet().eval(), calibration=X, settled=settled)
