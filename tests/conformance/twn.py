"""TWN of lowbit for reference cases."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lowbit.methods.quantization_aware.twn import TernaryQuantizer, Twn, pack_ternary, unpack_ternary
from lowbit.network import insert
from lowbit.qat import Slot


def weight(params: dict, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    quantizer = TernaryQuantizer(delta_factor=params["delta_factor"])
    threshold, scale = quantizer.threshold_and_scale(inputs["weight"])
    return {"ternary_weight": quantizer(inputs["weight"]), "delta": threshold, "alpha": scale}


def pack(params: dict, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    scale = torch.as_tensor(inputs["alpha"]).reshape(())
    words = pack_ternary(inputs["ternary_weight"], scale)
    return {"codes": words, "unpacked": unpack_ternary(words, scale, tuple(params["shape"]))}


def conv(params: dict, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    out_channels, in_channels, *kernel = inputs["weight"].shape
    layer = nn.Conv2d(in_channels, out_channels, tuple(kernel), params["stride"], params["padding"], bias=False)
    layer.load_state_dict({"weight": inputs["weight"]})
    method = Twn(delta_factor=params["delta_factor"])
    insert.set_weight_quantizer(layer, method.weight_quantizer(Slot("layer", layer, 2, True, "inner")))
    x = inputs["x"].requires_grad_()
    y = layer(x)
    y.backward(inputs["grad_output"])
    return {"ternary_weight": layer.weight, "y": y, "grad_x": x.grad, "grad_weight": insert.float_weight(layer).grad}
