"""Networks in integers alone: how accumulators become codes again, and the operators on codes.

- ``requantize`` multiplies an int32 accumulator by a real number in integers, in the three ways that runtimes know;
- ``parameters`` derives scales and zero points from ranges, and codes from real values, rounding half away from zero;
- ``operators`` computes convolutions, products, sums and pools on codes as TensorFlow Lite, gemmlowp and HAWQ-V3 do;
- ``onnx_operators`` does so as ONNX Runtime does, for both forms of a quantized convolution;
- ``graph`` is a whole network as a list of operations on codes; ``lowering`` makes it of a program, with ``context``, ``values``,
  ``lower_layers``, ``lower_shapes`` and ``weights``; ``constants`` are the integers of its operations;
- ``network`` runs it (``lowbit.compile_integer``), with ``interpret``;
- ``c_source`` writes it as C, with ``c_kernels`` and ``memory``, which places buffers.
"""
