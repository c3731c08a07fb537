"""EWGS of lowbit for reference cases."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lowbit.methods.gradients import ewgs
from lowbit.methods.gradients.ewgs import Ewgs, EwgsActivation, EwgsWeight, estimate_deltas
from lowbit.network import insert

BITS = {2: 1, 4: 2, 8: 3, 16: 4, 32: 5, 64: 6, 128: 7, 256: 8}


def discretizer(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    quantizer = EwgsActivation(BITS[params["levels"]], delta=params["delta"])
    quantizer.set_interval(torch.tensor(0.0), torch.tensor(1.0))
    x = inputs["x"].requires_grad_()
    y = quantizer(x)
    y.backward(inputs["grad_output"])
    return {"y": y, "grad_x": x.grad}


def _quantized(quantizer: EwgsWeight | EwgsActivation, x: Tensor, inputs: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    quantizer.set_interval(inputs["l"], inputs["u"])
    x.requires_grad_()
    y = quantizer(x)
    y.backward(inputs["grad_output"])
    return {"y": y, name: x.grad, "grad_l": quantizer.lower.grad, "grad_u": quantizer.upper.grad}


def weight(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return _quantized(EwgsWeight(BITS[params["levels"]], delta=params["delta"]), inputs["weight"], inputs, "grad_weight")


def activation(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return _quantized(EwgsActivation(BITS[params["levels"]], delta=params["delta"]), inputs["x"], inputs, "grad_x")


def conv(params: dict[str, Any], weight: Tensor, bias: Tensor | None = None, deltas: tuple[float, float] = (0.0, 0.0)) -> nn.Conv2d:
    """A convolution with EWGS quantizers, not initialized."""
    out_channels, in_channels, *kernel = weight.shape
    layer = nn.Conv2d(in_channels, out_channels, tuple(kernel), params.get("stride", 1), params.get("padding", 1), bias=bias is not None)
    layer.load_state_dict({"weight": weight} if bias is None else {"weight": weight, "bias": bias})
    insert.set_weight_quantizer(layer, EwgsWeight(BITS[params["weight_levels"]], delta=deltas[0]))
    insert.set_input_quantizer(layer, EwgsActivation(BITS[params["act_levels"]], delta=deltas[1]))
    return layer


def parts(layer: nn.Conv2d) -> tuple[EwgsWeight, EwgsActivation]:
    weights, activations = insert.weight_quantizer(layer), insert.input_quantizer(layer)
    assert isinstance(weights, EwgsWeight)
    assert isinstance(activations, EwgsActivation)
    return weights, activations


def initialize(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    layer = conv(params, inputs["weight"], inputs.get("bias"))
    Ewgs().initialize_layer(layer, inputs["x"])
    weights, activations = parts(layer)
    intervals = {"lW": weights.lower, "uW": weights.upper, "lA": activations.lower, "uA": activations.upper}
    return {**intervals, "output_scale": weights.output_scale, "y": layer(inputs["x"])}


def set_up(layer: nn.Conv2d, values: dict[str, Tensor]) -> None:
    weights, activations = parts(layer)
    weights.set_interval(values["lW"], values["uW"])
    activations.set_interval(values["lA"], values["uA"])
    weights.output_scale.data.copy_(values["output_scale"].reshape(()))


def conv_layer(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    layer = conv(params, inputs["weight"], deltas=(params["delta_w"], params["delta_a"]))
    set_up(layer, inputs)
    weights, activations = parts(layer)
    x = inputs["x"].requires_grad_()
    y = layer(x)
    y.backward(inputs["grad_output"])
    return {
        "y": y, "grad_x": x.grad, "grad_weight": insert.float_weight(layer).grad, "grad_lW": weights.lower.grad, "grad_uW": weights.upper.grad,
        "grad_lA": activations.lower.grad, "grad_uA": activations.upper.grad, "grad_output_scale": weights.output_scale.grad,
    }  # fmt: skip


def case_loss(p: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    """The function whose Hessian the case is about: half of p'Ap, and a sixth of the sum of b p^3."""
    quadratic = torch.einsum(",i,ij,j->", torch.tensor(0.5), p, inputs["A"], p)
    return torch.stack((quadratic, torch.einsum(",i,i,i,i->", torch.tensor(0.16666667), inputs["b"], p, p, p))).sum()


def hutchinson_trace(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Any]:
    p = inputs["p"].requires_grad_()
    (gradient,) = torch.autograd.grad(case_loss(p, inputs), p, create_graph=True)
    probes = inputs["probes"].to(p.dtype)
    average, found = ewgs.hutchinson_trace(gradient, p, probes, max_iterations=params["max_iter"], tolerance=params["tol"])
    return {"vhv": found, "mean": average, "iterations": len(found)}


def delta_update(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Any]:
    state: dict[str, dict[str, Tensor]] = {}
    for name, value in inputs.items():
        if name.startswith("state."):
            _, owner, part = name.split(".")
            state.setdefault(owner, {})[part] = value
    before = (params["delta_before"], params["delta_before"])
    layers = [conv({**params, "padding": 1}, state[name]["weight"], deltas=before) for name in params["layers"]]
    for layer, name in zip(layers, params["layers"], strict=True):
        set_up(layer, state[name])
    norms = [nn.BatchNorm2d(len(state[name]["weight"])) for name in ("b1", "b2")]
    linear = nn.Linear(*reversed(state["fc"]["weight"].shape))
    for module, name in zip((*norms, linear), ("b1", "b2", "fc"), strict=True):
        module.load_state_dict(state[name], strict=False)
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = nn.Sequential(layers[0], norms[0], nn.ReLU(), layers[1], norms[1], nn.ReLU(), pool, linear)
    weights, activations = zip(*map(parts, layers), strict=True)
    names = [*(f"a{i}" for i in (1, 2)), *(f"w{i}" for i in (1, 2))]

    def loss_of(batch: int) -> Tensor:
        labels = inputs["labels"]
        return cross_entropy(model(inputs[f"x{batch}"]), labels[batch] if labels.dim() > 1 else labels)

    losses = [lambda batch=batch: loss_of(batch) for batch in range(params["batches"])]
    deltas = estimate_deltas([*activations, *weights], losses, lambda batch, index, _: inputs[f"probes.b{batch}.{names[index]}"].float())
    return {"delta_a": deltas[:2], "delta_w": deltas[2:]}
