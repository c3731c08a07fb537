"""ZeroQ of lowbit for reference cases."""

from __future__ import annotations

from collections import OrderedDict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowbit.inputs import Inputs
from lowbit.methods.zero_shot.zeroq import ZeroqSamples, statistic_distance
from lowbit.quantizers.running_range import MinMaxWeightQuantizer, RunningRangeQuantizer
from lowbit.synthesis.problem import SynthesisProblem, make_problem


def problem_of(inputs: dict[str, Tensor], images: Tensor) -> SynthesisProblem:
    """The samples ``images`` of the case's network."""
    (c1, c0, *_), (c2, _, *_), (out, _) = (inputs[f"{name}.weight"].shape for name in ("conv1", "conv2", "fc"))
    layers: dict[str, nn.Module] = {
        "conv1": nn.Conv2d(c0, c1, 3, padding=1, bias=False), "bn1": nn.BatchNorm2d(c1), "relu1": nn.ReLU(),
        "conv2": nn.Conv2d(c1, c2, 3, stride=2, padding=1, bias=False), "bn2": nn.BatchNorm2d(c2), "relu2": nn.ReLU(),
        "pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "fc": nn.Linear(c2, out),
    }  # fmt: skip
    model = nn.Sequential(OrderedDict(layers))
    missing, _ = model.load_state_dict(inputs, strict=False)
    assert all(name.endswith("num_batches_tracked") for name in missing)
    return make_problem(model, Inputs((images,)), count=len(images))


def weight_quantizer(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    quantized = MinMaxWeightQuantizer(params["bits"])(inputs["w"])
    if quantized.dim() == 2:
        return {"w_quantized": quantized, "y": F.linear(inputs["x"], quantized, inputs["bias"])}
    return {"w_quantized": quantized, "y": F.conv2d(inputs["x"], quantized, inputs["bias"], padding=1)}


def activation_quantizer_running_range(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Any]:
    quantizer, outputs, lower, upper = RunningRangeQuantizer(params["bits"]), {}, [], []
    for index, x in enumerate(inputs.values()):
        quantizer.train(index < params["frozen_from_batch"])
        outputs[f"y{index}"] = quantizer(x)
        lower.append(quantizer.lower.item())
        upper.append(quantizer.upper.item())
    return outputs | {"x_min": lower, "x_max": upper}


def stat_distance(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    stat = inputs["stat"].requires_grad_()
    loss = statistic_distance(inputs["target"], stat)
    return {"loss": loss, "grad_stat": torch.autograd.grad(loss, stat)[0]}


def distill_images(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Any]:
    images = inputs.pop("images_init")
    problem, method = problem_of(inputs, images), ZeroqSamples(iterations=params["iterations"], learning_rate=params["lr"])
    made = method.descend(problem, partial(method.loss, problem), Inputs((images,)))
    first = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(method.loss(problem, Inputs((first,)), range(len(first))), first)
    return {
        "loss_per_iteration": made.losses,
        "grad_first_iteration": gradient,
        "images_final": made.inputs.args[0],
        "stable_mask": torch.ones_like(images),
    }
