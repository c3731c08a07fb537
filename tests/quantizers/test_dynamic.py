from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lowbit
from lowbit.errors import SpecError
from lowbit.network import insert
from lowbit.quantizers.affine import affine_parameters
from lowbit.quantizers.dynamic import DynamicMinMaxQuantizer, DynamicQuantizer
from lowbit.quantizers.grid import Grid
from lowbit.spec import Granularity

X = torch.randn(3, 4, 5, 5, generator=torch.Generator().manual_seed(2)) * torch.tensor([1.0, 10.0, 0.1]).view(3, 1, 1, 1)
AXES = [(), (0,), (1,), (0, 1), (0, -1)]
each_granularity = pytest.mark.parametrize("axes", AXES, ids=str)


def quantizer(axes: tuple[int, ...], bits: int = 3, *, symmetric: bool = False) -> DynamicMinMaxQuantizer:
    return DynamicMinMaxQuantizer(bits, symmetric=symmetric, granularity=Granularity(axes))


def test_the_range_is_that_of_the_present_input() -> None:
    q = quantizer((0,), 2)
    # 0 to 3 and -2 to 4: scale 1 and 2
    x = torch.tensor([[0.4, 0.5, 1.5, 3.0], [-2.0, 0.9, 1.1, 4.0]])
    assert q(x).tolist() == [[0, 0, 2, 3], [-2, 0, 2, 4]]
    assert q.encode(x).codes.tolist() == [[0, 0, 2, 3], [0, 1, 2, 3]]
    assert q(x * 7).tolist() == (q(x) * 7).tolist()


def test_symmetric_codes_are_signed_and_zero_is_zero() -> None:
    encoded = quantizer((), 3, symmetric=True).encode(torch.tensor([-6.0, 0.0, 1.0, 3.0]))
    assert encoded.codes.tolist() == [-3, 0, 0, 2]  # scale 2, halves to even
    assert encoded.decode().tolist() == [-6, 0, 0, 4]


@each_granularity
@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_come_with_the_scales_of_their_input(axes: tuple[int, ...], symmetric: bool) -> None:
    q = quantizer(axes, symmetric=symmetric)
    for x in (X, X * 3 - 1, X[:1]):
        encoded = q.encode(x)
        assert torch.equal(encoded.decode(), q(x))
        assert encoded.decoder.tensors()["scale"].shape == q.granularity.scale_shape(x)
        assert max(row.unique().numel() for row in q.granularity.flatten(q(x))) <= 8


@pytest.mark.parametrize("axes", [(0,), (0, 1)])
def test_samples_of_a_batch_do_not_influence_each_other(axes: tuple[int, ...]) -> None:
    q = quantizer(axes)
    assert torch.equal(q(X), torch.cat([q(x) for x in X.split(1)]))
    assert not torch.equal(quantizer(())(X), torch.cat([quantizer(())(x) for x in X.split(1)]))


def test_gradients_are_the_identity() -> None:
    x = X.clone().requires_grad_()
    upstream = torch.randn_like(X)
    quantizer((0, 1))(x).backward(upstream)
    torch.testing.assert_close(x.grad, upstream)


@each_granularity
def test_edges(axes: tuple[int, ...]) -> None:
    q = quantizer(axes)
    assert torch.equal(q(torch.zeros(2, 3, 4)), torch.zeros(2, 3, 4))
    constant = torch.full((1, 1, 5), 0.7)
    torch.testing.assert_close(q(constant), constant)
    y = q(X.bfloat16())
    assert y.dtype == torch.bfloat16 and torch.equal(y, q(X.bfloat16().float()).bfloat16())
    assert torch.equal(q(X[:, :3, :1, :1]), q.encode(X[:, :3, :1, :1]).decode())


def test_bits_change_without_anything_to_learn_anew() -> None:
    q = quantizer((0, 1), 8)
    before = q(X)
    q.set_bit_width(2)
    assert torch.equal(q(X), quantizer((0, 1), 2)(X))
    q.set_bit_width(8)
    assert torch.equal(q(X), before)


def test_groups_and_one_symmetric_bit_are_refused() -> None:
    with pytest.raises(SpecError, match=r"Use axes, for example Granularity.over\(0, 1\)"):
        DynamicMinMaxQuantizer(4, granularity=Granularity.group(4))
    with pytest.raises(SpecError, match="SignQuantizer"):
        DynamicMinMaxQuantizer(1, symmetric=True)


class Standardized(DynamicQuantizer):
    """Levels half a step off the channel's mean, a multiple of its standard deviation apart; a constant channel stays as it is."""

    def __init__(self, bit_width: int, step: float) -> None:
        super().__init__(bit_width, 1 - 2 ** (bit_width - 1), 2 ** (bit_width - 1), granularity=Granularity.over(0, 1))
        self.step = step

    def grid_of(self, x: Tensor) -> Grid:
        mean = self.statistic("mean", x)
        deviation = ((x - mean).square().mean((2, 3), keepdim=True)).sqrt()
        step = torch.where(deviation > 0, self.step * deviation, torch.ones_like(deviation))
        # a constant channel has the code 0, which stands for its mean
        zero_point = torch.where(deviation > 0, 0.5 - mean / step, -mean)
        return Grid(torch.where(deviation > 0, mean - step / 2, mean), step, step, zero_point)


def test_statistics_of_each_channel_of_each_sample_make_the_grid() -> None:
    q = Standardized(2, 0.996)
    x = X.clone()
    x[1, 2] = 1.25
    y = q(x)
    assert torch.equal(q.encode(x).decode(), y) and torch.equal(y[1, 2], x[1, 2])
    levels = y[0, 0].unique() - x[0, 0].mean()
    step = 0.996 * x[0, 0].std(correction=0)
    torch.testing.assert_close(levels, torch.tensor([-1.5, -0.5, 0.5, 1.5]) * step, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(q(2 * x + 3), 2 * y + 3, rtol=1e-4, atol=1e-4)


# In a network


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(200, 3)]
    model = lowbit.quantize(nn.Sequential(*layers).eval(), method="round_to_nearest", weight_bits=8, activation_bits=8, calibration=X)
    assert isinstance(model, nn.Sequential)
    return model


@pytest.mark.parametrize("axes", [(), (0,), (0, 1)], ids=str)
def test_files_compute_the_grid_and_the_report_says_what_is_emulated(axes: tuple[int, ...], tmp_path: Path) -> None:
    model = network()
    insert.set_input_quantizer(model[2], quantizer(axes, 4))
    report = lowbit.export(model, tmp_path / "net.lowbit", sample=X)
    assert "emulated in float, because every input has its own grid: 2" in report.notes
    other = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(lowbit.load(tmp_path / "net.lowbit")(other), model(other))
    pytest.importorskip("onnxruntime")
    report = lowbit.export(model, tmp_path / "net.onnx", sample=X, measure_speed=False)
    assert "computed in float, because every input has its own grid: 2" in report.notes
    insert.input_quantizer(model[2]).set_bit_width(None)  # type: ignore[union-attr]
    assert not any("grid of its own" in note for note in lowbit.export(model, tmp_path / "net.lowbit", sample=X).notes)


def test_a_network_trains_through_it() -> None:
    model = network().train()
    insert.set_input_quantizer(model[2], quantizer((0, 1), 4))
    model(X).square().mean().backward()
    gradient = insert.float_weight(model[0]).grad
    assert gradient is not None and gradient.abs().sum() > 0


def test_the_compiled_quantizer_computes_the_same() -> None:
    torch.compiler.reset()
    for axes in ((), (0, 1)):
        compiled = torch.compile(quantizer(axes), backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(X), quantizer(axes)(X))


def test_the_grid_is_the_affine_one() -> None:
    scale, zero_point = affine_parameters(X.amin((2, 3), keepdim=True), X.amax((2, 3), keepdim=True), 0, 7, symmetric=False)
    expected = ((X / scale + zero_point).round().clamp(0, 7) - zero_point) * scale
    torch.testing.assert_close(quantizer((0, 1))(X), expected)
