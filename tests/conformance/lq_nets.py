"""LQ-Nets of lowbit for reference cases; bases are [bits] for activations and [bits, out_channels] for weights there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowbit.methods.quantizer_design.lq_nets import LearnedBasis, LqNets, initial_activation_basis, initial_weight_basis
from lowbit.qat import Slot
from lowbit.spec import Granularity


def activation_init(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"basis": initial_activation_basis(params["bits"])}


def weight_init(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"basis": initial_weight_basis(params["bits"], params["n"], params["out_channels"])}


def quantizer_of(kind: str, params: dict[str, Any], **options: Any) -> LearnedBasis:
    method, layer = LqNets(**options), torch.nn.Conv2d(1, 1, 1)
    make = method.weight_quantizer if kind == "weight" else method.activation_quantizer
    quantizer = make(Slot("layer", layer, params["bits"], kind == "weight", "inner"))
    assert isinstance(quantizer, LearnedBasis)
    if "eps" in params:
        quantizer.pull = params["eps"]
    return quantizer


def rows_of(basis: Tensor) -> Tensor:
    return basis.unsqueeze(0) if basis.dim() == 1 else basis.T


def as_case(basis: Tensor, kind: str) -> Tensor:
    return basis.T if kind == "weight" else basis[0]


def _one(kind: str, params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    quantizer = quantizer_of(kind, params)
    quantizer.set_basis(rows_of(inputs["basis"]))
    x = inputs["x"].requires_grad_()
    y = quantizer(x)
    y.backward(inputs["grad_output"])
    rows = (Granularity.channel() if kind == "weight" else Granularity.tensor()).flatten(inputs["x"].detach())
    return {"y": y, "grad_x": x.grad, "new_basis": as_case(quantizer.solve(*quantizer.statistics(rows)), kind)}


def activation(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return _one("activation", params, inputs)


def weight(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return _one("weight", params, inputs)


def _many(kind: str, params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    quantizer = quantizer_of(kind, params, momentum=params["momentum"])
    first = (
        initial_weight_basis(params["bits"], params["n"], inputs["x"].shape[1])
        if kind == "weight"
        else initial_activation_basis(params["bits"])
    )
    quantizer.set_basis(rows_of(first))
    outputs, fitted, averaged = [], [], []
    granularity = Granularity.channel() if kind == "weight" else Granularity.tensor()
    for x in inputs["x"]:
        fitted.append(as_case(quantizer.solve(*quantizer.statistics(granularity.flatten(x))), kind).clone())
        outputs.append(quantizer(x.requires_grad_()))
        quantizer.update()
        averaged.append(as_case(quantizer.basis, kind).clone())
    return {"y": torch.stack(outputs), "new_basis": torch.stack(fitted), "basis": torch.stack(averaged), "basis0": first}


def activation_ema(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return _many("activation", params, inputs)


def weight_ema(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return _many("weight", params, inputs)
