"""Low-bit layers computed in low precision.

Imports run down: ``compile`` -> ``lowering`` -> ``layers`` -> ``cuda``, ``cpu`` -> ``arguments``, ``activation``, ``thresholds``, ``kept``.

- ``compile`` moves the layers of a network onto kernels, ``profile`` shows where its time goes;
- ``lowering`` finds the layers in a graph and the operators that can be fused with them;
- ``layers`` are torch operators, one file for each kind of layer, with a reference in plain torch;
- ``cpu`` and ``cuda`` contain the kernels.
"""
