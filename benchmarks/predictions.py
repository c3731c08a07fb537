"""How well searches predict what quantizing a layer costs.

    python benchmarks/predictions.py                  # resnet20 on Fashion-MNIST

Spearman's rank correlation, over layers, between what ``hawq``, ``hawq_v2`` and ``zeroq_pareto`` predict for a layer at 2, 3 and 4 bits from
samples of the training data, and by how much the loss on test images grows with this layer alone at these bits.
Results: benchmarks/results/predictions.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import cast

import torch
from scipy.stats import spearmanr
from subjects import resnet20_fashion
from torch import Tensor
from torch.nn import functional

import lowbit
from lowbit.measure.sensitivity import LossIncrease, QuantizedLayer, SensitivityMeter
from lowbit.methods.mixed_precision.zeroq_pareto import quantized_weight
from lowbit.network.insert import weight_sites
from lowbit.spec import LayerBits

RESULTS = Path(__file__).parent / "results" / "predictions.json"
WIDTHS = (2, 3, 4)
METHODS: dict[str, dict[str, object]] = {
    "hawq_v2": {"max_probes": 10},
    "hawq": {"max_iterations": 10},
    "zeroq_pareto": {},
    "zeroq_pareto (loss)": {"distance": "loss"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--samples", type=int, default=64)
    args = parser.parse_args()
    torch.set_num_threads(1)
    subject = resnet20_fashion()
    images, labels = cast(tuple[Tensor, Tensor], subject.test_data)
    batches = list(zip(images[: args.images].split(64), labels[: args.images].split(64), strict=True))
    drawn = subject.draw_labelled(args.samples, 64, 0)
    meter = SensitivityMeter(
        subject.model, batches, LossIncrease(lambda output, batch: functional.cross_entropy(output, batch[1])), lambda model, b: model(b[0])
    )
    sites, measured, rows = weight_sites(subject.model), dict[tuple[str, int], float](), []
    for method, options in METHODS.items():
        name = method.partition(" ")[0]
        found = lowbit.search(subject.model, method=name, budget="average=3", data=drawn, candidates=WIDTHS, progress=False, **options)
        for bits in WIDTHS:
            for layer in found.sensitivity:
                if (layer, bits) not in measured:
                    measured[layer, bits] = meter.of({layer: QuantizedLayer(quantized_weight(sites[layer], bits))})
            pairs_of = [(losses[LayerBits(bits, 8)], measured[layer, bits]) for layer, losses in found.sensitivity.items()]
            correlation = float(spearmanr(*zip(*pairs_of, strict=True)).statistic)
            rows.append({"method": method, "bits": bits, "layers": len(pairs_of), "rank_correlation": correlation})
            print(rows[-1], flush=True)
            RESULTS.write_text(json.dumps({"images": args.images, "samples": args.samples, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
