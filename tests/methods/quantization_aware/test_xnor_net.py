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
from lowbit.methods.quantization_aware.xnor_net import (
    InputScale,
    XnorNet,
    XnorWeightQuantizer,
    centre,
    input_channels,
)
from lowbit.network import insert
from lowbit.network.layers import output_channel_axis
from lowbit.qat import Classification, OptimizerSpec, Recipe, Slot, TrainRun
from lowbit.qat.attach.input_norm import InputNorm
from lowbit.qat.prepare import method_of
from lowbit.quantizers import LearnedScaleQuantizer, SignQuantizer
from lowbit.spec import BitPolicy, Granularity

LAYERS = {
    "linear": lambda: nn.Linear(5, 3),
    "conv1d": lambda: nn.Conv1d(4, 3, 3),
    "conv2d": lambda: nn.Conv2d(3, 4, 3, padding=1),
    "conv3d": lambda: nn.Conv3d(2, 3, 2),
    "depthwise": lambda: nn.Conv2d(4, 4, 3, groups=4),
    "grouped": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "transposed": lambda: nn.ConvTranspose2d(3, 4, 3, stride=2),
    "transposed_grouped": lambda: nn.ConvTranspose2d(4, 6, 3, groups=2),
}
every_layer = pytest.mark.parametrize("kind", LAYERS)


def slot_of(layer: nn.Module) -> Slot:
    return Slot("layer", layer, 1, True, "inner")


def quantizer(**options: object) -> XnorWeightQuantizer:
    return XnorWeightQuantizer(granularity=Granularity.channel(0), **options)  # type: ignore[arg-type]


def gradient(weight: Tensor, upstream: Tensor, **options: object) -> Tensor:
    weight = weight.clone().requires_grad_()
    quantizer(**options)(weight).backward(upstream)
    assert weight.grad is not None
    return weight.grad


# Weights


@every_layer
def test_a_filter_has_its_mean_magnitude_with_both_signs(kind: str) -> None:
    layer = LAYERS[kind]()
    weight = layer.weight.detach().clone()
    q = XnorNet().weight_quantizer(slot_of(layer))
    y = q(weight)
    axis = output_channel_axis(layer)
    for values, binary in zip(weight.movedim(axis, 0), y.movedim(axis, 0), strict=True):
        torch.testing.assert_close(binary, torch.where(values >= 0, 1.0, -1.0) * values.abs().mean())
    assert torch.equal(q.encode(weight).decode(), y)
    assert q.encode(weight).codes.unique().tolist() == [0, 1]


def test_zero_counts_as_positive_and_a_filter_of_zeros_stays_zero() -> None:
    weight = torch.tensor([[0.0, -0.0, -1.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    assert quantizer()(weight).tolist() == [[0.5, 0.5, -0.5, 0.5], [0.0, 0.0, 0.0, 0.0]]
    assert quantizer().encode(weight).codes.tolist() == [[1, 1, 0, 1], [1, 1, 1, 1]]
    for rule in ("corrected", "paper", "ste"):
        assert torch.isfinite(gradient(weight, torch.ones(2, 4), gradient=rule)).all()


def test_the_mean_magnitude_is_the_best_scale() -> None:
    weight = torch.randn(1, 200)
    best = float(quantizer()(weight).abs()[0, 0])
    error = {factor: float((weight - factor * best * weight.sign()).square().sum()) for factor in (0.98, 1.0, 1.02)}
    assert error[1.0] < min(error[0.98], error[1.02])


def test_the_papers_gradient_has_no_sum_and_leaves_out_weights_at_one() -> None:
    weight = torch.tensor([[0.5, -0.5, 1.0, -2.0]])  # scale 1, n 4
    upstream = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    expected = [[1 * (0.25 + 1), 2 * (0.25 + 1), 3 * 0.25, 4 * 0.25]]
    assert gradient(weight, upstream, gradient="paper").tolist() == expected


def test_the_corrected_gradient_is_the_chain_rule_and_takes_weights_at_one() -> None:
    weight = torch.tensor([[0.5, -0.5, 1.0, -2.0]])
    upstream = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    through_scale = (1 - 2 + 3 - 4) / 4
    expected = [[1 + through_scale, 2 - through_scale, 3 + through_scale, -through_scale]]
    assert gradient(weight, upstream).tolist() == expected

    weight, upstream = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    free = weight.clone().requires_grad_()
    signs = weight.sign() + free.clamp(-1, 1) - free.detach().clamp(-1, 1)
    (free.abs().mean((1, 2, 3), keepdim=True) * signs).backward(upstream)
    torch.testing.assert_close(gradient(weight, upstream), free.grad)


def test_the_plain_gradient_is_the_upstream_one_times_the_scale() -> None:
    weight, upstream = torch.randn(2, 6) * 3, torch.randn(2, 6)
    torch.testing.assert_close(gradient(weight, upstream, gradient="ste"), upstream * weight.abs().mean(1, keepdim=True))


def test_multipliers_multiply_the_gradient_only() -> None:
    layer = nn.Conv2d(4, 2, 3, bias=False)
    weight, upstream = layer.weight.detach().clone(), torch.randn(2, 4, 3, 3)

    def grad(**options: object) -> Tensor:
        q = XnorNet(**options).weight_quantizer(slot_of(layer))  # type: ignore[arg-type]
        w = weight.clone().requires_grad_()
        y = q(w)
        assert torch.equal(y.detach(), quantizer()(weight))
        y.backward(upstream)
        assert w.grad is not None
        return w.grad

    plain = grad()
    torch.testing.assert_close(grad(multiply_by_size=True), plain * 36)
    torch.testing.assert_close(grad(gradient_multiplier=10.0), plain * 10)
    torch.testing.assert_close(grad(centring_gradient=True, multiply_by_size=True), plain * 36 * 0.75)
    with pytest.raises(SpecError, match="gradient_multiplier must be above 0"):
        XnorNet(gradient_multiplier=0.0)


def test_bfloat16_weights_are_binarized_in_float32() -> None:
    weight = torch.randn(2, 300).bfloat16().requires_grad_()
    y = quantizer()(weight)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, quantizer()(weight.float()).bfloat16())
    y.sum().backward()
    assert weight.grad is not None and weight.grad.dtype == torch.bfloat16


# Centring and clamping


@every_layer
def test_centring_takes_the_mean_over_the_input_channels_of_each_output_channel(kind: str) -> None:
    layer = LAYERS[kind]()
    before = layer.weight.detach().clone()
    XnorNet(clamp=False).prepare_weight(layer)
    after = layer.weight.detach()
    if kind == "depthwise":  # one input channel: nothing would be left
        assert torch.equal(after, before) and input_channels(layer) == 1
    elif kind == "transposed_grouped":
        for half in (slice(0, 2), slice(2, 4)):
            torch.testing.assert_close(after[half], before[half] - before[half].mean(0))
    else:
        axis = 0 if kind == "transposed" else 1
        torch.testing.assert_close(after, before - before.mean(axis, keepdim=True))
    if kind != "depthwise":
        assert not torch.allclose(after, before)
        torch.testing.assert_close(
            centre(after, groups=getattr(layer, "groups", 1), is_transposed=kind.startswith("transposed")), after, atol=1e-6, rtol=0
        )


def test_stored_weights_are_centred_then_clamped_unless_switched_off() -> None:
    layer = nn.Linear(3, 1, bias=False)
    for options, expected in (
        ({}, [1.0, -1.0, 0.0]),
        ({"clamp": False}, [3.0, -3.0, 0.0]),
        ({"centre": False}, [1.0, -1.0, 1.0]),
        ({"centre": False, "clamp": False}, [5.0, -1.0, 2.0]),
    ):
        layer.weight.data = torch.tensor([[5.0, -1.0, 2.0]])
        XnorNet(**options).prepare_weight(layer)
        assert layer.weight.tolist() == [expected]


# Inputs


def test_input_signs_pass_gradients_strictly_within_one() -> None:
    x = torch.tensor([-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0], requires_grad=True)
    upstream = torch.arange(1.0, 8.0)
    y = XnorNet().activation_quantizer(slot_of(nn.Linear(1, 1)))(x)
    y.backward(upstream)
    assert y.tolist() == [-1, -1, -1, 1, 1, 1, 1]
    assert x.grad is not None and x.grad.tolist() == [0, 0, 3, 4, 5, 0, 0]
    x.grad = None
    quantizer = XnorNet(zero_inputs=True).activation_quantizer(slot_of(nn.Linear(1, 1))).train()
    authors = quantizer(x)
    authors.backward(upstream)
    assert quantizer.eval()(x).tolist() == [-1, -1, -1, 1, 1, 1, 1]
    assert authors.tolist() == [-1, -1, -1, 0, 1, 1, 1]
    assert x.grad.tolist() == [0, 0, 3, 4, 5, 0, 0]


# K


def scaled(layer: nn.Module) -> nn.Module:
    """``layer`` with binary inputs and K."""
    insert.set_input_quantizer(layer, SignQuantizer())
    insert.set_output_transform(layer, InputScale(layer))
    return layer


def test_k_is_the_mean_magnitude_under_the_kernel() -> None:
    x = torch.tensor([[[[1.0, -2.0], [3.0, 4.0]], [[-3.0, 0.0], [1.0, 0.0]]]])  # A: 2 1 / 2 2
    layer = nn.Conv2d(2, 1, 2)
    assert InputScale(layer).scale_map(x, (1, 1)).tolist() == [[[[7 / 4]]]]
    padded = nn.Conv2d(2, 1, 3, padding=1)  # the padding counts as zeros among the nine
    torch.testing.assert_close(InputScale(padded).scale_map(x, (2, 2)), torch.full((1, 1, 2, 2), 7 / 9))


@pytest.mark.parametrize("kind", ["conv1d", "conv2d", "conv3d", "depthwise", "grouped", "transposed", "transposed_grouped", "linear"])
def test_inputs_of_one_magnitude_are_scaled_by_it_and_the_bias_is_not(kind: str) -> None:
    layer = LAYERS[kind]()
    if kind == "conv2d":
        layer.padding = (0, 0)
    dims = len(getattr(layer, "kernel_size", ()))
    signs = torch.randn(2, *((layer.in_channels, *(5,) * dims) if dims else (5,))).sign()
    with torch.no_grad():
        expected = 0.25 * (layer(signs) - layer.bias.reshape(-1, *(1,) * dims)) + layer.bias.reshape(-1, *(1,) * dims)
        torch.testing.assert_close(scaled(layer)(0.25 * signs), expected)


def test_groups_have_a_map_each() -> None:
    layer, x = scaled(nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2, bias=False)), torch.randn(2, 4, 7, 7)
    weight = layer.weight
    for group in range(2):
        part = scaled(nn.Conv2d(2, 3, 3, stride=2, padding=1, dilation=2, bias=False))
        part.load_state_dict({"weight": weight[3 * group : 3 * group + 3]})
        torch.testing.assert_close(layer(x)[:, 3 * group : 3 * group + 3], part(x[:, 2 * group : 2 * group + 2]))


def test_a_transposed_layer_averages_the_inputs_that_reach_an_output() -> None:
    layer = nn.ConvTranspose1d(1, 1, 3, stride=2, bias=False)
    x = torch.tensor([[[1.0, -3.0]]])  # outputs 0 1 2 3 4: the first input reaches 0 to 2, the second 2 to 4
    assert InputScale(layer).scale_map(x, (5,)).tolist() == [[[1.0, 1.0, 2.0, 3.0, 3.0]]]
    assert InputScale(layer).scale_map(x, (6,)).tolist() == [[[1.0, 1.0, 2.0, 3.0, 3.0, 0.0]]]  # an output size of the caller's


@pytest.mark.parametrize("padding", [(1, 2), "same", "valid"])
def test_k_pads_as_its_layer_does(padding: tuple[int, int] | str) -> None:
    layer = nn.Conv2d(1, 1, (3, 4), padding=padding, padding_mode="circular", bias=False)  # type: ignore[arg-type]
    layer.weight.data.fill_(1 / 12)
    x = torch.randn(1, 1, 6, 6)
    expected = layer(x.abs())
    torch.testing.assert_close(InputScale(layer).scale_map(x, tuple(expected.shape[2:])), expected)


def test_the_gradient_through_k_can_be_left_out() -> None:
    for has_gradient, expected in ((True, [[1.5, 1.0]]), (False, [[0.0, 1.0]])):
        layer = nn.Linear(2, 1, bias=False)
        layer.weight.data = torch.tensor([[2.0, 1.0]])
        insert.set_input_quantizer(layer, SignQuantizer())
        insert.set_output_transform(layer, InputScale(layer, has_gradient=has_gradient))
        x = torch.tensor([[2.0, 0.0]], requires_grad=True)
        y = layer(x)
        y.sum().backward()
        assert y.tolist() == [[3.0]]  # both signs are 1, K is 1
        # 2 is outside the sign's window and gets half of the 3 through K; 0 gets its weight through the sign, |0| has no slope
        assert x.grad is not None and x.grad.tolist() == expected


# In a network


X = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def prepared(activation_bits: int | None = 1, **options: object) -> nn.Module:
    torch.manual_seed(0)
    return lowbit.prepare(TinyNet(), method="xnor_net", weight_bits=1, activation_bits=activation_bits, sample=X, **options)


def test_inputs_behind_a_relu_get_a_norm_whose_statistics_are_those_of_the_sample() -> None:
    model = prepared()
    assert isinstance(insert.input_transform(model.conv1), InputNorm)
    assert insert.input_transform(model.stem) is None  # the first and the last layer are not binary
    assert isinstance(insert.weight_quantizer(model.stem), LearnedScaleQuantizer)
    assert isinstance(insert.weight_quantizer(model.conv1), XnorWeightQuantizer)
    seen: list[Tensor] = []
    model.conv1.input_quantizer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model.eval()(X)
    rows = seen[0].movedim(1, 0).flatten(1)
    alive = rows.std(1) > 0.1
    assert alive.any()
    assert rows.mean(1).abs().max() < 1e-4
    torch.testing.assert_close(rows[alive].std(1), torch.ones(int(alive.sum())), atol=1e-2, rtol=0)


def test_norms_go_where_they_are_asked_for() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(16, 3))
    for choice, expected in (("unsigned", [False, True]), ("always", [True, True]), ("never", [False, False])):
        model = lowbit.prepare(net, method="xnor_net", weight_bits=1, activation_bits=1, sample=X, input_norm=choice)
        assert [isinstance(insert.input_transform(model[i]), InputNorm) for i in (1, 3)] == expected


def test_linear_layers_are_normed_over_their_features_and_one_value_uses_the_running_statistics() -> None:
    norm = InputNorm(nn.Linear(4, 2))
    x = torch.randn(3, 5, 4) * 3 + 1
    y = norm.train()(x)
    torch.testing.assert_close(y, F.batch_norm(x.reshape(-1, 4), None, None, training=True, eps=1e-4).reshape(3, 5, 4))
    before = norm.norm.running_mean.clone()  # type: ignore[union-attr]
    one = norm(torch.ones(1, 4))
    torch.testing.assert_close(one, norm.eval()(torch.ones(1, 4)))
    assert torch.equal(norm.norm.running_mean, before)


def test_float_activations_leave_everything_but_weights_alone() -> None:
    model = prepared(None)
    assert not insert.activation_quantizers(model)
    assert insert.input_transform(model.conv1) is None and insert.output_transform(model.conv1) is None
    assert model.conv1.weight[0].unique().numel() == 2


def step(run: TrainRun, batch: tuple[Tensor, Tensor]) -> float:
    run.before_step()
    loss = run.loss(batch)
    loss.backward()
    run.after_backward()
    run.optimizer_step()
    run.after_step()
    return float(loss.detach())


def run_of(model: nn.Module, learning_rate: float) -> TrainRun:
    recipe = Recipe(epochs=1, optimizer=OptimizerSpec(learning_rate=learning_rate, schedule="constant"))
    run = TrainRun(model, method_of(model), Classification(), recipe, 100)
    run.start_phase()
    run.start_epoch()
    return run


def test_stored_weights_are_centred_and_clamped_from_the_start_and_after_every_step() -> None:
    model = prepared().train()
    run = run_of(model, 0.1)
    stem = insert.float_weight(model.stem)
    for _ in range(4):
        weight = insert.float_weight(model.conv1).detach().clone()
        assert weight.abs().max() <= 1
        torch.testing.assert_close(weight.mean(1), torch.zeros_like(weight.mean(1)), atol=1e-6, rtol=0)
        assert stem.mean(1).abs().max() > 1e-3
        step(run, (X, torch.arange(32) % 4))
    assert not torch.equal(weight, insert.float_weight(model.conv1))


@pytest.mark.parametrize("clone", ["deepcopy", "pickle", "state_dict", "export"])
def test_a_network_with_k_and_norms_survives_copies_and_export(clone: str) -> None:
    model = prepared(input_scaling=True).eval()
    with torch.no_grad():
        expected = model(X)
        if clone == "deepcopy":
            twin: nn.Module = copy.deepcopy(model)
        elif clone == "pickle":
            twin = pickle.loads(pickle.dumps(model))
        elif clone == "state_dict":
            twin = lowbit.prepare(TinyNet(), method="xnor_net", weight_bits=1, activation_bits=1, sample=X, input_scaling=True).eval()
            assert not torch.equal(twin(X), expected)
            twin.load_state_dict(model.state_dict())
        else:
            twin = torch.export.export(model, (X,)).module()
        assert torch.equal(twin(X), expected)


def test_a_network_of_signs_learns() -> None:
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randn(4, 3, 8, 8, generator=generator)
    torch.manual_seed(0)
    labels = torch.arange(256) % 4
    images = patterns[labels] + torch.randn(256, 3, 8, 8, generator=generator)
    policy = BitPolicy.uniform(1, 1).keep_float("stem")
    model = lowbit.prepare(TinyNet(16), method="xnor_net", policy=policy, sample=images[:64], multiply_by_size=True).train()
    test = patterns[labels] + torch.randn(256, 3, 8, 8, generator=generator)

    @torch.no_grad()
    def accuracy() -> float:
        return float((model.eval()(test).argmax(1) == labels).float().mean())

    before, run = accuracy(), run_of(model.train(), 0.02)
    for start in list(range(0, 256, 32)) * 8:
        step(run, (images[start : start + 32], labels[start : start + 32]))
    assert before < 0.5 and accuracy() > 0.9
