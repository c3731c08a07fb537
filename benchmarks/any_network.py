"""Quantize, export and check networks of many families, with random weights: what works, how small, what stays float.

    pip install timm torchvision
    python benchmarks/any_network.py                  # all; one process for each network
    python benchmarks/any_network.py resnet18 vgg11

Each network is quantized at W8A8 and W4A8 by round_to_nearest, written as .lowbit and .onnx, and both files are held
against the quantized network. Results: benchmarks/results/any_network.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

NETWORKS = (
    "resnet18", "mobilenetv2_100", "mobilenetv3_small_100", "efficientnet_lite0", "regnety_002", "densenet121", "ghostnet_100", "convnext_atto", "vgg11",
    "inception_v3", "repvgg_a0", "mobilevit_xxs", "vit_tiny_patch16_224", "xception41", "dla34", "hrnet_w18_small", "skresnet18", "rexnet_100",
)  # fmt: skip
FIXED_SIZE = {"vit_tiny_patch16_224": 224, "mobilevit_xxs": 128, "inception_v3": 139}  # the others take 96x96, which keeps this short
RESULT = Path(__file__).parent / "results" / "any_network.json"


def check(name: str, weight_bits: int, folder: Path) -> dict[str, object]:
    """One network at one weight bit-width."""
    import torch

    import lowbit
    from lowbit.models import load_model
    from lowbit.network.record import record_of

    torch.manual_seed(0)
    model = load_model(f"timm:{name}").eval()
    size = FIXED_SIZE.get(name, 96)
    calibration = [torch.randn(4, 3, size, size) for _ in range(4)]
    with torch.no_grad():  # random weights with untouched batch norms let activations grow or vanish; set the statistics once
        for module in model.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                module.train()
                module.momentum = None
        for x in calibration:
            model(x)
    model.eval()
    start = time.perf_counter()
    quantized = lowbit.quantize(model, method="round_to_nearest", weight_bits=weight_bits, calibration=calibration)
    row: dict[str, object] = {
        "network": name,
        "weight_bits": weight_bits,
        "layers": len(record_of(quantized).table.done),
        "quantize_s": round(time.perf_counter() - start, 1),
    }
    for suffix in ("lowbit", "onnx"):
        report = lowbit.export(quantized, folder / f"{name}.{suffix}", sample=calibration[0])
        row[suffix] = {
            "bytes": report.size_bytes,
            "passed": report.parity.passed,
            "max_abs_error": report.parity.max_abs_error,
            "sqnr_db": report.parity.sqnr_db,
            "top1_agreement": report.parity.top1_agreement,
        }
        if report.integer is not None:
            row["integer"] = str(report.integer)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=NETWORKS)
    parser.add_argument("--weight-bits", type=int, help="run one network in this process and print its row")
    parser.add_argument("--folder", type=Path, default=Path("data/any_network"))
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.weight_bits:
        print(json.dumps(check(args.networks[0], args.weight_bits, args.folder)))
        return
    rows = {(row["network"], row["weight_bits"]): row for row in json.loads(RESULT.read_text())} if RESULT.exists() else {}
    for name in args.networks:
        for weight_bits in (8, 4):
            command = [sys.executable, __file__, name, "--weight-bits", str(weight_bits), "--folder", str(args.folder)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            lines = done.stdout.strip().splitlines()
            row = (
                json.loads(lines[-1])
                if done.returncode == 0
                else {"network": name, "weight_bits": weight_bits, "error": done.stderr.strip().splitlines()[-1]}
            )
            rows[name, weight_bits] = row
            print(json.dumps(row), flush=True)
            RESULT.write_text(json.dumps(list(rows.values()), indent=1) + "\n")


if __name__ == "__main__":
    main()
