"""IR-Net of lowbit for reference cases."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lowbit.methods.binary.ir_net import IrNet, LibraWeight
from lowbit.models.resnet import ResidualBlock
from lowbit.network import insert
from lowbit.network.surgery.shortcuts import PaddedShortcut, ShortcutUnit
from lowbit.qat import Slot
from lowbit.spec import Granularity
from lowbit.surrogates import ErrorDecay
from lowbit.surrogates.ede import error_decay


def ede_schedule(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Any]:
    pairs = [error_decay(epoch, params["epochs"], params["t_min"], params["t_max"]) for epoch in inputs["epochs_at"].tolist()]
    return {"k": [k for k, _ in pairs], "t": [t for _, t in pairs]}


def set_curves(model: nn.Module, params: dict[str, Any]) -> None:
    for module in model.modules():
        if isinstance(module, ErrorDecay):
            module.set_curve(params["k"], params["t"])


def quantize(layer: nn.Module, params: dict[str, Any]) -> None:
    """Give a layer the method's quantizers."""
    slot = Slot("layer", layer, 1, True, "inner")
    insert.set_weight_quantizer(layer, IrNet().weight_quantizer(slot))
    if params["binary_activation"]:
        insert.set_input_quantizer(layer, IrNet().activation_quantizer(slot))
    set_curves(layer, params)


def binarize(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    quantizer = IrNet().activation_quantizer(Slot("x", nn.Identity(), 1, True, "inner"))
    set_curves(quantizer, params)
    x = inputs["x"].requires_grad_()
    y = quantizer(x)
    y.backward(inputs["grad_output"])
    return {"y": y, "grad_x": x.grad}


def weight_values(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"w_binary": LibraWeight(granularity=Granularity.channel())(inputs["weight"])}


def conv_layer(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    weight = inputs["weight"]
    layer = nn.Conv2d(weight.shape[1], weight.shape[0], tuple(weight.shape[2:]), params["stride"], params["padding"], bias=False)
    layer.load_state_dict({"weight": weight})
    quantize(layer, params)
    x = inputs["x"].requires_grad_()
    y = layer(x)
    y.backward(inputs["grad_output"])
    return {"y": y, "grad_x": x.grad, "grad_weight": insert.float_weight(layer).grad}


def shortcut_units(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    """Two 3x3 convolutions with norm, shortcut and Hardtanh; the first one changes the shape."""
    shortcut = None if stride == 1 and in_channels == out_channels else PaddedShortcut(in_channels, out_channels, stride)
    first = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
    last = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
    return nn.Sequential(
        ShortcutUnit(first, nn.BatchNorm2d(out_channels), shortcut, nn.Hardtanh()),
        ShortcutUnit(last, nn.BatchNorm2d(out_channels), None, nn.Hardtanh()),
    )


def block(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    size = params["in"], params["out"], params["stride"]
    if params["binary_activation"]:
        model: nn.Module = shortcut_units(*size)
        parts = {"conv1": model[0].conv, "bn1": model[0].norm, "conv2": model[1].conv, "bn2": model[1].norm}
    else:
        model = ResidualBlock(*size)
        if not isinstance(model.downsample, nn.Identity):
            model.downsample = PaddedShortcut(*size)
        parts = {"conv1": model.conv1, "bn1": model.norm1, "conv2": model.conv2, "bn2": model.norm2}
    for name, module in parts.items():
        prefix = f"state.{name}."
        module.load_state_dict({k.removeprefix(prefix): v for k, v in inputs.items() if k.startswith(prefix)}, strict=False)
    for name in ("conv1", "conv2"):
        quantize(parts[name], params)
    x = inputs["x"].requires_grad_()
    y = model.train()(x)
    y.backward(inputs["grad_output"])
    gradients = {f"grad.{name}.weight": insert.float_weight(parts[name]).grad for name in ("conv1", "conv2")}
    for name in ("bn1", "bn2"):
        gradients |= {f"grad.{name}.weight": parts[name].weight.grad, f"grad.{name}.bias": parts[name].bias.grad}
    return {"y": y, "grad_x": x.grad, **gradients}
