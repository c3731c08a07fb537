"""Layers of few bits computed with few bits."""

from lowbit.runtime.binary_conv import binary_conv2d, binary_linear, pack_conv_weight
from lowbit.runtime.target import active_target

__all__ = ["active_target", "binary_conv2d", "binary_linear", "pack_conv_weight"]
