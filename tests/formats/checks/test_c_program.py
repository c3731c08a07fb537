from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import lowbit
from lowbit.errors import ParityError
from lowbit.formats.checks.c_program import c_compiler, require_equal_codes, run_c
from lowbit.formats.fixed_point.c_source import c_source

COMPILER = c_compiler()
pytestmark = pytest.mark.skipif(COMPILER is None, reason="this machine has no C compiler")


def test_a_file_that_computes_something_else_or_has_a_warning_is_refused() -> None:
    assert COMPILER is not None
    x = torch.rand(8, 4)
    network = lowbit.compile_integer(lowbit.quantize(nn.Linear(4, 3), method="round_to_nearest", calibration=x), sample=x)
    source, codes = c_source(network, "net"), network.quantize(x)
    require_equal_codes(network, source, codes, COMPILER)
    wrong = replace(source, source=source.source.replace("+ w->y_zero", "- 40 + w->y_zero"))
    with pytest.raises(ParityError, match=r"net\.c, compiled by .*, gives other codes than the integer network for [1-8] of 8 samples"):
        require_equal_codes(network, wrong, codes, COMPILER)
    unused = replace(source, source=source.source.replace("int net_run", "static int unused(void) { return 0; }\n\nint net_run"))
    with pytest.raises(ParityError, match=r"net\.c does not compile: (.|\n)*unused"):
        run_c(unused, codes, COMPILER)
