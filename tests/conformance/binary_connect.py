"""BinaryConnect of lowbit for reference cases."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lowbit.methods.binary.binary_connect import BinaryConnect, BinaryConnectWeight, fans, glorot_scales, squared_hinge
from lowbit.network import insert
from lowbit.qat import Classification, Recipe, Slot, TrainRun


def binarize(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    quantizer = BinaryConnectWeight(params["H"])
    stochastic = BinaryConnectWeight(params["H"], binarization="stochastic", evaluation="real")
    weight = inputs["weight"]
    return {
        "w_binary": quantizer.train()(weight),
        "w_eval_deterministic_training": quantizer.eval()(weight),
        "w_eval_stochastic_training": stochastic.eval()(weight),
        "p_plus": stochastic.probability(weight),
    }


def glorot_scale(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Any]:
    pairs = []
    for is_conv, fan_in, fan_out, kernel in inputs["layers"].long().tolist():
        shape = (fan_out, fan_in, kernel, kernel) if is_conv else (fan_out, fan_in)
        pairs.append(glorot_scales(*fans(shape)))
    return {"lr_scale": [scale for scale, _ in pairs], "H_glorot": [limit for _, limit in pairs]}


def option(value: object) -> object:
    return "glorot" if value == "Glorot" else value


def train_steps(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Any]:
    method = BinaryConnect(limit=option(params["H"]), learning_rate_scale=option(params["lr_scale"]))
    first, second = (nn.Linear(*inputs[f"W{index}"].shape) for index in (1, 2))
    for index, layer in ((1, first), (2, second)):
        layer.load_state_dict({"weight": inputs[f"W{index}"].T, "bias": inputs[f"b{index}"]})
        insert.set_weight_quantizer(layer, method.weight_quantizer(Slot(f"{index}", layer, 1, True, "inner")))
    model = nn.Sequential(first, nn.ReLU(), second).train()
    optimizers = {
        "adam": lambda: torch.optim.Adam(model.parameters(), params["lr"]),
        "sgd": lambda: torch.optim.SGD(model.parameters(), params["lr"]),
        "nesterov": lambda: torch.optim.SGD(model.parameters(), params["lr"], momentum=0.9, nesterov=True),
    }
    optimizer = optimizers[params["optimizer"]]()
    run = TrainRun(model, method, Classification(), Recipe(1), params["steps"])
    found: dict[str, Any] = {"lr_scale1": method.step_scale(first), "lr_scale2": method.step_scale(second)}
    for step in range(params["steps"]):
        optimizer.zero_grad()
        loss = squared_hinge(model(inputs[f"x{step}"]), inputs[f"t{step}"])
        loss.backward()
        method.after_backward(run)
        optimizer.step()
        method.after_step(run)
        found[f"loss{step}"] = loss.detach()
        for index, layer in ((1, first), (2, second)):
            weight = insert.float_weight(layer)
            found[f"gW{index}_{step}"] = weight.grad.T.clone()
            found[f"W{index}_{step}"], found[f"b{index}_{step}"] = weight.detach().T.clone(), layer.bias.detach().clone()
    return found
