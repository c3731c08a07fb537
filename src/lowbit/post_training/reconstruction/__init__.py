"""Reconstruction: parts of a network learn to reproduce the float network's outputs, one after the other."""
