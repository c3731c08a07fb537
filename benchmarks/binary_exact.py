"""Whether a trained binary network on the kernels gives the answers that it gave in training: all 10,000 Fashion-MNIST test images.

    python benchmarks/binary_exact.py                     # some minutes
    python benchmarks/binary_exact.py --steps 400         # trained longer

A resnet20 is trained with each method for a while (what matters is that its norms and weights are no longer random), compiled, and compared image
by image with the float simulation that it was trained as. A value within rounding errors of zero can get either sign, and one next to a step of
an 8-bit grid either code, and then logits move. How often rounding alone does that is seen by simulating the first 2,000 images in float64: the
simulation in float32 and the kernels are each held against it. Results: benchmarks/results/binary_exact.json.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

import lowbit
from lowbit.data import load_data
from lowbit.data.augment import flip, pad_crop
from lowbit.data.image_data import TensorImages
from lowbit.models import load_model
from lowbit.qat import Classification, OptimizerSpec, Recipe, TrainRun
from lowbit.qat.prepare import method_of, prepare
from lowbit.spec import BitPolicy

HERE = Path(__file__).parent
RESULT = HERE / "results" / "binary_exact.json"
FLOAT = HERE / "weights" / "resnet20_fashion.safetensors"
BATCH = 128
METHODS = ("bi_real_net", "ir_net")
PRECISE = 2_000  # images


class Data:
    """Training batches in a fixed random order with shifts and flips, and the test images."""

    def __init__(self) -> None:
        train, test = (load_data("fashion-mnist", split=split).dataset for split in ("train", "test"))
        assert isinstance(train, TensorImages)
        assert isinstance(test, TensorImages)
        assert train.labels is not None
        assert test.labels is not None
        self._train, self._labels = train.normalized(train.images), train.labels
        self._black = float(train.normalized(torch.zeros(1, 1, 1, dtype=torch.uint8)))
        self.test, self.test_labels = test.normalized(test.images), test.labels

    def epoch(self, index: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of epoch ``index``, the same in every run."""
        generator = torch.Generator().manual_seed(index)
        order = torch.randperm(len(self._labels), generator=generator)
        for chosen in order.split(BATCH):
            yield flip(pad_crop(self._train[chosen], 2, generator, fill=self._black), generator), self._labels[chosen]


def trained(method: str, data: Data, steps: int, *, is_first_last_float: bool) -> nn.Module:
    """A resnet20 after ``steps`` steps at one bit."""
    policy = BitPolicy.uniform(1, 1)
    if is_first_last_float:
        policy = policy.keep_float("conv").keep_float("fc")
    sample = next(iter(data.epoch(0)))[0]
    start = load_model("resnet20", FLOAT, in_channels=1, num_classes=10)
    model = prepare(start, method=method, policy=policy, sample=sample).train()
    recipe = Recipe(2, BATCH, OptimizerSpec("adam", 2e-3))
    run = TrainRun(
        model,
        method_of(model),
        Classification(),
        recipe,
        steps // 2,
        batches=lambda n: [b for b, _ in zip(data.epoch(0), range(n), strict=False)],
    )
    for epoch in run.each_epoch():
        for batch, _ in zip(data.epoch(epoch), range(steps // 2), strict=False):
            run.before_step()
            run.loss(batch).backward()
            run.after_backward()
            run.optimizer_step()
            run.after_step()
    return model.eval()


@torch.no_grad()
def compare(model: nn.Module, data: Data) -> dict[str, object]:
    """The kernels and the simulation in float32 on every test image, in float64 on the first ones."""
    network, precise = lowbit.compile_runtime(model, sample=data.test[:4]), copy.deepcopy(model).double()
    outputs: dict[str, list[Tensor]] = {"kernels": [], "float32": [], "float64": []}
    for x in data.test.split(500):
        outputs["kernels"].append(network(x))
        outputs["float32"].append(model(x))
        if len(outputs["float64"]) * len(x) < PRECISE:
            outputs["float64"].append(precise(x.double()).float())
    found = {name: torch.cat(parts) for name, parts in outputs.items()}
    row: dict[str, object] = {
        "accuracy": round(100 * float((found["kernels"].argmax(1) == data.test_labels).float().mean()), 2),
        "binary_layers": sum(layer.kernel == "binary" for layer in network.report.layers),
        "kernels": network.report.target,
    }
    for a, b in (("kernels", "float32"), ("kernels", "float64"), ("float32", "float64")):
        count = min(len(found[a]), len(found[b]))
        left, right = found[a][:count], found[b][:count]
        difference = (left - right).abs().amax(1)
        row[f"{a} against {b}"] = {
            "images": count,
            "same_top1": int((left.argmax(1) == right.argmax(1)).sum()),
            "within_1e-4": int((difference <= 1e-4).sum()),
            "median_difference": float(difference.median()),
            "largest_difference": float(difference.max()),
        }
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    data = Data()
    rows = {}
    for method in args.methods:
        for is_float in (False, True):
            key = f"{method}, first and last layer in {'float' if is_float else '8 bits'}"
            rows[key] = compare(trained(method, data, args.steps, is_first_last_float=is_float), data)
            print(key, rows[key], flush=True)
            args.out.write_text(json.dumps({"steps": args.steps, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
