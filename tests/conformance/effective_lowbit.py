"""Effective low-bitwidth networks of lowbit for reference cases."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

import lowbit
from lowbit.methods.training.effective_lowbit import EffectiveLowbit, EffectiveQuantizers, on_grid, squared_distance
from lowbit.network import insert
from lowbit.qat import Classification, GivenNetworks, OptimizerSpec, Recipe, Slot, TrainRun
from lowbit.spec import BitPolicy, LayerBits, Rule


def slot(bit_width: int, layer: nn.Module, **facts: Any) -> Slot:
    return Slot("layer", layer, bit_width, **facts)


def weight(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    w = inputs["w"].requires_grad_()
    w_q = EffectiveQuantizers().weight_quantizer(slot(params["bits"], nn.Identity()))(w)
    w_q.backward(inputs["grad_output"])
    return {"w_q": w_q, "grad_w": w.grad}


def clip(bit_width: int) -> Any:
    return EffectiveQuantizers().activation_quantizer(slot(bit_width, nn.Identity(), is_signed=False, purpose="input"))


def activation(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    x = inputs["x"].requires_grad_()
    y = clip(params["bits"])(x)
    y.backward(inputs["grad_output"])
    return {"y": y, "grad_x": x.grad}


def quantized_last_layer(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    classes, features = inputs["w"].shape
    layer = nn.Linear(features, classes)
    layer.load_state_dict({"weight": inputs["w"], "bias": inputs["bias"]})
    quantizer = EffectiveQuantizers(scaled_logits=True).weight_quantizer(slot(params["bits"], layer, position="last"))
    quantizer.logit_scale.data.copy_(inputs["scalar"].reshape(()))
    insert.set_weight_quantizer(layer, quantizer)
    insert.set_input_quantizer(layer, clip(params["bits"]))
    return {"y": layer(inputs["x"])}


def kl_loss(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    logits = inputs["student_logits"].requires_grad_()
    loss = Classification().with_temperature(params["T"]).distillation_loss(logits, inputs["teacher_logits"])
    loss.backward()
    return {"loss": loss, "grad_student_logits": logits.grad}


def hint_loss(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    feature, quantizer = inputs["student_feature"].requires_grad_(), clip(params["bits"])
    loss = squared_distance(quantizer(feature), on_grid(quantizer, inputs["teacher_feature"]))
    loss.backward()
    return {"loss": loss, "grad_student_feature": feature.grad}


class Mlp(nn.Sequential):
    """The float network of the training cases."""

    def __init__(self, prefix: str, inputs: dict[str, Tensor]) -> None:
        super().__init__()
        for name in ("fc1", "fc2", "fc3"):
            values = {key: inputs[f"{prefix}.{name}/{key}"] for key in ("weight", "bias")}
            outputs, features = values["weight"].shape
            layer = nn.Linear(features, outputs)
            layer.load_state_dict(values)
            self.add_module(name, layer)
            if name != "fc3":
                self.add_module(f"relu{name}", nn.ReLU())


def joint_training(params: dict[str, Any], inputs: dict[str, Tensor], method: EffectiveLowbit) -> dict[str, Tensor]:
    student, teacher = Mlp("init.student0", inputs), Mlp("init.teacher", inputs)
    (bits,) = params["bits"]
    policy = BitPolicy(LayerBits(bits, bits), rules=(Rule("fc1", weight="float", activation="float"), Rule("fc3", weight="float")))
    student = lowbit.prepare(student, method=method, policy=policy, sample=inputs["x"][0]).train()
    spec = OptimizerSpec("sgd", params["student_lr"], params["momentum"], params["nesterov"], params["weight_decay"], "constant")
    run = TrainRun(student, method, Classification(), Recipe(1, optimizer=spec), params["steps"], given=GivenNetworks(teacher))
    rate = replace(spec, learning_rate=params["teacher_lr"])
    run.phases = [replace(phase, optimizers={**phase.optimizers, "teacher": rate}) for phase in run.phases]
    for _ in run.each_epoch():
        for batch in zip(inputs["x"], inputs["target"], strict=True):
            run.before_step()
            for loss in run.losses(batch):
                loss.backward()
            run.after_backward()
            run.optimizer_step()
            run.after_step()
    found = {f"final.teacher.{name.replace('.', '/')}": parameter for name, parameter in teacher.named_parameters()}
    for name in ("fc1", "fc2", "fc3"):
        layer = student.get_submodule(name)
        found[f"final.student0.{name}/weight"], found[f"final.student0.{name}/bias"] = insert.float_weight(layer), layer.bias
    return {name: value.detach() for name, value in found.items()}


def joint_training_mse(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    weights = {"ce_weight": params["beta"], "teacher_ce_weight": params["alpha"]}
    weights |= dict.fromkeys(("guidance_weight", "teacher_guidance_weight"), params["gamma"])
    return joint_training(params, inputs, EffectiveLowbit(two_stage=False, progressive=False, guidance="logit_mse", **weights))


def joint_training_kl(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    weights = {"ce_weight": params["student_lambda"], "guidance_weight": params["sloss_lambda"]}
    weights |= {"teacher_ce_weight": params["teacher_lambda"], "teacher_guidance_weight": params["tloss_lambda"]}
    (temperature,) = params["T"]
    return joint_training(
        params, inputs, EffectiveLowbit(two_stage=False, progressive=False, guidance="kl", temperature=temperature, **weights)
    )
