"""The embedded default: digits, and a network trained on them (``scripts/train_digits.py``; 99.3 % on the test split)."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from lowbit.models.loading import load_model


def default_weights() -> Path:
    """Where the package keeps the trained weights of the digits network."""
    return Path(__file__).with_name("weights") / "digits.safetensors"


def load_default() -> nn.Module:
    """The trained digits network in evaluation mode; its data is ``lowbit.data.load_data("digits")``."""
    return load_model("digits", default_weights())
