"""Networks for the built-in data sets, and loading of any other network."""

from lowbit.models.default import default_weights, load_default, upscaling_weights
from lowbit.models.loading import BUILT_IN, full_name, load_model
from lowbit.models.weights import load_weights

__all__ = ["BUILT_IN", "default_weights", "full_name", "load_default", "load_model", "load_weights", "upscaling_weights"]
