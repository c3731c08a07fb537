"""FQSR of lowbit for reference cases."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import lowbit
from lowbit.methods.super_resolution.fqsr import Fqsr, FqsrQuantizer
from lowbit.models.edsr import Edsr
from lowbit.network import insert
from lowbit.network.surgery.constant_padding import pad_first
from lowbit.network.surgery.sums import Sum
from lowbit.qat import CriterionTask, OptimizerSpec, Recipe, Slot, TrainRun
from lowbit.spec import BitPolicy, LayerBits

PURPOSES: dict[str, Any] = {"fm": "input", "wt": "weight", "ot": "output"}


def quantizer_of(params: dict[str, Any], tag: str, *, is_half: bool = False, bits: int | None = None, **options: Any) -> FqsrQuantizer:
    method = Fqsr(warm_up=params.get("stable", 0), calibration_weight=params.get("alpha", 0.3), **options)
    slot = Slot("layer", nn.Identity(), params["bits"] if bits is None else bits, not is_half, purpose=PURPOSES[tag])
    make = {"fm": method.activation_quantizer, "wt": method.weight_quantizer, "ot": method.output_quantizer}[tag]
    quantizer = make(slot)
    assert isinstance(quantizer, FqsrQuantizer)
    return quantizer


def set_interval(quantizer: FqsrQuantizer, interval: float) -> FqsrQuantizer:
    quantizer.interval.data.fill_(interval)
    return quantizer


def given(params: dict[str, Any], **options: Any) -> FqsrQuantizer:
    return set_interval(quantizer_of(params, params["tag"], is_half=params.get("half_range", False), **options), params["interval"])


def quantizer(params: dict[str, Any], inputs: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    used, x = given(params, **options), inputs["x"].requires_grad_()
    y = used(x)
    y.backward(inputs["grad_output"])
    return {"y": y, "grad_x": x.grad, "grad_interval": used.interval.grad}


def quantizer_grad_option(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    scaled = {
        "scale_clamp_gradient": params["grad_type"] == "STE-scale",
        "scale_interval_gradient": params["grad_scale"] == "scale-element",
    }
    return quantizer(params, inputs, **scaled)


def quantizer_sequence(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    used = set_interval(quantizer_of(params, params["tag"], is_half=params["half_range"]), params["interval_init"])
    outputs, intervals, calls = [], [], []
    for x in inputs["x"]:
        outputs.append(used(x).detach())
        intervals.append(used.interval.detach().clone())
        calls.append(used.calls.clone())
    return {"y": torch.stack(outputs), "interval": torch.stack(intervals), "iteration": torch.stack(calls)}


def calibration_loss(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    used, x = given(params), inputs["x"].requires_grad_()
    y = used(x)
    loss = used.penalty()
    loss.backward()
    return {"loss": loss, "y": y, "grad_x": x.grad, "grad_interval": used.interval.grad}


def conv(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    w, x = inputs["w"], inputs["x"].requires_grad_()
    layer = nn.Conv2d(w.shape[1], w.shape[0], tuple(w.shape[2:]), padding="same")
    layer.load_state_dict({"weight": w, "bias": inputs["b"]})
    pad_first(layer)
    used = {
        tag: set_interval(
            quantizer_of(params, tag, is_half=tag == "fm" and params["fm_half_range"], bits=params[f"{tag}_bits"]),
            params[f"interval_{tag}"],
        )
        for tag in PURPOSES
    }
    insert.set_weight_quantizer(layer, used["wt"])
    insert.set_input_quantizer(layer, used["fm"])
    insert.set_output_quantizer(layer, used["ot"])
    y = layer(x)
    y.backward(inputs["grad_output"])
    found = {"y": y, "grad_x": x.grad, "grad_w": insert.float_weight(layer).grad, "grad_b": layer.bias.grad}
    return found | {f"grad_interval_{tag}": one.interval.grad for tag, one in used.items()}


def sum_with(used: FqsrQuantizer) -> Sum:
    module = Sum()
    insert.set_output_quantizer(module.left, used)
    insert.set_output_quantizer(module.right, used)
    return module


def eltwise_add(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    used, x, y = set_interval(quantizer_of(params, "ot"), params["interval"]), inputs["x"].requires_grad_(), inputs["y"].requires_grad_()
    z = sum_with(used)(x, y)
    z.backward(inputs["grad_output"])
    return {"z": z, "grad_x": x.grad, "grad_y": y.grad, "grad_interval": used.interval.grad}


def eltwise_sequence(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    used, intervals = set_interval(quantizer_of(params, "ot"), params["interval_init"]), []
    module = sum_with(used)
    for x, y in zip(inputs["x"], inputs["y"], strict=True):
        module(x, y)
        intervals.append(used.interval.detach().clone())
    return {"interval": torch.stack(intervals)}


def behind(module: nn.Module) -> Any:
    """The quantizer of a module's output."""
    return getattr(module, insert.OUTPUT, None)


def find(model: nn.Module, name: str) -> FqsrQuantizer | None:
    """The quantizer that the cases call ``body.0.eltwise.quant``, ``head.0.quant_weight`` and the like."""
    place, _, kind = name.removesuffix(".clip_val").rpartition(".")
    if place.endswith("eltwise"):
        found = behind(model.get_submodule(f"{place.removesuffix('eltwise')}sum.left"))
    else:
        layer = model.get_submodule(place)
        by_kind: dict[str, Any] = {
            "quant_activation": insert.input_quantizer,
            "quant_weight": insert.weight_quantizer,
            "quant_output": behind,
        }
        found = by_kind[kind](layer)
    assert found is None or isinstance(found, FqsrQuantizer)
    return found


def edsr_train_steps(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Any]:
    network = Edsr(params["scale"], params["n_resblocks"], params["n_feats"])
    for block in range(params["n_resblocks"]):
        network.body[block].body[1] = nn.PReLU()  # type: ignore[union-attr, index, operator]
    state = {name.removeprefix("param."): value for name, value in inputs.items() if name.startswith("param.")}
    network.load_state_dict({name: value for name, value in state.items() if "_mean." not in name})
    bits = {quantizer["tag"]: quantizer["bits"] for quantizer in params["quantizers"]}
    options = {"warm_up": params["stable"], "skip_bits": bits["ot"], "calibration_weight": params["quantizers"][0]["alpha"]}
    policy = BitPolicy(LayerBits(bits["wt"], bits["fm"]), None)
    model = lowbit.prepare(network, method="fqsr", policy=policy, sample=inputs["lr"][0], **options).train()
    for quantizer in params["quantizers"]:
        used = find(model, quantizer["name"])
        assert used is not None
        used.is_half = quantizer["half_range"]
    method: Any = model.lowbit_method
    spec = OptimizerSpec("adam", params["lr"], weight_decay=0.0, schedule="constant", betas=tuple(params["betas"]))
    run = TrainRun(model, method, CriterionTask(functional.l1_loss), Recipe(1, optimizer=spec), len(inputs["lr"]))
    found: dict[str, list[Any]] = {"loss": [], "calibration_loss": [], "intervals": []}
    for _ in run.each_epoch():
        for batch in zip(inputs["lr"], inputs["hr"], strict=True):
            run.before_step()
            loss = run.loss(batch)
            loss.backward()
            found["loss"].append(loss.item())
            found["calibration_loss"].append(run.penalty().item())
            run.after_backward()
            run.optimizer_step()
            run.after_step()
            intervals = [find(model, name) for name in params["interval_order"]]
            found["intervals"].append([1.0 if used is None else used.interval.item() for used in intervals])
    results: dict[str, Any] = {name: torch.tensor(values) for name, values in found.items()}
    return results | {"last_conv_weight": insert.float_weight(model.get_submodule("tail.1"))}
