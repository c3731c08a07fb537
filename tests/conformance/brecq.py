"""Block reconstruction of lowbit for reference cases."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from lowbit.inputs import Inputs
from lowbit.methods.post_training.brecq import Brecq, released_layers
from lowbit.models.resnet import ResidualBlock
from lowbit.network.insert import set_output_quantizer, set_weight_quantizer
from lowbit.network.layers import evaluating
from lowbit.network.surgery.fold import fold_batch_norm
from lowbit.post_training.pipeline import PtqJob
from lowbit.post_training.reconstruction import objective as objectives, rounding as roundings_of
from lowbit.post_training.reconstruction.adam import ResumableAdam
from lowbit.post_training.reconstruction.objective import Objective, released_weight, rounding_loss, unit_loss
from lowbit.post_training.reconstruction.rounding import AdaptiveRounding, BetaSchedule
from lowbit.post_training.reconstruction.unit_data import CacheSpace, CallCache, TensorCache, UnitData, call_of
from lowbit.post_training.reconstruction.units import PlannedUnit
from lowbit.quantizers import UniformQuantizer
from lowbit.quantizers.ranges.observers import make_observer
from lowbit.spec import BitPolicy, Granularity

PADDING = {1: 0, 3: 1}  # by kernel size
LAYERS = ("conv1", "conv2", "downsample")
BLOCK = PlannedUnit("", ("",), None, is_carried=False, channel_axis=1, cost=1.0)


def in_memory(x: Tensor) -> TensorCache:
    """A cache in memory with one sample for each row of ``x``."""
    cache = TensorCache(x, len(x), len(x), CacheSpace("ram", None))
    cache.write(0, len(x), x)
    return cache


def quantizer_of(params: dict, *, channel_wise: bool) -> UniformQuantizer:
    granularity = Granularity.channel() if channel_wise else Granularity.tensor()
    observer = make_observer("mse", granularity, power=params["p"], steps=params["search_steps"], contain_zero=False)
    return UniformQuantizer(params["bits"], signed=False, symmetric=params["symmetric"], granularity=granularity, observer=observer)


def fixed_grid(bits: int, scale: Tensor, zero_point: Tensor) -> UniformQuantizer:
    grid = UniformQuantizer(bits, signed=False, symmetric=False, granularity=Granularity.channel() if scale.dim() else None)
    grid.set_parameters(scale, zero_point)
    return grid


def rounding_of(bits: int, weight: Tensor, scale: Tensor, zero_point: Tensor) -> AdaptiveRounding:
    rounding = AdaptiveRounding(fixed_grid(bits, scale, zero_point))
    rounding.initialize(weight)
    return rounding


def block_of(tensors: dict[str, Tensor], stride: int = 1, *, weight: str = "weight") -> ResidualBlock:
    """A residual block with folded batch norms."""
    first, last = tensors[f"conv1.{weight}"], tensors[f"conv2.{weight}"]
    block = ResidualBlock(first.shape[1], last.shape[0], stride).eval()
    block.norm1, block.norm2 = nn.Identity(), nn.Identity()
    for name in (name for name in LAYERS if f"{name}.bias" in tensors):
        values = tensors[f"{name}.{weight}"]
        kernel = values.shape[2]
        layer = nn.Conv2d(values.shape[1], values.shape[0], kernel, 1 if name == "conv2" else stride, PADDING[kernel])
        layer.load_state_dict({"weight": values, "bias": tensors[f"{name}.bias"]})
        setattr(block, name, layer)
    return block


def tiny_network(inputs: dict[str, Tensor], stride: int = 2) -> nn.Module:
    """Stem, a residual block, one that halves the size, and a classifier."""

    def part(name: str) -> dict[str, Tensor]:
        return {key.removeprefix(f"{name}."): value for key, value in inputs.items() if key.startswith(f"{name}.")}

    stem, head = part("conv1"), part("fc")
    conv1, fc = nn.Conv2d(stem["weight"].shape[1], stem["weight"].shape[0], 3, padding=1), nn.Linear(*reversed(head["weight"].shape))
    conv1.load_state_dict(stem)
    fc.load_state_dict(head)
    layers: dict[str, nn.Module] = {
        "conv1": conv1, "relu": nn.ReLU(), "layer1": block_of(part("layer1")), "layer2": block_of(part("layer2"), stride),
        "pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "fc": fc,
    }  # fmt: skip
    return nn.Sequential(OrderedDict(layers)).eval()


def quantized_job(params: dict, inputs: dict[str, Tensor]) -> PtqJob:
    """The tiny network with every weight rounded to nearest."""
    sample = Inputs.of(inputs["data"])
    job = PtqJob(tiny_network(inputs, params.get("stride_of_layer2", 2)), BitPolicy.uniform(params["weight_bits"], None), sample)
    job.insert_weights(Brecq(weight_grid="affine").weight_quantizer)
    return job


def weight_quantizer(params: dict, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    quantizer = quantizer_of(params, channel_wise=params["channel_wise"])
    w = inputs["w"].requires_grad_()
    quantizer.initialize(w)
    y = quantizer(w)
    y.backward(inputs["grad_output"])
    return {"delta": quantizer.scale, "zero_point": quantizer.zero_point, "y": y, "grad_w": w.grad}


def activation_quantizer(params: dict, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    quantizer = quantizer_of(params, channel_wise=False)
    quantizer.initialize(inputs["x_init"])
    found, zero_point = quantizer.scale.clone(), quantizer.zero_point.clone()
    quantizer.learn_scale()
    quantizer.set_parameters(inputs["delta_used"].reshape(()), zero_point)
    x = inputs["x"].requires_grad_()
    y = quantizer(x)
    y.backward(inputs["grad_output"])
    return {"delta_init": found, "zero_point": zero_point, "y": y, "grad_x": x.grad, "grad_delta": quantizer.scale.grad}


def bn_fold(params: dict, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    norm = (inputs[name] for name in ("gamma", "beta", "mean", "var"))
    weight, bias, _, _ = fold_batch_norm(inputs["w"], inputs.get("bias"), *norm, params["eps"])
    return {"w": weight, "bias": bias}


def adaround_quantizer(params: dict, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    w = inputs["w"]
    rounding = rounding_of(params["bits"], w, inputs["delta"], inputs["zero_point"])
    start = rounding.logits.detach().clone()
    rounding.logits.data.copy_(inputs["alpha"])
    soft = rounding(w)
    soft.backward(inputs["grad_output"])
    return {"alpha_init": start, "soft": soft, "hard": rounding.encode(w).decode(), "grad_alpha": rounding.logits.grad}


def first_last_bits(params: dict, inputs: dict[str, Tensor]) -> dict[str, list[int]]:
    layers = released_layers(len(params["layers"]), params["weight_bits"], params["act_bits"])
    return {
        "weight_bits": [layer.weight_bits for layer in layers],
        "act_bits": [layer.output_bits for layer in layers],
        "skip_reconstruction": [int(not layer.is_reconstructed) for layer in layers],
    }


def reconstruction_loss(params: dict, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    pred = inputs["pred"].requires_grad_()
    loss = roundings_of.reconstruction_loss(pred, inputs["target"], kind=params["mode"], power=params["p"], gradient=inputs.get("grad"))
    return {"loss": loss, "grad_pred": torch.autograd.grad(loss, pred)[0]}


def fisher_gradient(params: dict, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    job = quantized_job(params, inputs)
    names = list(job.layers)
    inside = [index for index, name in enumerate(names) if name.startswith(f"{params['block']}.")]
    upto = [job.layers[name] for index, name in enumerate(names) if index <= max(inside)]
    parts = inputs["data"].split(params["batch_size"])
    gradients = [objectives.fisher_gradient(job.model, job.reference, params["block"], upto, Inputs.of(part)) for part in parts]
    return {"abs_grad_plus_1": released_weight(torch.cat(gradients))}


def cache_inputs_outputs(params: dict, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    job = quantized_job(params, inputs)
    source = job.model if params["asymmetric"] else job.reference
    (quant_input,), _ = call_of(source, params["block"], job.sample)
    call, _ = call_of(job.reference, params["block"], job.sample)
    with evaluating(job.reference):
        return {"quant_input": quant_input, "fp_output": job.reference.get_submodule(params["block"])(*call)}


def block_reconstruction_weights(params: dict, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    block = block_of(inputs, params["stride"])
    data = inputs["quant_input"]
    roundings = {}
    for name in (name for name in LAYERS if f"{name}.weight" in inputs):
        weight = inputs[f"{name}.weight"]
        roundings[name] = rounding_of(params["weight_bits"], weight, inputs[f"{name}.delta"], inputs[f"{name}.zero_point"])
        set_weight_quantizer(block.get_submodule(name), roundings[name])
    gradient = inputs.get("abs_grad_plus_1")
    cached = UnitData(CallCache.of(in_memory(data)), in_memory(inputs["fp_output"]), None if gradient is None else in_memory(gradient))
    schedule = BetaSchedule("linear", params["iterations"], params["warmup"], *params["beta_range"])
    objective = Objective(
        params["iterations"], params["lr"], len(data), loss=params["mode"], schedule=schedule, regularization=params["reg_weight"]
    )
    adam = ResumableAdam(
        {name: rounding.logits for name, rounding in roundings.items()},
        learning_rate=params["lr"], iterations=params["iterations"], samples=len(data), batch_size=len(data), seed=0,
    )  # fmt: skip
    while not adam.is_finished:
        adam.step(lambda index: rounding_loss(BLOCK, block, cached, index, objective, roundings.values(), adam.iteration))
    result = {}
    for name, rounding in roundings.items():
        weight = inputs[f"{name}.weight"]
        result |= {f"{name}.alpha_final": rounding.logits, f"{name}.hard_weight": rounding.encode(weight).decode()}
        result |= {f"{name}.stable_mask": torch.ones_like(weight)}
    return result


def block_reconstruction_activations(params: dict, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    block = block_of(inputs, params["stride"], weight="hard_weight")
    data, bits = inputs["fp_input"], params["act_bits"]
    quantizers = {name: fixed_grid(bits, inputs[f"{name}.act_delta_init"], inputs[f"{name}.act_zero_point"]) for name in ("block", "conv1")}
    set_output_quantizer(block, quantizers["block"])
    set_output_quantizer(block.relu1, quantizers["conv1"])
    for quantizer in quantizers.values():
        quantizer.learn_scale()
    cached = UnitData(CallCache.of(in_memory(data)), in_memory(inputs["fp_output"]))
    objective = Objective(params["iterations"], params["lr"], len(data), power=params["p"], is_annealed=True)
    adam = ResumableAdam(
        {name: quantizer.scale for name, quantizer in quantizers.items()},
        learning_rate=params["lr"], iterations=params["iterations"], samples=len(data), batch_size=len(data), seed=0, is_annealed=True,
    )  # fmt: skip
    while not adam.is_finished:
        adam.step(lambda index: unit_loss(BLOCK, block, cached, index, objective))
    return {f"{name}.act_delta_final": quantizer.scale for name, quantizer in quantizers.items()}
