"""XNOR-Net of lowbit for reference cases."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from lowbit.methods.quantization_aware.xnor_net import InputScale, XnorNet
from lowbit.network import insert
from lowbit.qat import Slot


def layer_of(weight: Tensor, stride: int = 1, padding: int = 0) -> nn.Module:
    """A layer without bias that holds ``weight``."""
    if weight.dim() == 2:
        layer: nn.Module = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    else:
        layer = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2], stride, padding, bias=False)
    layer.load_state_dict({"weight": weight})
    return layer


def binarized(method: XnorNet, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The stored weight before a step, the binary one, and the stored weight's gradient."""
    layer = layer_of(inputs["weight"])
    method.prepare_weight(layer)
    insert.set_weight_quantizer(layer, method.weight_quantizer(Slot("layer", layer, 1, True, "inner")))
    weight, binary = insert.float_weight(layer), layer.weight
    if "grad_binary_weight" in inputs:
        binary.backward(inputs["grad_binary_weight"])
    return {"real_weight": weight.detach(), "binary_weight": binary.detach(), "grad_weight": weight.grad}


def weight_paper(params: dict, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    multipliers = {"sgd": {"multiply_by_size": True}, "adam": {"multiply_by_size": False, "gradient_multiplier": 1e9}}[params["optimizer"]]
    return binarized(XnorNet(weight_gradient="paper", centring_gradient=True, **multipliers), inputs)


def weight_corrected(params: dict, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    method = XnorNet(
        weight_gradient="corrected", centring_gradient=True, multiply_by_size=True, gradient_multiplier=params["grad_multiplier"]
    )
    return binarized(method, inputs)


def weight_forward(params: dict, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return binarized(XnorNet(), inputs)


def activation(params: dict, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    x = inputs["x"].requires_grad_()
    y = XnorNet(zero_inputs=True).activation_quantizer(Slot("x", nn.Identity(), 1, True, "inner"))(x)
    y.backward(inputs["grad_output"])
    return {"y": y, "grad_x": x.grad}


def conv_with_k(params: dict, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    x = inputs["x"].requires_grad_()
    layer = layer_of(inputs["binary_weight"], params["stride"], params["padding"])
    scale = InputScale(layer)
    insert.set_input_quantizer(layer, XnorNet().activation_quantizer(Slot("layer", layer, 1, True, "inner")))
    insert.set_output_transform(layer, scale)
    norm = [inputs[f"bn_{name}"] for name in ("mean", "var", "weight", "bias")]
    normed = functional.batch_norm(x, *norm, eps=params["bn_eps"])
    y = layer(normed)
    y.backward(inputs["grad_output"])
    with torch.no_grad():
        return {"y": y, "grad_x": x.grad, "k": scale.scale_map(normed, tuple(y.shape[2:]))}
