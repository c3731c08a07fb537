"""The first methods that train with quantized weights, activations and gradients."""
