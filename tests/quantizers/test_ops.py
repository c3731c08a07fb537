from __future__ import annotations

import subprocess
import sys

FIRST_CALL = """
import sys, torch
from lowbit.quantizers.ops import mark_affine
known = set(sys.modules)
codes = mark_affine(torch.tensor([0.26, 0.9]), torch.tensor(0.25), torch.tensor(0.0), 0, 3)
print(codes.tolist(), len(set(sys.modules) - known))
"""


def test_the_first_call_of_an_operator_imports_next_to_nothing() -> None:
    done = subprocess.run([sys.executable, "-c", FIRST_CALL], capture_output=True, text=True, check=True)
    values, _, imported = done.stdout.rpartition(" ")
    assert values == "[0.25, 0.75]"
    assert int(imported) < 20
