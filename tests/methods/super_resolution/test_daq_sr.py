"""DAQ for super-resolution: numbers worked out by hand, and what its card says to check."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import lowbit
from lowbit.methods.super_resolution.daq_sr import DaqActivation, DaqWeight, quantize_deviations, step_size
from lowbit.models.edsr import Edsr
from lowbit.network import insert
from lowbit.spec import BitPolicy, LayerBits


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(4))


def test_the_step_of_the_released_program_is_that_for_one_bit_less() -> None:
    assert [step_size(bits, "released") for bits in (1, 2, 4, 8)] == [2.0, 1.596, 0.586, 0.057]
    assert [step_size(bits, "width") for bits in (1, 2, 4, 8)] == [1.596, 0.996, 0.335, 0.031]
    assert {step_size(bits, "fine_tuning") for bits in (2, 4, 8)} == {1.596}


def test_one_bit_weights_are_signs_times_their_deviation_and_zero_is_negative() -> None:
    w = torch.tensor([-3.0, 0.0, 3.0])  # deviation 3
    assert DaqWeight(1)(w).tolist() == [-3.0, -3.0, 3.0]
    two = DaqWeight(2)(torch.tensor([-3.0, 0.0, 3.0]))  # a tie of even steps of 4.788
    torch.testing.assert_close(two, torch.tensor([-2.394, -2.394, 2.394]))


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_weights_have_all_levels_and_follow_their_scale(bits: int) -> None:
    w = torch.cat([5 * drawn(4000), torch.linspace(-40, 40, 200)])
    y = DaqWeight(bits)(w)
    assert y.unique().numel() == 2**bits
    torch.testing.assert_close(DaqWeight(bits)(3 * w), 3 * y)


def test_equal_weights_keep_their_value_nearly() -> None:
    y = DaqWeight(8)(torch.full((9,), 0.25))
    torch.testing.assert_close(y, torch.full((9,), 0.25), rtol=0.04, atol=0)
    assert DaqWeight(4)(torch.zeros(9)).abs().max() < 1e-20


def test_gradients_are_the_identity_even_where_values_are_clipped() -> None:
    x = torch.tensor([[[-50.0, 0.1, 0.3, 50.0]]], requires_grad=True)
    DaqActivation(1, is_signed=True)(x).backward(torch.tensor([[[1.0, 2.0, 3.0, 4.0]]]))
    assert x.grad.tolist() == [[[1.0, 2.0, 3.0, 4.0]]]  # type: ignore[union-attr]


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_signed_channels_lie_evenly_around_their_mean_and_follow_any_line(bits: int) -> None:
    x, quantizer = drawn(2, 3, 8, 8), DaqActivation(bits, is_signed=True, deviation_bits=None)
    y = quantizer(x)
    for sample in range(2):
        for channel in range(3):
            distances = y[sample, channel] - x[sample, channel].mean()
            levels = distances.flatten().round(decimals=4).unique()
            assert levels.numel() <= 2**bits
            assert distances.abs().min() > 1e-3
    torch.testing.assert_close(quantizer(2 * x + 7), 2 * y + 7, rtol=1e-4, atol=1e-4)


def test_samples_do_not_influence_each_other() -> None:
    x, quantizer = drawn(3, 4, 6, 6), DaqActivation(4, is_signed=True, deviation_bits=4)
    y = quantizer(x)
    for sample in range(3):
        assert torch.equal(quantizer(x[sample : sample + 1]), y[sample : sample + 1])


def test_constant_channels_pass_and_dead_ones_stay_zero() -> None:
    x = drawn(1, 3, 5, 5)
    x[:, 1] = 3.7
    torch.testing.assert_close(DaqActivation(4, is_signed=True, deviation_bits=None)(x)[:, 1], x[:, 1], rtol=1e-6, atol=0)
    x = x.relu()
    x[:, 1] = 0
    assert not DaqActivation(4, is_signed=False)(x)[:, 1].any()


def test_behind_a_relu_levels_are_multiples_of_a_step_with_zero() -> None:
    x = torch.tensor([[[0.0, 1.0, 2.0, 3.0]]])  # K = 4: mean 1.5, deviation sqrt(14 / 4 - 2.25)
    step = 1.596 * 1.25**0.5
    quantizer = DaqActivation(2, is_signed=False, deviation_bits=None)
    torch.testing.assert_close(quantizer(x), torch.tensor([[[0.0, step, step, 2 * step]]]))
    outlier = torch.cat([torch.zeros(1, 1, 1), torch.ones(1, 1, 99), torch.full((1, 1, 1), 90.0)], 2)
    assert quantizer(outlier).unique().numel() <= 4
    open_end = DaqActivation(2, is_signed=False, deviation_bits=None, clip_top=False)(outlier)
    assert open_end.max() > quantizer(outlier).max()


def test_deviations_on_a_grid_of_their_own_are_never_negative() -> None:
    deviations = torch.tensor([[[10.0], [10.0], [10.0], [0.01]]])
    found = quantize_deviations(deviations, 2, 1.596)
    assert bool((found >= 0).all())
    equal = torch.full((1, 3, 1), 2.0)
    assert torch.equal(quantize_deviations(equal, 4, 0.586), equal)
    single = torch.tensor([[[2.5]]])
    assert torch.equal(quantize_deviations(single, 4, 0.586), single)


def test_a_network_is_quantized_without_data_and_only_in_its_blocks_on_request() -> None:
    torch.manual_seed(0)
    network = Edsr(2, 2, 6)
    policy = BitPolicy(LayerBits(8, 8), None)
    picture = 255 * torch.rand(1, 3, 8, 8)
    quantized = lowbit.quantize(network, method="daq_sr", policy=policy, calibration=picture, blocks_only=True)
    assert list(insert.quantized_weights(quantized)) == ["body.0.body.0", "body.0.body.2", "body.1.body.0", "body.1.body.2"]
    with torch.no_grad():
        expected, got = network(picture), quantized(picture)
    assert (got - expected).norm() < 0.02 * (expected - expected.mean()).norm()


def test_both_kinds_compute_the_same() -> None:
    torch.manual_seed(0)
    network, policy, picture = Edsr(2, 1, 6), BitPolicy(LayerBits(3, 3), None), 255 * torch.rand(2, 3, 8, 8)
    plain = lowbit.quantize(network, method="daq_sr", policy=policy, calibration=picture)
    trained = lowbit.prepare(network, method="daq_sr", policy=policy, sample=picture).eval()
    with torch.no_grad():
        torch.testing.assert_close(trained(picture), plain(picture))


def test_linear_layers_have_one_grid_for_each_sample() -> None:
    model = lowbit.prepare(nn.Linear(16, 2), method="daq_sr", policy=BitPolicy(LayerBits(4, 2), None), sample=drawn(8, 16))
    quantizer = insert.input_quantizer(model)
    assert quantizer is not None
    assert quantizer(drawn(8, 16))[0].unique().numel() <= 4
