"""Average pools whose divisors ONNX counts otherwise, in terms of those that both count alike."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.nn import functional

from lowbit.errors import GraphError

_POOLS = {torch.ops.aten.avg_pool1d.default: 1, torch.ops.aten.avg_pool2d.default: 2, torch.ops.aten.avg_pool3d.default: 3}
_SETTINGS = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")


def write_out_pools(exported: ExportedProgram) -> None:
    """Rewrite average pools of ``exported`` in place whose sums ONNX Runtime divides by another number than torch does.

    - ``divisor_override``, which ONNX does not have: the plain mean times ``elements of a window / divisor``.
    - ``ceil_mode`` with ``count_include_pad``: a last window that ends behind the padding is divided by its elements up to the end of the
      padding. Zeros are put around the input, and what lies outside of these is not counted.

    Raises:
        GraphError: Both settings need a form that ONNX does not have.
    """
    for node in list(exported.graph.nodes):
        dims = _POOLS.get(node.target)
        if dims is not None:
            _write_out(node, dims)
    exported.graph_module.recompile()


def _write_out(node: fx.Node, dims: int) -> None:
    given: dict[str, Any] = dict(zip(_SETTINGS, node.args[1:], strict=False)) | dict(node.kwargs)
    kernel = _per_dim(given["kernel_size"], dims)
    stride = _per_dim(given.get("stride") or kernel, dims)
    padding = _per_dim(given.get("padding", 0), dims)
    is_ceil, counts_padding, divisor = given.get("ceil_mode", False), given.get("count_include_pad", True), given.get("divisor_override")
    if divisor is None and not (is_ceil and counts_padding):
        return
    if divisor is not None and is_ceil:
        raise GraphError(
            f"average pool {node.name!r}: ONNX has no divisor_override with ceil_mode. Leave one of them out, or export to .lowbit."
        )
    x = node.args[0]
    assert isinstance(x, fx.Node)
    if divisor is not None:
        node.args, node.kwargs = (x, kernel, stride, padding, False, True), {}
        with node.graph.inserting_after(node):
            scaled = node.graph.call_function(torch.ops.aten.mul.Tensor, (node, math.prod(kernel) / divisor))
        scaled.meta = dict(node.meta)
        node.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)
        return
    for size, step, one in zip(kernel, stride, padding, strict=True):
        if one and step > size - one:  # zeros around the input would make room for a window that starts behind it
            raise GraphError(
                f"average pool {node.name!r}: ONNX has no ceil_mode with count_include_pad where windows of {size} with padding {one} move by "
                f"{step}. Take a stride of at most {size - one}, or ceil_mode=False or count_include_pad=False, or export to .lowbit."
            )
    if any(padding):
        zeros = [one for one in reversed(padding) for _ in range(2)]
        with node.graph.inserting_before(node):
            padded = node.graph.call_function(torch.ops.aten.constant_pad_nd.default, (x, zeros, 0.0))
        padded.meta = {**x.meta, "val": functional.pad(x.meta["val"], zeros)}
        x = padded
    node.args, node.kwargs = (x, kernel, stride, [0] * dims, True, False), {}


def _per_dim(value: int | list[int], dims: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * dims if len(values) == 1 else values
