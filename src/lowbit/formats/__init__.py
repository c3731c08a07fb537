"""Files that quantized networks are written to.

Imports run down: ``checks`` -> ``packed``, ``onnx`` -> ``program``.

- ``program`` is a network as one functional graph, which both formats are written from;
- ``packed`` is the ``.lowbit`` file, ``onnx`` the file for other runtimes;
- ``checks`` say whether a file computes what the network computes, and how fast.
"""
