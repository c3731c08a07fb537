"""Quantization Networks of lowbit for reference cases."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lowbit.methods.gradients.quantization_networks import QuantizationNetworks, StairsQuantizer
from lowbit.network import insert
from lowbit.qat import Classification, OptimizerSpec, Recipe, TrainRun

BITS = {2: 1, 3: 2, 4: 2, 5: 3, 7: 3, 8: 3, 15: 4, 16: 4, 31: 5}


def quantizer_of(params: dict[str, Any], biases: Tensor, *, is_weight: bool) -> StairsQuantizer:
    values = params["values"]
    quantizer = StairsQuantizer(
        BITS[len(values)], values, is_centred=is_weight, unit_backward=params["backward_T"] == 1, is_weight=is_weight
    )
    quantizer.set_biases(biases)
    return quantizer


def _run(quantizer: StairsQuantizer, params: dict[str, Any], x: Tensor, inputs: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    quantizer.temperature.fill_(params["T"])
    x.requires_grad_()
    y = quantizer(x)
    y.backward(inputs["grad_output"])
    gradients = {name: x.grad, "grad_alpha": quantizer.output_scale.grad, "grad_beta": quantizer.input_scale.grad}
    scales = {"alpha_used": quantizer.output_scale, "beta_used": quantizer.input_scale}
    return {**scales, "y_soft": y, "y_hard": quantizer.eval()(x), **gradients}


def weight(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    quantizer = quantizer_of(params, inputs["biases"], is_weight=True)
    if params["init"]:
        quantizer.initialize_scales(inputs["weight"])
    else:
        quantizer.set_scales(inputs["alpha"], inputs["beta"])
    return _run(quantizer, params, inputs["weight"], inputs, "grad_weight")


def activation(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    quantizer = quantizer_of(params, inputs["biases"], is_weight=False)
    quantizer.set_scales(inputs["alpha"], inputs["beta"])
    return _run(quantizer, params, inputs["x"], inputs, "grad_x")


def cluster_biases(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    quantizer = StairsQuantizer(BITS[len(params["values"])], params["values"], is_centred=True)
    return {"biases": quantizer.clustered(inputs["params"])}


class Net(nn.Module):
    """The small network of the training cases."""

    def __init__(self, inputs: dict[str, Tensor]) -> None:
        super().__init__()
        first, second, last = (inputs[f"net.{name}.weight"].shape for name in ("c1", "c2", "fc"))
        self.c1 = nn.Conv2d(first[1], first[0], 3, padding=1, bias=False)
        self.c2 = nn.Conv2d(second[1], second[0], 3, padding=1, bias=False)
        self.b1, self.b2 = nn.BatchNorm2d(first[0]), nn.BatchNorm2d(second[0])
        self.fc, self.rectify = nn.Linear(last[1], last[0]), nn.ReLU()
        state = {name.removeprefix("net."): value for name, value in inputs.items() if name.startswith("net.")}
        self.load_state_dict(state, strict=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.rectify(self.b2(self.c2(self.rectify(self.b1(self.c1(x))))))
        return self.fc(torch.nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))


def train_steps(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    model = Net(inputs)
    quantizer = quantizer_of(params, torch.tensor(params["biases"]), is_weight=True)
    quantizer.initialize_scales(model.c2.weight)
    insert.set_weight_quantizer(model.c2, quantizer)
    method = QuantizationNetworks(temperature=params["temperature"], soft_clip_norm=params["clip_norm"], quantizer_learning_rate=1.0)
    optimizer = OptimizerSpec("sgd", params["lr"], params["momentum"], weight_decay=params["weight_decay"], schedule="constant")
    run = TrainRun(model, method, Classification(), Recipe(params["epochs"], optimizer=optimizer), params["steps_per_epoch"])
    found: dict[str, Tensor] = {}
    for _ in run.each_epoch():
        for _ in range(params["steps_per_epoch"]):
            batch = run.step
            run.before_step()
            labels = inputs["labels"]
            loss = run.loss((inputs[f"x{batch}"], labels[batch] if labels.dim() > 1 else labels))
            loss.backward()
            run.after_backward()
            run.optimizer_step()
            run.after_step()
            scales = {f"alpha{batch}": quantizer.output_scale, f"beta{batch}": quantizer.input_scale}
            now = {**scales, f"c2_{batch}": insert.float_weight(model.c2), f"loss{batch}": loss}
            found |= {name: value.detach().clone() for name, value in now.items()}
    return found
