"""Scale searches of lowbit for reference cases."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.quantizers import UniformQuantizer
from lowbit.quantizers.ranges.observers import make_observer


def _quantizer(params: dict[str, object], observer: str, *, symmetric: bool) -> UniformQuantizer:
    return UniformQuantizer(int(str(params["bits"])), signed=params["codes"][0] < 0, symmetric=symmetric, observer=make_observer(observer))  # type: ignore[index]


def mse_upper_bound(params: dict[str, object], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    quantizer = _quantizer(params, "omse", symmetric=True)
    quantizer.initialize(inputs["x"])
    y = quantizer(inputs["x"])
    return {"mse": torch.nn.functional.mse_loss(y, inputs["x"]), "delta": quantizer.scale, "y": y}


def mse_affine_grid_90(params: dict[str, object], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    quantizer = _quantizer(params, "mse_affine_grid_90", symmetric=False)
    quantizer.initialize(inputs["x"])
    return {"scale": quantizer.scale, "zero_point": quantizer.zero_point, "y": quantizer(inputs["x"])}
