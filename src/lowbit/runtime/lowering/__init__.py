"""Graphs rewritten so that layers run on low-bit kernels."""
