"""What searches measure on a network, beside a plain training step and a plain evaluation.

    pip install timm
    python benchmarks/hessian.py                      # tf_efficientnet_lite0 and resnet18, 8 images of 224 pixels

The traces of the Hessian by all layers at once (``hutchinson_traces``): seconds of the gradients' graph and of each product with a vector,
in turns with steps of SGD on the same batch; and the sweep of all layers at 2, 4 and 8 bits (``SensitivityMeter``), over as many plain
evaluations. Processor time of one thread, random weights. Results: benchmarks/results/hessian.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from timing import machine
from torch import Tensor, nn
from torch.nn import functional

from lowbit.measure.hessian import Hessian, hutchinson_traces, rademacher
from lowbit.measure.loss_surface import LossSurface
from lowbit.measure.sensitivity import QuantizedLayer, SensitivityMeter, softmax_divergence
from lowbit.methods.mixed_precision.zeroq_pareto import quantized_weight
from lowbit.models import load_model
from lowbit.network.insert import weight_sites

NETWORKS = ("tf_efficientnet_lite0", "resnet18")
RESULTS = Path(__file__).parent / "results" / "hessian.json"
WIDTHS = (2, 4, 8)


def seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def traces(model: nn.Module, batch: tuple[Tensor, Tensor], products: int) -> dict[str, object]:
    """Times of probes and of training steps, and how sure the traces are."""
    x, y = batch
    trained = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(trained.parameters(), lr=1e-4, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        functional.cross_entropy(trained(x), y).backward()
        optimizer.step()

    surface = LossSurface(model, [batch], lambda output, batch: functional.cross_entropy(output, batch[1]))
    hessian = Hessian(surface, {name: [site.path] for name, site in weight_sites(model).items()})
    step()  # the optimizer's state
    graph, steps, last, probes = seconds(lambda: next(hessian.graphs())), [seconds(step)], [time.process_time()], list[float]()

    def between() -> None:
        probes.append(time.process_time() - last[0])
        steps.append(seconds(step))
        last[0] = time.process_time()

    found = hutchinson_traces(
        hessian, rademacher(torch.Generator().manual_seed(0)), min_probes=products, max_probes=products, advance=between
    )
    errors = [abs(trace.error / trace.mean) for trace in found.values() if trace.mean]
    return {
        "layers": len(found), "products": products, "graph_s": graph, "product_s": statistics.median(probes), "step_s": statistics.median(steps),
        "product_over_step": statistics.median(p / s for p, s in zip(probes, steps[1:], strict=True)),
        "median_relative_error": statistics.median(errors),
    }  # fmt: skip


def sweep(model: nn.Module, x: Tensor) -> dict[str, object]:
    """Time of all layers at all widths over that of as many evaluations."""
    sites = weight_sites(model)
    weights = {(name, bits): quantized_weight(site, bits) for name, site in sites.items() for bits in WIDTHS}
    start = time.process_time()
    meter = SensitivityMeter(model, [x], softmax_divergence)
    first = time.process_time() - start
    spent, plain = first, []
    with torch.no_grad():
        for place, ((name, _), weight) in enumerate(weights.items()):
            spent += seconds(lambda: meter.of({name: QuantizedLayer(weight)}))  # noqa: B023
            if place % 5 == 0:
                plain.append(seconds(lambda: model(x)))
    evaluation = statistics.median(plain)
    return {
        "measurements": len(weights),
        "sweep_s": spent,
        "evaluation_s": evaluation,
        "over_evaluations": spent / (evaluation * len(weights)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=NETWORKS)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--products", type=int, default=10)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in args.networks:
        torch.manual_seed(0)
        model = load_model(f"timm:{name}").eval()
        batch = torch.randn(args.batch, 3, args.size, args.size), torch.randint(0, 1000, (args.batch,))
        row = {"network": name, "images": list(batch[0].shape), **traces(model, batch, args.products), **sweep(model, batch[0])}
        print({key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}, flush=True)
        rows.append(row)
    RESULTS.write_text(json.dumps({"machine": machine(), "torch": torch.__version__, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
