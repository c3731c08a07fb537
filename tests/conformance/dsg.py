"""DSG of lowbit for reference cases."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lowbit.quantizers.running_range import RunningRangeQuantizer


def activation_range(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Any]:
    quantizer = RunningRangeQuantizer(params["bits"], kind=params["method"], percentile=params["percentile"])
    outputs, lower, upper = {}, [], []
    for index, x in enumerate(inputs.values()):
        outputs[f"y{index}"] = quantizer(x)
        lower.append(quantizer.lower.item())
        upper.append(quantizer.upper.item())
    return outputs | {"x_min": lower, "x_max": upper}
