"""Layers of few bits computed with few bits."""

from lowbit.runtime.cpu.target import active_target
from lowbit.runtime.layers.binary import binary_conv2d, binary_linear, pack_conv_weight

__all__ = ["active_target", "binary_conv2d", "binary_linear", "pack_conv_weight"]
