"""DSG of lowbit for reference cases."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.inputs import Inputs
from lowbit.methods.zero_shot.dsg import Dsg, Slack, total_variation
from lowbit.quantizers.running_range import RunningRangeQuantizer
from lowbit.synthesis.problem import SynthesisProblem, make_problem


def activation_range(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Any]:
    quantizer = RunningRangeQuantizer(params["bits"], kind=params["method"], percentile=params["percentile"])
    outputs, lower, upper = {}, [], []
    for index, x in enumerate(inputs.values()):
        outputs[f"y{index}"] = quantizer(x)
        lower.append(quantizer.lower.item())
        upper.append(quantizer.upper.item())
    return outputs | {"x_min": lower, "x_max": upper}


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


def method_of(params: dict[str, Any]) -> Dsg:
    return Dsg(enhance=bool(params["enhance"]), enhance_on_residual=True, layer_num=params["layer_num"])


def slack_statistic_loss(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    stat = inputs["stat"].requires_grad_()
    loss = method_of(params).distance(inputs["target"], stat, params["slack"], params["layer"], range(len(stat)), params["layer_num"])
    return {"loss": loss, "grad_stat": torch.autograd.grad(loss, stat)[0]}


def network_slack_loss(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Any]:
    x = inputs.pop("x").requires_grad_()
    method, problem, given = method_of(params), problem_of(inputs, x.detach()), Inputs((x,))
    slack = [Slack(mean, std) for mean, std in params["slack_mean_std_per_layer"]]
    terms = method.norm_terms(problem, given, range(len(x)), slack)
    loss = method.loss(problem, given, range(len(x)), slack)
    return {"loss_per_term": torch.stack(terms), "loss": loss, "grad_x": torch.autograd.grad(loss, x)[0]}


def image_prior_losses(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    x = inputs["x"].requires_grad_()
    l1, l2 = total_variation(x)
    return {"l1": l1, "l2": l2, "grad_l2": torch.autograd.grad(l2, x)[0]}
