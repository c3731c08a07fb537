"""Networks in integers alone: how accumulators become codes again, and the operators on codes.

- ``requantize`` multiplies an int32 accumulator by a real number in integers, in the three ways that runtimes know;
- ``parameters`` derives scales and zero points from ranges, and codes from real values, rounding half away from zero;
- ``operators`` computes convolutions, products, sums and pools on codes as TensorFlow Lite, gemmlowp and HAWQ-V3 do;
- ``onnx_operators`` does so as ONNX Runtime does, for both forms of a quantized convolution.
"""
