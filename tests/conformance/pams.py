"""PAMS of lowbit for reference cases."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import lowbit
from lowbit.methods.super_resolution.pams import TEACHER, Pams, PamsActivation, PamsQuantizers, attention_map, transfer_loss
from lowbit.models.edsr import Edsr, EdsrBlock
from lowbit.network import insert
from lowbit.network.taps import tapped
from lowbit.qat import GivenNetworks, OptimizerSpec, Recipe, Slot, TrainRun
from lowbit.qat.tasks import SuperResolution
from lowbit.spec import BitPolicy, LayerBits

CLIPS = {"1": "sum.left.output", "2": "body.2.input", "3": "sum.right.output"}  # of a block: shortcut, between its layers, behind them


def slot(bits: int, **facts: Any) -> Slot:
    return Slot("layer", nn.Identity(), bits, **facts)


def weight(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    w = inputs["w"].requires_grad_()
    y = PamsQuantizers().weight_quantizer(slot(params["bits"]))(w)
    y.backward(inputs["grad_output"])
    return {"y": y, "grad_w": w.grad}


def quantizer_of(params: dict[str, Any]) -> PamsActivation:
    method = PamsQuantizers(ema_epoch=params["ema_epoch"], **({"ema_decay": params["decay"]} if "decay" in params else {}))
    quantizer = method.activation_quantizer(slot(params["bits"], purpose="input"))
    assert isinstance(quantizer, PamsActivation)
    quantizer.epoch = params.get("epoch", 1)
    return quantizer.train(params.get("training", True))


def activation(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    quantizer = quantizer_of(params)
    quantizer.clip.data.fill_(params["alpha"])
    return passed(quantizer, inputs)


def passed(quantizer: PamsActivation, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    x = inputs["x"].requires_grad_()
    y = quantizer(x)
    y.backward(inputs["grad_output"])
    return {"y": y, "grad_x": x.grad, "grad_alpha": quantizer.clip.grad, "alpha": quantizer.clip}


def activation_sequence(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    quantizer = quantizer_of(params)
    quantizer.clip.data.fill_(params["alpha_init"])
    quantizer.max_value.fill_(params["max_val_init"])
    outputs, clips = [], []
    for quantizer.epoch, x in zip(params["epochs"], inputs["x"], strict=True):
        outputs.append(quantizer(x).detach())
        clips.append(quantizer.clip.detach().clone())
    return {"y": torch.stack(outputs), "alpha": torch.stack(clips)}


def activation_calibration_backward(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return passed(quantizer_of(params), inputs)


def skt_loss(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    student = inputs["student"].requires_grad_()
    loss = transfer_loss(student, inputs["teacher"])
    loss.backward()
    return {"loss": loss, "grad_student": student.grad, "map_student": attention_map(student)}


def prepared(model: nn.Module, params: dict[str, Any], sample: Tensor, **options: Any) -> nn.Module:
    bits = params["bits"]
    policy = BitPolicy(LayerBits(bits, bits), None).with_merges(bits)
    return lowbit.prepare(model, method="pams", policy=policy, block_input="float", sample=sample, **options)


def set_clip(model: nn.Module, site: str, value: Tensor) -> None:
    quantizer: Any = insert.sites(model)[site]
    quantizer.clip.data.copy_(value.squeeze())


def resblock(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    block = EdsrBlock(params["n_feats"], params["res_scale"])
    own = {"conv1": "0", "conv2": "2"}
    block.body.load_state_dict({f"{own[layer]}.{part}": inputs[f"{layer}.{part}"] for layer in own for part in ("weight", "bias")})
    model = prepared(block, params, inputs["x"], transfer_weight=0)
    for number, site in CLIPS.items():
        set_clip(model, site, inputs[f"alpha_{number}"])
    x = inputs["x"].requires_grad_()
    y = model.eval()(x)
    y.backward(inputs["grad_output"])
    found = {"y": y, "grad_x": x.grad}
    for layer, name in own.items():
        module = model.get_submodule(f"body.{name}")
        found |= {f"grad_{layer}.weight": insert.float_weight(module).grad, f"grad_{layer}.bias": module.get_parameter("bias").grad}
    clips: dict[str, Any] = insert.sites(model)
    return found | {f"grad_alpha_{number}": clips[site].clip.grad for number, site in CLIPS.items()}


def network(params: dict[str, Any], inputs: dict[str, Tensor]) -> Edsr:
    model = Edsr(params["scale"], params["n_resblocks"], params["n_feats"], params.get("res_scale", 1.0))
    state = {name.removeprefix("param."): value for name, value in inputs.items() if name.startswith("param.")}
    state = {name.replace(".body.3.", ".body.2."): value for name, value in state.items() if not name.endswith("alpha")}
    model.load_state_dict({name: value for name, value in state.items() if "_mean." not in name})
    return model


def edsr_forward(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    model: Any = prepared(network(params, inputs), params, inputs["x"], blocks_only=True).eval()
    for block in range(params["n_resblocks"]):
        for number, site in CLIPS.items():
            set_clip(model, f"body.{block}.{site}", inputs[f"param.body.{block}.quant_act{number}.alpha"])
    with torch.no_grad():
        return {"sr": model(inputs["x"]), "feature": model.features(inputs["x"])}


def train_steps(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Any]:
    teacher = network(params, inputs)
    options = {"transfer_weight": params["w_skt"], "ema_epoch": params["ema_epoch"]}
    model = prepared(teacher, params, inputs["lr"][0], blocks_only=True, **options).train()
    method: Any = model.lowbit_method
    assert isinstance(method, Pams)
    method.base.quantizer_learning_rate = 100.0
    spec = OptimizerSpec("adam", params["lr"], weight_decay=0.0, schedule="constant", betas=tuple(params["betas"]))
    epochs = params["epochs"]
    run = TrainRun(
        model,
        method,
        SuperResolution(scale=params["scale"]),
        Recipe(epochs[-1], optimizer=spec),
        epochs.count(1),
        given=GivenNetworks(None, teacher),
    )
    clips: dict[str, Any] = insert.sites(model)
    pairs = iter(zip(inputs["lr"], inputs["hr"], strict=True))
    found: dict[str, list[Any]] = {"loss": [], "l1": [], "skt": [], "alphas": []}
    for _ in run.each_epoch():
        for _, batch in zip(range(run.steps_per_epoch), pairs, strict=False):
            run.before_step()
            with torch.no_grad(), tapped(run.networks[TEACHER], [method.tap]) as theirs:
                run.task.predict(run.networks[TEACHER], batch)
            with tapped(model, [method.tap]) as mine, tapped(model, [""]) as outputs:
                loss = run.loss(batch)
            loss.backward()
            run.after_backward()
            run.optimizer_step()
            run.after_step()
            found["loss"].append(loss.item())
            found["l1"].append(run.task.loss(outputs[""], batch).item())
            found["skt"].append(method.attention_loss(mine[method.tap], theirs[method.tap]).item())
            found["alphas"].append([clips[f"body.0.{site}"].clip.item() for site in CLIPS.values()])
    results: dict[str, Any] = {name: torch.tensor(values) for name, values in found.items()}
    conv1 = insert.float_weight(model.get_submodule("body.0.body.0"))
    return results | {"head_weight": model.get_submodule("head.0").weight, "block_conv1_weight": conv1}
