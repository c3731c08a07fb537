"""AdaBits of lowbit for reference cases."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lowbit.methods.adaptive.adabits import Adabits, normalized, quantize_k as level_of
from lowbit.network import insert
from lowbit.network.slot import Slot
from lowbit.network.surgery.switchable_norm import SwitchableNorm
from lowbit.qat.loops.manual import training
from lowbit.qat.prepare import prepare
from lowbit.quantizers import Quantizer
from lowbit.quantizers.switchable import SwitchableQuantizer
from lowbit.spec import BitPolicy, LayerBits, Rule

Values = dict[str, Any]
ROUNDINGS = {"original": "nearest", "modified": "floor", "centered": "centered"}


def quantize_k(params: Values, inputs: dict[str, Tensor]) -> Values:
    x = inputs["x"].requires_grad_()
    y = level_of(x, params["bits"], ROUNDINGS[params["scheme"]])  # type: ignore[arg-type]
    y.backward(inputs["grad_output"])
    return {"y": y, "grad_x": x.grad}


def layer_for(weight: Tensor, params: Values, groups: int = 1) -> nn.Module:
    """A layer with this weight."""
    if weight.dim() == 2:
        layer: nn.Module = nn.Linear(weight.shape[1], weight.shape[0])
    else:
        stride, padding = params.get("stride", 1), params.get("padding", 0)
        layer = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2:], stride, padding, bias=False)  # type: ignore[arg-type]
    layer.get_parameter("weight").data = weight
    return layer


def slot(layer: nn.Module, params: Values, bits: int, **place: Any) -> Slot:
    return Slot("layer", layer, bits, widths=tuple(params.get("bits_list", (bits,))), **place)


def weight(params: Values, inputs: dict[str, Tensor]) -> Values:
    w = inputs["w"].requires_grad_()
    if params["bits"] >= 32:
        w_q = normalized(w)
    else:
        method = Adabits(
            weight_rounding=ROUNDINGS[params["scheme"]],  # type: ignore[arg-type]
            rescale=params["rescale"] or "none",
            rescale_convolutions=True,
            rescales_in_evaluation=False,
        )
        quantizer = method.weight_quantizer(slot(layer_for(w, params), params, params["bits"], position="last"))
        w_q = quantizer.train(params["training"])(w)
    w_q.backward(inputs["grad_output"])
    return {"w_q": w_q, "grad_w": w.grad}


def clips_of(quantizer: nn.Module, widths: list[int]) -> list[nn.Parameter]:
    """The clip of each width."""
    if isinstance(quantizer, SwitchableQuantizer):
        return [quantizer.at[str(bits)].get_parameter("clip") for bits in widths]
    return [quantizer.get_parameter("clip")]


def set_clips(quantizer: nn.Module, widths: list[int], alpha: Tensor) -> None:
    for clip, value in zip(clips_of(quantizer, widths), alpha.tolist(), strict=True):
        clip.data.fill_(value)


def clip_gradients(quantizer: nn.Module, widths: list[int]) -> Tensor:
    """The gradient of each width's clip, 0 where it has none."""
    gradients = [clip.grad for clip in clips_of(quantizer, widths)]
    return torch.stack([torch.zeros(()) if gradient is None else gradient for gradient in gradients])


def activation_quantizer(layer: nn.Module, params: Values, alpha: Tensor) -> Quantizer:
    scheme = ROUNDINGS[params.get("scheme", "original")]
    widths = params["bits_list"]
    place = Slot("layer", layer, widths[0], params.get("double_side", False), purpose="input", widths=tuple(widths))
    quantizer = Adabits(activation_rounding=scheme).activation_quantizer(place)  # type: ignore[arg-type]
    set_clips(quantizer, widths, alpha)
    quantizer.set_bit_width(max(params["bits"], params.get("bita_min", 0)))
    return quantizer


def activation(params: Values, inputs: dict[str, Tensor]) -> Values:
    quantizer, x = activation_quantizer(nn.Identity(), params, inputs["alpha"]), inputs["x"].requires_grad_()
    y = quantizer(x)
    y.backward(inputs["grad_output"])
    return {"y": y, "grad_x": x.grad, "grad_alpha": clip_gradients(quantizer, params["bits_list"])}


def whole_layer(params: Values, inputs: dict[str, Tensor]) -> Values:
    layer, widths = layer_for(inputs["w"], params), params["bits_list"]
    bias = dict(layer.named_parameters()).get("bias")
    if bias is not None:
        bias.data = inputs["bias"]
    method = Adabits(weight_rounding="floor", rescale=params.get("rescale") or "none", rescales_in_evaluation=False)
    bits = max(params["bits"], params.get("bitw_min", 0))
    weights = method.weight_quantizer(Slot("layer", layer, bits, position="last" if "rescale" in params else "inner"))
    insert.set_weight_quantizer(layer, weights)
    activations = activation_quantizer(layer, params, inputs["alpha"])
    if not params.get("weight_only", False):
        insert.set_input_quantizer(layer, activations)
    x = inputs["x"].requires_grad_()
    y = layer.train(params.get("training", True))(x)
    y.backward(inputs["grad_output"])
    found = {"y": y, "grad_x": x.grad, "grad_w": insert.float_weight(layer).grad, "grad_alpha": clip_gradients(activations, widths)}
    return found if bias is None else {**found, "grad_bias": bias.grad}


conv = linear = whole_layer


def switch_bn(params: Values, inputs: dict[str, Tensor]) -> Values:
    widths, x = params["bits_list"], inputs["x"]
    norm = SwitchableNorm(nn.BatchNorm2d(x.shape[2], params["eps"], params["momentum"]), [str(bits) for bits in widths])
    if not params.get("affine", True):
        norm.share_affine()
    for own, weight_, bias in zip(
        norm.norms.values(), inputs["weight"].expand(len(widths), -1), inputs["bias"].expand(len(widths), -1), strict=True
    ):
        own.weight.data, own.bias.data = weight_.clone(), bias.clone()
    outputs = []
    for values, bits in zip(x, params["sequence"], strict=True):
        norm.select(str(bits))
        outputs.append(norm(values))
    norm.eval().select(str(params["eval_bits"]))
    found = {"y": torch.stack(outputs), "y_eval_last_x": norm(x[-1])}
    return {
        **found,
        **{name: torch.stack([own.get_buffer(name) for own in norm.norms.values()]) for name in ("running_mean", "running_var")},
    }


class Small(nn.Sequential):
    """The network of the case."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu1 = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU()
        self.conv2, self.bn2, self.relu2 = nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False), nn.BatchNorm2d(4), nn.ReLU()
        self.conv3, self.bn3, self.relu3 = nn.Conv2d(4, 6, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU()
        self.pool, self.flatten, self.fc = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)


def tensors_of(model: nn.Module, widths: list[int]) -> dict[str, list[Tensor]]:
    """The tensors of the network by the names of the cases; of clips one for each width."""
    found: dict[str, list[Tensor]] = {}
    for name in ("conv1", "conv2", "conv3", "fc"):
        layer = model.get_submodule(name)
        found[f"{name}/weight"] = [insert.float_weight(layer)]
        quantizer = insert.input_quantizer(layer)
        if quantizer is not None:
            found[f"{name}/alpha"] = list(clips_of(quantizer, widths))
    for name, module in model.named_modules():
        if isinstance(module, SwitchableNorm):
            for place, own in enumerate(module.norms.values()):
                tensors = {"weight": own.weight, "bias": own.bias, **dict(own.named_buffers())}
                found |= {f"{name}/bn/{place}/{key}": [tensor] for key, tensor in tensors.items()}
    return {**found, "fc/bias": [model.get_submodule("fc").get_parameter("bias")]}


def joint_training(params: Values, inputs: dict[str, Tensor]) -> Values:
    widths, steps = params["bits_list"], params["steps"]
    policy = BitPolicy(LayerBits(8, 8), rules=(Rule("conv1", weight=8, activation="float"), Rule("fc", weight=8)))
    ask: Values = {
        "method": "adabits",
        "bits": widths,
        "policy": policy,
        "weight_rounding": "floor",
        "integer_images": True,
        "sample": inputs["x"][0],
    }
    model = prepare(Small(), **ask).train()
    for name, tensors in tensors_of(model, widths).items():
        if f"init.{name}" in inputs:
            given = inputs[f"init.{name}"]
            for tensor, value in zip(tensors, given.unbind() if len(tensors) > 1 else [given], strict=True):
                tensor.data.copy_(value)
    run = training(model, steps_per_epoch=steps, epochs=1)
    groups = run.parameter_groups(learning_rate=params["lr"], weight_decay=params["weight_decay"])
    optimizer = torch.optim.SGD(groups, params["lr"], params["momentum"], nesterov=params["nesterov"])
    losses = []
    for step in range(steps):
        run.before_step(optimizer)
        optimizer.zero_grad()
        found = []
        for loss in run.losses((inputs["x"][step], inputs["target"][step])):
            loss.backward()
            found.append(loss.detach())
        losses.append(torch.stack(found))
        run.after_backward()
        optimizer.step()
        run.after_step()
    final = {
        f"final.{name}": tensors[0] if len(tensors) == 1 else torch.stack(tensors) for name, tensors in tensors_of(model, widths).items()
    }
    return {"losses": torch.stack(losses), "final.conv1/alpha": inputs["init.conv1/alpha"], **final}
