"""Binary super-resolution of lowbit for reference cases."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import lowbit
from lowbit.measure.macs import count_macs
from lowbit.methods.super_resolution.binary_sr import BamBlocks, BamWeight, BinarySr, accumulate, chain
from lowbit.models.bsrn import bsrn
from lowbit.models.srresnet import srresnet
from lowbit.models.vdsr import vdsr
from lowbit.network import insert
from lowbit.qat import Slot
from lowbit.runtime.thresholds import sign_threshold


def slot(layer: nn.Module | None = None) -> Slot:
    return Slot("layer", nn.Conv2d(1, 1, 1) if layer is None else layer, 1)


def weight_quantizer(earlier: Any, alpha: Any = None) -> BamWeight:
    quantizer = BinarySr(alpha="search" if alpha == "search" else "ones").weight_quantizer(slot())
    assert isinstance(quantizer, BamWeight)
    quantizer.earlier = tuple(earlier)
    quantizer.coefficients = alpha if isinstance(alpha, Tensor) else None
    return quantizer


def weight(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    w = inputs["w"].requires_grad_()
    *earlier, own = w.unbind(0)
    quantizer = weight_quantizer(earlier, inputs.get("alpha"))
    y = quantizer(own)
    y.backward(inputs["grad_output"])
    encoded = quantizer.encode(own)
    signs = torch.tensor([-1.0, 1.0])[encoded.codes.long()]
    error = quantizer.error(own, quantizer.chosen(own.detach()))
    return {"codes": signs, "scale": encoded.decoder.tensors()["scale"], "w_b": y, "J": error, "grad_w": w.grad}


def search(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    *earlier, own = inputs["w"].unbind(0)
    quantizer = weight_quantizer(earlier, "search")
    alpha, ones = quantizer.chosen(own), torch.ones(len(inputs["w"]))
    plain = torch.tensor([*[0.0 for _ in earlier], 1.0])
    errors = {name: quantizer.error(own, factors) for name, factors in (("J", alpha), ("J_plain", plain), ("J_ones", ones))}
    return {"alpha": alpha, "w_b": quantizer(own), **errors}


def norm_of(inputs: dict[str, Tensor], row: int | None = None, eps: float = 1e-5, momentum: float = 0.1) -> nn.BatchNorm2d:
    names = {"weight": "bn_weight", "bias": "bn_bias", "running_mean": "running_mean", "running_var": "running_var"}
    state = {own: inputs[name] if row is None else inputs[name][row] for own, name in names.items()}
    norm = nn.BatchNorm2d(len(state["weight"]), eps=eps, momentum=momentum)
    norm.load_state_dict(state, strict=False)
    return norm


def activation(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    a, scales = inputs["a"].requires_grad_(), inputs["beta_scale"].requires_grad_()
    norm = norm_of(inputs).train(params["training"])
    total = accumulate(a.unbind(0), scales, absolute=params["abs"])
    a_b = BinarySr().activation_quantizer(slot())(norm(total))
    a_b.backward(inputs["grad_output"])
    grads = {"grad_a": a.grad, "grad_beta_scale": scales.grad, "grad_bn_weight": norm.weight.grad, "grad_bn_bias": norm.bias.grad}
    return {"accumulated": total, "a_b": a_b, "running_mean": norm.running_mean, "running_var": norm.running_var, **grads}


def block(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    names = [f"conv{number}" for number in range(params["N"])]
    layers = {}
    for name, w in zip(names, inputs["w"], strict=True):
        layers[name] = nn.Conv2d(w.shape[1], w.shape[0], tuple(w.shape[2:]), padding="same", bias=False)
        layers[name].load_state_dict({"weight": w})
    model = BamBlocks([chain(names)], layers, absolute=params["abs"])
    accumulator: Any = model.accumulators[0]
    accumulator.scales.data.copy_(inputs["beta_scale"])
    accumulator.norms = nn.ModuleList(norm_of(inputs, row, params["eps"], params["momentum"]) for row in range(params["N"]))
    originals = [layer.weight for layer in layers.values()]
    signs: list[Tensor] = []
    for place, layer in enumerate(layers.values()):
        alpha = None if params["alpha"] is None else torch.tensor(params["alpha"][place])
        insert.set_weight_quantizer(layer, weight_quantizer(originals[:place], alpha))
        quantizer = BinarySr().activation_quantizer(slot(layer))
        insert.set_input_quantizer(layer, quantizer)
        quantizer.register_forward_hook(lambda _module, _args, output: signs.append(output.detach()))
    x = inputs["x"].requires_grad_()
    y = model.train()(x)
    y.backward(inputs["grad_output"])
    a_b = torch.stack(signs)
    norms: list[Any] = list(accumulator.norms)
    found = {
        "y": y,
        "a_b": a_b,
        "grad_x": x.grad,
        "grad_w": torch.stack([insert.float_weight(layer).grad for layer in layers.values()]),  # type: ignore[misc]
        "grad_beta_scale": accumulator.scales.grad,
        "grad_bn_weight": torch.stack([norm.weight.grad for norm in norms]),
        "grad_bn_bias": torch.stack([norm.bias.grad for norm in norms]),
        "running_mean": torch.stack([norm.running_mean for norm in norms]),
        "running_var": torch.stack([norm.running_var for norm in norms]),
    }
    with torch.no_grad():
        return found | {"y_eval": model.eval()(inputs["x"])}


def fold_batch_norm(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    norm = norm_of(inputs, eps=params["eps"]).eval()
    with torch.no_grad():
        codes = BinarySr().activation_quantizer(slot())(norm(inputs["z"]))
        threshold, flip = sign_threshold(lambda x: norm(x.reshape(1, -1, 1, 1)).flatten(), norm.num_features)
    return {"threshold": threshold, "flipped": torch.zeros(norm.num_features) if flip is None else flip, "codes": codes}


NETWORKS: dict[str, Callable[..., nn.Module]] = {"srresnet_bam": srresnet, "vdsr_bam": vdsr, "bsrn": bsrn}


def network_size(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, float]:
    depth = {} if params["network"] == "vdsr_bam" else {"blocks": params["blocks"]}
    network = NETWORKS[params["network"]](params["scale"], width=params["features"], **depth)
    parameters = sum(p.numel() for p in network.parameters())
    model = lowbit.prepare(network, method="binary_sr", policy="paper", weight_bits=1, activation_bits=1, sample=torch.zeros(1, 3, 4, 4))
    sites = insert.weight_sites(model)
    width, height = params["output_size"]
    picture = torch.empty(1, 3, height, width, device="meta")[..., :: params["scale"], :: params["scale"]]
    macs = count_macs(model.to("meta"), picture)
    return {
        "conv_weights": sum(site.original.numel() for site in sites.values()),
        "binary_weights": sum(site.original.numel() for site in sites.values() if site.quantizer is not None),
        "macs": int(sum(macs.values())),
        "base_parameters": parameters,
    }
