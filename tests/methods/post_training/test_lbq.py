"""LBQ: scales of least squared error against enumeration, dual tensors, refinement of the scales."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path

import pytest
import torch
from tests.networks import SharedWeightNet, TinyNet, settled
from torch import Tensor, nn

from lowbit.errors import SpecError
from lowbit.inputs import Inputs
from lowbit.methods.post_training.lbq import DualQuantizer, ScaleRefinement, dual_scales, key_layers, nearest_sum, relative_error
from lowbit.network.insert import bake_weights, float_weight, set_weight_quantizer, weight_quantizer
from lowbit.network.record import record_of
from lowbit.quantizers import UniformQuantizer
from lowbit.quantizers.ranges.observers import make_observer
from lowbit.quantizers.ranges.scale_search import mmse_scale
from lowbit.spec import Granularity
from lowbit.workflows.quantize import quantize

GRANULARITIES = [Granularity.tensor(), Granularity.channel(0), Granularity.channel(1), Granularity.group(9)]
GRIDS = [(-2, 1), (-8, 7), (0, 3), (0, 15)]


def error_of(rows: Tensor, scale: Tensor, qmin: int, qmax: int) -> Tensor:
    """Squared error of each row under one scale each."""
    s = scale.double()[:, None]
    return (rows.double() - s * (rows.double() / s).round().clamp(qmin, qmax)).square().sum(1)


def enumerated(row: Tensor, qmin: int, qmax: int) -> float:
    """The least error over all scales: between neighbouring breakpoints ``t / (k - 1/2)`` the codes are constant."""
    breaks = sorted({float(t) / (k - 0.5) for t in row.double() for k in range(qmin + 1, qmax + 1) if float(t) / (k - 0.5) > 0})
    edges = [0.0, *breaks, 2 * breaks[-1] if breaks else 1.0]
    best = float(row.double().square().sum())
    for low, high in itertools.pairwise(edges):
        codes = (row.double() / ((low + high) / 2)).round().clamp(qmin, qmax)
        if codes.any():
            scale = float(row.double() @ codes / (codes @ codes))
            best = min(best, float((row.double() - scale * codes).square().sum()))
    return best


@pytest.mark.parametrize(("qmin", "qmax"), GRIDS)
@pytest.mark.parametrize("elements", [1, 2, 9, 60, 400])
def test_the_scale_is_the_best_of_all_scales(qmin: int, qmax: int, elements: int) -> None:
    rows = torch.randn(6, elements) * torch.tensor([1.0, 100.0, 1e-3, 5.0, 1.0, 2.0])[:, None]
    scale, error = mmse_scale(rows, qmin, qmax)
    torch.testing.assert_close(error, error_of(rows, scale, qmin, qmax), rtol=1e-5, atol=1e-12)
    for row, found in zip(rows, error.tolist(), strict=True):
        assert found <= enumerated(row, qmin, qmax) * (1 + (1e-9 if elements * (qmax - qmin) <= 512 else 2e-3)) + 1e-15


@pytest.mark.parametrize(("qmin", "qmax"), GRIDS)
def test_no_scale_of_a_fine_grid_is_better_nor_is_the_maximum(qmin: int, qmax: int) -> None:
    rows = torch.distributions.Laplace(0.0, 1.0).sample((4, 3000))
    _, error = mmse_scale(rows, qmin, qmax)
    largest = rows.abs().amax(1) / qmax
    for factor in torch.linspace(0.02, 1.1, 300).tolist():
        assert (error <= error_of(rows, largest * factor, qmin, qmax) * (1 + 1e-4)).all()


def test_the_scale_follows_the_tensor() -> None:
    rows = torch.randn(3, 700)
    torch.testing.assert_close(mmse_scale(rows * 64, -8, 7)[0], mmse_scale(rows, -8, 7)[0] * 64, rtol=1e-6, atol=0)


@pytest.mark.parametrize("elements", [20, 2000])
def test_a_tensor_on_a_grid_is_found_without_error(elements: int) -> None:
    codes = torch.randint(-8, 8, (3, elements)).float()
    codes[:, 0], codes[:, 1] = 7, -5  # coprime, so that no coarser grid fits
    scale, error = mmse_scale(codes * 0.37, -8, 7)
    torch.testing.assert_close(scale, torch.full((3,), 0.37))
    assert error.max() < 1e-9


def test_weights_count_as_repetitions() -> None:
    values, counts = torch.randn(1, 300), torch.randint(0, 5, (300,)).float()
    repeated = values.repeat_interleave(counts.long(), 1)
    torch.testing.assert_close(mmse_scale(values, -8, 7, weights=counts)[0], mmse_scale(repeated, -8, 7)[0], rtol=1e-4, atol=0)


def test_zeros_and_hopeless_rows_get_a_finite_scale() -> None:
    rows = torch.stack([torch.zeros(50), -torch.rand(50), torch.full((50,), 1e-35)])
    scale, error = mmse_scale(rows, 0, 15)
    assert scale[0] == 1 and scale[2] == 1
    assert torch.isfinite(scale).all() and (scale > 0).all()
    assert error[0] == 0 and error[1].item() == pytest.approx(rows[1].double().square().sum().item())


def test_a_scale_for_each_kernel_beats_one_for_all() -> None:
    rows = torch.randn(8, 90) * torch.rand(8, 1)
    assert mmse_scale(rows, -8, 7)[1].sum() < mmse_scale(rows.reshape(1, -1), -8, 7)[1].sum()


# Two tensors


def test_nearest_sum_is_the_best_of_all_pairs() -> None:
    x, first, second = torch.linspace(-2, 2, 401), torch.tensor(0.4), torch.tensor(0.11)
    c1, c2 = nearest_sum(x, first, second, -4, 3)
    pairs = torch.tensor([0.4 * i + 0.11 * j for i in range(-4, 4) for j in range(-4, 4)])
    best = (x[:, None] - pairs).abs().amin(1)
    torch.testing.assert_close((x - 0.4 * c1 - 0.11 * c2).abs(), best, rtol=0, atol=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("kind", ["normal", "outlier", "grid"])
def test_two_tensors_are_never_worse_than_one(bits: int, kind: str) -> None:
    qmin, qmax = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    rows = torch.randn(5, 200)
    if kind == "outlier":
        rows[:, 7] = 30.0
    if kind == "grid":
        rows = torch.randint(qmin, qmax + 1, (5, 200)).float() * 0.3
    _, single = mmse_scale(rows, qmin, qmax)
    scales, dual = dual_scales(rows, qmin, qmax)
    assert scales.shape == (2, 5) and (scales > 0).all()
    assert (dual <= single + 1e-9).all()
    if kind != "grid":
        assert (dual < 0.35 * single).all()


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
def test_dual_codes_decode_to_the_forward_pass_and_encode_to_themselves(granularity: Granularity) -> None:
    x = torch.randn(6, 5, 3, 3)
    quantizer = DualQuantizer(3, granularity).eval()
    quantizer.initialize(x)
    encoded = quantizer.encode(x)
    assert torch.equal(encoded.decode(), quantizer(x))
    assert encoded.codes.shape == (2, 6, 5, 3, 3) and encoded.code_bits == 2 * 3 * x.numel()
    assert encoded.codes.min() >= -4 and encoded.codes.max() <= 3
    torch.testing.assert_close(quantizer(encoded.decode()), encoded.decode(), rtol=1e-6, atol=1e-7)


def test_key_layers_are_the_worst_above_tau_and_at_most_a_share() -> None:
    errors = {"a": 0.02, "b": 0.5, "c": 0.001, "d": 0.03}
    assert key_layers(errors, 0.01, 1.0) == ["b", "d", "a"]
    assert key_layers(errors, 0.01, 0.5) == ["b", "d"]
    assert key_layers(errors, 0.01, 0.1) == ["b"]
    assert key_layers(errors, 0.0, 1.0) == ["b", "d", "a", "c"]
    assert key_layers(errors, float("inf"), 1.0) == []
    assert key_layers(errors, 0.0, 0.0) == []


def test_relative_error_does_not_depend_on_magnitude() -> None:
    assert relative_error(torch.tensor([2.0, 0.0]), torch.tensor([1.0, 0.0])) == 0.25
    assert relative_error(torch.tensor([2e4, 0.0]), torch.tensor([1e4, 0.0])) == 0.25
    assert relative_error(torch.zeros(3), torch.zeros(3)) == 0.0


# Refinement


def omse_layer(layer: nn.Module, bits: int) -> None:
    """Give ``layer`` its weight quantizer of least error."""
    granularity = Granularity.channel(0)
    quantizer = UniformQuantizer(bits, signed=True, symmetric=True, granularity=granularity, observer=make_observer("omse", granularity))
    quantizer.initialize(float_weight(layer))
    set_weight_quantizer(layer, quantizer)


def test_with_one_linear_layer_refinement_is_least_squares() -> None:
    reference = nn.Linear(12, 4)
    model = copy.deepcopy(reference)
    omse_layer(model, 2)
    x = torch.randn(200, 12) * torch.logspace(0, 1, 12)
    target = reference(x).detach()
    quantizer = weight_quantizer(model)
    assert quantizer is not None
    codes = quantizer.encode(float_weight(model)).codes
    refinement = ScaleRefinement(model, {"": model}, 1e-2)
    for _ in range(800):
        refinement.step(Inputs((x,)), target)
    refinement.keep_if_better([(Inputs((x,)), target)])
    refinement.store()
    reached = x @ codes.float().T
    best = (reached * (target - reference.bias)).sum(0) / reached.square().sum(0)
    assert isinstance(quantizer, UniformQuantizer)
    torch.testing.assert_close(quantizer.scale.flatten(), best.detach(), rtol=1e-3, atol=1e-5)
    assert torch.equal(quantizer.encode(float_weight(model)).codes, codes)


def test_the_gradient_of_a_scale_is_the_product_with_its_codes() -> None:
    model = nn.Linear(3, 2, bias=False)
    omse_layer(model, 3)
    x, target = torch.randn(5, 3), torch.randn(5, 2)
    refinement = ScaleRefinement(model, {"": model}, 1e-2)
    (frozen,) = refinement.frozen.values()
    (gradient,) = torch.autograd.grad(refinement.loss(Inputs((x,)), target), frozen.shifts)
    weight = frozen.weight().detach().requires_grad_()
    (by_weight,) = torch.autograd.grad((x @ weight.T - target).square().sum() / 5, weight)
    expected = (by_weight * frozen.codes[0]).sum(1, keepdim=True) * frozen.scales[0]  # d alpha / d shift = alpha
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("tau", [0.0, float("inf")])
def test_refinement_brings_outputs_closer_and_leaves_codes_alone(tau: float) -> None:
    data = torch.randn(96, 3, 8, 8)
    model = settled(TinyNet(), data)
    options = {"weight_bits": 3, "activation_bits": None, "calibration": data, "tau": tau, "key_share": 1.0}
    before = quantize(model, method="lbq", epochs=0, **options)
    after = quantize(model, method="lbq", epochs=8, learning_rate=1e-2, **options)
    codes_before, codes_after = (bake_weights(m)[1] for m in (before, after))
    for name, code in codes_before.items():
        difference = (code.codes != codes_after[name].codes).float().mean()
        assert difference <= (0.01 if tau == 0 else 0)  # two pairs of codes may mean the same value
    with torch.no_grad():
        expected = model(data)
        assert (after(data) - expected).square().mean() < 0.8 * (before(data) - expected).square().mean()


def test_a_useless_learning_rate_keeps_the_scales_at_the_start() -> None:
    data = torch.randn(64, 3, 8, 8)
    model = settled(TinyNet(), data)
    options = {"weight_bits": 4, "activation_bits": None, "calibration": data}
    before, after = (quantize(model, method="lbq", epochs=e, learning_rate=50.0, **options) for e in (0, 2))
    with torch.no_grad():
        torch.testing.assert_close(after(data), before(data), rtol=1e-5, atol=1e-5)


class Killed(Exception):
    """Stands for a kill in the middle of the work."""


def test_a_killed_refinement_goes_on_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = torch.randn(64, 3, 8, 8)
    model = settled(TinyNet(), data)

    def run(work_dir: Path | None, seed: int = 0) -> dict[str, Tensor]:
        return quantize(model, method="lbq", weight_bits=3, calibration=data, epochs=4, seed=seed, work_dir=work_dir).state_dict()

    expected = run(None)
    steps, step = [], ScaleRefinement.step

    def counted(self: ScaleRefinement, inputs: Inputs, target: Tensor) -> None:
        steps.append(1)
        if len(steps) == 6:  # in the third of four epochs of two steps
            raise Killed
        step(self, inputs, target)

    monkeypatch.setattr(ScaleRefinement, "step", counted)
    with pytest.raises(Killed):
        run(tmp_path)
    resumed = run(tmp_path)
    assert len(steps) == 6 + 4
    assert all(torch.equal(resumed[key], value) for key, value in expected.items())
    steps[:] = [1] * 10
    run(tmp_path, seed=1)
    assert len(steps) == 10 + 8  # another run does not use this state


def test_layers_that_share_a_weight_keep_one_scale() -> None:
    data = torch.randn(64, 6)
    model = quantize(SharedWeightNet(), method="lbq", weight_bits=8, activation_bits=8, calibration=data, epochs=3)
    first, second = weight_quantizer(model.encode), weight_quantizer(model.decode)
    assert isinstance(first, UniformQuantizer) and isinstance(second, UniformQuantizer)
    assert torch.equal(first.scale, second.scale)


# The whole method


def test_tau_decides_how_many_layers_are_stored_twice_and_the_notes_say_so() -> None:
    data = torch.randn(64, 3, 8, 8)
    model = settled(TinyNet(), data)
    for tau, share, expected in ((0.0, 1.0, 4), (0.01, 1.0, 2), (0.01, 0.1, 1), (float("inf"), 1.0, 0)):
        result = quantize(model, method="lbq", weight_bits=3, activation_bits=8, calibration=data, tau=tau, key_share=share, epochs=0)
        codes = bake_weights(result)[1]
        doubled = [name for name, code in codes.items() if code.code_bits == 2 * code.bit_width * code.shape.numel()]
        assert len(doubled) == expected
        record = record_of(result)
        assert record is not None
        assert sum("two 3-bit weight tensors" in note or "two 8-bit weight tensors" in note for note in record.table.notes) == expected


def test_eight_bits_are_nearly_float() -> None:
    data = torch.randn(64, 3, 8, 8)
    model = settled(TinyNet(), data)
    result = quantize(model, method="lbq", weight_bits=8, activation_bits=8, calibration=data, epochs=1)
    with torch.no_grad():
        expected = model(data)
        assert (result(data) - expected).square().mean() < 2e-3 * expected.var()


@pytest.mark.parametrize("option", [{"tau": -1.0}, {"key_share": 1.5}, {"epochs": -1}, {"learning_rate": 0.0}, {"batch_size": 0}])
def test_options_out_of_range_are_refused(option: dict[str, float]) -> None:
    with pytest.raises(SpecError, match=next(iter(option))):
        quantize(TinyNet().eval(), method="lbq", calibration=torch.randn(4, 3, 8, 8), **option)


def test_one_bit_is_refused() -> None:
    with pytest.raises(SpecError, match="lbq supports 2 to 8 weight bits"):
        quantize(TinyNet().eval(), method="lbq", weight_bits=1, calibration=torch.randn(4, 3, 8, 8))
