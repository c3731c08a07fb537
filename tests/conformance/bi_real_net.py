"""Bi-Real Net and ReActNet of lowbit for reference cases."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lowbit.methods.binary import bi_real_net
from lowbit.methods.binary.bi_real_net import BiRealNet
from lowbit.methods.binary.react_net import ChannelShift, ReactNetMethod, distribution_loss
from lowbit.models.reactnet import ReactBlock
from lowbit.network import insert
from lowbit.network.surgery.shortcuts import ShiftedPReLU, ShortcutUnit
from lowbit.qat import Classification, Slot, TrainingMethod


def slot(layer: nn.Module) -> Slot:
    return Slot("layer", layer, 1, True, "inner")


def with_gradient(function: Any, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    x.requires_grad_()
    y = function(x)
    y.backward(grad)
    return {"y": y, "grad_x": x.grad}


def activation(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return with_gradient(BiRealNet().activation_quantizer(slot(nn.Identity())), inputs["x"], inputs["grad_output"])


def leaky_clip(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return with_gradient(lambda x: bi_real_net.leaky_clip(x, params["slope"]), inputs["x"], inputs["grad_output"])


def conv(weight: Tensor, method: TrainingMethod, stride: int = 1, padding: int = 0, *, binary_input: bool = True) -> nn.Conv2d:
    """A convolution with the method's quantizers."""
    layer = nn.Conv2d(weight.shape[1], weight.shape[0], tuple(weight.shape[2:]), stride, padding, bias=False)
    layer.load_state_dict({"weight": weight})
    insert.set_weight_quantizer(layer, method.weight_quantizer(slot(layer)))
    if binary_input:
        insert.set_input_quantizer(layer, method.activation_quantizer(slot(layer)))
    return layer.train()


def binary_conv(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    layer = conv(inputs["weight"], BiRealNet(), params["stride"], params["padding"], binary_input=False)
    return {
        **with_gradient(layer, inputs["x"], inputs["grad_output"]),
        "grad_weight": insert.float_weight(layer).grad,
    }


def magnitude_aware_weight(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    layer = conv(inputs["weight"], BiRealNet(weight_gradient="magnitude_aware"), binary_input=False)
    binary = layer.weight
    binary.backward(inputs["grad_w_binary"])
    return {"w_binary": binary, "grad_weight": insert.float_weight(layer).grad}


def load(module: nn.Module, inputs: dict[str, Tensor], name: str) -> None:
    """Load what ``inputs`` has under ``state.<name>.``; parameters may have other shapes of the same size."""
    own = module.state_dict()
    prefix = f"state.{name}."
    state = {key.removeprefix(prefix): value for key, value in inputs.items() if key.startswith(prefix)}
    module.load_state_dict({key: value.reshape(own[key].shape) for key, value in state.items()}, strict=False)


def weight_of(inputs: dict[str, Tensor], name: str, *shape: int) -> Tensor:
    """A weight that is stored flat or not."""
    value = inputs.get(f"state.{name}.weights")
    return inputs[f"state.{name}.weight"] if value is None else value.reshape(shape)


def pooled_shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module | None:
    """Nothing where nothing changes; else average pool, 1x1 convolution and norm."""
    if stride == 1 and in_channels == out_channels:
        return None
    pool = [nn.AvgPool2d(stride)] if stride > 1 else []
    return nn.Sequential(*pool, nn.Conv2d(in_channels, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels))


def block(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    channels, out, stride = params["in"], params["out"], params["stride"]
    layer = conv(weight_of(inputs, "binary_conv", out, channels, 3, 3), BiRealNet(), stride, 1)
    model = ShortcutUnit(layer, nn.BatchNorm2d(out), pooled_shortcut(channels, out, stride)).train()
    load(model.norm, inputs, "bn1")
    load(model.shortcut, inputs, "downsample")
    found = with_gradient(model, inputs["x"], inputs["grad_output"])
    found["grad.binary_conv.weights"] = insert.float_weight(layer).grad
    found |= {"grad.bn1.weight": model.norm.weight.grad, "grad.bn1.bias": model.norm.bias.grad}
    found |= {f"grad.downsample.{name}": parameter.grad for name, parameter in model.shortcut.named_parameters()}
    return {**found, "running_mean": model.norm.running_mean, "y_eval": model.eval()(inputs["x"])}


def label_smooth_ce(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    logits = inputs["logits"].requires_grad_()
    loss = Classification(label_smoothing=params["epsilon"]).loss(logits, (logits, inputs["labels"]))
    loss.backward()
    return {"loss": loss, "grad_logits": logits.grad}


def react_distribution_loss(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    logits = inputs["student_logits"].requires_grad_()
    loss = distribution_loss(logits, inputs["teacher_logits"])
    loss.backward()
    return {"loss": loss, "grad_student": logits.grad}


def set_shift(layer: nn.Module, shift: Tensor) -> ChannelShift:
    transform = ChannelShift(layer)
    transform.shift.data.copy_(shift.reshape(transform.shift.shape))
    insert.set_input_transform(layer, transform)
    return transform


def load_prelu(module: ShiftedPReLU, inputs: dict[str, Tensor], first: str, prelu: str, last: str) -> None:
    load(module.prelu, inputs, prelu)
    for shift, name in ((module.shift_in, first), (module.shift_out, last)):
        shift.data.copy_(inputs[f"state.{name}.bias"].reshape(shift.shape))


def react_block(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    channels, out, stride = params["in"], params["out"], params["stride"]
    layer = conv(weight_of(inputs, "binary_conv", out, channels, 3, 3), ReactNetMethod(), stride, 1)
    model = ShortcutUnit(layer, nn.BatchNorm2d(out), pooled_shortcut(channels, out, stride), ShiftedPReLU(out)).train()
    shift = set_shift(layer, inputs["state.move0.bias"])
    load(model.norm, inputs, "bn1")
    load(model.shortcut, inputs, "downsample")
    load_prelu(model.activation, inputs, "move1", "prelu", "move2")
    found = with_gradient(model, inputs["x"], inputs["grad_output"])
    found |= {"grad.binary_conv.weight": insert.float_weight(layer).grad, "grad.move0.bias": shift.shift.grad}
    found |= {"grad.bn1.weight": model.norm.weight.grad, "grad.bn1.bias": model.norm.bias.grad}
    found |= {f"grad.downsample.{name}": parameter.grad for name, parameter in model.shortcut.named_parameters()}
    found |= {"grad.move1.bias": model.activation.shift_in.grad, "grad.move2.bias": model.activation.shift_out.grad}
    return {**found, "grad.prelu.weight": model.activation.prelu.weight.grad}


def react_mobile_block(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    channels, out, stride = params["in"], params["out"], params["stride"]
    model = ReactBlock(channels, out, stride)
    method = ReactNetMethod()
    model.spatial.conv = conv(weight_of(inputs, "binary_3x3", channels, channels, 3, 3), method, stride, 1)
    set_shift(model.spatial.conv, inputs["state.move11.bias"])
    load(model.spatial.norm, inputs, "bn1")
    load_prelu(model.spatial.activation, inputs, "move12", "prelu1", "move13")
    is_double = len(model.pointwise) == 2
    names = [("binary_pw_down1", "bn2_1"), ("binary_pw_down2", "bn2_2")] if is_double else [("binary_pw", "bn2")]
    for unit, (weight, norm) in zip(model.pointwise, names, strict=True):
        unit.conv = conv(weight_of(inputs, weight, channels, channels, 1, 1), method)
        set_shift(unit.conv, inputs["state.move21.bias"])
        load(unit.norm, inputs, norm)
    load_prelu(model.activation, inputs, "move22", "prelu2", "move23")
    with torch.no_grad():
        return {"y": model.train()(inputs["x"])}
