"""Fused loops for what training and calibration repeat most often, each beside a plain torch reference with the same signature.

They need numba (``pip install "lowbit[kernels]"``); without it, or where a tensor does not suit them, the reference runs.
"""

from lowbit.quantizers.fused.switch import are_available, fused_kernels, is_fusing

__all__ = ["are_available", "fused_kernels", "is_fusing"]
