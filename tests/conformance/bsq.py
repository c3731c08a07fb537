"""BSQ of lowbit for reference cases."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lowbit.methods.mixed_precision.bsq import BitPlanesWithBias, Bsq, BsqActivation, held_by_planes
from lowbit.network import insert
from lowbit.qat import Classification, OptimizerSpec, Recipe, TrainRun
from lowbit.quantizers.bit_planes import BitPlanes, planes_of, requantize, size_of, to_planes, trim, value_of


def given(p: Tensor, n: Tensor, scale: Tensor, kind: type[BitPlanes] = BitPlanes, most: int | None = None) -> BitPlanes:
    """A quantizer with these planes, in training."""
    quantizer = kind(8, most=most).train()
    quantizer.set_planes(torch.stack([p, n]), scale)
    return quantizer


def weight(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    quantizer = given(inputs["p"], inputs["n"], inputs["scale"])
    w = quantizer(torch.zeros_like(inputs["grad_w"]))
    w.backward(inputs["grad_w"])
    grad_p, grad_n = quantizer.planes.grad
    return {"w": w, "grad_p": grad_p, "grad_n": grad_n, "grad_scale": quantizer.scale.grad}


def to_bits(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    (p, n), scale = to_planes(inputs["w"], params["bits"])
    return {"p": p, "n": n, "scale": scale, "w_back": given(p, n, scale)(inputs["w"])}


def regularizer(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor | float]:
    quantizers = [given(inputs[f"p.{i}"], inputs[f"n.{i}"], torch.ones(())) for i in range(params["layers"])]
    weights, bits = size_of(quantizers)
    Bsq(alpha=weights).weigh(quantizers)
    regularizer = sum(quantizer.penalty() for quantizer in quantizers)
    Bsq(alpha=params["alpha"]).weigh(quantizers)
    loss = sum(quantizer.penalty() for quantizer in quantizers)
    loss.backward()
    found = {"regularizer": regularizer, "loss": loss, "total_params": weights, "total_bits": bits}
    for i, quantizer in enumerate(quantizers):
        found[f"grad_p.{i}"], found[f"grad_n.{i}"] = quantizer.planes.grad
    return found


def requantize_and_trim(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Any]:
    found: dict[str, Any] = {}

    def note(name: str, planes: Tensor, scale: Tensor) -> None:
        (p, n), bits = planes, planes.shape[-1]
        found.update({f"p_{name}": p, f"n_{name}": n, f"scale_{name}": scale, f"bits_{name}": bits})
        found[f"w_{name}"] = given(p, n, scale)(value_of(planes))

    planes, scale = requantize(torch.stack([inputs["p"], inputs["n"]]), inputs["scale"], params["max_bits"])
    note("requantized", planes, scale)
    note("trimmed", *trim(planes, scale))
    quantizer = given(inputs["p"], inputs["n"], inputs["scale"], most=params["max_bits"])
    quantizer.adjust()
    return {**found, "all_zero": quantizer.is_zero}


def activation(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    learns = params["clip"] == "learned"
    quantizer = BsqActivation(params["bits"], learns_clip=learns).train()
    x = inputs["x"].requires_grad_()
    if learns:
        quantizer.clip.data.fill_(params["alpha"])
    y = quantizer(x)
    y.backward(inputs["grad_output"])
    return {"y": y, "grad_x": x.grad, "grad_alpha": quantizer.clip.grad}


def finetune(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    quantizer = given(inputs["p"], inputs["n"], inputs["scale"])
    start = quantizer.finish()
    w_start = quantizer.normalized(start)
    quantizer.unit = 1.0  # weights in units of the scale, as the authors have them
    shape = inputs["w_float"].shape
    layer = nn.Conv2d(shape[1], shape[0], shape[2:], padding=params["padding"], bias=False)
    layer.weight.data.copy_(inputs["w_float"])
    insert.set_weight_quantizer(layer, quantizer)
    original, x = insert.float_weight(layer), inputs["x"].requires_grad_()
    y = layer(x)
    y.backward(inputs["grad_output"])
    quantizer.keep_inside(original)
    p_final, n_final = planes_of(quantizer.encode(original).codes, params["bits"])
    return {
        "w_start": w_start, "y": y, "grad_x": x.grad, "grad_w": original.grad, "grad_scale": quantizer.scale.grad, "p_final": p_final,
        "n_final": n_final,
    }  # fmt: skip


class Net(nn.Module):
    """The network of the training case; its activations are quantized behind the functions that make them."""

    def __init__(self, inputs: dict[str, Tensor], bits: int) -> None:
        super().__init__()
        first, second, last = (inputs[f"float.{name}"].shape for name in ("conv1", "conv2", "fc"))
        self.conv1 = nn.Conv2d(first[1], first[0], 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(second[1], second[0], 3, stride=2, padding=1, bias=False)
        self.fc = nn.Linear(last[1], last[0])
        self.relu1, self.relu2 = nn.ReLU6(), nn.ReLU6()
        for name in ("conv1", "conv2", "fc"):
            self.get_submodule(name).weight.data.copy_(inputs[f"float.{name}"])
        self.fc.bias.data.copy_(inputs["float_bias.fc"])
        for activation_function in (self.relu1, self.relu2):
            insert.set_output_quantizer(activation_function, BsqActivation(bits, learns_clip=False))

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu2(self.conv2(self.relu1(self.conv1(x))))
        return self.fc(torch.nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))


def train_sequence(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Any]:
    model = Net(inputs, params["act_bits"]).train()
    method = Bsq(alpha=params["alpha"])
    for name, kind in {"conv1": BitPlanes, "conv2": BitPlanes, "fc": BitPlanesWithBias}.items():
        layer = model.get_submodule(name)
        planes, scale = to_planes(layer.weight.detach(), params["bits"])
        quantizer = given(*planes, scale, kind, params["max_bits"])
        if kind is BitPlanesWithBias:
            quantizer.bias.set_planes(*to_planes(layer.bias.detach(), params["bits"]))
        insert.set_weight_quantizer(layer, quantizer)
    spec = OptimizerSpec("sgd", params["lr"], params["momentum"], weight_decay=params["weight_decay"], schedule="constant")
    run = TrainRun(model, method, Classification(), Recipe(1, optimizer=spec), params["steps"])
    next(run.each_epoch())
    quantizers = [quantizer for quantizer, _ in held_by_planes(model)]
    found: dict[str, Any] = {"bits_start": [q.count for q in quantizers], "scales_start": [q.scale.item() for q in quantizers]}
    losses, penalties = [], []
    for batch in zip(inputs["x"], inputs["labels"], strict=True):
        run.before_step()
        losses.append(run.task_loss(batch).item())
        penalties.append(run.penalty().item())
        run.loss(batch).backward()
        run.after_backward()
        run.optimizer_step()
        run.after_step()
    for name in ("conv1", "conv2", "fc"):
        found[f"p_trained.{name}"], found[f"n_trained.{name}"] = insert.weight_quantizer(model.get_submodule(name)).planes.detach().clone()
    for quantizer in quantizers:
        quantizer.adjust()
    found |= {"bits_end": [q.count for q in quantizers], "scales_end": [q.scale.item() for q in quantizers]}
    found |= {f"w_end.{name}": model.get_submodule(name).weight for name in ("conv1", "conv2", "fc")}
    return {**found, "cross_entropy": losses, "regularization": penalties, "logits_end": model(inputs["x"][0])}
