"""ProxQuant of lowbit for reference cases."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lowbit.methods.gradients.proxquant import (
    ProxQuant,
    ProxQuantizer,
    alternating,
    greedy_median as greedy_median_of,
    prox_binary as binary_map,
    prox_mean as mean_map,
    prox_median as median_map,
    prox_towards,
    ternary,
)
from lowbit.network import insert
from lowbit.qat import Classification, OptimizerSpec, Recipe, TrainRun
from lowbit.spec import Granularity


def prox_binary(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    far = float("inf")
    return {"prox": binary_map(inputs["weight"], params["reg"]), "quantized": binary_map(inputs["weight"], far)}


def prox_ternary(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    target = ternary(inputs["weight"])
    return {"prox": prox_towards(inputs["weight"], target, params["reg"]), "quantized": target}


def prox_median(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    options = {"by_row": params["by_row"]}
    target, _ = greedy_median_of(inputs["weight"], params["n_bits"], **options)
    return {"prox": median_map(inputs["weight"], params["n_bits"], params["reg"], **options), "quantized": target}


def prox_mean(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    options = {"by_row": params["by_row"]}
    moved = mean_map(inputs["weight"], params["n_bits"], params["reg"], rounds=params["n_rounds"], **options)
    return {"prox": moved, "quantized": alternating(inputs["weight"], params["n_bits"], **options).values}


def alt_quantize(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    found = alternating(inputs["weight"], params["bits"], by_row=params["by_row"], rounds=params["rounds"], norm_rate=params["norm_rate"])
    return {"w_hat": found.values, "alphas": found.alphas}


def lazy_projection(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    weight, found = nn.Parameter(inputs["weight"]), {}
    quantizer = ProxQuantizer(1, "binary", Granularity.tensor()).train()
    quantizer.lazy_strength = params["reg"]
    optimizer = torch.optim.SGD([weight], params["lr"])
    for step in range(params["steps"]):
        optimizer.zero_grad()
        projected = quantizer(weight)
        torch.nn.functional.mse_loss(projected, inputs["target"], reduction="sum").backward()
        optimizer.step()
        weight.data.copy_(quantizer.proximal(weight.detach(), 0.0))
        found |= {f"w_binary{step}": projected.detach(), f"w{step}": weight.detach().clone()}
    return found


class Net(nn.Module):
    """The small network of the training cases."""

    def __init__(self, inputs: dict[str, Tensor]) -> None:
        super().__init__()
        first, second, last = (inputs[f"net.{name}.weight"].shape for name in ("conv1", "layer", "fc"))
        self.conv1 = nn.Conv2d(first[1], first[0], 3, padding=1, bias=False)
        self.layer = nn.Conv2d(second[1], second[0], 3, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(first[0]), nn.BatchNorm2d(second[0])
        self.fc, self.rectify = nn.Linear(last[1], last[0]), nn.ReLU()
        state = {name.removeprefix("net."): value for name, value in inputs.items() if name.startswith("net.")}
        self.load_state_dict(state, strict=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.rectify(self.bn2(self.layer(self.rectify(self.bn1(self.conv1(x))))))
        return self.fc(torch.nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))


def train_steps(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    model = Net(inputs)
    kind, bits = ("binary", 1) if params["mode"] == "prox" else ("ternary", 2)
    layers = {name: model.get_submodule(name.removesuffix(".weight")) for name in params["quantised"]}
    for layer in layers.values():
        insert.set_weight_quantizer(layer, ProxQuantizer(bits, kind, Granularity.channel()))
    method = ProxQuant(reg_rate=params["reg_rate"], freeze_epoch=params["freeze_epoch"], renew_optimizer=True)
    optimizer = OptimizerSpec("adam", params["lr"], weight_decay=0.0, schedule="constant")
    run = TrainRun(model, method, Classification(), Recipe(params["epochs"], optimizer=optimizer), params["steps_per_epoch"])
    found: dict[str, Tensor] = {}

    def note(suffix: str) -> None:
        found.update({f"{name}_{suffix}": insert.float_weight(layer).detach().clone() for name, layer in layers.items()})

    ended: int | None = None
    for epoch in run.each_epoch():
        if ended is not None:  # only now, as weights may have been quantized in between
            note(f"end_epoch{ended}")
        for _ in range(params["steps_per_epoch"]):
            batch = run.step
            run.before_step()
            labels = inputs["labels"]
            loss = run.loss((inputs[f"x{batch}"], labels[batch] if labels.dim() > 1 else labels))
            loss.backward()
            run.after_backward()
            run.optimizer_step()
            run.after_step()
            found[f"loss{batch}"] = loss.detach()
            note(str(batch))
        ended = epoch
    note(f"end_epoch{ended}")
    return found


def greedy_median(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    values, alphas = greedy_median_of(inputs["weight"], params["bits"], by_row=params["by_row"])
    return {"w_hat": values, "alphas": alphas}
