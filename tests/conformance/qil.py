"""QIL of lowbit for reference cases."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowbit.methods.quantizer_design.qil import IntervalQuantizer, QilActivation, QilWeight, interval_of_histogram, transform_magnitudes


def _run(quantizer: QilWeight | QilActivation, x: Tensor, inputs: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    x.requires_grad_()
    y = quantizer(x)
    y.backward(inputs["grad_output"])
    gradients = {name: x.grad, "grad_center": quantizer.center.grad, "grad_distance": quantizer.distance.grad}
    is_weight = isinstance(quantizer, QilWeight)
    transformed = quantizer.transform(x) if is_weight else transform_magnitudes(x, *quantizer.interval(x))
    return {"transformed": transformed, "y": y, "center": quantizer.center, "distance": quantizer.distance, **gradients}


def _at(quantizer: IntervalQuantizer, params: dict[str, Any]) -> None:
    quantizer.set_interval(torch.tensor(params["center"]), torch.tensor(params["distance"]))


def weight(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    quantizer = QilWeight(params["bits"], learns_gamma=True)
    _at(quantizer, params)
    quantizer.gamma.data.fill_(params["gamma"])
    found = _run(quantizer, inputs["weight"], inputs, "grad_weight")
    return {**found, "grad_gamma": quantizer.gamma.grad}


def activation(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    quantizer = QilActivation(params["bits"])
    _at(quantizer, params)
    return _run(quantizer, inputs["x"], inputs, "grad_x")


def weight_init_max(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    quantizer = QilWeight(params["bits"], start="max", scale_gradient=True)
    quantizer.initialize(inputs["weight"])
    return _run(quantizer, inputs["weight"], inputs, "grad_weight")


def init_histogram(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    center, distance = interval_of_histogram(inputs["x"], percentile=params["percentile"], bins=params["bins"])
    return {"center": center, "distance": distance}
