"""How small the files are: bits against bytes.

    pip install timm torchvision
    python benchmarks/sizes.py                        # tf_efficientnet_lite0 and resnet18 at 1, 2, 3, 4 and 8 bits
    python benchmarks/sizes.py resnet18 --bits 3

Random weights: sizes do not depend on them. All layers, the first and the last too, have weights of the stated bits (round_to_nearest,
per channel) and 8-bit activations. ``arithmetic`` is codes x bits + scales + biases + activation grids + all that stayed float;
``overhead`` is what the packed file takes beyond it. ONNX files hold one code to a byte (int8), or two where they have up to
4 bits (int4). Results: benchmarks/results/sizes.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

import lowbit
from lowbit.measure import model_size
from lowbit.models import load_model
from lowbit.network.insert import bake_weights

NETWORKS = ("tf_efficientnet_lite0", "resnet18")
BITS = (1, 2, 3, 4, 8)
RESULT = Path(__file__).parent / "results" / "sizes.json"


def network(name: str, images: Tensor) -> nn.Module:
    """The network with random weights and batch norms that fit them."""
    torch.manual_seed(0)
    model = load_model(f"timm:{name}").train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = None
            nn.init.uniform_(module.weight, 0.5, 1.5)  # timm starts some at 0, and layers of nothing but 0 are stored once
    with torch.no_grad():
        model(images)
    return model.eval()


def measure(name: str, weight_bits: int, model: nn.Module, images: Tensor, folder: Path) -> dict[str, object]:
    """Sizes of one network at one bit-width, in bytes."""
    policy = lowbit.BitPolicy.uniform(weight_bits, 8, first_last=None)
    quantized = lowbit.quantize(model, method="round_to_nearest", policy=policy, calibration=images, activation_observer="min_max")
    size = model_size(quantized)
    codes = bake_weights(quantized)[1].values()
    files = {kind: folder / f"{name}.{kind}.{suffix}" for kind, suffix in (("packed", "lowbit"), ("int8", "onnx"), ("int4", "onnx"))}
    packed = lowbit.export(quantized, files["packed"], sample=images[:2])
    row: dict[str, object] = {
        "network": name,
        "weight_bits": weight_bits,
        "float_bytes": size.float_bytes,
        "arithmetic_bytes": size.total_bytes,
        "code_bytes": sum(layer.weight_bytes for layer in size.layers.values()),
        "scale_bytes": sum(layer.table_bytes for layer in size.layers.values()),
        "bias_bytes": sum(layer.bias_bytes for layer in size.layers.values()),
        "other_bytes": size.other_bytes,
        "packed_bytes": packed.size_bytes,
        "overhead_percent": round(100 * (packed.size_bytes / size.total_bytes - 1), 2),
        "codes": sum(code.codes.numel() for code in codes),
        "packed_max_abs_error": packed.parity.max_abs_error,
    }
    for container in ("int8", "int4") if weight_bits <= 4 else ("int8",):
        report = lowbit.export(quantized, files[container], sample=images[:2], weight_container=container, measure_speed=False)
        row[f"onnx_{container}_bytes"] = report.size_bytes
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=NETWORKS)
    parser.add_argument("--bits", type=int, nargs="+", default=BITS)
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    images = torch.randn(8, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in args.networks:
            model = network(name, images)
            for weight_bits in args.bits:
                rows.append(measure(name, weight_bits, model, images, Path(folder)))
                print(rows[-1], flush=True)
    command = f"python benchmarks/sizes.py {' '.join(args.networks)} --bits {' '.join(map(str, args.bits))}"
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"command": command, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
