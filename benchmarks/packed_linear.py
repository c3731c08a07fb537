"""How fast a linear layer of packed weights is: 8-bit inputs against torch in float32 and bfloat16.

    python benchmarks/packed_linear.py                 # 4096 x 4096, 1 and 64 rows, weights of 1, 2, 4 and 8 bits

Weights are random: the time does not depend on them. All variants are timed turn by turn in one process, one thread on one core; the time
includes rounding the inputs to 8 bits. Ratios are medians over the turns; where other programs run beside, the least times say more.
Results: benchmarks/results/packed_linear.json, and packed_linear_xeon_amx.json on a processor with AMX.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from timing import machine, ratio, turn_by_turn
from torch.nn import functional

from lowbit.runtime.cpu.target import active_target
from lowbit.runtime.layers.packed import pack_linear_weight, packed_linear, packed_loops

RESULT = Path(__file__).parent / "results" / "packed_linear.json"
BITS = (1, 2, 4, 8)


def measure(size: int, rows: int, runs: int) -> dict[str, object]:
    """Milliseconds of each variant, and how many times as long as it float32 takes."""
    x, weight = torch.randn(rows, size), torch.randn(size, size)
    short, short_x = weight.bfloat16(), x.bfloat16()
    calls: dict[str, Callable[[], object]] = {
        "torch float32": lambda: functional.linear(x, weight),
        "torch bfloat16": lambda: functional.linear(short_x, short),
    }
    sizes = {"torch float32": weight.numel() * 4, "torch bfloat16": weight.numel() * 2}
    for bits in BITS:
        table = (torch.rand(size, 1) * torch.arange(2.0**bits)).contiguous()
        packed = pack_linear_weight(torch.randint(0, 2**bits, (size, size)), table, bits)
        calls[f"{bits} bit x int8"] = functools.partial(packed_linear, x, packed, None, "int8")
        sizes[f"{bits} bit x int8"] = packed.words.numel() + 8 * size
    with torch.inference_mode():
        times = turn_by_turn(calls, runs)
    row: dict[str, object] = {
        "size": size,
        "rows": rows,
        "ms": {name: round(1e3 * statistics.median(values), 3) for name, values in times.items()},
        "least_ms": {name: round(1e3 * min(values), 3) for name, values in times.items()},
        "times_float32": {name: round(ratio(times["torch float32"], values), 2) for name, values in times.items()},
        "bytes": sizes,
    }
    print(json.dumps(row, indent=1), flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    loops = packed_loops()
    result = {
        "machine": machine(),
        "load": round(os.getloadavg()[0], 1),
        "kernels": active_target()[0].name,
        "dot_products_of_bytes": bool(loops and loops.HAS_DOT),
        "layers": [measure(args.size, rows, args.runs) for rows in args.rows],
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
