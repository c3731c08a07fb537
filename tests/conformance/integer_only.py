"""The integer arithmetic of lowbit for reference cases."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lowbit.formats.fixed_point import onnx_operators, operators, parameters, requantize as multipliers
from lowbit.formats.fixed_point.requantize import FixedPointRequantizer, make_requantizer
from lowbit.methods.fixed_point.integer_only import RangeWeight
from lowbit.network.surgery.fold import fold_batch_norm
from lowbit.quantizers.affine import qrange, quantize
from lowbit.spec import Granularity

Params = dict[str, Any]
Tensors = dict[str, Tensor]
INT32 = (multipliers.INT32_MIN, multipliers.INT32_MAX)
RANGES = {"tflite_uint8": (0, 255), "tflite_int8": (-128, 127), "tflite_int8_narrow": (-127, 127)}
CODES = {"uint8": (0, 255), "int8": (-128, 127)}
DTYPES = {torch.uint8: CODES["uint8"], torch.int8: CODES["int8"]}


def fixed_point_multiply(params: Params, inputs: Tensors) -> Tensors:
    return {"y": multipliers.fixed_point_multiply(inputs["a"], inputs["b"])}


def rounding_right_shift(params: Params, inputs: Tensors) -> Tensors:
    return {"y": multipliers.rounding_right_shift(inputs["x"], inputs["shift"])}


def quantize_multiplier(params: Params, inputs: Tensors) -> Tensors:
    fixed, shift = multipliers.quantize_multiplier(inputs["multiplier"])
    return {"fixed": fixed, "shift": shift}


def quantize_multiplier_gemmlowp(params: Params, inputs: Tensors) -> Tensors:
    fixed, right_shift = multipliers.quantize_multiplier_below_one(inputs["multiplier"])
    return {"fixed": fixed, "right_shift": right_shift}


def requantize(params: Params, inputs: Tensors) -> Tensors:
    acc, fixed, shift = inputs["acc"], inputs["fixed"], inputs["shift"]
    return {
        f"y_{rounding}_rounding": FixedPointRequantizer(0, *INT32, fixed, shift, rounding)(acc, axis=0) for rounding in ("double", "single")
    }


def choose_qparams(params: Params, inputs: Tensors) -> Tensors:
    lo, hi = inputs["min"], inputs["max"]
    found = {"gemmlowp_uint8": parameters.choose_qparams_gemmlowp(lo, hi)}
    for name, codes in RANGES.items():
        found[name] = parameters.choose_qparams(*parameters.widened(lo, hi), *codes)
    return {f"{what}.{name}": value for name, both in found.items() for what, value in zip(("scale", "zero_point"), both, strict=True)}


def fake_quant_range(params: Params, inputs: Tensors) -> Tensors:
    rows = []
    for lo, hi, (bits, narrow) in zip(inputs["min"], inputs["max"], inputs["bits_and_narrow"].tolist(), strict=True):
        _, qmax = qrange(bits, signed=False)
        rows.append(torch.stack(parameters.nudged_range(lo, hi, narrow, qmax)[:3]))
    return {"nudged_min_max_scale": torch.stack(rows)}


def quantize_half_away(params: Params, inputs: Tensors) -> Tensors:
    return {
        f"q_{kind}": parameters.quantize_half_away(inputs["x"], params["scale"], params[f"zero_point_{kind}"], *codes)
        for kind, codes in CODES.items()
    }


def conv_fixed_point(params: Params, inputs: Tensors) -> Tensors:
    acc = operators.accumulate_conv(
        inputs["x"].permute(0, 3, 1, 2),
        inputs["w"].permute(0, 3, 1, 2),
        inputs["bias"],
        x_zero_point=params["x_zero_point"],
        w_zero_point=params["w_zero_point"],
        stride=params["stride"],
        padding=params["padding"],
    )
    found = {}
    for rounding in ("double", "single"):
        made = make_requantizer(
            "fixed_point",
            params["x_scale"],
            inputs["w_scale"],
            params["y_scale"],
            params["y_zero_point"],
            *params["clamp"],
            rounding=rounding,
        )
        assert torch.equal(made.multiplier, inputs["fixed"].long()) and torch.equal(made.shift, inputs["shift"].long())
        found[f"y_{rounding}_rounding"] = made(acc).permute(0, 2, 3, 1)
    return found


def gemm_fixed_point(params: Params, inputs: Tensors) -> Tensors:
    acc = operators.accumulate_matmul(
        inputs["lhs"], inputs["rhs"], lhs_zero_point=params["lhs_zero_point"], rhs_zero_point=params["rhs_zero_point"]
    )
    fixed, right_shift = multipliers.quantize_multiplier_below_one(inputs["multiplier"])
    made = FixedPointRequantizer(params["result_zero_point"], *CODES["uint8"], fixed, right_shift.neg())
    return {"fixed": fixed, "right_shift": right_shift, "y": made(acc)}


def add_fixed_point(params: Params, inputs: Tensors) -> Tensors:
    y = operators.add_fixed_point(
        inputs["a"], inputs["b"], params["scales"], params["zero_points"], *CODES["int8"], left_shift=params["left_shift"]
    )
    return {"y": y}


def average_pool_int8(params: Params, inputs: Tensors) -> Tensors:
    y = operators.average_pool(inputs["x"].permute(0, 3, 1, 2), params["kernel"], params["stride"])
    return {"y": y.permute(0, 2, 3, 1)}


def dyadic_requantize(params: Params, inputs: Tensors) -> Tensors:
    x_scale, w_scale, y_scale = inputs["x_scale"], inputs["w_scale"], inputs["y_scale"]
    qmin, qmax = qrange(params["bits"], signed=params["mode"] == "symmetric")
    made = make_requantizer("dyadic", x_scale, w_scale, y_scale, 0, qmin, qmax)
    acc_scale = multipliers.accumulator_scale(x_scale, w_scale)
    z = onnx_operators.dequantize_linear(inputs["acc"], acc_scale).requires_grad_()
    multipliers.simulate_requantize(z, acc_scale, y_scale, made).backward(inputs["grad_output"])
    assert z.grad is not None
    return {"mantissa": made.multiplier, "exponent": made.exponent, "codes": made(inputs["acc"]), "grad_z": z.grad}


def dyadic_residual_add(params: Params, inputs: Tensors) -> Tensors:
    codes = qrange(params["bits"], signed=True)
    main = make_requantizer("dyadic", inputs["x_scale"], inputs["w_scale"], inputs["y_scale"], 0, *codes)
    identity = make_requantizer("dyadic", inputs["identity_x_scale"], inputs["identity_w_scale"], inputs["y_scale"], 0, *codes)
    return {"codes": operators.add_dyadic([(inputs["acc_main"], main), (inputs["acc_identity"], identity)])}


def folded_conv_bn_integer(params: Params, inputs: Tensors) -> Tensors:
    codes = qrange(params["act_bits"], signed=False)
    x_scale = parameters.unsigned_scale(inputs["x"], params["act_bits"])
    x_codes = quantize(inputs["x"], x_scale, torch.tensor(0.0), *codes)
    weight, bias, _, _ = fold_batch_norm(
        inputs["conv_weight"], None, inputs["bn_weight"], inputs["bn_bias"], inputs["bn_mean"], inputs["bn_var"], params["bn_eps"]
    )
    quantizer = RangeWeight(params["weight_bits"], code_type="int8", granularity=Granularity.channel())
    encoded = quantizer.encode(weight)
    w_codes, w_scale = encoded.codes, encoded.decoder.tensors()["scale"].flatten()
    acc_scale = multipliers.accumulator_scale(x_scale, w_scale)
    bias_codes = parameters.quantize_bias(bias, acc_scale)
    acc = operators.accumulate_conv(x_codes, w_codes, bias_codes, padding=params["padding"])
    z = nn.ReLU()(onnx_operators.dequantize_linear(acc, acc_scale))
    y_scale = parameters.unsigned_scale(z, params["act_bits"])
    y_codes = make_requantizer("dyadic", x_scale, w_scale, y_scale, 0, *codes)(acc)  # the lowest code is 0: the clamp is the ReLU
    return {
        "x_scale": x_scale,
        "x_codes": x_codes,
        "w_scale": w_scale,
        "w_codes": w_codes,
        "bias_codes": bias_codes,
        "acc": acc,
        "y_scale": y_scale,
        "y_codes": y_codes,
    }


def integer_average_pool_hawq(params: Params, inputs: Tensors) -> Tensors:
    return {"y_codes": operators.average_pool_truncated(inputs["codes"], params["kernel"], eps=params["eps"])}


def onnx_quantize_dequantize(params: Params, inputs: Tensors) -> Tensors:
    scale, zero_point, axis = inputs["scale"], inputs["zero_point"], params["axis"] or 0
    q = onnx_operators.quantize_linear(inputs["x"], scale, zero_point, *CODES[params["dtype"]], axis)
    return {"q": q, "x_dequantized": onnx_operators.dequantize_linear(q, scale, zero_point, axis)}


def onnx_qlinear_conv(params: Params, inputs: Tensors) -> Tensors:
    x, w, bias, w_zero_point = inputs["x"], inputs["w"], inputs["bias"], inputs["w_zero_point"]
    x_zero_point, y_zero_point = inputs["x_zero_point"].item(), inputs["y_zero_point"].item()
    qmin, qmax = CODES[params["x_dtype"]]  # of the output too: the kernels have one type for both
    where = {"stride": params["stride"], "padding": params["padding"], "groups": params["groups"]}
    y = onnx_operators.qlinear_conv(
        x,
        w,
        bias,
        x_scale=inputs["x_scale"],
        x_zero_point=x_zero_point,
        w_scale=inputs["w_scale"],
        w_zero_point=w_zero_point,
        y_scale=inputs["y_scale"],
        y_zero_point=y_zero_point,
        qmin=qmin,
        qmax=qmax,
        **where,
    )
    return {"acc": operators.accumulate_conv(x, w, bias, x_zero_point=x_zero_point, w_zero_point=w_zero_point, **where), "y": y}


def onnx_qdq_conv(params: Params, inputs: Tensors) -> Tensors:
    qmin, qmax = CODES[params["x_dtype"]]
    x_scale, w_scale, y_scale = inputs["x_scale"], inputs["w_scale"], inputs["y_scale"]
    x_zero_point, y_zero_point = inputs["x_zero_point"].item(), inputs["y_zero_point"].item()
    where = {"stride": params["stride"], "padding": params["padding"]}
    x_q = onnx_operators.quantize_linear(inputs["x"], x_scale, inputs["x_zero_point"], qmin, qmax)
    fused, unfused = (
        onnx_operators.qdq_conv(
            x_q,
            inputs["w"],
            inputs["bias"],
            x_scale=x_scale,
            x_zero_point=x_zero_point,
            w_scale=w_scale,
            bias_scale=inputs["bias_scale"],
            y_scale=y_scale,
            y_zero_point=y_zero_point,
            qmin=qmin,
            qmax=qmax,
            relu=params["relu"],
            optimized=is_optimized,
            **where,
        )
        for is_optimized in (True, False)
    )
    acc = operators.accumulate_conv(x_q, inputs["w"], inputs["bias"], x_zero_point=x_zero_point, **where)
    return {
        "x_q": x_q,
        "acc": acc,
        "y_q_fused": fused,
        "y_q_unfused": unfused,
        "y_fused": onnx_operators.dequantize_linear(fused, y_scale, y_zero_point),
        "compare_mask": onnx_operators.is_far_from_ties(acc, x_scale, w_scale, y_scale, relu=params["relu"]),
    }


def onnx_qlinear_matmul(params: Params, inputs: Tensors) -> Tensors:
    qmin, qmax = DTYPES[inputs["a"].dtype]
    y = onnx_operators.qlinear_matmul(
        inputs["a"],
        inputs["b"],
        a_scale=inputs["a_scale"],
        a_zero_point=inputs["a_zero_point"].item(),
        b_scale=inputs["b_scale"],
        y_scale=inputs["y_scale"],
        y_zero_point=inputs["y_zero_point"].item(),
        qmin=qmin,
        qmax=qmax,
    )
    q, scale, zero_point = onnx_operators.dynamic_quantize_linear(inputs["x_dynamic"])
    return {"y": y, "dynamic_q": q, "dynamic_scale": scale, "dynamic_zero_point": zero_point}
