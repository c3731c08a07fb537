"""HAQ of lowbit for reference cases."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

from lowbit.assignment import environment as walks
from lowbit.assignment.budget import Limit
from lowbit.assignment.costs import Cost
from lowbit.assignment.ddpg import DdpgAgent, DdpgSettings, Transitions
from lowbit.assignment.environment import Environment, code_cost, facts_of, share
from lowbit.inputs import Inputs
from lowbit.methods.mixed_precision import haq_quantizers
from lowbit.methods.mixed_precision.haq_quantizers import HaqActivation, HaqWeight
from lowbit.network.insert import weight_sites
from lowbit.quantizers.kmeans import KMeansQuantizer, lloyd
from lowbit.spec import LayerBits

PADDING = {1: 0, 3: 1, 5: 2, 7: 3}  # that keeps the size, by kernel


def activation(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Any]:
    quantizer = HaqActivation(
        params["a_bit"],
        is_signed=not params["half_wave"],
        initial_clip=params["activation_range"],
        learns_clip=params["trainable_range"],
    )
    x = inputs["x"].requires_grad_()
    y = quantizer(x)
    y.backward(inputs["grad_output"])
    return {"y": y, "grad_x": x.grad, "grad_range": quantizer.clip.grad}


def weight(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Any]:
    clip = "max" if params["weight_range"] <= 0 else params["weight_range"]
    quantizer = HaqWeight(params["w_bit"], clip=clip, tanh=params["tanh_weight"])
    w = inputs["w"].requires_grad_()
    quantizer.initialize(w)
    quantized = quantizer(w)
    quantized.backward(inputs["grad_output"])
    return {"w_q": quantized, "grad_w": w.grad, "range_after": quantizer.clip}


def kl_threshold(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Any]:
    return {"threshold": haq_quantizers.kl_threshold(inputs["x"], params["bits"])}


def calibrate_then_conv(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Any]:
    activations = HaqActivation(params["a_bit"], is_signed=not params["half_wave"], initial_clip=params["init_range"])
    weights = HaqWeight(params["w_bit"])
    w, x = inputs["weight"].requires_grad_(), inputs["x"].requires_grad_()
    before = conv2d(inputs["x_calibration"], w, None, params["stride"], params["padding"])
    activations.initialize(inputs["x_calibration"])
    weights.initialize(w)
    found = {"activation_range": activations.clip.detach().clone(), "weight_range": weights.clip.clone()}
    y = conv2d(activations(x), weights(w), None, params["stride"], params["padding"])
    y.backward(inputs["grad_output"])
    return {"y_calibration": before, **found, "y": y, "grad_x": x.grad, "grad_weight": w.grad, "grad_range": activations.clip.grad}


def kmeans(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Any]:
    w = inputs["w"]
    centroids, labels = lloyd(w.flatten(), inputs["init_centroids"], params["max_iter"])
    quantizer = KMeansQuantizer(params["bits"])
    quantizer.set_centroids(centroids)
    quantized = quantizer(w)
    quantizer.freeze(w)
    return {
        "centroids": centroids,
        "labels": labels.reshape(w.shape),
        "w_q": quantized,
        "w_reprojected": quantizer(inputs["w_after_sgd"]),
    }


def action_to_bits(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Any]:
    return {"bits": [walks.action_to_bits(action, params["min_bit"], params["max_bit"]) for action in inputs["action"].tolist()]}


def _network(layers: dict[str, Any]) -> tuple[nn.Module, Inputs]:
    modules: list[nn.Module] = []
    for channels_in, channels_out, kernel, stride, groups in layers["convs_cin_cout_kernel_stride_groups"]:
        modules.append(nn.Conv2d(channels_in, channels_out, kernel, stride, PADDING[kernel], groups=groups))
        modules.append(nn.ReLU())
    model = nn.Sequential(*modules, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(*layers["fc_in_out"])).eval()
    return model, Inputs.of(torch.zeros(1, *layers["input"]), model)


def _walk(environment: Environment, actions: list[float]) -> dict[str, Any]:
    """One episode: what the agent sees and gets."""
    first = environment.reset()
    steps = [environment.step(action) for action in actions]
    observations, rewards, done = zip(*steps, strict=True)
    return {"first_observation": first, "observations": torch.stack(observations), "rewards": rewards, "done": done}


def episode_linear(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Any]:
    model, sample = _network(params["layers"])
    sites = weight_sites(model)
    widths = _widths(params)
    table: dict[str, dict[LayerBits, float]] = {}
    for name, rows in zip(sites, inputs["cost_table"].tolist(), strict=True):
        table[name] = {LayerBits(w, a): float(cost) for w, row in enumerate(rows, 1) for a, cost in enumerate(row, 1)}
        table[name] |= {LayerBits(w, None): float(row[-2]) for w, row in enumerate(rows, 1)}  # the authors' -1 reads this column
    cost = Cost("latency", "cycles", table)
    cost = replace(cost, reference=cost.of(dict.fromkeys(sites, LayerBits(params["float_bit"], params["float_bit"]))))
    names = list(sites)
    environment = Environment(
        facts_of(model, sample, sites),
        dict.fromkeys(sites, tuple(LayerBits(w, a) for w in widths for a in widths)),
        [(cost, cost.limit(Limit("latency", params["ratio"], is_share=True)))],
        measure=lambda bits: params["accuracy"],
        original=params["original_accuracy"],
        pinned={names[0]: LayerBits(8, None), names[-1]: LayerBits(8, 8)},
        pins="over budget",
        flag="previous",
        forgets=False,
    )
    static = environment.embedding.clone()
    episodes, raw, final, costs = [], [], [], []
    for actions in inputs["actions"].tolist():
        episodes.append(_walk(environment, actions))
        raw.append([bits for chosen in environment.chosen.values() for bits in (chosen.weight, chosen.activation)])
        final.append([[bits.weight, -1 if bits.activation is None else bits.activation] for bits in environment.bits.values()])
        costs.append(cost.of(environment.bits))
    return {
        "static_embedding": static,
        "first_observation": torch.stack([episode["first_observation"] for episode in episodes]),
        "observations": torch.stack([episode["observations"] for episode in episodes]),
        "rewards": [episode["rewards"] for episode in episodes],
        "done": [episode["done"] for episode in episodes],
        "raw_bits": raw,
        "final_strategy": final,
        "final_cost": costs,
        "original_cost": cost.reference,
    }


def episode_size(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Any]:
    model, sample = _network(params["layers"])
    sites = weight_sites(model)
    counts = {name: site.original.numel() for name, site in sites.items()}
    choices = dict.fromkeys(sites, tuple(LayerBits(bits, None) for bits in _widths(params)))
    cost = code_cost(counts, choices)
    environment = Environment(
        facts_of(model, sample, sites),
        choices,
        [(cost, cost.limit(Limit("size", params["ratio"], is_share=True)))],
        measure=lambda bits: params["accuracy"],
        original=params["original_accuracy"],
        first_action=4.0,
        actions="bits",
    )
    static = environment.embedding.clone()
    return {
        "static_embedding": static,
        **_walk(environment, inputs["actions"].tolist()),
        "raw_bits": [bits.weight for bits in environment.chosen.values()],
        "final_strategy": [bits.weight for bits in environment.bits.values()],
        "final_size_bits": cost.of(environment.bits),
        "size_ratio": share(cost, environment.bits),
        "weight_counts": list(counts.values()),
    }


def _widths(params: dict[str, Any]) -> list[int]:
    return [bits for bits in range(1, 9) if params["min_bit"] <= bits <= params["max_bit"]]


def ddpg_update(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Any]:
    settings = DdpgSettings(
        hidden=(params["hidden1"], params["hidden2"]),
        actor_learning_rate=params["lr_actor"],
        critic_learning_rate=params["lr_critic"],
        tau=params["tau"],
        discount=params["discount"],
        warmup=params["warmup"],
        noise=params["init_delta"],
        noise_decay=params["delta_decay"],
        baseline_rate=params["moving_alpha"],
    )
    agent = DdpgAgent(inputs["state"].shape[-1], settings, torch.Generator().manual_seed(0))
    agent.actor.load_state_dict(_part(inputs, "actor."))
    agent.critic.load_state_dict(_part(inputs, "critic."))
    agent.reset_targets()
    critic_losses, actor_losses, averages = [], [], []
    for step in range(params["steps"]):
        names = ("state", "action", "reward", "next_state", "not_terminal")
        critic_loss, actor_loss = agent.update(Transitions(*(inputs[name][step] for name in names)))
        critic_losses.append(critic_loss)
        actor_losses.append(actor_loss)
        averages.append(agent.baseline)
    return {
        "value_loss": torch.stack(critic_losses),
        "policy_loss": torch.stack(actor_losses),
        "moving_average": averages,
        **agent.state(),
        "actor_output": agent.actor(inputs["state"][0]),
        "noise_sigma": [agent.noise(episode) for episode in inputs["episode"].tolist()],
    }


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
