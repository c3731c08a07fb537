from __future__ import annotations

import pytest
import torch
from tests.networks import TinyNet
from torch import Tensor, nn

import lowbit
from lowbit.errors import SpecError
from lowbit.formats.packed import packing
from lowbit.methods.quantization_aware.twn import (
    TernaryQuantizer,
    Twn,
    best_threshold,
    ternary_scale,
    threshold_by_rule,
)
from lowbit.network import insert
from lowbit.qat import Slot
from lowbit.quantizers import LearnedScaleQuantizer, QTensor, ScaledSignQuantizer
from lowbit.spec import BitPolicy, Granularity
from lowbit.surrogates import make_surrogate


def test_weights_beyond_the_threshold_become_their_mean_magnitude_and_others_zero() -> None:
    weight = torch.tensor([[1.0, -2.0, 0.5, 0.0], [-0.1, 4.0, 0.4, -2.0]])  # mean magnitude 1.25
    q = TernaryQuantizer(delta_factor=0.8)
    threshold, scale = q.threshold_and_scale(weight)
    assert threshold.item() == 1.0
    assert scale.item() == pytest.approx(8 / 3)
    a = scale.item()
    assert q(weight).tolist() == [[0.0, -a, 0.0, 0.0], [0.0, a, 0.0, -a]]  # exactly at the threshold is zero


def test_only_what_lies_strictly_beyond_the_threshold_survives() -> None:
    threshold = torch.tensor([0.7 * 1.37])
    for value in (threshold, torch.nextafter(threshold, torch.tensor(2.0)), torch.nextafter(threshold, torch.tensor(0.0))):
        q = TernaryQuantizer()
        q.threshold_and_scale = lambda _: (threshold, torch.tensor([1.0]))  # type: ignore[method-assign, assignment]
        assert q(torch.cat([value, -value])).tolist() == ([1.0, -1.0] if value > threshold else [0.0, 0.0])


def test_one_threshold_serves_the_whole_tensor_unless_channels_are_asked_for() -> None:
    weight = torch.tensor([[0.1, -0.1, 0.1], [1.0, -1.0, 1.0]])
    assert TernaryQuantizer()(weight).tolist() == [[0.0, 0.0, 0.0], [1.0, -1.0, 1.0]]
    for granularity in (Granularity.channel(0), Granularity.group(3)):
        torch.testing.assert_close(TernaryQuantizer(granularity=granularity)(weight), weight)


@pytest.mark.parametrize("threshold", ["rule", "search"])
@pytest.mark.parametrize("granularity", [Granularity.tensor(), Granularity.channel(1), Granularity.group(4)], ids=str)
def test_codes_are_minus_one_zero_and_one_and_decode_to_the_forward_pass(threshold: str, granularity: Granularity) -> None:
    q, weight = TernaryQuantizer(threshold=threshold, granularity=granularity), torch.randn(6, 4, 3, 3)  # type: ignore[arg-type]
    encoded = q.encode(weight)
    assert torch.equal(encoded.decode(), q(weight))
    assert encoded.codes.unique().tolist() == [-1, 0, 1] and encoded.bit_width == 2
    assert all(row.unique().numel() <= 3 for row in granularity.flatten(q(weight)))
    torch.testing.assert_close(q(-weight), -q(weight))
    torch.testing.assert_close(q(3 * weight), 3 * q(weight))


@pytest.mark.parametrize(
    "weight", [torch.zeros(3, 4), torch.full((3, 4), 0.25), torch.full((3, 4), -1e-30)], ids=["zero", "constant", "tiny"]
)
@pytest.mark.parametrize("threshold", ["rule", "search"])
def test_zero_and_constant_weights_are_kept(weight: Tensor, threshold: str) -> None:
    for granularity in (Granularity.tensor(), Granularity.channel(0)):
        q = TernaryQuantizer(threshold=threshold, granularity=granularity)  # type: ignore[arg-type]
        torch.testing.assert_close(q(weight), weight, rtol=1e-5, atol=0)
        assert torch.equal(q.encode(weight).decode(), q(weight))


def test_the_gradient_is_the_upstream_one_bit_for_bit() -> None:
    weight, upstream = torch.randn(4, 5).requires_grad_(), torch.randn(4, 5)
    TernaryQuantizer()(weight).backward(upstream)
    assert weight.grad is not None and torch.equal(weight.grad, upstream)


def test_a_surrogate_replaces_the_gradient_only() -> None:
    weight = torch.tensor([0.1, 1.0, -3.0], requires_grad=True)
    q = TernaryQuantizer()
    plain = q(weight).detach()
    q.surrogate = make_surrogate("clipped_ste")
    y = q(weight)
    y.sum().backward()
    threshold, scale = q.threshold_and_scale(weight.detach())
    slope = float(scale / (2 * threshold))
    assert torch.equal(y.detach(), plain)
    assert weight.grad is not None
    assert weight.grad.tolist() == pytest.approx([slope, slope, 0.0])  # -3 is beyond the last code


def test_the_searched_threshold_is_the_best_of_all() -> None:
    rows = torch.randn(5, 12)
    found = best_threshold(rows)

    def errors(threshold: Tensor) -> Tensor:
        ternary = ternary_scale(rows, threshold)[:, None] * rows.sign() * (rows.abs() > threshold[:, None])
        return (rows - ternary).square().sum(1)

    candidates = torch.stack([errors(rows.abs().sort(1).values[:, k] * 0.999) for k in range(12)])
    torch.testing.assert_close(errors(found), candidates.amin(0))
    assert bool((errors(found) <= errors(threshold_by_rule(rows)) + 1e-6).all())


def test_gaussian_weights_have_the_thresholds_of_the_paper_and_less_error_than_binary_ones() -> None:
    weight = torch.randn(1, 200_000, generator=torch.Generator().manual_seed(0))
    assert threshold_by_rule(weight).item() == pytest.approx(0.7 * 0.7979, abs=0.01)
    assert best_threshold(weight).item() == pytest.approx(0.612, abs=0.02)
    uniform = torch.rand(1, 200_000, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert best_threshold(uniform).item() == pytest.approx(1 / 3, abs=0.02)
    error = {type(q): float((weight - q(weight)).square().mean()) for q in (TernaryQuantizer(), ScaledSignQuantizer())}
    assert error[TernaryQuantizer] < 0.6 * error[ScaledSignQuantizer]


def test_the_threshold_is_at_most_a_hundred_as_in_the_authors_program() -> None:
    assert threshold_by_rule(torch.tensor([[1000.0, 1000.0]])).item() == 100.0


def test_bfloat16_weights_are_computed_in_float32() -> None:
    weight = torch.randn(300, generator=torch.Generator().manual_seed(0)).bfloat16()
    y = TernaryQuantizer()(weight)
    assert y.dtype == torch.bfloat16 and torch.equal(y, TernaryQuantizer()(weight.float()).bfloat16())


@pytest.mark.parametrize("shape", [(1,), (4, 4), (3, 7, 3, 3)])
def test_packing_two_bits_a_weight_loses_nothing(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape)
    encoded: QTensor = TernaryQuantizer().encode(weight)
    levels = encoded.codes + 1
    stored = packing.pack(levels, 2)
    assert stored.numel() == -(-weight.numel() // 4)
    codes = packing.unpack(stored, 2, weight.numel()).reshape(shape).to(torch.int8) - 1
    assert torch.equal(QTensor(codes, encoded.decoder, 2).decode(), TernaryQuantizer()(weight))


def test_a_prepared_network_has_ternary_weights_and_float_activations() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 3, 8, 8)
    model = lowbit.prepare(TinyNet(), method="twn", weight_bits=2, activation_bits=4, sample=x)
    assert model.conv1.weight.unique().numel() == 3 and not insert.activation_quantizers(model)
    assert isinstance(insert.weight_quantizer(model.stem), LearnedScaleQuantizer)
    everywhere = lowbit.prepare(TinyNet(), method="twn", sample=x, policy=BitPolicy.uniform(2, 4, first_last=None))
    assert everywhere.stem.weight.unique().numel() == 3
    assert insert.activation_quantizers(everywhere)["conv1.input"].bit_width == 4


def test_wrong_options_are_refused() -> None:
    with pytest.raises(SpecError, match="delta_factor must be above 0"):
        Twn(delta_factor=0.0)
    with pytest.raises(SpecError, match="granularity"):
        Twn(weight_granularity="per_layer")
    with pytest.raises(SpecError, match="2 to 2 weight bits, got 4"):
        lowbit.prepare(TinyNet(), method="twn", weight_bits=4, sample=torch.randn(8, 3, 8, 8))


@pytest.mark.parametrize(
    "layer", [nn.Conv1d(4, 4, 3, groups=4), nn.ConvTranspose2d(3, 5, 2), nn.Linear(4, 3)], ids=lambda x: type(x).__name__
)
def test_channels_are_counted_along_the_layers_own_axis(layer: nn.Module) -> None:
    q = Twn(weight_granularity="per_channel").weight_quantizer(Slot("layer", layer, 2, True, "inner"))
    weight = layer.weight.detach()
    axis = 1 if isinstance(layer, nn.ConvTranspose2d) else 0
    for channel, ternary in zip(weight.movedim(axis, 0), q(weight).movedim(axis, 0), strict=True):
        torch.testing.assert_close(ternary, TernaryQuantizer()(channel))
