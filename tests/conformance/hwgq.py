"""HWGQ of lowbit for reference cases."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lowbit.methods.quantization_aware.hwgq import Hwgq, half_wave_table, quantize_half_wave
from lowbit.network import insert
from lowbit.qat import Slot
from lowbit.quantizers import Quantizer, SignQuantizer


def activation(params: dict, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    x = inputs["x"].requires_grad_()
    if params["forward"] == "hwgq":
        levels = torch.tensor(params["levels"])
        y = quantize_half_wave(x, levels, "vanilla" if params["clip"] is None else "clipped")
    else:
        y = SignQuantizer(is_closed=True)(x) if params["forward"] == "sign" else nn.ReLU()(x)
    y.backward(inputs["grad_output"])
    found = {"y": y, "grad_x": x.grad}
    return {**found, "thresholds": half_wave_table(levels)[0][1:]} if params["forward"] == "hwgq" else found


def trained(layer: nn.Module, params: dict, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """A forward and a backward pass through ``layer`` with binary weights."""
    layer.load_state_dict({"weight": inputs["weight"]})
    quantizer: Quantizer = Hwgq(weight_scale=params["use_alpha"]).weight_quantizer(Slot("layer", layer, 1, True, "inner"))
    insert.set_weight_quantizer(layer, quantizer)
    x = inputs["x"].requires_grad_()
    y = layer(x)
    y.backward(inputs["grad_output"])
    weight = insert.float_weight(layer)
    return {
        "binary_weight": layer.weight,
        "alpha": quantizer.scale(weight.detach()),
        "y": y,
        "grad_x": x.grad,
        "grad_weight": weight.grad,
    }


def binary_conv(params: dict, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    out_channels, in_channels, *kernel = inputs["weight"].shape
    return trained(nn.Conv2d(in_channels, out_channels, tuple(kernel), params["stride"], params["padding"], bias=False), params, inputs)


def binary_linear(params: dict, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return trained(nn.Linear(inputs["weight"].shape[1], inputs["weight"].shape[0], bias=False), params, inputs)
