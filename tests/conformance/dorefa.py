"""DoReFa of lowbit for reference cases."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lowbit.methods.quantization_aware.dorefa import Dorefa, DorefaActivation, GradientQuantizer
from lowbit.network import insert
from lowbit.qat import Slot


class Injected(GradientQuantizer):
    """A gradient quantizer with given noise."""

    def __init__(self, bit_width: int, noise: Tensor) -> None:
        super().__init__(bit_width)
        self.noise = noise

    def uniform(self, grad: Tensor) -> Tensor:
        return self.noise


def slot(bit_width: int, layer: nn.Module) -> Slot:
    return Slot("layer", layer, bit_width, True, "inner")


def weight(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    x = inputs["x"].requires_grad_()
    y = Dorefa().weight_quantizer(slot(params["bits"], nn.Identity()))(x)
    y.backward(inputs["grad_output"])
    return {"y": y, "grad_x": x.grad}


def activation(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    x = inputs["x"].requires_grad_()
    y = DorefaActivation(params["bits"])(x)
    y.backward(inputs["grad_output"])
    return {"y": y, "grad_x": x.grad}


def gradient(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    x = inputs["x"].requires_grad_()
    y = Injected(params["bits"], inputs["uniform"])(x, x)
    y.backward(inputs["grad_output"])
    return {"y": y, "grad_x": x.grad}


def layer(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    out_channels, in_channels, *kernel = inputs["weight"].shape
    conv = nn.Conv2d(in_channels, out_channels, tuple(kernel), params["stride"], params["padding"], bias=False)
    conv.load_state_dict({"weight": inputs["weight"]})
    insert.set_weight_quantizer(conv, Dorefa().weight_quantizer(slot(params["bits_w"], conv)))
    insert.set_input_quantizer(conv, DorefaActivation(params["bits_a"]))
    insert.set_output_transform(conv, Injected(params["bits_g"], inputs["uniform"]))
    x = inputs["x"].requires_grad_()
    pre_activation = conv(x)
    y = DorefaActivation(params["bits_a"])(pre_activation)
    y.backward(inputs["grad_output"])
    return {"pre_activation": pre_activation, "y": y, "grad_x": x.grad, "grad_weight": insert.float_weight(conv).grad}
