"""LCQ of lowbit for reference cases."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lowbit.methods.quantizer_design.lcq import CompandingQuantizer
from lowbit.network import insert

INITIAL_CLIPS = (8.0, 3.0)  # activation, weight


def quantizer_of(bits: int, clip: float, theta: Tensor | None, *, signed: bool, normalizes: bool = False) -> CompandingQuantizer:
    intervals = None if theta is None else len(theta)
    quantizer = CompandingQuantizer(bits, signed=signed, clip=clip, intervals=intervals, outer_bits=None, normalizes=normalizes)
    if quantizer.logits is not None and theta is not None:
        quantizer.logits.data.copy_(theta)
    return quantizer


def quantize(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor | None]:
    quantizer = quantizer_of(params["bits"], params["alpha"], inputs.get("theta"), signed=params["signed"])
    x = inputs["x"].requires_grad_()
    y = quantizer(x)
    y.backward(inputs["grad_output"])
    curve = {} if quantizer.logits is None else {"grad_theta": quantizer.logits.grad}
    return {"y": y, "grad_x": x.grad, "grad_alpha": quantizer.clip.grad, **curve}


def layer(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Any]:
    out_channels, in_channels, *kernel = inputs["weight"].shape
    conv = nn.Conv2d(in_channels, out_channels, tuple(kernel), padding=params["padding"], bias=False)
    conv.load_state_dict({"weight": inputs["weight"]})
    weights = quantizer_of(params["bits"], params["alpha_w"], inputs.get("theta_w"), signed=True, normalizes=params["weight_norm"] == "LWN")
    activations = quantizer_of(params["bits"], params["alpha_x"], inputs.get("theta_x"), signed=False)
    insert.set_weight_quantizer(conv, weights)
    insert.set_input_quantizer(conv, activations)
    x = inputs["x"].requires_grad_()
    y = conv(x)
    y.backward(inputs["grad_output"])
    starts = [
        CompandingQuantizer(params["bits"], signed=signed, clip=clip) for signed, clip in zip((False, True), INITIAL_CLIPS, strict=True)
    ]
    found = {
        "y": y, "grad_x": x.grad, "grad_weight": insert.float_weight(conv).grad, "grad_alpha_x": activations.clip.grad,
        "grad_alpha_w": weights.clip.grad, "initial_alpha": torch.stack([start.clip.detach() for start in starts]),
    }  # fmt: skip
    for name, quantizer in (("grad_theta_x", activations), ("grad_theta_w", weights)):
        if quantizer.logits is not None:
            found[name] = quantizer.logits.grad
    return found
