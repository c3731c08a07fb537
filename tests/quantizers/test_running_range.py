"""Ranges and codes by hand, edges of the range, and gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lowbit.errors import SpecError
from lowbit.quantizers.running_range import MinMaxWeightQuantizer, RunningRangeQuantizer, quantile
from lowbit.spec import Granularity

X = torch.randn(6, 5, 4, 4, generator=torch.Generator().manual_seed(0))
KINDS = ["minmax", "ema", "perc", "mse"]


def as_published(x: Tensor, lo: Tensor, hi: Tensor, bits: int) -> Tensor:
    """The program's arithmetic: codes per unit, signed codes, division."""
    s = (2**bits - 1) / (hi - lo).clamp(min=1e-8)
    z = (s * lo).round() + 2 ** (bits - 1)
    return ((s * x - z).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) + z) / s


def test_a_weight_spans_each_channel_whether_it_holds_zero_or_not() -> None:
    weight = torch.tensor([[1.0, 1.9, 2.4, 4.0], [0.0, 0.0, 0.0, 0.0], [-1.0, -0.4, 1.4, 2.0]])
    encoded = MinMaxWeightQuantizer(2).encode(weight)
    assert encoded.codes.tolist() == [[-2, -1, -1, 1], [-2, -2, -2, -2], [-2, -1, 0, 1]]
    assert encoded.decoder.tensors()["scale"].flatten().tolist() == [1.0, pytest.approx(1e-8 / 3), 1.0]
    assert encoded.decoder.tensors()["zero_point"].flatten().tolist() == [-3.0, -2.0, -1.0]
    assert encoded.decode().tolist() == [[1, 2, 2, 4], [0, 0, 0, 0], [-1, 0, 1, 2]]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("granularity", [Granularity(), Granularity.channel(1), Granularity.over(0, 1), Granularity.group(8)], ids=str)
def test_weights_are_those_of_the_program_and_their_codes_say_the_same(bits: int, granularity: Granularity) -> None:
    quantizer = MinMaxWeightQuantizer(bits, granularity)
    rows = granularity.flatten(X)
    expected = granularity.unflatten(as_published(rows, rows.amin(1, keepdim=True), rows.amax(1, keepdim=True), bits), X.shape)
    y = quantizer(X)
    torch.testing.assert_close(y, expected)
    assert torch.equal(quantizer.encode(X).decode(), y)
    assert all(row.unique().numel() <= 2**bits for row in granularity.flatten(y))


def test_a_weight_moves_by_at_most_half_a_step_but_at_the_top() -> None:
    weight = X.reshape(6, -1)
    encoded = MinMaxWeightQuantizer(4).encode(weight)
    steps = (encoded.decode() - weight).abs() / encoded.decoder.tensors()["scale"]
    assert float(steps.max()) < 1.001
    is_top = encoded.codes == 7  # rounding the zero point can push the largest values beyond the last code
    assert float(steps[~is_top].max()) < 0.501


def test_ties_are_rounded_as_in_the_program() -> None:
    """With S = 1 and Z = 1: S x - Z is halfway, and half to even of that, not of S x."""
    weight = torch.tensor([[-1.0, 2.0, 0.5, 1.5, -0.5]])
    assert MinMaxWeightQuantizer(2)(weight).tolist() == [[-1.0, 2.0, 1.0, 1.0, -1.0]]


@pytest.mark.parametrize("value", [0.7, -3.0, 1e-3])
def test_a_constant_channel_keeps_its_value(value: float) -> None:
    weight = torch.full((1, 5), value)
    quantizer = MinMaxWeightQuantizer(4)
    torch.testing.assert_close(quantizer(weight), weight)
    assert torch.equal(quantizer.encode(weight).decode(), quantizer(weight))


def test_gradients_pass_unchanged_where_values_are_clipped_too() -> None:
    quantizer = RunningRangeQuantizer(3)
    quantizer.initialize(X / 2)
    quantizer.eval()
    for q in (quantizer, MinMaxWeightQuantizer(2)):
        x, upstream = X.clone().requires_grad_(), torch.randn_like(X)
        q(x).backward(upstream)
        assert torch.equal(x.grad, upstream)


def test_a_running_range_starts_at_zero_only_grows_and_stays_in_evaluation() -> None:
    quantizer = RunningRangeQuantizer(4)
    first, second = torch.tensor([1.0, 2.0]), torch.tensor([-3.0, 0.6])
    quantizer(first)
    assert (float(quantizer.lower), float(quantizer.upper)) == (0.0, 2.0)
    y = quantizer(second)
    assert (float(quantizer.lower), float(quantizer.upper)) == (-3.0, 2.0)
    torch.testing.assert_close(y, as_published(second, torch.tensor(-3.0), torch.tensor(2.0), 4))
    quantizer.eval()
    assert float(quantizer(torch.tensor([9.0]))) == pytest.approx(2.0, abs=0.2) and float(quantizer.upper) == 2.0
    quantizer.initialize(torch.tensor([1.0]))
    assert (float(quantizer.lower), float(quantizer.upper)) == (0.0, 1.0)


def test_ranges_of_the_other_kinds() -> None:
    quantizers = {kind: RunningRangeQuantizer(4, kind=kind, percentile=90.0) for kind in KINDS}  # type: ignore[arg-type]
    batches = [X, 2 * X[:2] + 1]
    for batch in batches:
        for quantizer in quantizers.values():
            quantizer.observe(batch)
    ranges = {kind: (float(q.lower), float(q.upper)) for kind, q in quantizers.items()}
    assert ranges["minmax"] == (min(0, *(float(b.min()) for b in batches)), max(float(b.max()) for b in batches))
    means = [(float(b.flatten(1).amin(1).mean()), float(b.flatten(1).amax(1).mean())) for b in batches]
    assert ranges["ema"] == pytest.approx((min(lo for lo, _ in means), max(hi for _, hi in means)))
    percentiles = [np.percentile(b.numpy(), (10, 90)) for b in batches]
    assert ranges["perc"] == pytest.approx((min(lo for lo, _ in percentiles), max(hi for _, hi in percentiles)))
    last = batches[-1]
    candidates = [float(last.max() - s * 0.01 * (last.max() - last.min())) for s in range(80)]
    errors = [float((as_published(last, last.min(), torch.tensor(hi), 4) - last).norm()) for hi in candidates]
    assert ranges["mse"] == pytest.approx((float(last.min()), candidates[int(np.argmin(errors))]))
    assert ranges["mse"][1] < float(last.max())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("symmetric", [False, True])
def test_codes_say_what_the_forward_pass_computes(kind: str, symmetric: bool) -> None:
    for bits in range(1 + symmetric, 9):
        quantizer = RunningRangeQuantizer(bits, kind=kind, symmetric=symmetric)  # type: ignore[arg-type]
        quantizer(X[:3])
        quantizer.eval()
        y = quantizer(X * 1.5)
        assert torch.equal(quantizer.encode(X * 1.5).decode(), y) and y.unique().numel() <= 2**bits
        assert not symmetric or float(quantizer(torch.zeros(1))) == 0.0


def test_an_empty_range_is_replaced_by_that_of_the_batch() -> None:
    quantizer = RunningRangeQuantizer(2).eval()
    assert not quantizer.is_initialized
    assert quantizer(torch.tensor([1.0, 2.2, 4.0])).tolist() == [1.0, 2.0, 4.0]
    assert quantizer.encode(torch.tensor([1.0, 2.2, 4.0])).decode().tolist() == [1.0, 2.0, 4.0]
    quantizer.initialize(torch.zeros(3))
    assert quantizer(torch.zeros(4)).tolist() == [0.0] * 4
    assert quantizer(torch.zeros(0, 3)).shape == (0, 3)
    quantizer.observe(torch.zeros(0, 3))


def test_widths_share_the_range_and_a_state_dict_holds_it() -> None:
    quantizer = RunningRangeQuantizer(8)
    quantizer(X)
    quantizer.eval()
    before = quantizer(X)
    quantizer.set_bit_width(2)
    assert quantizer(X).unique().numel() <= 4
    quantizer.set_bit_width(8)
    assert torch.equal(quantizer(X), before)
    other = RunningRangeQuantizer(8).eval()
    other.load_state_dict(quantizer.state_dict())
    assert torch.equal(other(X), before)


def test_quantiles_of_many_values_are_those_of_numpy() -> None:
    x = torch.randn(1001, generator=torch.Generator().manual_seed(1))
    for share in (0.0, 0.00001, 0.25, 0.5, 0.99999, 1.0):
        assert float(quantile(x, share)) == pytest.approx(float(np.quantile(x.numpy(), share)), rel=1e-5)
    assert float(quantile(torch.tensor([2.0]), 0.3)) == 2.0


def test_an_exported_network_computes_with_the_stored_range() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.quantizer = RunningRangeQuantizer(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.quantizer(x.relu())

    net = Net()
    net(X)
    net.eval()
    program = torch.export.export(net, (X.repeat(2, 1, 1, 1)[:8],)).module()
    x = torch.cat([X * 2, net.quantizer.upper / 30 * torch.arange(160).view(2, 5, 4, 4)])  # every second one halfway between two codes
    assert torch.equal(program(x), net(x))


def test_half_precision_is_quantized_in_float() -> None:
    quantizer = RunningRangeQuantizer(4)
    y = quantizer(X.bfloat16())
    quantizer.eval()
    assert y.dtype == torch.bfloat16 and torch.equal(y, quantizer(X.bfloat16().float()).bfloat16())


def test_bad_arguments() -> None:
    with pytest.raises(SpecError, match="at least 2 bits"):
        MinMaxWeightQuantizer(1, symmetric=True)
    with pytest.raises(SpecError, match=r"from 50 to 100, got 0\.9"):
        RunningRangeQuantizer(4, kind="perc", percentile=0.9)
    with pytest.raises(SpecError):
        RunningRangeQuantizer(9)
