"""``lowbit.load``: a packed file as a network that runs without the code of the original one."""

from __future__ import annotations

from pathlib import Path

from lowbit.errors import FileFormatError
from lowbit.formats.packed.file import read_package
from lowbit.formats.packed.network import PackedNetwork
from lowbit.runtime.compile import RuntimeNetwork


def load(path: Path | str, *, kernels: bool | None = None) -> PackedNetwork:
    """The network in a ``.lowbit`` file, in evaluation mode.

    Weights are decoded once; their codes stay beside them, so that the network can be exported again without loss. Nothing is
    unpickled, and the file can call no other operators than those of ``lowbit.formats.program.operators``.

    Args:
        path: The file.
        kernels: Whether low-bit layers run on low-bit kernels (see ``lowbit.compile_runtime``) or everything runs in float; default: as
            the file says (see ``lowbit.export``).

    Raises:
        DataError: There is no such file, or it cannot be read.
        FileFormatError: The file is damaged, not a packed file, of another version, or not safe to load.

    Example:
        >>> import torch, lowbit
        >>> inputs = torch.rand(32, 8)
        >>> quantized = lowbit.quantize(torch.nn.Linear(8, 4), method="round_to_nearest", calibration=inputs)
        >>> _ = lowbit.export(quantized, "network.lowbit", sample=inputs)
        >>> torch.equal(lowbit.load("network.lowbit")(inputs), quantized(inputs))
        True
    """
    content = read_package(path)
    try:
        if content.runs_on_kernels if kernels is None else kernels:
            return RuntimeNetwork(content).eval()
        return PackedNetwork(content).eval()
    except FileFormatError as error:
        raise FileFormatError(f"{path}: {error}") from error
    except KeyError as error:  # torch refuses a name
        raise FileFormatError(f"{path}: a tensor has a name that no network can have: {error}") from error
