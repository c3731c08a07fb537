"""Equalization, absorption and bias correction of lowbit for reference cases."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from lowbit.methods.post_training.dfq import OffsetQuantizer, channel_mean, corrected_bias, empirically_corrected_bias
from lowbit.network.graph import moments
from lowbit.network.graph.moments import Moments, clipped
from lowbit.network.surgery.equalize import LayerState, absorb_bias, chain_sets, channel_kind, equalize, equalize_set, pair_scales
from lowbit.network.surgery.fold import fold_batch_norm
from lowbit.quantizers.affine import affine_parameters, fake_quantize, qrange
from lowbit.surrogates import straight_through

CLIPS = {"relu": (0.0, float("inf")), "relu6": (0.0, 6.0), "no_activation": (float("-inf"), float("inf"))}


def state_of(weight: Tensor, *others: Tensor, depthwise: bool = False) -> LayerState:
    """A layer in the case's precision; ``others``: bias, mean, deviation."""
    return LayerState(weight, *others, groups=len(weight) if depthwise else 1)


def chain_of(inputs: dict[str, Tensor]) -> dict[str, LayerState]:
    return {
        f"c{i}": state_of(*(inputs[key] for key in (f"c{i}.w", f"c{i}.b", f"b{i}.mean", f"b{i}.std")), depthwise=i == 2) for i in (1, 2, 3)
    }


def chain_values(chain: dict[str, LayerState]) -> dict[str, Tensor]:
    values: dict[str, Tensor] = {}
    for i, state in enumerate(chain.values(), 1):
        values |= {f"c{i}.w": state.weight, f"c{i}.b": state.bias, f"b{i}.mean": state.mean, f"b{i}.std": state.std}
    return values


def cross_layer_scale_pair(params: dict, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    first, second = state_of(inputs["w1"], inputs["b1"]), state_of(inputs["w2"])
    (scale,) = equalize_set([first, second], params["range"])
    return {"s": scale, "w1_scaled": first.weight, "w2_scaled": second.weight, "b1_scaled": first.bias}


def cross_layer_scale_depthwise_triple(params: dict, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    layers = [state_of(inputs["w1"], inputs["b1"]), state_of(inputs["w2"], inputs["b2"], depthwise=True), state_of(inputs["w3"])]
    s12, s23 = equalize_set(layers, params["range"])
    weights = {f"w{i}_scaled": layer.weight for i, layer in enumerate(layers, 1)}
    return {"s12": s12, "s23": s23, "b1_scaled": layers[0].bias, "b2_scaled": layers[1].bias, **weights}


def cle_grouping(params: dict, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    sets = chain_sets([channel_kind(*layer) for layer in params["layers_in_out_groups"]]) or [()]
    return {"sets": torch.tensor([(*indices, -1, -1, -1)[:3] for indices in sets])}


def high_bias_absorption(params: dict, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    # the previous layer's weight takes no part
    first = state_of(torch.zeros(len(inputs["beta"]), 1), inputs["b_prev"], inputs["beta"], inputs["gamma"])
    second = state_of(inputs["w_next"], inputs["b_next"], depthwise=params["depthwise"])
    absorb_bias(first, second, activation=params["activation"], n_sigma=params["n_sigma"])
    return {"b_prev": first.bias, "b_next": second.bias}


def analytic_bias_correction(params: dict, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    expected, _ = moments.clipped_normal_moments(inputs["beta"], inputs["gamma"], *CLIPS[params["activation"]])
    weight, quantized, bias = (inputs[key].double() for key in ("w", "w_quantized", "bias"))
    return {"bias": corrected_bias(bias, weight, quantized, expected, groups=len(weight) if params["depthwise"] else 1)}


def empirical_bias_correction(params: dict, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    expected, quantized = channel_mean(inputs["fp_output"]), channel_mean(inputs["quantized_output"])
    return {"bias": empirically_corrected_bias(inputs["bias"], expected, quantized)}


def clipped_normal_moments(params: dict, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    mean, variance = moments.clipped_normal_moments(inputs["beta"], inputs["gamma"], *CLIPS[params["activation"]])
    return {"mean": mean, "var": variance}


def bn_fold(params: dict, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    norm = (inputs[key] for key in ("gamma", "beta", "mean", "var"))
    weight, bias, std, mean = fold_batch_norm(inputs["w"], inputs.get("bias"), *norm, params["eps"])
    return {"w": weight, "bias": bias, "out_std": std, "out_mean": mean}


def cross_layer_scale_pair_range(params: dict, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    first = state_of(*(inputs[key] for key in ("w1", "b1", "bn_mean", "bn_std")))
    second = state_of(inputs["w2"], depthwise=params["second_is_depthwise"])
    kind = params["range"]
    multiplier = pair_scales(second.input_ranges(kind), first.output_ranges(kind))
    equalize_set([first, second], kind)
    return {
        "multiplier": multiplier, "w1_scaled": first.weight, "w2_scaled": second.weight, "b1_scaled": first.bias,
        "bn_std_scaled": first.std, "bn_mean_scaled": first.mean,
    }  # fmt: skip


def cross_layer_equalize_chain(params: dict, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    chain = chain_of(inputs)
    equalize(chain, [tuple(pair) for pair in params["pairs"]], kind=params["range"])
    return chain_values(chain)


def high_bias_absorption_chain(params: dict, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    chain = chain_of(inputs)
    for first, second in params["pairs"]:
        absorb_bias(chain[first], chain[second], n_sigma=params["n_sigma"])
    return chain_values(chain)


def analytic_bias_correction_chain(params: dict, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    chain = chain_of(inputs)
    names = list(chain)
    for before, name in pairwise(names):
        expected, _ = moments.clipped_normal_moments(chain[before].mean, chain[before].std)
        state, quantized = chain[name], inputs[f"{name}.w_quantized"].double()
        weight = state.weight.double()
        # shift_statistics: the stored mean moves along
        state.bias, state.mean = (corrected_bias(x, weight, quantized, expected, groups=state.groups) for x in (state.bias, state.mean))
    return chain_values(chain)


def activation_range_from_bn(params: dict, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    ranges: dict[str, Tensor] = {}
    for norm, layer in (("b1", "c2"), ("b2", "c3")):
        made = Moments.normal(inputs[f"{norm}.mean"], inputs[f"{norm}.std"], params["n_sigma"])
        ranges[f"{layer}_input_min"], ranges[f"{layer}_input_max"] = clipped(made, *CLIPS[params["activation"]]).range()
    return ranges


def minmax_quantizer_float_offset(params: dict, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    x = inputs["x"].requires_grad_()
    qmin, qmax = qrange(params["bits"], signed=params["symmetric"])
    lo, hi = torch.tensor(params["min"]), torch.tensor(params["max"])
    if params["symmetric"]:
        scale, zero_point = affine_parameters(lo, hi, qmin, qmax, symmetric=True)
        y = fake_quantize(x, scale, zero_point, qmin, qmax, straight_through)
    else:
        quantizer = OffsetQuantizer(params["bits"])
        quantizer.initialize(torch.stack([lo, hi]))
        y = quantizer(x)
    return {"y": y, "grad_x": torch.autograd.grad(y, x, inputs["grad_output"])[0]}
