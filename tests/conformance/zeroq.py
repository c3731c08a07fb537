"""ZeroQ of lowbit for reference cases."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from lowbit.quantizers.running_range import MinMaxWeightQuantizer, RunningRangeQuantizer


def weight_quantizer(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    quantized = MinMaxWeightQuantizer(params["bits"])(inputs["w"])
    if quantized.dim() == 2:
        return {"w_quantized": quantized, "y": F.linear(inputs["x"], quantized, inputs["bias"])}
    return {"w_quantized": quantized, "y": F.conv2d(inputs["x"], quantized, inputs["bias"], padding=1)}


def activation_quantizer_running_range(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Any]:
    quantizer, outputs, lower, upper = RunningRangeQuantizer(params["bits"]), {}, [], []
    for index, x in enumerate(inputs.values()):
        quantizer.train(index < params["frozen_from_batch"])
        outputs[f"y{index}"] = quantizer(x)
        lower.append(quantizer.lower.item())
        upper.append(quantizer.upper.item())
    return outputs | {"x_min": lower, "x_max": upper}
