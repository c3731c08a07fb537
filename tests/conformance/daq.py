"""DAQ of lowbit for reference cases."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lowbit.methods.gradients.daq import Daq, DaqActivation, DaqWeight
from lowbit.network import insert
from lowbit.surrogates import DistanceAwareRounding


def soft_round(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    x = inputs["x"].requires_grad_()
    y = DistanceAwareRounding(params["gamma"], params["sigma"])(x, 0, DaqActivation(params["bits"]).qmax)
    y.backward(inputs["grad_output"])
    return {"y": y, "grad_x": x.grad}


def weight(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    quantizer = DaqWeight(params["bits"], gamma=params["gamma"], sigma=params["sigma"])
    quantizer.set_interval(inputs["l"], inputs["u"])
    x = inputs["weight"].requires_grad_()
    y = quantizer(x)
    y.backward(inputs["grad_output"])
    gradients = {"grad_weight": x.grad, "grad_l": quantizer.lower.grad, "grad_u": quantizer.upper.grad}
    return {"y_train": y, "y_eval": quantizer.eval()(x), **gradients}


def activation(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    quantizer = DaqActivation(params["bits"], gamma=params["gamma"], sigma=params["sigma"])
    quantizer.set_interval(torch.zeros(()), inputs["u"])
    x = inputs["x"].requires_grad_()
    y = quantizer(x)
    y.backward(inputs["grad_output"])
    return {"y_train": y, "y_eval": quantizer.eval()(x), "grad_x": x.grad, "grad_u": quantizer.upper.grad}


def conv(params: dict[str, Any], weight: Tensor) -> tuple[nn.Conv2d, DaqWeight, DaqActivation]:
    out_channels, in_channels, *kernel = weight.shape
    layer = nn.Conv2d(in_channels, out_channels, tuple(kernel), params["stride"], params["padding"], bias=False)
    layer.load_state_dict({"weight": weight})
    weights = DaqWeight(params["bits"], gamma=params.get("gamma_w", 2), sigma=params.get("sigma_w", 1))
    activations = DaqActivation(params["bits"], gamma=params.get("gamma_a", 2), sigma=params.get("sigma_a", 2))
    insert.set_weight_quantizer(layer, weights)
    insert.set_input_quantizer(layer, activations)
    return layer, weights, activations


def conv_layer(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    layer, weights, activations = conv(params, inputs["weight"])
    weights.set_interval(inputs["lW"], inputs["uW"])
    activations.set_interval(torch.zeros(()), inputs["uA"])
    weights.output_scale.data.copy_(inputs["beta"].reshape(()))
    x = inputs["x"].requires_grad_()
    y = layer(x)
    y.backward(inputs["grad_output"])
    return {
        "y_train": y, "grad_x": x.grad, "grad_weight": insert.float_weight(layer).grad, "grad_lW": weights.lower.grad,
        "grad_uW": weights.upper.grad, "grad_uA": activations.upper.grad, "grad_beta": weights.output_scale.grad, "y_eval": layer.eval()(x),
    }  # fmt: skip


def initialize(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    layer, weights, activations = conv(params, inputs["weight"])
    Daq().initialize_layer(layer, inputs["x"])
    return {
        "lW": weights.lower, "uW": weights.upper, "uA": activations.upper, "beta": weights.output_scale, "y": layer(inputs["x"]),
    }  # fmt: skip
