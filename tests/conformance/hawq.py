"""HAWQ of lowbit for reference cases, and the networks of its cases and of HAWQ-V2's."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lowbit.measure.hessian import Draw, Eigenpair, Hessian, Spectrum, exact_spectrum, top_eigenvalues
from lowbit.measure.loss_surface import LossSurface
from lowbit.methods.mixed_precision.hawq import Hawq, descending, omega, perturbation, scores
from lowbit.methods.mixed_precision.hawq_quantizers import HawqActivation, HawqWeight
from lowbit.spec import Granularity

CONVERGED = {"tolerance": 1e-5, "max_iterations": 2000}


class Network(nn.Module):
    """The networks of the cases: two convolutions and one or two linear layers, with ReLU, or with a batch norm and tanh."""

    def __init__(self, inputs: dict[str, Tensor]) -> None:
        super().__init__()
        state = {name.removeprefix("state."): value for name, value in inputs.items() if name.startswith("state.")}
        has_norm = "bn1.weight" in state
        first, second = state["conv1.weight"], state["conv2.weight"]
        groups, stride, padding = (2, 1, 0) if has_norm else (1, 2, 1)
        self.conv1 = nn.Conv2d(first.shape[1], first.shape[0], 3, padding=padding, bias=False)
        self.bn1 = nn.BatchNorm2d(len(first)) if has_norm else nn.Identity()
        self.act1, self.act2, self.act3 = (nn.Tanh() if has_norm else nn.ReLU() for _ in range(3))
        self.conv2 = nn.Conv2d(len(first), len(second), 3, stride, padding=1, groups=groups)
        linear = [nn.Linear(*reversed(state[f"{name}.weight"].shape)) for name in ("fc", "fc1", "fc2") if f"{name}.weight" in state]
        for name, layer in zip(("fc1", "fc2") if has_norm else ("fc",), linear, strict=True):
            self.add_module(name, layer)
        self.pool, self.has_norm = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), has_norm
        missing = self.load_state_dict(state, strict=False)
        assert not missing.unexpected_keys and set(missing.missing_keys) <= {"bn1.num_batches_tracked"}

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.act2(self.conv2(self.act1(self.bn1(self.conv1(x))))))
        return self.fc2(self.act3(self.fc1(x))) if self.has_norm else self.fc(x)


def task_loss(output: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    return cross_entropy(output, batch[1])


def surface_of(inputs: dict[str, Tensor], sizes: list[int] | None = None) -> LossSurface:
    sizes = [len(inputs["x"])] if sizes is None else sizes
    return LossSurface(Network(inputs), zip(inputs["x"].split(sizes), inputs["labels"].split(sizes), strict=True), task_loss)


def hessian_of(inputs: dict[str, Tensor], *names: str) -> Hessian:
    return Hessian(surface_of(inputs), {"block": names})


def spectrum_of(inputs: dict[str, Tensor], *names: str) -> Spectrum:
    doubled = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    surface = surface_of(doubled)
    wide = LossSurface(surface.model.double(), surface.batches, task_loss)
    return exact_spectrum(Hessian(wide, {"block": names}))


def given(vectors: Iterable[Tensor]) -> Draw:
    """Draws these vectors, one after the other."""
    left = iter(vectors)
    return lambda like: next(left).to(like)


def eigenpairs(hessian: Hessian, count: int = 1) -> list[Eigenpair]:
    generator = torch.Generator().manual_seed(0)
    return top_eigenvalues(hessian, lambda like: torch.randn(like.shape, generator=generator), count=count, **CONVERGED)


def top_eigenvalue(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for layer in params["layers"]:
        exact = spectrum_of(inputs, f"{layer}.weight").eigenvalues
        found[f"top_eigenvalue_pyhessian.{layer}"] = eigenpairs(hessian_of(inputs, f"{layer}.weight"))[0].value
        found[f"top3_eigenvalues_exact.{layer}"] = exact[:3]
        found[f"eig_min_max_exact.{layer}"] = [min(exact), max(exact)]
    names = [name for name, _ in Network(inputs).named_parameters()]
    found["top2_eigenvalues_pyhessian.whole_net"] = [pair.value for pair in eigenpairs(hessian_of(inputs, *names), count=2)]
    found["top3_eigenvalues_exact.whole_net"] = spectrum_of(inputs, *names).eigenvalues[:3]
    surface = surface_of(inputs)
    found["loss"] = task_loss(surface.model(inputs["x"]), (inputs["x"], inputs["labels"]))
    return found


def power_iteration(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Any]:
    hessian = hessian_of(inputs, f"{params['layer']}.weight")
    (all_of_them,) = top_eigenvalues(hessian, given([inputs["v0"]]), tolerance=0.0, max_iterations=params["iterations"])
    (settled,) = top_eigenvalues(hessian, given([inputs["v0"]]), tolerance=params["tol"], max_iterations=Hawq.max_iterations)
    before = settled.estimates[-2] if settled.is_converged else settled.value  # what the authors' program returns
    return {
        "hv": hessian.product([inputs["v0"]])[0],
        "estimates": all_of_them.estimates,
        "eigenvector": all_of_them.vector[0],
        "estimate_with_tol": before,
    }


def weight(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Any]:
    granularity = Granularity.channel() if params["per_channel"] else Granularity.tensor()
    quantizer = HawqWeight(params["bits"], granularity=granularity, percentile=params.get("percentile", 0))
    w = inputs["w"].requires_grad_()
    w_q = quantizer(w)
    w_q.backward(inputs["grad_output"])
    codes = quantizer.encode(w)
    return {
        "codes": codes.codes, "scale": quantizer.grid(w).scale, "w_q": w_q, "grad_w": w.grad,
        "perturbation": perturbation(w, params["bits"], granularity),
    }  # fmt: skip


def activation_range(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Any]:
    quantizer = HawqActivation(
        params["bits"], is_signed=params["mode"] == "symmetric", momentum=params["momentum"], percentile=params["percentile"]
    )
    steps: dict[str, list[Tensor]] = {name: [] for name in ("y", "grad_x", "scale", "x_min", "x_max")}
    for batch, grad_output in zip(inputs["x"], inputs["grad_output"], strict=True):
        x = batch.clone().requires_grad_()
        y = quantizer(x)
        y.backward(grad_output)
        quantizer.project()
        values = (y.detach(), x.grad, quantizer.grid(x).scale, quantizer.lower.clone(), quantizer.upper.clone())
        for name, value in zip(steps, values, strict=True):
            steps[name].append(value)  # type: ignore[arg-type]
    stacked = {name: torch.stack(values) for name, values in steps.items()}
    return {**stacked, "y_frozen": quantizer.eval()(inputs["x_frozen"])}


def sensitivity(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Any]:
    weights = [Network(inputs).get_parameter(f"{layer}.weight") for layer in params["layers"]]
    values = [eigenpairs(hessian_of(inputs, f"{layer}.weight"))[0].value for layer in params["layers"]]
    counts = [math.prod(one.shape) for one in weights]
    perturbations = [[perturbation(one, bits) for bits in params["bits"]] for one in weights]
    table = omega(values, perturbations)
    score = scores(values, counts)
    return {
        "eigenvalue": values, "n": counts, "S": score, "perturbation": perturbations, "Omega": table,
        "order_by_S": descending(score), "order_by_Omega_first_bits": descending([row[0] for row in table]),
    }  # fmt: skip
