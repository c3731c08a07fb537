"""PACT and SAWB of lowbit for reference cases."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from lowbit.methods.quantizer_design.pact import PactActivation, SawbWeight
from lowbit.spec import Granularity


def activation(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    quantizer = PactActivation(params["bits"], clip=params["alpha"])
    x = inputs["x"].requires_grad_()
    y = quantizer(x)
    y.backward(inputs["grad_output"])
    return {"y": y, "grad_x": x.grad, "grad_alpha": quantizer.clip.grad}


def alpha_sgd(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    quantizer = PactActivation(params["bits"], clip=params["alpha0"])
    optimizer = torch.optim.SGD(quantizer.parameters(), params["lr"], params["momentum"], weight_decay=params["weight_decay"])
    clips, losses = [], []
    for step in range(params["steps"]):
        optimizer.zero_grad()
        target = inputs["target"]
        loss = mse_loss(quantizer(inputs["x"][step]), target[step] if target.dim() > 1 else target)
        loss.backward()
        optimizer.step()
        clips.append(quantizer.clip.detach().clone())
        losses.append(loss.detach())
    return {"alpha": torch.stack(clips), "loss": torch.stack(losses)}


def _sawb(params: dict[str, Any], inputs: dict[str, Tensor], granularity: Granularity) -> dict[str, Tensor]:
    quantizer = SawbWeight(params["bits"], has_zero=params["zero_aligned"], clips_gradient=params["grad_clip"], granularity=granularity)
    weight = inputs["weight"].requires_grad_()
    quantizer.initialize(weight)
    y = quantizer(weight)
    y.backward(inputs["grad_output"])
    return {"y": y, "grad_weight": weight.grad, "clip": quantizer.clip}


def sawb_weight(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return _sawb(params, inputs, Granularity.tensor())


def sawb_weight_per_channel(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return _sawb(params, inputs, Granularity.channel())
