from __future__ import annotations

import copy
import pickle

import pytest
import torch
from tests.networks import TinyNet
from torch import Tensor, nn
from torch.nn import functional as F

import lowbit
from lowbit.errors import SpecError
from lowbit.methods.quantization_aware.dorefa import Dorefa, DorefaActivation, DorefaWeight, GradientQuantizer, largest_tanh, squash
from lowbit.network import insert
from lowbit.qat import Classification, OptimizerSpec, Recipe, Slot, TrainRun
from lowbit.qat.prepare import method_of
from lowbit.quantizers import Quantizer
from lowbit.spec import BitPolicy

LAYERS = {
    "linear": lambda: nn.Linear(5, 3),
    "conv1d": lambda: nn.Conv1d(4, 3, 3),
    "conv3d": lambda: nn.Conv3d(2, 3, 2),
    "depthwise": lambda: nn.Conv2d(4, 4, 3, groups=4),
    "transposed": lambda: nn.ConvTranspose2d(3, 4, 3, stride=2),
}


def weight_quantizer(bit_width: int, layer: nn.Module | None = None, **options: object) -> Quantizer:
    slot = Slot("layer", layer or nn.Identity(), bit_width, True, "inner")
    return Dorefa(**options).weight_quantizer(slot)  # type: ignore[arg-type]


def gradient(quantizer: nn.Module, x: Tensor, upstream: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    quantizer(leaf).backward(upstream)
    assert leaf.grad is not None
    return leaf.grad


# Weights


def test_two_bit_weights_are_thirds_of_the_squashed_weight() -> None:
    # tanh: 0.7616, 0.2449, -0.0997, -0.6640 over 0.7616; codes round(3 (t / 2 m + 1/2)) = 3, 2, 1, 0
    y = weight_quantizer(2)(torch.tensor([1.0, 0.25, -0.1, -0.8]))
    torch.testing.assert_close(y, torch.tensor([1.0, 1 / 3, -1 / 3, -1.0]))


@pytest.mark.parametrize("bit_width", [2, 3, 4, 8])
def test_levels_are_the_odd_multiples_of_one_over_the_steps(bit_width: int) -> None:
    weight, steps = torch.linspace(-3, 3, 4001), 2**bit_width - 1
    y = weight_quantizer(bit_width)(weight)
    torch.testing.assert_close(y.unique(), torch.arange(-steps, steps + 1, 2) / steps, rtol=0, atol=1e-6)
    assert bool((y.diff() >= 0).all())


def test_one_bit_weights_have_one_scale_for_the_layer_and_zero_counts_as_positive() -> None:
    weight = torch.tensor([[0.5, -1.5], [0.0, -2.0]])
    assert weight_quantizer(1)(weight).tolist() == [[1.0, -1.0], [1.0, -1.0]]


def test_one_bit_weights_pass_every_gradient_and_give_the_scale_none() -> None:
    upstream = torch.tensor([1.0, -2.0, 3.0])
    assert torch.equal(gradient(weight_quantizer(1), torch.tensor([5.0, -0.1, 0.0]), upstream), upstream)


def test_the_gradient_goes_through_the_maximum_too() -> None:
    weight, upstream = torch.tensor([0.3, -0.9, 0.5]), torch.tensor([1.0, 2.0, -0.5])
    t = torch.tanh(weight)
    largest = t.abs().max()
    expected = upstream / largest
    expected[1] -= t[1].sign() * (upstream * t).sum() / largest**2
    torch.testing.assert_close(gradient(weight_quantizer(3), weight, upstream), expected * (1 - t * t))


def test_squashed_weights_fill_zero_to_one() -> None:
    u = squash(torch.tensor([-4.0, 0.0, 2.0]))
    torch.testing.assert_close(u, torch.tensor([0.0, 0.5, 0.98234]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("bit_width", [2, 3, 4, 5, 6, 7, 8])
def test_zeros_get_the_same_code_in_training_and_evaluation(bit_width: int) -> None:
    weight = torch.tensor([0.0, 0.4, -0.4, 0.0])
    quantizer = weight_quantizer(bit_width)
    trained = quantizer(weight.clone().requires_grad_()).detach()
    torch.testing.assert_close(quantizer.eval()(weight), trained, rtol=0, atol=1e-6)


@pytest.mark.parametrize("fill", [0.0, 1e-38, 0.25])
def test_equal_weights_have_finite_values_and_gradients(fill: float) -> None:
    weight, upstream = torch.full((3, 2), fill), torch.ones(3, 2)
    for bit_width in (1, 2, 4):
        quantizer = weight_quantizer(bit_width)
        assert bool(gradient(quantizer, weight, upstream).abs().le(1e3).all())
        y = quantizer.eval()(weight)
        assert torch.isfinite(y).all() and y.unique().numel() == 1
        assert torch.equal(quantizer.encode(weight).decode(), y)


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("bit_width", [1, 2, 4, 8])
def test_codes_decode_to_the_weights_of_any_layer(kind: str, bit_width: int, rescale: bool) -> None:
    layer = LAYERS[kind]()
    weight = layer.weight.detach()
    quantizer = weight_quantizer(bit_width, layer, rescale=rescale).eval()
    y = quantizer(weight)
    assert torch.equal(quantizer.encode(weight).decode(), y)
    assert y.unique().numel() <= 2**bit_width
    low = weight.bfloat16()
    assert quantizer(low).dtype == torch.bfloat16
    assert torch.equal(quantizer(low), quantizer(low.float()).bfloat16())


def test_rescaled_weights_keep_their_size_and_the_gradient_without_the_division() -> None:
    weight, upstream = torch.tensor([0.02, -0.05, 0.01, 0.03]), torch.tensor([1.0, 0.0, -2.0, 0.5])
    plain, rescaled = DorefaWeight(4), DorefaWeight(4, rescale=True)
    size = torch.tanh(torch.tensor(0.05))
    torch.testing.assert_close(largest_tanh(weight), size)
    torch.testing.assert_close(rescaled(weight), plain(weight) * size)
    torch.testing.assert_close(gradient(rescaled, weight, upstream), gradient(plain, weight, upstream) * size)
    assert (rescaled(weight) - weight).abs().max() <= 0.05 / 15 + 1e-4  # half a step


# Activations


def test_activations_round_between_zero_and_one() -> None:
    x = torch.tensor([-0.2, 0.0, 0.1, 0.2, 0.6, 0.84, 1.0, 7.0])
    expected = torch.tensor([0, 0, 0, 1, 2, 3, 3, 3]) / 3
    torch.testing.assert_close(DorefaActivation(2)(x), expected)
    assert DorefaActivation(1)(x).tolist() == [0, 0, 0, 0, 1, 1, 1, 1]


def test_the_gradient_of_activations_ends_at_the_clip_bounds_included() -> None:
    x = torch.tensor([-0.01, 0.0, 0.5, 1.0, 1.01])
    for bit_width in (1, 2, 3, 5, 8):
        assert gradient(DorefaActivation(bit_width), x, torch.full((5,), 2.0)).tolist() == [0, 2, 2, 2, 0]


def test_signed_activations_keep_their_negative_half() -> None:
    x = torch.tensor([-3.0, -0.9, -0.4, 0.0, 0.6, 2.0])
    torch.testing.assert_close(DorefaActivation(2, is_signed=True)(x), torch.tensor([-1.0, -1, 0, 0, 1, 1]))
    assert DorefaActivation(1, is_signed=True)(x).tolist() == [-1, -1, -1, -1, 1, 1]
    for bit_width in (1, 2, 4):
        assert gradient(DorefaActivation(bit_width, is_signed=True), x, torch.ones(6)).tolist() == [0, 1, 1, 1, 1, 0]


@pytest.mark.parametrize("is_signed", [False, True])
@pytest.mark.parametrize("bit_width", [1, 2, 3, 8])
def test_activation_codes_decode_to_the_forward_pass(bit_width: int, is_signed: bool) -> None:
    x = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0))
    quantizer = DorefaActivation(bit_width, is_signed=is_signed).eval()
    assert torch.equal(quantizer.encode(x).decode(), quantizer(x))
    assert quantizer(x).unique().numel() <= 2**bit_width
    assert quantizer(x.bfloat16()).dtype == torch.bfloat16


# Gradients


def test_the_gradient_quantizer_is_the_identity_forward_and_in_evaluation() -> None:
    x, upstream = torch.randn(2, 3), torch.tensor([[1.0, 0.3, -0.2], [0.0, 0.1, 0.7]])
    quantizer = GradientQuantizer(2)
    leaf = x.clone().requires_grad_()
    assert torch.equal(quantizer(leaf, x), x)
    quantizer.eval()(leaf, x).backward(upstream)
    assert torch.equal(leaf.grad, upstream)  # type: ignore[arg-type]


def test_gradients_are_odd_multiples_of_a_step_of_each_samples_largest() -> None:
    quantizer = GradientQuantizer(2)
    grad = torch.tensor([[4.0, 1.0, -0.5], [-0.08, 0.02, 0.0]])
    # u = g / 2M + 1/2 without noise: 1, 0.625, 0.4375 and 0, 0.625, 0.5 (a tie at 1.5 of 3, rounded to even)
    expected = torch.tensor([[4.0, 4 / 3, -4 / 3], [-0.08, 0.08 / 3, 0.08 / 3]])
    torch.testing.assert_close(quantizer.quantize(grad, torch.full((2, 3), 0.5)), expected)


def test_noise_shifts_by_at_most_half_a_step_and_the_ends_are_clipped() -> None:
    quantizer, grad = GradientQuantizer(1), torch.tensor([[1.0, 0.2, -1.0]])
    assert quantizer.quantize(grad, torch.zeros(1, 3)).tolist() == [[-1.0, -1.0, -1.0]]  # u = 0.5, a tie to even for the largest
    assert quantizer.quantize(grad, torch.full((1, 3), 0.999)).tolist() == [[1.0, 1.0, -1.0]]


def test_quantized_gradients_are_right_on_average() -> None:
    quantizer = GradientQuantizer(3)
    quantizer.generator = torch.Generator().manual_seed(0)
    row = torch.tensor([1.0, 0.6, 0.3, 0.0, -0.05, -0.7])
    grad = row.expand(20000, 6)
    drawn = quantizer.quantize(grad, quantizer.uniform(grad))
    torch.testing.assert_close(drawn.mean(0)[1:], row[1:], rtol=0, atol=0.01)
    assert drawn.abs().max() <= 1.0
    torch.testing.assert_close(drawn.unique(), torch.tensor([-5.0, -3, -1, 1, 3, 5, 7]) / 7)


def test_a_sample_without_gradient_stays_without_and_samples_do_not_mix() -> None:
    quantizer, uniform = GradientQuantizer(4), torch.rand(2, 5, generator=torch.Generator().manual_seed(1))
    grad = torch.stack([torch.zeros(5), torch.randn(5)])
    both = quantizer.quantize(grad, uniform)
    assert both[0].tolist() == [0.0] * 5
    assert torch.equal(quantizer.quantize(torch.stack([torch.ones(5), grad[1]]), uniform)[1], both[1])
    torch.testing.assert_close(quantizer.quantize(8 * grad, uniform), 8 * both)
    assert quantizer.quantize(grad.bfloat16(), uniform).dtype == torch.bfloat16


# The method


def run_of(**options: object) -> tuple[TrainRun, Tensor, Tensor]:
    torch.manual_seed(0)
    x, labels = torch.randn(8, 3, 6, 6), torch.arange(8) % 4
    model = lowbit.prepare(TinyNet(), method="dorefa", weight_bits=1, activation_bits=2, sample=x, **options).train()
    run = TrainRun(model, method_of(model), Classification(), Recipe(1, optimizer=OptimizerSpec(), seed=7), 3)
    run.start_phase()
    run.start_epoch()
    return run, x, labels


def weights_after(run: TrainRun, x: Tensor, labels: Tensor) -> list[Tensor]:
    for _ in range(3):
        run.before_step()
        run.loss((x, labels)).backward()
        run.after_backward()
        run.optimizer_step()
        run.after_step()
    return [p.detach().clone() for p in run.model.parameters()]


def test_gradients_are_quantized_behind_inner_layers_only() -> None:
    run, *_ = run_of(gradient_bits=6)
    found = [name for name, module in run.model.named_modules() if isinstance(insert.output_transform(module), GradientQuantizer)]
    assert found == ["conv1", "conv2"]
    run, *_ = run_of()
    assert all(insert.output_transform(module) is None for module in run.model.modules())


def test_the_noise_of_gradients_belongs_to_the_run() -> None:
    first = weights_after(*run_of(gradient_bits=2))
    torch.manual_seed(99)
    again = run_of(gradient_bits=2)
    assert all(torch.equal(a, b) for a, b in zip(first, weights_after(*again), strict=True))
    other = run_of(gradient_bits=2)
    other[0].generator.manual_seed(8)
    assert not all(torch.equal(a, b) for a, b in zip(first, weights_after(*other), strict=True))


def test_networks_with_a_runs_generator_can_be_copied_and_pickled() -> None:
    run, x, labels = run_of(gradient_bits=4)
    weights_after(run, x, labels)
    expected = run.model.eval()(x)
    assert torch.equal(copy.deepcopy(run.model)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(run.model))(x), expected)


@pytest.mark.parametrize("gradient_bits", [0, 9, 16, -1])
def test_gradient_bits_out_of_range_are_refused(gradient_bits: int) -> None:
    with pytest.raises(SpecError, match="1 to 8 or 32"):
        Dorefa(gradient_bits=gradient_bits)


def test_every_bit_of_a_layer_can_be_computed_by_hand() -> None:
    layer = nn.Linear(2, 1, bias=False)
    nn.init.constant_(layer.weight, 0.5)
    model = nn.Sequential(layer)
    policy = BitPolicy.uniform(1, 2, first_last=None)
    prepared = lowbit.prepare(model, method="dorefa", sample=torch.rand(2, 2), policy=policy).eval()
    x = torch.tensor([[0.3, 5.0], [0.1, 0.0]])
    torch.testing.assert_close(prepared(x), torch.tensor([[0.5 * (1 / 3 + 1)], [0.0]]))
    torch.testing.assert_close(prepared(x), F.linear(torch.tensor([[1 / 3, 1.0], [0.0, 0.0]]), torch.tensor([[0.5, 0.5]])))
