"""Kernels for this processor."""
