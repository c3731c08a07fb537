"""What networks of integers take on a chip, and how near they come to the simulation in float.

    python benchmarks/integer.py                      # the embedded digits, resnet20 and a small MobileNetV2 on Fashion-MNIST
    python benchmarks/integer.py --images 10000

For weights of 4 and 8 bits (``round_to_nearest``): flash and RAM of the C file, bytes of the ``.lowbit`` file, the share of codes that equal
those of the simulation, over all operations on its own inputs and over all images, and the accuracy of both and of the float network.
Results: benchmarks/results/integer.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor, nn

import lowbit
from lowbit.data import load_data
from lowbit.formats.checks.codes import compare_codes
from lowbit.formats.fixed_point.c_source import c_source
from lowbit.formats.fixed_point.network import compile_program
from lowbit.formats.packed.file import package, package_bytes
from lowbit.formats.program.program import export_program
from lowbit.inputs import Inputs
from lowbit.models import load_default, load_model
from lowbit.network.record import record_of

ROOT = Path(__file__).parent
RESULTS = ROOT / "results" / "integer.json"
BATCH = 10  # images whose numbers of 64 bits stay in the caches


def networks() -> dict[str, tuple[nn.Module, str]]:
    """Trained networks and their data."""
    trained = {name: ROOT / "weights" / f"{name}_fashion.safetensors" for name in ("resnet20", "mobilenet_v2_small")}
    return {"digits": (load_default(), "digits")} | {
        name: (load_model(name, path, in_channels=1), "fashion-mnist") for name, path in trained.items()
    }


def samples(data: str, split: str, count: int) -> tuple[Tensor, Tensor]:
    held = load_data(data, split=split)
    pairs = [held.dataset[index] for index in range(min(count, len(held)))]
    return torch.stack([image for image, _ in pairs]), torch.tensor([int(label) for _, label in pairs])


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        answers = torch.cat([model(x).argmax(1) for x in images.split(BATCH)])
    return float((answers == labels).double().mean())


def measure(name: str, model: nn.Module, data: str, weight_bits: int, count: int) -> dict[str, object]:
    """One row of results."""
    calibration, (images, labels) = samples(data, "train", 256)[0], samples(data, "test", count)
    quantized = lowbit.quantize(model, method="round_to_nearest", weight_bits=weight_bits, activation_bits=8, calibration=calibration)
    program = export_program(quantized, Inputs.of(calibration[:2], quantized))
    network = compile_program(program, quantized)
    memory, equal, codes, farthest = c_source(network, "net").memory, 0, 0, 0
    for x in images.split(BATCH):
        found = compare_codes(program, network, Inputs.of(x, quantized))
        equal += sum(one.equal for one in found.operations)
        codes += sum(one.codes for one in found.operations)
        farthest = max(farthest, found.farthest)
    return {
        "network": name, "weight_bits": weight_bits, "flash_bytes": memory.flash_bytes, "ram_bytes": memory.ram_bytes,
        "packed_bytes": len(package_bytes(package(program, record_of(quantized)))), "images": len(images), "codes": codes,
        "equal_codes": equal / codes, "farthest": farthest, "float_accuracy": accuracy(model, images, labels),
        "simulation_accuracy": accuracy(quantized, images, labels), "integer_accuracy": accuracy(network, images, labels),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=500, help="test images of each network at most")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name, (model, data) in networks().items():
        for bits in (8, 4):
            rows.append(measure(name, model.eval(), data, bits, args.images))
            print(rows[-1], flush=True)
            RESULTS.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
