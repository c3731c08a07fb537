"""Compiles a generated C file with the machine's compiler and runs it, so that its results can be compared with the reference's."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from lowbit.errors import ParityError
from lowbit.formats.fixed_point.c_source import CSource
from lowbit.formats.fixed_point.network import IntegerNetwork

STRICT = ("-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic")
_COMPILERS = ("cc", "gcc", "clang")
_SECONDS = 300  # for compiling, and for all samples

_MAIN = """\
#include <stdio.h>
#include "{name}.h"

int main(void)
{{
    static int8_t input[{upper}_INPUT_SIZE], output[{upper}_OUTPUT_SIZE];

    while (fread(input, 1, sizeof input, stdin) == sizeof input) {{
        if ({name}_run(input, output) != 0)
            return 1;
        fwrite(output, 1, sizeof output, stdout);
    }}
    return 0;
}}
"""


def c_compiler() -> str | None:
    """The C compiler of this machine; ``None`` if it has none."""
    return next((path for name in _COMPILERS if (path := shutil.which(name)) is not None), None)


def run_c(source: CSource, codes: Tensor, compiler: str, options: Sequence[str] = ("-O2",)) -> Tensor:
    """The output's codes that the C file computes, int8 ``[samples, size]``.

    Args:
        source: The C file and its header.
        codes: Of the input, int8 ``[samples, ...]``.
        compiler: Path of a C compiler.
        options: Options besides ``STRICT``.

    Raises:
        ParityError: The file does not compile without warnings, or the program fails; says why.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{source.name}.c"
        source.write(path)
        main, program = Path(folder) / "_main.c", Path(folder) / "_program"  # no network's name begins like this
        main.write_text(_MAIN.format(name=source.name, upper=source.name.upper()), encoding="utf-8")
        _called([compiler, *STRICT, *options, str(path), str(main), "-o", str(program)], b"", f"{source.name}.c does not compile")
        content = codes.to(torch.int8).contiguous().numpy().tobytes()
        printed = _called([str(program)], content, f"the program of {source.name}.c fails")
    return torch.frombuffer(bytearray(printed), dtype=torch.int8).reshape(len(codes), -1)


def require_equal_codes(network: IntegerNetwork, source: CSource, codes: Tensor, compiler: str) -> None:
    """Raise ParityError unless the C file computes the codes that ``network`` computes."""
    wanted, found = network.run(codes).reshape(len(codes), -1), run_c(source, codes, compiler)
    if not torch.equal(wanted, found):
        wrong = (wanted != found).any(1)
        raise ParityError(
            f"{source.name}.c, compiled by {compiler}, gives other codes than the integer network for {int(wrong.sum())} of {len(codes)} samples"
        )


def _called(command: Sequence[str], content: bytes, failure: str) -> bytes:
    try:
        done = subprocess.run(command, input=content, capture_output=True, timeout=_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ParityError(f"{failure}: {error}") from error
    if done.returncode != 0:
        raise ParityError(f"{failure}: {done.stderr.decode(errors='replace').strip()[:2000]}")
    return done.stdout
