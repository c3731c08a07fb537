"""Trainable quantizers put into a network."""
