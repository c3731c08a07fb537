"""The embedded defaults: digits, and pictures to enlarge twice, each with a network trained on them.

``scripts/train_digits.py`` (99.3 % on the test split) and ``scripts/train_upscaler.py`` trained them.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from lowbit.models.loading import load_model

WEIGHTS = Path(__file__).with_name("weights")


def default_weights() -> Path:
    """Where the package keeps the trained weights of the digits network."""
    return WEIGHTS / "digits.safetensors"


def load_default() -> nn.Module:
    """The trained digits network in evaluation mode; its data is ``lowbit.data.load_data("digits")``."""
    return load_model("digits", default_weights())


def upscaling_weights() -> Path:
    """Where the package keeps the trained weights of ``edsr_small`` for scale 2."""
    return WEIGHTS / "edsr_small.safetensors"
