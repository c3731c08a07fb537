from __future__ import annotations

import pytest
import torch
from torch import nn

from lowbit.errors import SpecError
from lowbit.methods.gradients.quantization_networks import QuantizationNetworks, StairsQuantizer, cluster_biases, target_values
from lowbit.qat import Classification, Recipe, TrainRun


def stairs(
    values: tuple[float, ...], biases: list[float], *, bit_width: int = 2, temperature: float = 10.0, **options: object
) -> StairsQuantizer:
    quantizer = StairsQuantizer(bit_width, values, is_centred=True, **options)  # type: ignore[arg-type]
    quantizer.set_scales(torch.tensor(0.5), torch.tensor(2.0))
    quantizer.set_biases(torch.tensor(biases))
    quantizer.temperature.fill_(temperature)
    return quantizer


X = torch.linspace(-1, 1, 200)


def test_evaluation_steps_strictly_above_each_bias() -> None:
    quantizer = stairs((-1, 0, 1), [-0.5, 0.5]).eval()
    assert quantizer(torch.tensor([-0.3, -0.25, -0.2, 0.25, 0.26])).tolist() == [-0.5, -0.5, 0.0, 0.0, 0.5]


def test_the_soft_staircase_tends_to_the_hard_one() -> None:
    gaps = []
    for temperature in (5.0, 50.0, 1500.0):
        quantizer = stairs((-1, 0, 1), [-0.5, 0.5], temperature=temperature)
        x = X.clone().requires_grad_()
        gaps.append(float((quantizer.train()(x) - quantizer.eval()(x)).abs().mean()))
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[2] < 1e-3


def test_gradients_are_those_of_the_soft_staircase() -> None:
    quantizer = stairs((-4, -2, -1, 0, 1, 2, 4), [-3.0, -1.5, -0.5, 0.5, 1.5, 3.0], bit_width=3, temperature=2.0)
    x = torch.linspace(-0.9, 0.9, 31, dtype=torch.float32).requires_grad_()
    g = torch.randn(31, generator=torch.Generator().manual_seed(0))
    quantizer(x).backward(g)
    y = quantizer.output_scale.detach().clone().requires_grad_()
    b = quantizer.input_scale.detach().clone().requires_grad_()
    z = x.detach().clone().requires_grad_()
    steps = zip(quantizer.gaps, quantizer.biases, strict=True)
    expected = y * (sum(gap * torch.sigmoid(2.0 * (b * z - bias)) for gap, bias in steps) - quantizer.offset)
    expected.backward(g)
    torch.testing.assert_close(x.grad, z.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(quantizer.output_scale.grad, y.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(quantizer.input_scale.grad, b.grad, rtol=1e-4, atol=1e-4)


def test_two_steps_at_one_place_are_one_of_twice_the_height() -> None:
    one, two = stairs((-1, 1), [0.0], bit_width=1), stairs((-1, 0, 1), [0.0, 0.0])
    x = X.clone().requires_grad_()
    torch.testing.assert_close(one(x), two(x))
    torch.testing.assert_close(one.eval()(x), two.eval()(x))


def test_the_derivative_of_a_binary_step_can_be_taken_at_temperature_one() -> None:
    quantizer = stairs((-1, 1), [0.0], bit_width=1, temperature=8.0, unit_backward=True)
    x = torch.tensor([0.1], requires_grad=True)
    quantizer(x).sum().backward()
    sigmoid = torch.sigmoid(torch.tensor(0.2))
    assert x.grad is not None and x.grad.item() == pytest.approx(float(0.5 * 2 * 8 * 2 * sigmoid * (1 - sigmoid)), rel=1e-5)


def test_weight_temperatures_are_capped() -> None:
    assert stairs((-1, 1), [0.0], bit_width=1, temperature=9000.0).soft_temperature == 2000


def test_clusters_meet_halfway_between_their_neighbours() -> None:
    values = torch.tensor([-1.1, -1.0, -0.9, 0.0, 0.1, 2.0, 2.1, 2.2, 2.3, 2.4])
    torch.testing.assert_close(cluster_biases(values, 3), torch.tensor([-0.45, 1.05]))


def test_clusters_do_not_depend_on_the_scale_of_the_weights() -> None:
    w = torch.randn(3000, generator=torch.Generator().manual_seed(1))
    quantizer = StairsQuantizer(3, target_values(3, "powers"), is_centred=True)
    torch.testing.assert_close(quantizer.clustered(w), quantizer.clustered(40 * w), rtol=1e-3, atol=1e-3)


def test_value_sets() -> None:
    assert target_values(1, "powers") == (-1, 1)
    assert target_values(3, "powers") == (-4, -2, -1, 0, 1, 2, 4)
    assert target_values(3, "uniform") == tuple(range(-3, 4))


def test_constant_and_zero_weights_stay_finite() -> None:
    for w in (torch.zeros(5), torch.full((5,), 0.4)):
        quantizer = StairsQuantizer(3, target_values(3, "powers"), is_centred=True)
        quantizer.initialize(w)
        assert torch.isfinite(quantizer.eval()(w)).all()


def test_the_papers_temperature_grows_with_the_epochs() -> None:
    model = nn.Sequential(stairs((-1, 0, 1), [-0.5, 0.5]))
    method = QuantizationNetworks(temperature=5.0)
    run = TrainRun(model, method, Classification(), Recipe(3), 1)
    run.epoch = 2
    method.before_step(run)
    assert float(model[0].temperature) == 15  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="temperature"):
        QuantizationNetworks(temperature=0.0)
