"""DAQ (super-resolution) of lowbit for reference cases."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import lowbit
from lowbit.methods.super_resolution.daq_sr import DaqSrTraining
from lowbit.models.edsr import Edsr, EdsrBlock
from lowbit.models.srresnet import SrResNetBlock
from lowbit.network import insert
from lowbit.qat import Slot
from lowbit.spec import BitPolicy, LayerBits


def options(params: dict[str, Any]) -> dict[str, Any]:
    bits = params.get("qq_bits", 32)
    return {
        "deviation_bits": None if bits == 32 else bits,
        "step_index": "fine_tuning" if params["finetune"] else "released",
        "clip_top": params.get("clip_top", True) is not False,
    }


def passed(function: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    x = inputs["x"].requires_grad_()
    y = function(x)
    y.backward(inputs["grad_output"])
    return {"y": y, "grad_x": x.grad}


def weight_quantizer(params: dict[str, Any]) -> nn.Module:
    return DaqSrTraining(**options(params)).weight_quantizer(Slot("layer", nn.Identity(), params["bits"]))


def weight(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    w = inputs["w"].requires_grad_()
    y = weight_quantizer(params)(w)
    y.backward(inputs["grad_output"])
    return {"y": y, "grad_w": w.grad}


def activation(params: dict[str, Any], inputs: dict[str, Tensor], *, is_signed: bool) -> dict[str, Tensor]:
    slot = Slot("layer", nn.Conv2d(1, 1, 1), params["bits"], is_signed, purpose="input")
    return passed(DaqSrTraining(**options(params)).activation_quantizer(slot), inputs)


def activation_signed(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return activation(params, inputs, is_signed=True)


def activation_relu(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return activation(params, inputs, is_signed=False)


def conv(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    w = inputs["w"]
    layer = nn.Conv2d(w.shape[1], w.shape[0], tuple(w.shape[2:]), padding="same")
    layer.load_state_dict({"weight": w, "bias": inputs["b"]})
    insert.set_weight_quantizer(layer, weight_quantizer(params))  # type: ignore[arg-type]
    found = passed(layer, inputs)
    assert layer.bias is not None
    return found | {"grad_w": insert.float_weight(layer).grad, "grad_b": layer.bias.grad}


def prepared(model: nn.Module, params: dict[str, Any], sample: Tensor, **more: Any) -> nn.Module:
    policy = BitPolicy(LayerBits(params["w_bits"], params["a_bits"]), None)
    return lowbit.prepare(model, method="daq_sr", policy=policy, sample=sample, **options(params), **more)


def block(model: nn.Module, own: dict[str, str], params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    qat = prepared(model.train(), params, inputs["x"].detach())
    found = passed(qat, inputs)
    for layer, name in own.items():
        module = qat.get_submodule(name)
        found[f"grad_{layer}.weight"] = insert.float_weight(module).grad
        found[f"grad_{layer}.bias"] = module.bias.grad
    return found | dict(qat.named_buffers())


def resblock_edsr(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    own = {"conv1": "body.0", "conv2": "body.2"}
    model = EdsrBlock(inputs["conv1.weight"].shape[0], params["res_scale"])
    model.load_state_dict({f"{own[layer]}.{part}": inputs[f"{layer}.{part}"] for layer in own for part in ("weight", "bias")})
    return block(model, own, params, inputs)


def resblock_srresnet(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    model = SrResNetBlock(inputs["conv1.weight"].shape[0], "relu")
    for name in ("conv1", "conv2"):
        layer: nn.Conv2d = getattr(model, name)
        layer.bias = nn.Parameter(inputs[f"{name}.bias"])
    norms = {name.replace("bn", "norm"): inputs[name] for name in inputs if name.startswith("bn")}
    model.load_state_dict(norms | {name: inputs[name] for name in inputs if name.startswith("conv")}, strict=False)
    found = block(model, {"conv1": "conv1", "conv2": "conv2"}, params, inputs)
    return found | {f"bn1.{name}": found[f"norm1.{name}"] for name in ("running_mean", "running_var")}


def edsr_forward(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    model = Edsr(params["scale"], params["n_resblocks"], params["n_feats"], params["res_scale"])
    state = {name.removeprefix("param."): value for name, value in inputs.items() if name.startswith("param.")}
    state = {name.replace(".conv1.", ".body.0.").replace(".conv2.", ".body.2."): value for name, value in state.items()}
    model.load_state_dict({name: value for name, value in state.items() if "_mean." not in name})
    with torch.no_grad():
        return {"sr": prepared(model, params, inputs["x"], blocks_only=True).eval()(inputs["x"])}
