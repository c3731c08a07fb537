"""A quantized network as one functional graph."""
