"""Whether binary layers on CUDA devices have kernels."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings

import torch

from lowbit.errors import install_command
from lowbit.runtime.cpu.target import REFERENCE, VARIABLE


@functools.cache
def cuda_target() -> tuple[bool, str]:
    """Whether binary layers on CUDA devices run on the Triton kernels, and why; determined by the first call.

    ``LOWBIT_KERNELS=reference`` turns them off. They are tried out once, as Triton also needs a C compiler and a supported device.
    """
    if os.environ.get(VARIABLE) == REFERENCE.name:
        return False, f"{VARIABLE} asks for the reference"
    if not torch.cuda.is_available():
        return False, "torch finds no CUDA device"
    if importlib.util.find_spec("triton") is None:
        return False, f"triton is not installed: {install_command('cuda')}"
    try:
        importlib.import_module("lowbit.runtime.cuda.kernels").pack(torch.ones(1, 1, 1, 1, device="cuda"), 1, None, None)
    except Exception as error:  # whatever a broken installation raises
        warnings.warn(f"triton does not work here ({type(error).__name__}: {error}), binary layers on CUDA run in float", stacklevel=2)
        return False, f"triton does not work here ({type(error).__name__})"
    return True, f"triton works on {torch.cuda.get_device_name()}"
