"""INQ of lowbit for reference cases."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import lowbit
from lowbit.methods.training.inq import FrozenShare, InqQuantizer, still_trainable
from lowbit.qat import Classification, OptimizerSpec, Recipe, TrainRun


def fitted(bits: int, w: Tensor, n1: int | None = None) -> InqQuantizer:
    quantizer = InqQuantizer(bits)
    quantizer.initialize(w)
    if n1 is not None:
        quantizer.set_exponent(torch.full_like(quantizer.scale, n1))
    return quantizer


def levels(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    n1, n2 = fitted(params["bits"], inputs["w"]).exponents
    return {"n1": n1.squeeze(), "n2": n2.squeeze()}


def quantize(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"q": fitted(params["bits"], inputs["w"], params["n1"])(inputs["w"])}


def partition(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    w = inputs["w"].clone()
    share = FrozenShare(fitted(params["bits"], w), w.shape)
    share.freeze(w, still_trainable(w, params["portion"], params["rule"]))
    return {"mask": share.trainable, "w": w}


class Recorded(nn.Module):
    """Weights whose gradients are given."""

    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.layer = nn.Linear(w.numel(), 1, bias=False)
        self.layer.weight = nn.Parameter(w.reshape(1, -1).clone())

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out


def prepared(w: Tensor, bits: int, **options: object) -> tuple[nn.Module, FrozenShare, Tensor]:
    policy = lowbit.BitPolicy.uniform(bits, None, first_last=None)
    model = lowbit.prepare(Recorded(w), method="inq", policy=policy, sample=torch.zeros(2, w.numel()), **options).train()
    share = next(module for module in model.modules() if isinstance(module, FrozenShare))
    return model, share, next(model.parameters())


def stepping(run: TrainRun, weight: Tensor, grad: Tensor) -> Tensor:
    run.before_step()
    weight.grad = grad.reshape(weight.shape).clone()
    run.after_backward()
    run.optimizer_step()
    run.after_step()
    return weight.detach().reshape(grad.shape).clone()


def recipe(params: dict[str, Any], epochs: int) -> Recipe:
    spec = OptimizerSpec(
        "sgd", params["lr"], params["momentum"], nesterov=params.get("nesterov", False), weight_decay=params["weight_decay"],
        schedule="constant",
    )  # fmt: skip
    return Recipe(epochs, optimizer=spec)


def masked_sgd(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    model, share, weight = prepared(inputs["w"], 5, restart_schedule=False)
    run = TrainRun(model, model.lowbit_method, Classification(), recipe(params, 1), params["steps"])
    run.start_phase()
    share.trainable.copy_(inputs["mask"].reshape(weight.shape).bool())
    return {"w_steps": torch.stack([stepping(run, weight, grad) for grad in inputs["grads"]])}


def schedule(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    w, portions, grads = inputs["w"], tuple(params["portions"]), iter(inputs["grads"])
    model, share, weight = prepared(w, params["bits"], restart_schedule=False, portions=portions)
    run = TrainRun(model, model.lowbit_method, Classification(), recipe(params, len(portions)), params["steps_per_portion"])
    quantized, masks, trained = [], [], []
    for _ in run.each_epoch():
        quantized.append(weight.detach().reshape(w.shape).clone())
        masks.append(share.trainable.reshape(w.shape).clone())
        steps = [stepping(run, weight, grad) for grad in next(grads, ())]
        trained.extend(steps[-1:])
    return {"w_after_quantize": torch.stack(quantized), "mask": torch.stack(masks), "w_after_train": torch.stack(trained)}
