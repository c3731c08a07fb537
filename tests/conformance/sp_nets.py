"""SP-Nets of lowbit for reference cases."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lowbit.methods.adaptive.sp_nets import SpNets, soft_cross_entropy as soft_loss
from lowbit.network import insert
from lowbit.network.slot import Slot
from lowbit.network.surgery.switchable_norm import SwitchableNorm
from lowbit.qat.loops.manual import training
from lowbit.qat.prepare import prepare
from lowbit.spec import BitPolicy, LayerBits, Rule

Values = dict[str, Any]
BUFFERS = ("running_mean", "running_var")


def weight_dorefa(params: Values, inputs: dict[str, Tensor]) -> Values:
    w = inputs["w"].requires_grad_()
    w_q = SpNets().weight_quantizer(Slot("layer", nn.Identity(), params["bits"]))(w)
    w_q.backward(inputs["grad_output"])
    return {"w_q": w_q, "grad_w": w.grad}


weight_binary = weight_dorefa


def activation_dorefa(params: Values, inputs: dict[str, Tensor]) -> Values:
    x = inputs["x"].requires_grad_()
    y = SpNets().activation_quantizer(Slot("layer", nn.Identity(), params["bits"], is_signed=False, purpose="input"))(x)
    y.backward(inputs["grad_output"])
    return {"y": y, "grad_x": x.grad}


def switch_bn(params: Values, inputs: dict[str, Tensor]) -> Values:
    widths, x = params["bits_list"], inputs["x"]
    norm = SwitchableNorm(nn.BatchNorm2d(x.shape[2], params["eps"], params["momentum"]), [str(bits) for bits in widths])
    for own, scale, bias in zip(norm.norms.values(), inputs["weight"], inputs["bias"], strict=True):
        own.weight.data, own.bias.data = scale.clone(), bias.clone()
    outputs = []
    for values, bits in zip(x, params["sequence"], strict=True):
        norm.select(str(bits))
        outputs.append(norm(values))
    norm.eval().select(str(params["eval_bits"]))
    statistics = {name: torch.stack([own.get_buffer(name) for own in norm.norms.values()]) for name in BUFFERS}
    return {"y": torch.stack(outputs), "y_eval_last_x": norm(x[-1]), **statistics}


def soft_cross_entropy(params: Values, inputs: dict[str, Tensor]) -> Values:
    logits = inputs["student_logits"].requires_grad_()
    loss = soft_loss(logits, inputs["teacher_logits"])
    loss.backward()
    return {"loss": loss, "grad_student_logits": logits.grad}


class Small(nn.Sequential):
    """The network of the case."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.bn, self.relu, self.fc2 = nn.Linear(6, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 6)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of the network by the names of the cases."""
    found: dict[str, Tensor] = {}
    for name in ("fc1", "fc2"):
        layer = model.get_submodule(name)
        found |= {f"{name}/weight": insert.float_weight(layer), f"{name}/bias": layer.get_parameter("bias")}
    for key, own in model.get_submodule("bn.norms").named_children():
        switch = key.replace("float/float", "32").replace("float/", "")
        found |= {f"bn/bn_dict/{switch}/weight": own.get_parameter("weight"), f"bn/bn_dict/{switch}/bias": own.get_parameter("bias")}
        found |= {f"bn/bn_dict/{switch}/{name}": own.get_buffer(name) for name in BUFFERS}
    return found


def self_distillation(params: Values, inputs: dict[str, Tensor]) -> Values:
    switches = [LayerBits(None, None if bits == 32 else bits) for bits in sorted(params["bits_list"], reverse=True)]
    policy = BitPolicy(LayerBits(None, 8), rules=(Rule("fc1", activation="float"),))
    model = prepare(Small(), method="sp_nets", bits=switches, policy=policy, distance="cross_entropy", sample=inputs["x"][0]).train()
    for name, tensor in tensors_of(model).items():
        tensor.data.copy_(inputs[f"init.{name}"])
    run = training(model, steps_per_epoch=params["steps"], epochs=1)
    groups = run.parameter_groups(learning_rate=params["lr"], weight_decay=params["weight_decay"])
    optimizer = torch.optim.SGD(groups, params["lr"], params["momentum"])
    for x, target in zip(inputs["x"], inputs["target"], strict=True):
        run.before_step(optimizer)
        optimizer.zero_grad()
        for loss in run.losses((x, target)):
            loss.backward()
        run.after_backward()
        optimizer.step()
        run.after_step()
    return {f"final.{name}": tensor for name, tensor in tensors_of(model).items()}
