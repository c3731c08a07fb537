"""``lowbit.load``: a packed file as a network that runs without the code of the original one."""

from __future__ import annotations

from pathlib import Path

from lowbit.errors import FileFormatError, LayerError, SpecError
from lowbit.formats.packed.file import read_package
from lowbit.formats.packed.network import PackedNetwork
from lowbit.network.bits import WidthLike, set_bits
from lowbit.runtime.compile import RuntimeNetwork


def load(
    path: Path | str,
    *,
    bits: WidthLike = None,
    kernels: bool | None = None,
    max_elements: int | None = None,
    check_finite: bool = False,
) -> PackedNetwork:
    """The network in a ``.lowbit`` file, in evaluation mode.

    Weights are decoded once; their codes stay beside them, so that the network can be exported again without loss. Nothing is
    unpickled, and the file can call no other operators than those of ``lowbit.formats.program.operators``. ``network.provenance`` says
    where it comes from: its preprocessing, its classes and so on (``lowbit.Provenance``), or is ``None`` where the file does not say.

    Args:
        path: The file.
        bits: The width to start with, where the file holds several: ``2``, ``"4/8"`` (weights and inputs), ``"float"``, or where layers have
            widths of their own a mapping, as ``lowbit.set_bits`` takes them, which switches later. Default: those that the network had when
            it was exported.
        kernels: Whether low-bit layers run on low-bit kernels (see ``lowbit.compile_runtime``) or everything runs in float; default: as
            the file says (see ``lowbit.export``).
        max_elements: Largest number of elements of one result within the network; calls that need more are refused before anything is
            allocated. What is held together and the work of one pass are limited in proportion. Default: ``2**28``, or 64 times the
            elements of the inputs where that is more.
        check_finite: Whether a call refuses inputs that hold NaN or infinity (DataError). Else infinity is clipped to the range of the first
            quantizer, and NaN gives NaN, on kernels too: a call with NaN is computed in float, as codes cannot hold it.

    Raises:
        DataError: There is no such file, or it cannot be read.
        SpecError: ``max_elements`` is not a positive number, or the file does not have these ``bits``; lists those it has.
        LayerError: ``bits`` for a file of another single width.
        FileFormatError: The file is damaged, not a packed file, of another version, or not safe to load.

    Example:
        >>> import torch, lowbit
        >>> inputs = torch.rand(32, 8)
        >>> quantized = lowbit.quantize(torch.nn.Linear(8, 4), method="round_to_nearest", calibration=inputs)
        >>> _ = lowbit.export(quantized, "network.lowbit", sample=inputs)
        >>> torch.equal(lowbit.load("network.lowbit")(inputs), quantized(inputs))
        True
    """
    if max_elements is not None and not (isinstance(max_elements, int) and max_elements >= 1):
        raise SpecError(f"max_elements must be a whole number of at least 1, or None, got {max_elements!r}")
    content = read_package(path)
    try:
        if bits is not None:
            chosen = PackedNetwork(content)
            set_bits(chosen, bits)
            content = chosen.packed_content
        is_on_kernels = content.runs_on_kernels if kernels is None else kernels
        network = (
            RuntimeNetwork(content, max_elements=max_elements).eval() if is_on_kernels else PackedNetwork(content, max_elements).eval()
        )
    except (FileFormatError, SpecError, LayerError) as error:
        raise type(error)(f"{path}: {error}") from error
    network.packed_refuses_nan = check_finite
    return network
