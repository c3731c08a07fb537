"""Learned rounding of lowbit for reference cases."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lowbit.network.insert import set_weight_quantizer
from lowbit.post_training.reconstruction.adam import ResumableAdam
from lowbit.post_training.reconstruction.objective import Objective, rounding_loss, set_beta, weighted_penalty
from lowbit.post_training.reconstruction.rounding import AdaptiveRounding, BetaSchedule, reconstruction_loss
from lowbit.post_training.reconstruction.unit_data import CacheSpace, CallCache, TensorCache, UnitData
from lowbit.post_training.reconstruction.units import PlannedUnit
from lowbit.quantizers import UniformQuantizer
from lowbit.spec import Granularity

ACTIVATIONS = {"relu": nn.ReLU(), "none": nn.Identity()}


def in_memory(x: Tensor) -> TensorCache:
    """A cache in memory with one sample for each row of ``x``."""
    cache = TensorCache(x, len(x), len(x), CacheSpace("ram", None))
    cache.write(0, len(x), x)
    return cache


def rounding_of(bits: int, weight: Tensor, scale: Tensor, zero_point: Tensor, alpha: Tensor | None = None) -> AdaptiveRounding:
    """A rounding on the case's grid, at its start or at ``alpha``."""
    grid = UniformQuantizer(bits, signed=False, symmetric=False, granularity=Granularity.channel())
    grid.set_parameters(scale, zero_point)
    rounding = AdaptiveRounding(grid)
    rounding.initialize(weight)
    if alpha is not None:
        rounding.logits.data.copy_(alpha)
    return rounding


def schedule_of(params: dict, shape: str) -> BetaSchedule:
    return BetaSchedule(shape, params["iterations"], params["warm_start"], *params["beta_range"])


def alpha_init(params: dict, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    delta = inputs["delta"]
    return {"alpha": rounding_of(params["bits"], inputs["weight"], delta, torch.zeros_like(delta)).logits}


def rounded_weight(params: dict, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    weight = inputs["weight"]
    rounding = rounding_of(params["bits"], weight, inputs["delta"], -inputs["offset"], inputs["alpha"])
    soft = rounding(weight)
    soft.backward(inputs["grad_output"])
    return {"soft": soft, "grad_alpha": rounding.logits.grad, "hard": rounding.encode(weight).decode()}


def round_loss_cosine(params: dict, inputs: dict[str, Tensor]) -> dict[str, object]:
    alpha = inputs["alpha"]
    one = torch.ones(())
    rounding = rounding_of(8, torch.zeros_like(alpha), one, one, alpha)
    objective = Objective(params["iterations"], 1e-3, schedule=schedule_of(params, "cosine"), regularization=params["reg_param"])
    losses, gradients, betas = [], [], []
    for iteration in params["at_iterations"]:
        set_beta(objective, [rounding], iteration)
        rounding(alpha)
        losses.append(weighted_penalty(objective, [rounding]))
        gradients.append(torch.autograd.grad(losses[-1], rounding.logits)[0])
        betas.append(rounding.beta or 0.0)
    return {"loss": torch.stack(losses), "grad_alpha": torch.stack(gradients), "beta": betas}


def beta_linear(params: dict, inputs: dict[str, Tensor]) -> dict[str, list[float]]:
    schedule = schedule_of(params, "linear")
    by_count = [schedule.beta(iteration) for iteration in range(-1, params["iterations"])]
    return {"beta": [by_count[count] for count in params["at_counts"]]}


def recon_loss(params: dict, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    pred = inputs["pred"].requires_grad_()
    loss = reconstruction_loss(pred, inputs["target"])
    return {"loss": loss, "grad_pred": torch.autograd.grad(loss, pred)[0]}


def optimize_layer(params: dict, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    weight, data, target = inputs["weight"], inputs["quant_input"], inputs["fp_output"]
    if params["kind"] == "linear":
        layer: nn.Module = nn.Linear(data.shape[1], target.shape[1])
    else:
        layer = nn.Conv2d(data.shape[1], target.shape[1], weight.shape[2:], padding=params["padding"], groups=params["groups"])
    layer.load_state_dict({"weight": weight, "bias": inputs["bias"]})
    rounding = rounding_of(params["bits"], weight, inputs["delta"], -inputs["offset"])
    start = rounding.logits.detach().clone()
    set_weight_quantizer(layer, rounding)
    activation = ACTIVATIONS[params["activation"]]
    unit = PlannedUnit("", ("",), activation, is_carried=False, channel_axis=1, cost=1.0)
    cached = UnitData(CallCache.of(in_memory(data)), in_memory(activation(target)))
    objective = Objective(
        params["iterations"],
        params["lr"],
        len(data),
        schedule=schedule_of(params, params["beta_schedule"]),
        regularization=params["reg_param"],
    )
    adam = ResumableAdam(
        {"": rounding.logits}, learning_rate=params["lr"], iterations=params["iterations"], samples=len(data), batch_size=len(data), seed=0
    )
    while not adam.is_finished:
        adam.step(lambda index: rounding_loss(unit, layer, cached, index, objective, [rounding], adam.iteration))
    settled = rounding.encode(weight).decode()
    return {"alpha_init": start, "alpha_final": rounding.logits, "hard_weight": settled, "stable_mask": torch.ones_like(weight)}
