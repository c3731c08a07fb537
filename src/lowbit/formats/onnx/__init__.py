"""ONNX files that run on integer kernels."""
