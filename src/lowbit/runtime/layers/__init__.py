"""Low-bit layers as torch operators."""
