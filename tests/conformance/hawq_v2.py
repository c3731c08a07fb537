"""HAWQ-V2 of lowbit for reference cases."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lowbit.measure.hessian import Hessian, exact_spectrum, hutchinson_traces
from lowbit.measure.loss_surface import LossSurface
from lowbit.methods.mixed_precision.hawq import omega, perturbation
from lowbit.methods.mixed_precision.hawq_v2 import limit_between, select
from lowbit.network.taps import Tap


def beside(name: str) -> ModuleType:
    """Another adapter; they lie in no package that can be imported from everywhere."""
    spec = importlib.util.spec_from_file_location(f"conformance_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


hawq = beside("hawq")  # its networks are the same
AUTHORS_FLOOR = 1e-6  # what their program adds to the mean that a change is compared with


def all_probes(hessian: Hessian, probes: Tensor) -> tuple[float, ...]:
    """``z' H z`` for each probe, whatever their running mean."""
    return hutchinson_traces(hessian, hawq.given(probes), min_probes=len(probes), max_probes=len(probes))["block"].values


def hutchinson_trace(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for layer in params["layers"]:
        hessian, probes = hawq.hessian_of(inputs, f"{layer}.weight"), inputs[f"probes.{layer}"]
        every = hutchinson_traces(hessian, hawq.given(probes), min_probes=len(probes), max_probes=len(probes))["block"]
        settled = hutchinson_traces(
            hessian, hawq.given(probes), min_probes=1, max_probes=len(probes), tolerance=params["tol"], floor=AUTHORS_FLOOR
        )["block"]
        exact = hawq.spectrum_of(inputs, f"{layer}.weight")
        found |= {
            f"vhv.{layer}": every.values,
            f"mean.{layer}": every.mean,
            f"iterations_until_tol.{layer}": len(settled.values),
            f"trace_exact.{layer}": exact.trace,
            f"average_trace_exact.{layer}": exact.average,
            f"frobenius_exact.{layer}": exact.frobenius,
            f"offdiag_frobenius_exact.{layer}": exact.off_diagonal,
        }
    return found


def hutchinson_trace_batches(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Any]:
    names = params["parameter_order"]
    hessian = Hessian(hawq.surface_of(inputs, params["batch_sizes"]), {"block": names})
    parameters = dict(hawq.Network(inputs).named_parameters())
    sizes = [parameters[name].numel() for name in names]
    probes = inputs["probes_flat"]
    vectors = [part.view_as(parameters[name]) for row in probes for name, part in zip(names, row.split(sizes), strict=True)]
    found = hutchinson_traces(hessian, hawq.given(vectors), min_probes=len(probes), max_probes=len(probes))["block"]
    return {"vhv": found.values, "trace_exact": hawq.spectrum_of(inputs, *names).trace}


def activation_trace(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    surface = hawq.surface_of(inputs)
    for name in ("act1", "act2"):
        block = {"block": [Tap(name)]}
        single = [
            LossSurface(surface.model, [(x.unsqueeze(0), label.unsqueeze(0))], hawq.task_loss)
            for x, label in zip(inputs["x"], inputs["labels"], strict=True)
        ]
        exact = exact_spectrum(Hessian(surface, block))
        found |= {
            f"vhv.{name}": all_probes(Hessian(surface, block), inputs[f"probes.{name}"]),
            f"trace_per_sample_exact.{name}": [exact_spectrum(Hessian(one, block)).trace for one in single],
            f"mean_trace_exact.{name}": exact.trace,
            f"average_trace_exact.{name}": exact.average,
        }
    return found


def pareto(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Any]:
    weights = [hawq.Network(inputs).get_parameter(f"{layer}.weight") for layer in params["layers"]]
    averages = [hawq.spectrum_of(inputs, f"{layer}.weight").average for layer in params["layers"]]
    perturbations = [[perturbation(weight, bits) for bits in params["bits"]] for weight in weights]
    table = omega(averages, perturbations)
    counts = [math.prod(weight.shape) for weight in weights]
    costs = torch.outer(torch.tensor(counts), torch.tensor(params["bits"])).tolist()
    chosen = [select(table, [costs], [float(limit)]) for limit in inputs["size_limits_in_bits"]]
    return {
        "average_trace_exact": averages, "perturbation": perturbations, "omega": table, "n": counts,
        "best_bits": [[params["bits"][choice] for choice in row] for row in chosen],
    }  # fmt: skip


def ilp_bits(params: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Any]:
    choices = params["bit_choices"]
    perturbations, costs = (torch.stack([inputs[f"{name}_{bits}bit"] for bits in choices], 1).tolist() for name in ("perturbation", "cost"))
    table = omega(inputs["average_trace"].tolist(), perturbations)
    limit = limit_between(costs, params["limit_fraction"])
    found = select(table, [costs], [limit], params["equal_bits_pairs"])
    omega_total, cost = (math.fsum(row[choice] for row, choice in zip(values, found, strict=True)) for values in (table, costs))
    return {"bits": [choices[choice] for choice in found], "omega_total": omega_total, "cost": cost, "limit": limit}
