"""FP auxiliary of lowbit for reference cases."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lowbit.methods.training.fp_auxiliary import AuxiliaryBlock, FpAuxiliary, FpAuxiliaryQuantizers, Place
from lowbit.models.resnet import ResidualBlock
from lowbit.network import insert
from lowbit.network.taps import Tap, tapped
from lowbit.qat import Classification, Recipe, Slot, TrainRun

PADDING = {1: 0, 3: 1}  # of a kernel
END = Tap("relu2", "input")  # of a block: before its activation


def slot(bit_width: int, **facts: Any) -> Slot:
    return Slot("layer", nn.Identity(), bit_width, **facts)


def weight(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    w = inputs["w"].requires_grad_()
    w_q = FpAuxiliaryQuantizers().weight_quantizer(slot(params["bits"]))(w)
    w_q.backward(inputs["grad_output"])
    return {"w_q": w_q, "grad_w": w.grad}


def activation_of(bits: int) -> nn.Module:
    if bits == 32:
        return nn.ReLU6()
    facts: dict[str, Any] = {"is_signed": False, "purpose": "input"}
    return FpAuxiliaryQuantizers(activation_range="range6_code").activation_quantizer(slot(bits, **facts))


def activation_relu6_code(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    x = inputs["x"].requires_grad_()
    y = activation_of(params["bits"])(x)
    y.backward(inputs["grad_output"])
    return {"y": y, "grad_x": x.grad}


def state_of(inputs: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix).replace("/", "."): value for name, value in inputs.items() if name.startswith(prefix)}


def convolution(w: Tensor, bits: int, stride: int = 1) -> nn.Conv2d:
    """A convolution that keeps the size, with quantized weights."""
    kernel = w.shape[-1]
    layer = nn.Conv2d(w.shape[1], w.shape[0], kernel, stride, PADDING[kernel], bias=False)
    layer.weight.data.copy_(w)
    if bits != 32:
        insert.set_weight_quantizer(layer, FpAuxiliaryQuantizers().weight_quantizer(slot(bits)))
    return layer


def norm(state: dict[str, Tensor], name: str) -> nn.BatchNorm2d:
    found = nn.BatchNorm2d(len(state[f"{name}.weight"]))
    found.load_state_dict({key: state[f"{name}.{key}"] for key in ("weight", "bias", "running_mean", "running_var")}, strict=False)
    return found


def bottleneck(state: dict[str, Tensor], bits: int, stride: int, *, is_last: bool) -> ResidualBlock:
    """A block of three convolutions; the names of its parts in the cases are those in ``PARTS``."""
    block = ResidualBlock(1, 1, 1)
    block.conv1, block.norm1, block.relu1 = convolution(state["conv1.weight"], bits), norm(state, "bn1"), activation_of(bits)
    middle = convolution(state["conv2.weight"], bits, stride)
    block.conv2 = nn.Sequential(middle, norm(state, "bn2"), activation_of(bits), convolution(state["conv3.weight"], bits))
    block.norm2, block.relu2 = norm(state, "bn3"), nn.ReLU() if is_last else activation_of(bits)
    if "downsample.0.weight" in state:
        block.downsample = nn.Sequential(convolution(state["downsample.0.weight"], bits, stride), norm(state, "downsample.1"))
    return block.train()


PARTS = {
    "conv1": "conv1",
    "bn1": "norm1",
    "conv2": "conv2.0",
    "bn2": "conv2.1",
    "conv3": "conv2.3",
    "bn3": "norm2",
    "downsample": "downsample",
}
AUXILIARY_PARTS = {"downsample_booster": "resample", "auxiliary": "adaptor"}


def load_auxiliary(block: AuxiliaryBlock, state: dict[str, Tensor]) -> None:
    for name, own in AUXILIARY_PARTS.items():
        part = {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
        block.get_submodule(own).load_state_dict(part, strict=False)


def gradients(block: nn.Module, parts: dict[str, str]) -> dict[str, Tensor]:
    """The gradients of all parameters, by their names in the cases."""
    found = {}
    for name, own in parts.items():
        for inner, module in block.get_submodule(own).named_modules():
            if isinstance(module, nn.Conv2d | nn.BatchNorm2d):
                path = "/".join((name, *filter(None, inner.split("."))))
                found[f"{path}/weight"] = insert.float_weight(module).grad if isinstance(module, nn.Conv2d) else module.weight.grad
                if isinstance(module, nn.BatchNorm2d):
                    found[f"{path}/bias"] = module.bias.grad
    return found


def shapes_of(block: nn.Module, x: Tensor) -> tuple[int, ...]:
    """Channels and sizes of a block's end."""
    with torch.no_grad():
        return tuple(block(x).shape[1:])


def aux_block(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    state, x, booster = state_of(inputs, "init."), inputs["x"].requires_grad_(), inputs["booster"].requires_grad_()
    block = bottleneck(state, params["bits"], params["stride"], is_last=params["is_last"])
    with tapped(block, [END]) as features:
        y = block(x)
    auxiliary = AuxiliaryBlock(booster.shape[1:], y.shape[1:])
    load_auxiliary(auxiliary, state)
    booster_out = auxiliary(booster, features[END])
    torch.autograd.backward([y, booster_out], [inputs["grad_y"], inputs["grad_booster_out"]])
    found = {"y": y, "booster_out": booster_out, "grad_x": x.grad, "grad_booster": booster.grad}
    grads = {**gradients(block, PARTS), **gradients(auxiliary, AUXILIARY_PARTS)}
    return {**found, **{f"grad.{name}": value for name, value in grads.items()}}


class Chain(nn.Module):
    """Two blocks and a classifier; what the auxiliary stream starts from comes from outside."""

    def __init__(self, states: dict[str, dict[str, Tensor]], bits: int, head: dict[str, Tensor]) -> None:
        super().__init__()
        self.stem = nn.Identity()
        self.block1 = bottleneck(states["block1"], bits, 2, is_last=False)
        self.block2 = bottleneck(states["block2"], bits, 1, is_last=True)
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(*reversed(head["weight"].shape))
        self.fc.load_state_dict(head)

    def forward(self, x: Tensor, booster: Tensor) -> Tensor:
        self.stem(booster)
        logits: Tensor = self.fc(self.pool(self.block2(self.block1(x))).flatten(1))
        return logits


def aux_chain_loss(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    states = {name: state_of(inputs, f"init.{name}/") for name in ("block1", "block2")}
    model = Chain(states, params["bits"], state_of(inputs, "init.fc_1/"))
    shapes = [inputs["booster"].shape[1:], shapes_of(model.block1, inputs["x"])]
    taps = [Tap("stem"), Tap("block1.relu2", "input"), Tap("block2.relu2", "input")]
    method = FpAuxiliary()
    method.places = [Place((tap,), 1, tuple(shape)) for tap, shape in zip(taps, [*shapes, shapes[1]], strict=True)]
    method.outputs = len(inputs["init.fc_2/bias"])
    run = TrainRun(model, method, Classification(), Recipe(1), 1)
    auxiliary: Any = run.networks["auxiliary"]
    auxiliary.stem = nn.Identity()
    for block, state in zip(auxiliary.blocks, states.values(), strict=True):
        load_auxiliary(block, state)
    auxiliary.head.load_state_dict(state_of(inputs, "init.fc_2/"))
    with tapped(model, ["fc"]) as logits, tapped(auxiliary, ["head"]) as aux_logits:
        loss = run.loss(((inputs["x"], inputs["booster"]), inputs["target"]))
    loss.backward()
    grads = {f"fc_1/{name}": parameter.grad for name, parameter in model.fc.named_parameters()}
    grads |= {f"fc_2/{name}": parameter.grad for name, parameter in auxiliary.head.named_parameters()}
    for name, block in zip(states, auxiliary.blocks, strict=True):
        own = {**gradients(model.get_submodule(name), PARTS), **gradients(block, AUXILIARY_PARTS)}
        grads |= {f"{name}/{key}": value for key, value in own.items()}
    found = {"logits": logits["fc"], "aux_logits": aux_logits["head"], "loss": loss}
    return {**found, **{f"grad.{name}": value for name, value in grads.items()}}
