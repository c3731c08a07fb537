"""DSQ of lowbit for reference cases."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lowbit.methods.gradients.dsq import DsqQuantizer, ObservedDsqQuantizer
from lowbit.spec import Granularity

BITS = {3: 3, 7: 4, 15: 4}  # by the largest code


def dsq_affine(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    x = inputs["x"].requires_grad_()
    granularity = Granularity.tensor() if params["ch_axis"] is None else Granularity.channel(params["ch_axis"])
    quantizer = ObservedDsqQuantizer(BITS[params["quant_max"]], is_weight=True, granularity=granularity, alpha=params["alpha"]).eval()
    quantizer.qmin, quantizer.qmax = params["quant_min"], params["quant_max"]
    shape = granularity.scale_shape(x)
    quantizer.set_parameters(inputs["scale"].reshape(shape), inputs["zero_point"].float().reshape(shape))
    y = quantizer(x)
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
