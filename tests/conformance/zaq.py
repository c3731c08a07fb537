"""ZAQ of lowbit for reference cases."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lowbit
from lowbit.methods.zero_shot.zaq import View, Zaq, channel_map, channels_and_pixels, feature_discrepancy, normalized, position_map
from lowbit.network.insert import float_weight
from lowbit.qat.prepare import method_of
from lowbit.quantizers.running_range import MinMaxWeightQuantizer, RunningRangeQuantizer
from lowbit.synthesis.generator import Generator

SMALLEST_NORM = 1e-12  # of the authors' program


class Network(nn.Module):
    """The network of the cases."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        super().__init__()
        first, second = state["conv1.weight"], state["conv2.weight"]
        self.conv1 = nn.Conv2d(first.shape[1], first.shape[0], 3, padding=1, bias=False)
        self.bn1, self.relu1 = nn.BatchNorm2d(first.shape[0]), nn.ReLU()
        self.conv2 = nn.Conv2d(second.shape[1], second.shape[0], 3, 2, padding=1, bias=False)
        self.bn2, self.relu2 = nn.BatchNorm2d(second.shape[0]), nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(*reversed(state["linear.weight"].shape))
        load(self, state)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.bn1(self.conv1(x)))
        return self.linear(self.pool(self.relu2(self.bn2(self.conv2(x)))).flatten(1))


@dataclass
class GivenNoise(Zaq):
    """With the noise of a case in place of random one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.given: Iterator[Tensor] = iter(())

    def noise(self, run: lowbit.TrainRun, count: int) -> Tensor:
        return next(self.given)


def load(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    missing = model.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys and all(name.endswith("num_batches_tracked") for name in missing.missing_keys)


def load_generator(generator: nn.Module, state: Mapping[str, Tensor]) -> None:
    """The tensors of the case in the order of the authors' modules, which is that of ours."""
    names = [name for name in generator.state_dict() if not name.endswith("num_batches_tracked")]
    load(generator, dict(zip(names, state.values(), strict=True)))


def within(inputs: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in inputs.items() if name.startswith(prefix)}


def quantized_conv(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor | None]:
    w, x = inputs["w"].requires_grad_(), inputs["x"].requires_grad_()
    y = F.conv2d(x, MinMaxWeightQuantizer(params["bits"])(w), padding=params["padding"])
    y.backward(inputs["grad_output"])
    return {"y": y, "grad_x": x.grad, "grad_w": w.grad}


def quantized_activation(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor | None]:
    quantizer, x = RunningRangeQuantizer(params["bits"]), inputs["x"].requires_grad_()
    y_calibration = quantizer(inputs["x_calibration"])
    quantizer.eval()
    y = quantizer(x)
    y.backward(inputs["grad_output"])
    return {"y_calibration": y_calibration, "x_min": quantizer.lower, "x_max": quantizer.upper, "y": y, "grad_x": x.grad}


def relation_loss(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor | None]:
    student, gamma = inputs["student"].requires_grad_(), params["gamma"]
    loss = feature_discrepancy(student, inputs["teacher"], gamma=gamma, epsilon=SMALLEST_NORM)
    loss.backward()
    x = normalized(channels_and_pixels(student), params["normalize_dim"], SMALLEST_NORM)
    maps = {"channel_map_student": channel_map(x, gamma), "spatial_map_student": position_map(x, gamma)}
    return {"loss": loss, "grad_student": student.grad, **maps}


def relation_loss_channel(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    settings = {"gamma": params["gamma"], "epsilon": SMALLEST_NORM}
    return {"loss": feature_discrepancy(inputs["student"], inputs["teacher"], "scrm_channel", **settings)}


def generator(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    made = Generator((params["nc"], params["img_size"], params["img_size"]), latent=params["nz"], width=params["ngf"])
    load_generator(made, {name: value for name, value in inputs.items() if name != "z"})
    return {"images": made.train(params["mode"] == "train")(inputs["z"].flatten(1))}


def adversarial_losses(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    method = Zaq(alpha=params["alpha"], beta=params["beta"], gamma=params["relation_gamma"], epsilon=SMALLEST_NORM)
    network, teacher = (View(inputs[f"{side}_logits"], list(within(inputs, f"{side}_feat").values())) for side in ("q", "p"))
    losses = {"loss_q": method.network_loss(network, teacher), "loss_g": method.generator_loss(network, teacher)}
    return {**losses, "relation": method.relation_loss(network, teacher)}


def adversarial_training(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Any]:
    size = params["img_size"]
    method = GivenNoise(
        alpha=params["alpha"], beta=params["beta"], gamma=params["relation_gamma"], latent=params["nz"], width=params["ngf"],
        network_steps=params["q_steps_per_round"], generator_learning_rate=params["lr_g"],
    )  # fmt: skip
    policy = lowbit.BitPolicy.uniform(params["weight_bits"], params["activation_bits"], first_last=None)
    for layer in ("conv1", "linear"):  # activations are quantized behind the two ReLUs alone
        policy = policy.with_rule(match=layer, weight=params["weight_bits"], activation="float")
    network = Network(within(inputs, "net."))
    sample = torch.zeros(2, network.conv1.in_channels, size, size)
    model = lowbit.prepare(network, method=method, policy=policy.with_merges(params["activation_bits"]), sample=sample).train()
    spec = lowbit.OptimizerSpec(
        learning_rate=params["lr_q"],
        momentum=params["momentum_q"],
        nesterov=False,
        weight_decay=params["weight_decay_q"],
        schedule="constant",
    )
    run = lowbit.TrainRun(
        model, method_of(model), lowbit.Classification(), lowbit.Recipe(1, optimizer=spec), params["generator_rounds"],
        given=lowbit.qat.GivenNetworks(float_network=network),
    )  # fmt: skip
    load_generator(run.networks["generator"], within(inputs, "gen."))
    method_of(model).given = iter(inputs["z"].flatten(2))
    losses: dict[str, list[Tensor]] = {"network": [], "generator": []}
    for _ in run.each_epoch():
        for _ in itertools.repeat(None, params["generator_rounds"]):
            last = {}
            for turn in run.phase.turns:
                run.before_step()
                loss = run.loss(torch.empty(inputs["z"].shape[1], 0))
                loss.backward()
                run.after_backward()
                run.optimizer_step()
                run.after_step()
                last[turn.name] = loss.detach()
            losses["network"].append(last["network"])
            losses["generator"].append(last["generator"])
    weights = {f"q_{name}": float_weight(getattr(model, name)) for name in ("conv1", "conv2", "linear")}
    return {
        "loss_q": torch.stack(losses["network"]),
        "loss_g": torch.stack(losses["generator"]),
        "gen_l1": run.networks["generator"].start.weight,
        **weights,
    }
