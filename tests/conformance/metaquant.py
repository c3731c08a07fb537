"""MetaQuant of lowbit for reference cases."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lowbit.methods.gradients.metaquant import (
    LookAhead,
    MetaQuant,
    MetaQuantizer,
    move_bias,
    refined_gradient,
)
from lowbit.network import insert
from lowbit.qat import Classification, OptimizerSpec, Recipe, TrainRun
from lowbit.spec import Granularity

BASES = {"dorefa": "dorefa", "BWN": "bwn", "BWN-F": "bwn_f"}


def layer_of(params: dict[str, Any], inputs: dict[str, Tensor]) -> tuple[nn.Module, MetaQuantizer]:
    weight = inputs["weight"]
    if params["kind"] == "linear":
        layer: nn.Module = nn.Linear(weight.shape[1], weight.shape[0], bias="bias" in inputs)
    else:
        layer = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2:], padding=params["padding"], bias="bias" in inputs)
    layer.load_state_dict({name: inputs[name] for name in ("weight", "bias") if name in inputs})
    base = BASES[params["quantizer"]]
    if base == "bwn_f" and params["kind"] == "linear":
        base = "bwn"
    quantizer = MetaQuantizer(params["bits"], base, Granularity.channel())
    insert.set_weight_quantizer(layer, quantizer)
    return layer, quantizer


def ste_layer(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    layer, quantizer = layer_of(params, inputs)
    y = layer(inputs["x"])
    y.backward(inputs["grad_output"])
    weight = insert.float_weight(layer)
    found = {"y": y, "grad_w_hat": quantizer.captured, "grad_weight": weight.grad}
    return {**found, "w_tilde": quantizer.preprocess(weight), "w_hat": layer.weight}


def method_of(params: dict[str, Any]) -> MetaQuant:
    name, _, activation = params["meta"].partition("-")
    kind = {"FC": "fc_grad", "MultiFC": "multi_fc"}.get(name, "lstm_fc")
    return MetaQuant(
        meta=kind,
        hidden=params["hidden"],
        layers=params.get("num_fc", 2),
        activation=(activation or "none") if kind == "multi_fc" else "none",
        look_ahead="stored",
        meta_learning_rate=params.get("meta_lr", 1e-3),
    )


def network_of(params: dict[str, Any], inputs: dict[str, Tensor]) -> nn.Module:
    return loaded(method_of(params).meta_network(), inputs)


def loaded(network: nn.Module, inputs: dict[str, Tensor]) -> nn.Module:
    network.load_state_dict({name.removeprefix("phi."): value for name, value in inputs.items() if name.startswith("phi.")})
    return network


def meta_gradient(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    network, state, found = network_of(params, inputs), None, {}
    for step in range(params["steps"]):
        m, state = network(inputs[f"g_hat_{step}"], inputs[f"w_tilde_{step}"], state)
        found[f"meta_grad_{step}"] = m
        if state is not None:
            found |= {f"h_{step}": state[:1], f"c_{step}": state[1:]}
    m.backward(inputs["grad_meta_grad"])
    return found | {f"grad_phi.{name}": parameter.grad for name, parameter in network.named_parameters()}


def meta_forward(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    layer, quantizer = layer_of(params, inputs)
    m = inputs["meta_grad"].requires_grad_()
    quantizer.pending = LookAhead(lambda: m, inputs["stored_grad"], params["lr"], m)
    if "stored_bias_grad" in inputs:
        move_bias(layer.bias, inputs["stored_bias_grad"], params["lr"])
    weight = insert.float_weight(layer)
    ahead = quantizer.look_ahead(weight)
    y = layer(inputs["x"])
    hat = layer.weight
    tilde = quantizer.preprocess(ahead)
    y.backward(inputs["grad_output"])
    found = {"calibration": quantizer.calibration(weight), "meta_weight": ahead, "w_tilde": tilde, "w_hat": hat}
    return {**found, "y": y, "g_hat": quantizer.captured, "grad_meta_grad": m.grad, "grad_weight": weight.grad}


def optimizer_of(params: dict[str, Any], parameters: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    decay = params.get("weight_decay", 0.0)
    if params["optimizer"] == "Adam":
        return torch.optim.Adam(parameters, lr, weight_decay=decay)
    return torch.optim.SGD(parameters, lr, momentum=0.9 if params["optimizer"] == "SGD-M" else 0.0, weight_decay=decay)


def refine(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    key = "param" if "param" in inputs else "parameter"
    parameter = nn.Parameter(inputs[key])
    optimizer = optimizer_of(params, [parameter], 0.0)
    found = {}
    for step in range(params["steps"]):
        parameter.grad = inputs[f"grad{step}"].clone()
        found[f"refined{step}"] = refined_gradient(optimizer, parameter, parameter.grad)
        optimizer.step()
    return found


class Net(nn.Module):
    """The small network of the training cases."""

    def __init__(self, inputs: dict[str, Tensor]) -> None:
        super().__init__()
        first, last = inputs["net.conv1.weight"].shape, inputs["net.fc.weight"].shape
        self.conv1 = nn.Conv2d(first[1], first[0], 3, padding=1, bias=False)
        self.bn1, self.activation = nn.BatchNorm2d(first[0]), nn.ReLU()
        self.fc = nn.Linear(last[1], last[0])
        state = {name.removeprefix("net."): value for name, value in inputs.items() if name.startswith("net.")}
        self.load_state_dict(state, strict=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.bn1(self.conv1(x)))
        return self.fc(torch.nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))


def train_steps(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    model = Net(inputs)
    base = BASES[params["quantizer"]]
    for layer in (model.conv1, model.fc):
        insert.set_weight_quantizer(
            layer, MetaQuantizer(params["bits"], "bwn" if layer is model.fc and base == "bwn_f" else base, Granularity.channel())
        )
    kind = "adam" if params["optimizer"] == "Adam" else "sgd"
    momentum = 0.9 if params["optimizer"] == "SGD-M" else 0.0
    spec = OptimizerSpec(kind, params["lr"], momentum, weight_decay=params["weight_decay"], schedule="constant")
    run = TrainRun(model, method_of(params), Classification(), Recipe(1, optimizer=spec), params["steps"])
    network = loaded(run.networks["meta"], inputs)
    found: dict[str, Tensor] = {}
    for _ in run.each_epoch():
        for step in range(params["steps"]):
            run.before_step()
            labels = inputs["labels"]
            loss = run.loss((inputs[f"x{step}"], labels[step] if labels.dim() > 1 else labels))
            loss.backward()
            run.after_backward()
            run.optimizer_step()
            run.after_step()
            now = {"conv1.weight": insert.float_weight(model.conv1), "fc.weight": insert.float_weight(model.fc), "fc.bias": model.fc.bias}
            now |= {"bn1.weight": model.bn1.weight, "bn1.bias": model.bn1.bias}
            now |= {f"phi.{name}": parameter for name, parameter in network.named_parameters()}
            found[f"loss{step}"] = loss.detach()
            found |= {f"step{step}.{name}": value.detach().clone() for name, value in now.items()}
    return found
