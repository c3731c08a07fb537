"""ReCU of lowbit for reference cases."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from lowbit.methods.binary.recu import Recu, RecuActivation, clamp_tails, laplace_quantile, standardize, tau_at
from lowbit.network import insert
from lowbit.network.surgery.shortcuts import PaddedShortcut, ShortcutUnit
from lowbit.qat import Slot
from lowbit.spec import Granularity


def tau_schedule(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Any]:
    return {"tau": [tau_at(epoch, params["epochs"], params["tau_min"], params["tau_max"]) for epoch in inputs["epochs_at"].tolist()]}


def activation_sign(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    quantizer = RecuActivation().eval()
    x = inputs["x"].requires_grad_()
    y = quantizer(x)
    y.backward(inputs["grad_output"])
    return {"y": y, "grad_x": x.grad}


def quantize(layer: nn.Module, scale: Tensor, tau: float) -> None:
    """Give a layer the method's quantizers with these scales."""
    slot = Slot("layer", layer, 1, True, "inner")
    quantizer = Recu(scale_init="magnitude").weight_quantizer(slot)
    quantizer.initialize(layer.weight)
    quantizer.scale.data.copy_(scale.reshape(quantizer.scale.shape))
    quantizer.tau.fill_(tau)
    insert.set_weight_quantizer(layer, quantizer)
    insert.set_input_quantizer(layer, Recu().activation_quantizer(slot))


def layer_of(params: dict[str, Any], inputs: dict[str, Tensor], tau: float) -> nn.Conv2d:
    weight = inputs["weight"]
    layer = nn.Conv2d(weight.shape[1], weight.shape[0], tuple(weight.shape[2:]), params.get("stride", 1), params["padding"], bias=False)
    layer.load_state_dict({"weight": weight})
    quantize(layer, inputs["alpha"], tau)
    return layer.train()


def conv_layer(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    layer = layer_of(params, inputs, params["tau"])
    x = inputs["x"].requires_grad_()
    y = layer(x)
    y.backward(inputs["grad_output"])
    standardized = standardize(inputs["weight"], Granularity.channel())
    return {
        "w_standardised": standardized, "q_tau": laplace_quantile(standardized, params["tau"]),
        "w_clamped": clamp_tails(standardized, params["tau"]), "y_train": y, "y_eval": layer.eval()(x), "grad_x": x.grad,
        "grad_weight": insert.float_weight(layer).grad, "grad_alpha": insert.weight_quantizer(layer).scale.grad,
    }  # fmt: skip


def shortcut_units(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    """Two 3x3 convolutions with norm, shortcut and Hardtanh; the first one changes the shape."""
    shortcut = None if stride == 1 and in_channels == out_channels else PaddedShortcut(in_channels, out_channels, stride, pooled=True)
    first = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
    last = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
    return nn.Sequential(
        ShortcutUnit(first, nn.BatchNorm2d(out_channels), shortcut, nn.Hardtanh()),
        ShortcutUnit(last, nn.BatchNorm2d(out_channels), None, nn.Hardtanh()),
    )


def block(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    model = shortcut_units(params["in"], params["out"], params["stride"])
    parts = {"conv1": model[0].conv, "bn1": model[0].norm, "conv2": model[1].conv, "bn2": model[1].norm}
    for name, module in parts.items():
        prefix = f"state.{name}."
        state = {k.removeprefix(prefix): v for k, v in inputs.items() if k.startswith(prefix)}
        scale = state.pop("alpha", None)
        module.load_state_dict(state, strict=False)
        if scale is not None:
            quantize(module, scale, params["tau"])
    x = inputs["x"].requires_grad_()
    y = model.train()(x)
    y.backward(inputs["grad_output"])
    gradients = {}
    for name in ("conv1", "conv2"):
        gradients[f"grad.{name}.weight"] = insert.float_weight(parts[name]).grad
        gradients[f"grad.{name}.alpha"] = insert.weight_quantizer(parts[name]).scale.grad
    for name in ("bn1", "bn2"):
        gradients |= {f"grad.{name}.weight": parts[name].weight.grad, f"grad.{name}.bias": parts[name].bias.grad}
    return {"y": y, "grad_x": x.grad, **gradients}


def train_steps(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    layer = layer_of(params, inputs, params["tau_min"])
    quantizer = insert.weight_quantizer(layer)
    optimizer = torch.optim.SGD(layer.parameters(), params["lr"], params["momentum"], weight_decay=params["weight_decay"])
    found = {}
    for epoch in range(params["epochs"]):
        quantizer.tau.fill_(tau_at(epoch, params["epochs"], params["tau_min"], params["tau_max"]))
        optimizer.zero_grad()
        loss = mse_loss(layer(inputs["x"]), inputs["target"])
        loss.backward()
        optimizer.step()
        found |= {f"loss{epoch}": loss.detach(), f"weight{epoch}": insert.float_weight(layer).detach().clone()}
        found[f"alpha{epoch}"] = quantizer.scale.detach().clone()
    return found
