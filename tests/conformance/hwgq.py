"""HWGQ of lowbit for reference cases."""

from __future__ import annotations

from torch import Tensor, nn

from lowbit.methods.quantization_aware.hwgq import AUTHORS_NON_UNIFORM, AUTHORS_UNIFORM, Hwgq
from lowbit.network import insert
from lowbit.qat import Slot
from lowbit.quantizers import Quantizer

LEVELS = {AUTHORS_UNIFORM: "authors", AUTHORS_NON_UNIFORM: "authors_non_uniform"}


def activation(params: dict, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    x, count = inputs["x"].requires_grad_(), len(params["levels"])
    quantizer: nn.Module = nn.ReLU()
    if params["forward"] == "sign":
        quantizer = Hwgq(signed_inputs="sign").activation_quantizer(Slot("x", nn.Identity(), 1, True, "inner"))
    if params["forward"] == "hwgq":
        backward, levels = "vanilla" if params["clip"] is None else "clipped", LEVELS[tuple(params["levels"])]
        method = Hwgq(backward=backward, levels=levels, input_scale="unit", signed_inputs="rectify")
        quantizer = method.activation_quantizer(Slot("x", nn.Identity(), 2, True, "inner"))
        quantizer.initialize(x)
    y = quantizer(x)
    y.backward(inputs["grad_output"])
    return {"y": y, "grad_x": x.grad} | ({"thresholds": quantizer.table()[0][1:count]} if count else {})


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
