"""Low-bit layers computed in low precision.

Imports run down: ``compile`` -> ``lowering`` -> ``layers`` -> ``cuda``, ``cpu`` -> ``arguments``, ``activation``, ``thresholds``, ``kept``.

- ``compile`` puts layers of a network on kernels, ``profile`` says where its time goes;
- ``lowering`` finds the layers in a graph, with what can be computed along with them;
- ``layers`` are torch operators, one file for each kind of layer, with a reference in plain torch;
- ``cpu`` and ``cuda`` are the kernels.
"""
