"""DSQ of lowbit for reference cases."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lowbit.methods.gradients.dsq import DsqQuantizer, soft_fake_quantize


def dsq_affine(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    x = inputs["x"].requires_grad_()
    scale, zero_point = inputs["scale"], inputs["zero_point"].float()
    if params["ch_axis"] is not None:
        shape = [len(scale) if axis == params["ch_axis"] else 1 for axis in range(x.dim())]
        scale, zero_point = scale.reshape(shape), zero_point.reshape(shape)
    y = soft_fake_quantize(x, scale, zero_point, params["quant_min"], params["quant_max"], params["alpha"])
    y.backward(inputs["grad_output"])
    return {"y": y, "grad_x": x.grad}


def dsq_learned_bounds(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    quantizer = DsqQuantizer(params["bits"], momentum=params["momentum"], spans_data=True).train(params["training"])
    quantizer.set_bounds(inputs["running_l"].reshape(()), inputs["running_u"].reshape(()))
    for parameter, name in ((quantizer.lower, "l"), (quantizer.upper, "u"), (quantizer.surrogate.alpha, "alpha")):
        parameter.data.copy_(inputs[name].reshape(()))
    x = inputs["x"].requires_grad_()
    y = quantizer(x)
    y.backward(inputs["grad_output"])
    none = inputs["l"].new_zeros(())
    bounds = {"grad_l": quantizer.lower.grad, "grad_u": quantizer.upper.grad}
    return {
        "y": y,
        "grad_x": x.grad,
        "grad_alpha": quantizer.surrogate.alpha.grad,
        **{k: none if g is None else g for k, g in bounds.items()},
    }
