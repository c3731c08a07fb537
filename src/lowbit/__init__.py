"""lowbit: quantize any PyTorch network to 1-8 bits with the methods of the classic reading list."""
from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("lowbit")
except PackageNotFoundError:  # run from a source tree that was not installed
    __version__ = "0.0.0"
