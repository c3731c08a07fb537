"""Files that quantized networks are written to.

Imports run down: ``checks`` -> ``packed``, ``onnx``, ``fixed_point`` -> ``program``.

- ``program`` exports a network as one functional graph, from which both formats are written;
- ``packed`` is the ``.lowbit`` file, ``onnx`` the file for other runtimes;
- ``fixed_point`` holds the arithmetic of networks in integers alone;
- ``checks`` test whether a file computes what the network computes, and how fast.
"""
