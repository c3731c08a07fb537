"""Adaptive bit-widths: one network that runs at any of several widths."""
