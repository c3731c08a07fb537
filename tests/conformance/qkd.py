"""QKD of lowbit for reference cases."""

from __future__ import annotations

from dataclasses import replace
from statistics import fmean
from typing import Any

from torch import Tensor, nn

from lowbit.methods.training.qkd import Qkd
from lowbit.qat import Classification, GivenNetworks, OptimizerSpec, Recipe, TrainRun

PHASES = {"self": (1.0, 0.0), "co": (0.0, 1.0), "tutor": (0.0, 0.0)}  # shares of the epochs in which the network learns alone, and together


def kd_loss(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    logits = inputs["student_logits"].requires_grad_()
    loss = Classification().with_temperature(params["temperature"]).distillation_loss(logits, inputs["teacher_logits"])
    loss.backward()
    return {"loss": loss, "grad_student_logits": logits.grad}


def network(prefix: str, inputs: dict[str, Tensor]) -> nn.Module:
    state = {name.removeprefix(prefix).replace("/", "."): value for name, value in inputs.items() if name.startswith(prefix)}
    (hidden, features), (classes, _) = state["0.weight"].shape, state["2.weight"].shape
    model = nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, classes))
    model.load_state_dict(state)
    return model


def phase(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Any]:
    model, teacher = network("init.student.", inputs), network("init.teacher.", inputs)
    weights = {"student_ce_weight": "ce_weight", "student_kd_weight": "kd_weight"}
    options = {name: params[name] for name in ("temperature", "teacher_ce_weight", "teacher_kd_weight") if name in params}
    options |= {name: params[given] for given, name in weights.items() if given in params}
    alone, together = PHASES[params["phase"]]
    method = Qkd(**options, self_share=alone, co_share=together)
    spec = OptimizerSpec("sgd", params["student_lr"], params["momentum"], weight_decay=0.0, schedule="constant")
    run = TrainRun(model, method, Classification(), Recipe(1, optimizer=spec), params["steps"], given=GivenNetworks(teacher))
    rates = {"teacher": replace(spec, learning_rate=params["teacher_lr"])}
    run.phases = [replace(p, optimizers={**p.optimizers, **(rates if "teacher" in p.optimizers else {})}) for p in run.phases]
    found: dict[str, list[float]] = {"student": [], "teacher": []}
    for _ in run.each_epoch():
        for step in range(params["steps"]):
            run.before_step()
            for name, loss in zip(found, run.losses((inputs["x"][step], inputs["target"][step])), strict=False):
                loss.backward()
                found[name].append(loss.item())
            run.after_backward()
            run.optimizer_step()
            run.after_step()
    results = {
        f"final.{name}.{key.replace('.', '/')}": p
        for name, net in (("student", model), ("teacher", teacher))
        for key, p in net.named_parameters()
    }
    return results | {f"mean_{name}_loss": fmean(losses) for name, losses in found.items() if losses}
