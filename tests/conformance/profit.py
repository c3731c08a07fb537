"""PROFIT of lowbit for reference cases."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import lowbit
from lowbit.measure.instability import InstabilityMeter, convolve, output_divergence
from lowbit.methods.training.profit import LOWEST_HSWISH, ROUNDS, SAMPLING, DuqActivation, DuqQuantizer, Profit, freezing_groups
from lowbit.network import insert
from lowbit.network.surgery.constant_padding import pad_with
from lowbit.qat import Classification, GivenNetworks, OptimizerSpec, Recipe, TrainRun
from lowbit.qat.engine.averaging import WeightAverage
from lowbit.spec import BitPolicy, LayerBits, Rule

BITS = {4: 2, 8: 3, 16: 4, 32: 5, 64: 6, 128: 7, 256: 8}  # by the number of levels
FUNCTIONS = {"relu": nn.ReLU, "relu6": nn.ReLU, "sym": nn.Identity, "hswish": nn.Hardswish}  # ReLU6 of the authors does not clip
CLIPPED = {**FUNCTIONS, "relu6": nn.ReLU6}


def with_raw(quantizer: nn.Module, a: Tensor, c: Tensor) -> nn.Module:
    quantizer.raw_range.data.copy_(a.reshape(()))
    quantizer.raw_scale.data.copy_(c.reshape(()))
    return quantizer


def weights(params: dict[str, Any], inputs: dict[str, Tensor]) -> nn.Module:
    return with_raw(DuqQuantizer(BITS[params["n_lv"]], signed=True), inputs["a"], inputs["c"])


def activations(params: dict[str, Any]) -> DuqActivation:
    kind = params["kind"]
    low = LOWEST_HSWISH if kind == "hswish" else 0.0
    return DuqActivation(BITS.get(params["n_lv"], 8), signed=kind == "sym", low=low)


def activation(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor | None]:
    x, quantizer = inputs["x"].requires_grad_(), with_raw(activations(params), inputs["a"], inputs["c"])
    quantizer.set_bit_width(BITS.get(params["n_lv"]))
    function = FUNCTIONS[params["kind"]]() if params["act_func"] else nn.Identity()
    y = quantizer(function(x))
    y.backward(inputs["grad_output"])
    return {"y": y, "grad_x": x.grad, "grad_a": quantizer.raw_range.grad, "grad_c": quantizer.raw_scale.grad}


def weight(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor | None]:
    w, quantizer = inputs["w"].requires_grad_(), weights(params, inputs)
    w_q = quantizer(w)
    w_q.backward(inputs["grad_output"])
    return {"w_q": w_q, "grad_w": w.grad, "grad_a": quantizer.raw_range.grad, "grad_c": quantizer.raw_scale.grad}


def weight_init(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    quantizer = DuqQuantizer(BITS[params["n_lv"]], signed=True)
    quantizer.initialize(inputs["w"])
    return {"a": quantizer.raw_range, "c": quantizer.raw_scale}


def activation_init(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    quantizer = activations(params)
    quantizer.initialize(CLIPPED[params["kind"]]()(inputs["x"]))
    return {"a": quantizer.raw_range, "c": quantizer.raw_scale}


def convolution(weight: Tensor, params: dict[str, Any]) -> nn.Conv2d:
    outputs, inputs, *kernel = weight.shape
    conv = nn.Conv2d(
        inputs if params["groups"] == 1 else outputs,
        outputs,
        tuple(kernel),
        params["stride"],
        params["padding"],
        1,
        params["groups"],
        bias=False,
    )
    conv.load_state_dict({"weight": weight})
    return conv


def pad_conv(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor | None]:
    x, quantizer, conv = inputs["x"].requires_grad_(), weights(params, inputs), convolution(inputs["w"], params)
    insert.set_weight_quantizer(conv, quantizer)
    if params["mode"] == "HS":
        pad_with(conv, LOWEST_HSWISH)
    y = conv(x)
    y.backward(inputs["grad_output"])
    found = {"grad_x": x.grad, "grad_w": insert.float_weight(conv).grad}
    return {**found, "y": y, "grad_a": quantizer.raw_range.grad, "grad_c": quantizer.raw_scale.grad}


def aiwq_metric(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Any]:
    conv, meter = convolution(inputs["w_q_old"], params), InstabilityMeter()
    outputs = [convolve(conv, inputs["x"], inputs[name]) for name in ("w_q_new", "w_q_old")]
    for name in ("w_q_old", "w_q_new"):
        conv.load_state_dict({"weight": inputs[name]})
        with meter.watching(conv):
            conv(inputs["x"])
        meter.step()
    return {"kl": output_divergence(*outputs), "metric_after_ema": meter.metric[""]}


class Net(nn.Module):
    """The network of the training cases."""

    def __init__(self, prefix: str, inputs: dict[str, Tensor]) -> None:
        super().__init__()
        state = {name.removeprefix(prefix).replace("/", "."): value for name, value in inputs.items() if name.startswith(prefix)}
        (hidden, channels, *_), (classes, _) = state["conv1.weight"].shape, state["fc.weight"].shape
        self.conv1, self.bn1, self.act1 = nn.Conv2d(channels, hidden, 3, padding=1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU()
        self.conv2, self.bn2 = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False), nn.BatchNorm2d(hidden)
        self.act2, self.fc = nn.ReLU(), nn.Linear(hidden, classes)
        self.load_state_dict(state, strict=False)
        names = [name.removesuffix(".a") for name in state if name.endswith(".a")]
        self.raw = {name: (state[f"{name}.a"], state[f"{name}.c"]) for name in names}

    def forward(self, x: Tensor) -> Tensor:
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.act2(self.bn2(self.conv2(x)))
        return self.fc(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))


def prepared(params: dict[str, Any], inputs: dict[str, Tensor]) -> tuple[nn.Module, dict[str, nn.Module]]:
    """The network with its quantizers, and these by the names of the reference's modules."""
    bits, float_network = BITS[params["n_lv"]], Net("init.", inputs)
    policy = BitPolicy(LayerBits(bits, bits), rules=(Rule("conv1", activation="float"), Rule("fc", activation="float")), merges=bits)
    model = lowbit.prepare(float_network, method="profit", progressive=False, policy=policy, sample=inputs["x"][0]).train()
    quantizers = {name: insert.weight_quantizer(model.get_submodule(name)) for name in ("conv1", "conv2", "fc")}
    quantizers |= {"act1": insert.input_quantizer(model.conv2), "act2": insert.activation_quantizers(model)["act2.output"]}
    for name, quantizer in quantizers.items():
        with_raw(quantizer, *float_network.raw[name])
    return model, quantizers


def values(model: nn.Module, quantizers: dict[str, nn.Module], prefix: str) -> dict[str, Tensor]:
    found = {f"{name}/{key}": getattr(q, raw) for name, q in quantizers.items() for key, raw in (("a", "raw_range"), ("c", "raw_scale"))}
    found |= {f"{name}/weight": insert.float_weight(model.get_submodule(name)) for name in ("conv1", "conv2", "fc")}
    for name in ("bn1", "bn2"):
        norm = model.get_submodule(name)
        found |= {f"{name}/{key}": getattr(norm, key) for key in ("weight", "bias", "running_mean", "running_var")}
    return {f"{prefix}.{name}": value.detach().clone() for name, value in (found | {"fc/bias": model.fc.bias}).items()}


def ts_training(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Any]:
    model, quantizers = prepared(params, inputs)
    method = model.lowbit_method
    spec = OptimizerSpec("sgd", params["lr"], params["momentum"], params["nesterov"], params["weight_decay"], "constant")
    run = TrainRun(
        model, method, Classification(), Recipe(1, optimizer=spec), params["steps"], given=GivenNetworks(Net("teacher.", inputs))
    )
    run.phases = [replace(run.phases[-1], name=SAMPLING if params["sampling"] else ROUNDS[-1])]
    average = WeightAverage(with_average(params, inputs), params["ema_rate"])
    for _ in run.each_epoch():
        for name in params["frozen"]:
            run.freeze(name)
        for batch in zip(inputs["x"], inputs["target"], strict=True):
            run.before_step()
            for loss in run.losses(batch):
                loss.backward()
            run.after_backward()
            run.optimizer_step()
            run.after_step()
            average.update(model)
    found = values(model, quantizers, "final") | {f"metric.{name}": value for name, value in method.meter.metric.items()}
    average.apply(model)
    return found | values(model, quantizers, "ema")


def with_average(params: dict[str, Any], inputs: dict[str, Tensor]) -> nn.Module:
    """The network whose values the averages start from."""
    start = {name.replace("ema.", "init."): value for name, value in inputs.items() if name.startswith("ema.")}
    return prepared(params, {**inputs, **start})[0]


def lr_schedule(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Any]:
    spec = replace(Profit().default_recipe().optimizer, learning_rate=params["base_lr"])
    model = lowbit.prepare(nn.Linear(2, 2), method="profit", kd_weight=0, policy=BitPolicy(LayerBits(4, 4)), sample=torch.ones(2, 2))
    run, found = TrainRun(model, model.lowbit_method, Classification(), Recipe(1, optimizer=spec), 1), []
    run.phases = [replace(phase, epochs=params["max_epochs"]) for phase in run.phases]
    for _ in run.each_epoch():
        run.before_step()
        found.extend(group["lr"] for optimizer in run.optimizers for group in optimizer.param_groups if group["role"] == "weights")
        run.after_step()
    return {"lr": found}


def freeze_selection(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Any]:
    first, second = freezing_groups(dict(zip(params["names"], inputs["metric"].tolist(), strict=True)))
    flags = ([name in frozen for name in params["names"]] for frozen in (first, [*first, *second]))
    return dict(zip(("frozen_in_second", "frozen_in_third"), (torch.tensor(found).float() for found in flags), strict=True))
