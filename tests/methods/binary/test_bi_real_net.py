from __future__ import annotations

import pytest
import torch
from tests.networks import TinyNet
from torch import Tensor, nn

import lowbit
from lowbit.errors import LayerError, SpecError
from lowbit.methods.binary.bi_real_net import BiRealActivation, BiRealNet, BiRealWeight, leaky_clip
from lowbit.models import load_model
from lowbit.network import insert
from lowbit.network.surgery.shortcuts import ShortcutBlock
from lowbit.qat import Classification, OptimizerSpec, Recipe, TrainRun
from lowbit.qat.prepare import method_of
from lowbit.spec import Granularity


def images(count: int = 4, channels: int = 3) -> Tensor:
    return torch.randn(count, channels, 12, 12, generator=torch.Generator().manual_seed(0))


def prepared(**options: object) -> nn.Module:
    return lowbit.prepare(
        load_model("resnet8", num_classes=4), method="bi_real_net", weight_bits=1, activation_bits=1, sample=images(), **options
    )


def run_of(model: nn.Module, epochs: int) -> TrainRun:
    return TrainRun(model, method_of(model), Classification(), Recipe(epochs, 4, OptimizerSpec(learning_rate=0.01)), 1)


def step(run: TrainRun) -> None:
    run.before_step()
    run.loss((images(), torch.arange(4))).backward()
    run.after_backward()
    run.optimizer_step()
    run.after_step()


@pytest.mark.parametrize("gradient", ["release", "magnitude_aware", "caffe"])
def test_weights_are_signs_times_the_mean_magnitude_with_three_gradients(gradient: str) -> None:
    weight = torch.tensor([[0.5, -0.25, 0.0, 1.5], [-1.0, 1.0, -2.0, 0.5]], requires_grad=True)
    upstream = torch.arange(1.0, 9).view(2, 4)
    y = BiRealWeight(granularity=Granularity.channel(), gradient=gradient)(weight)  # type: ignore[arg-type]
    scale = weight.detach().abs().mean(1, keepdim=True)
    assert torch.equal(y, torch.where(weight >= 0, scale, -scale))
    y.backward(upstream)
    size = weight.detach()
    expected = {
        "release": upstream * (size.abs() <= 1),
        "magnitude_aware": upstream * scale * ((size > -1) & (size <= 1)),
        "caffe": upstream,
    }[gradient]
    torch.testing.assert_close(weight.grad, expected)


def test_inputs_are_signs_with_the_derivative_of_a_parabola() -> None:
    x = torch.linspace(-1.5, 1.5, 25, requires_grad=True)
    quantizer = BiRealActivation()
    y = quantizer(x)
    assert torch.equal(y, torch.where(x >= 0, 1.0, -1.0))
    y.sum().backward()
    torch.testing.assert_close(x.grad, (2 - 2 * x.detach().abs()).clamp(min=0))


def test_in_pretraining_inputs_are_clipped_leakily_and_in_evaluation_they_are_signs() -> None:
    quantizer, x = BiRealActivation().train(), torch.tensor([-3.0, -0.5, 0.5, 2.0])
    quantizer.form = "leaky_clip"
    assert torch.allclose(quantizer(x), torch.tensor([-1.2, -0.5, 0.5, 1.1]))
    quantizer.form = "clip"
    assert torch.equal(quantizer(x), torch.tensor([-1.0, -0.5, 0.5, 1.0]))
    assert torch.equal(quantizer.eval()(x), x.sign())
    assert torch.equal(leaky_clip(x, 1.0), x)


def test_residual_networks_get_shortcuts_and_lose_their_relus() -> None:
    model = prepared()
    assert sum(isinstance(module, ShortcutBlock) for module in model.modules()) == 3
    assert not any(isinstance(module, nn.ReLU) for module in model.modules())
    assert insert.weight_quantizer(model.get_submodule("layer2.0.downsample.0")) is None
    assert isinstance(insert.weight_quantizer(model.get_submodule("layer2.0.conv1")), BiRealWeight)
    plain = prepared(shortcuts="no")
    assert not any(isinstance(module, ShortcutBlock) for module in plain.modules())
    assert isinstance(insert.weight_quantizer(plain.get_submodule("layer2.0.downsample.0")), BiRealWeight)


def test_shortcuts_that_are_asked_for_and_impossible_are_an_error() -> None:
    arguments = {"method": "bi_real_net", "weight_bits": 1, "activation_bits": 1, "sample": images()}
    with pytest.raises(LayerError, match="no residual block"):
        lowbit.prepare(
            nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)), shortcuts="yes", **arguments
        )
    lowbit.prepare(TinyNet(8), **arguments)


def test_float_inputs_leave_the_network_as_it_is() -> None:
    model = lowbit.prepare(load_model("resnet8", num_classes=4), method="bi_real_net", weight_bits=1, activation_bits=None, sample=images())
    assert any(isinstance(module, nn.ReLU) for module in model.modules())
    assert not any(isinstance(module, ShortcutBlock) for module in model.modules())


def test_phases_train_a_real_network_first_and_norms_alone_in_the_end() -> None:
    model = prepared(pretraining=0.5, retrain_norms=1)
    run = run_of(model.train(), 6)
    assert [(phase.name, phase.epochs) for phase in run.phases] == [("leaky clip", 2), ("clip", 1), ("binary", 2), ("norms", 1)]
    layer = model.get_submodule("layer1.0.conv1")
    quantizer = insert.weight_quantizer(layer)
    assert isinstance(quantizer, BiRealWeight)
    seen: list[tuple[int, bool]] = []
    for epoch in run.each_epoch():
        before = insert.float_weight(layer).detach().clone()
        step(run)
        moved = not torch.equal(insert.float_weight(layer), before)
        levels = len(layer.weight.detach()[0].unique())
        seen.append((levels, moved))
        assert quantizer.is_real == (epoch < 3)
    assert [levels > 2 for levels, _ in seen] == [True] * 3 + [False] * 3
    assert [moved for _, moved in seen] == [True] * 5 + [False]
    assert torch.equal(layer.weight.detach().abs(), torch.ones_like(layer.weight))


def test_weights_can_start_small_and_positive() -> None:
    first, second = (prepared(weight_init="uniform") for _ in range(2))
    weight = insert.float_weight(first.get_submodule("layer1.0.conv1"))
    assert weight.min() >= 0 and weight.max() < 1e-3 and weight.std() > 1e-4
    assert torch.equal(weight, insert.float_weight(second.get_submodule("layer1.0.conv1")))


@pytest.mark.parametrize("options", [{"pretraining": 1.0}, {"pretraining": -0.1}, {"retrain_norms": -1}])
def test_options_that_leave_no_training_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(SpecError, match="bi_real_net: "):
        BiRealNet(**options)  # type: ignore[arg-type]
