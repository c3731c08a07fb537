"""Quantized networks as files: packed, ONNX; and the checks that a file computes what the network computes."""
