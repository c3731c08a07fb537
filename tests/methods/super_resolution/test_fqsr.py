"""FQSR: numbers worked out by hand, and what its card says to check."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import lowbit
from lowbit.methods.super_resolution.fqsr import FqsrQuantizer
from lowbit.models.edsr import Edsr
from lowbit.models.srresnet import SrResNet
from lowbit.network import insert
from lowbit.network.surgery.sums import Sum
from lowbit.spec import BitPolicy, LayerBits


def quantizer(bits: int, interval: float, *, is_half: bool = False, **options: object) -> FqsrQuantizer:
    made = FqsrQuantizer(bits, is_half=is_half, **{"warm_up": 0, **options})  # type: ignore[arg-type]
    made.interval.data.fill_(interval)
    return made


def picture(side: int = 6) -> Tensor:
    return 255 * torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(3))


def test_the_full_range_has_no_level_at_zero_and_the_half_range_has() -> None:
    x = torch.tensor([-9.0, -0.4, 0.0, 0.6, 1.4, 9.0])
    torch.testing.assert_close(quantizer(2, 1.5)(x), torch.tensor([-1.5, -0.5, 0.5, 0.5, 1.5, 1.5]))
    torch.testing.assert_close(quantizer(2, 1.5, is_half=True)(x), torch.tensor([0.0, 0.0, 0.0, 0.5, 1.5, 1.5]))


@pytest.mark.parametrize("bits", range(1, 9))
def test_zero_becomes_half_a_step_for_any_interval(bits: int) -> None:
    for interval in torch.rand(200, generator=torch.Generator().manual_seed(bits)).tolist():
        y = quantizer(bits, interval).eval()(torch.zeros(1)).item()
        assert y == pytest.approx(interval / (2**bits - 1), rel=1e-5)


def test_an_interval_and_its_negative_quantize_alike_with_opposite_gradients() -> None:
    x = torch.tensor([-2.0, 0.2, 0.9])
    found = []
    for interval in (1.2, -1.2):
        used = quantizer(4, interval)
        y = used(x)
        y.backward(torch.tensor([1.0, 10.0, 100.0]))
        found.append((y.detach(), used.interval.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1].item() == pytest.approx(-found[1][1].item())  # type: ignore[union-attr]


def test_gradients_of_clipped_and_of_other_values() -> None:
    used, x = quantizer(2, 1.5), torch.tensor([-4.0, 0.4, 4.0], requires_grad=True)
    used(x).backward(torch.tensor([1.0, 10.0, 100.0]))
    assert x.grad.tolist() == [0.0, 10.0, 0.0]  # type: ignore[union-attr]
    assert used.interval.grad.item() == pytest.approx(-1 + 10 * (0.5 - 0.4) / 1.5 + 100, rel=1e-5)  # type: ignore[union-attr]


def test_values_pass_in_the_warm_up_and_the_interval_is_their_mean_maximum() -> None:
    used = quantizer(4, 1.0, warm_up=2)
    for largest, mean in ((3.0, 3.0), (1.0, 2.0)):
        x = torch.tensor([0.3, -largest], requires_grad=True)
        y = used(x)
        assert torch.equal(y, x)
        y.sum().backward()
        assert used.interval.grad is None
        assert used.interval.item() == mean
    assert used(torch.tensor([9.0])).item() == 2.0
    assert used.interval.item() == 2.0
    assert used.calls.item() == 3


def test_in_evaluation_values_are_quantized_and_nothing_is_counted() -> None:
    used = quantizer(1, 2.0, warm_up=5).eval()
    assert used(torch.tensor([0.3])).item() == 2.0
    assert used.calls.item() == 0


def test_the_penalty_is_zero_on_the_grid_and_moves_clipped_values_alone() -> None:
    used = quantizer(2, 1.5, calibration_weight=0.3)
    used(torch.tensor([0.5, -1.5]))
    assert used.penalty().item() == 0.0
    x = torch.tensor([0.4, 2.0], requires_grad=True)
    used(x)
    assert used.penalty().item() == pytest.approx(0.3 * (0.1 + 0.5) / 2, rel=1e-5)
    used.penalty().backward()
    torch.testing.assert_close(x.grad, torch.tensor([0.0, 0.15]))


def test_the_penalty_sums_the_passes_since_it_was_asked_for() -> None:
    used = quantizer(2, 1.5)
    used(torch.tensor([2.0]))
    used(torch.tensor([2.5]))
    assert used.penalty().item() == pytest.approx(0.3 * (0.5 + 1.0))
    used(torch.tensor([2.0]))
    assert used.penalty().item() == pytest.approx(0.3 * 0.5)


def test_copies_leave_out_what_belongs_to_a_step() -> None:
    used = quantizer(4, 1.0)
    used(torch.randn(5, requires_grad=True))
    for twin in (copy.deepcopy(used), pickle.loads(pickle.dumps(used))):
        assert twin.penalty().item() == 0.0


def test_both_operands_of_a_sum_lie_on_one_grid() -> None:
    used, module = quantizer(8, 2.2).eval(), Sum()
    insert.set_output_quantizer(module.left, used)
    insert.set_output_quantizer(module.right, used)
    z = module(torch.randn(50), torch.randn(50))
    units = z * 255 / 2.2
    torch.testing.assert_close(units, units.round(), atol=1e-3, rtol=0)
    assert not bool((units.round() % 2).any())


def prepared(network: nn.Module, **options: object) -> nn.Module:
    return lowbit.prepare(network, method="fqsr", policy=BitPolicy(LayerBits(4, 4), None), sample=picture(), **options)


def test_every_convolution_and_every_sum_is_quantized_but_for_the_ends() -> None:
    torch.manual_seed(0)
    model = prepared(Edsr(2, 2, 4))
    layers = list(insert.quantized_weights(model))
    assert layers == ["head.0", "body.0.body.0", "body.0.body.2", "body.1.body.0", "body.1.body.2", "body.2", "tail.0.0", "tail.1"]
    sites = set(insert.sites(model))
    assert {f"{name}.input" for name in layers[1:]} | {f"{name}.output" for name in layers[:-1]} <= sites
    sums = [name for name, module in model.named_modules() if isinstance(module, Sum)]
    assert len(sums) == 3
    for name in sums:
        left, right = (insert.output_quantizer(model.get_submodule(f"{name}.{side}")) for side in ("left", "right"))
        assert left is right is not None
    assert all(isinstance(q, FqsrQuantizer) for q in insert.sites(model).values())


def test_padding_lies_on_the_grid() -> None:
    torch.manual_seed(0)
    assert prepared(Edsr(2, 1, 4)).body[1].padding == (0, 0)
    assert prepared(Edsr(2, 1, 4), pad_first=False).body[1].padding == (1, 1)


def test_norms_are_folded_before_outputs_are_quantized_on_request() -> None:
    torch.manual_seed(0)
    network = SrResNet(2, 1, 4, "prelu").eval()
    folded = prepared(network, norms="fold")
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    with insert.quantization_enabled(folded, weights=False, activations=False), torch.no_grad():
        torch.testing.assert_close(folded.eval()(picture()), network(picture()), rtol=1e-4, atol=1e-2)
    assert any(isinstance(module, nn.BatchNorm2d) for module in prepared(network).modules())


def test_skips_stay_float_on_request() -> None:
    torch.manual_seed(0)
    assert all(site.endswith(".input") for site in insert.sites(prepared(Edsr(2, 1, 4), skip_bits=None)))
