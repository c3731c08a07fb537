"""The operators of a layer in the file of that layer alone, without those at the ends of every file.

A file takes and returns floats in the order in which torch keeps them. Between the layers of a network ONNX Runtime passes codes, or blocks of
channels, so that the time of one layer there is that of the operators between its conversions, less what calling the runtime takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from lowbit.formats.onnx.sessions import load_onnx, optimized_model
from lowbit.formats.onnx.translate import OPSET
from lowbit.inputs import Inputs

if TYPE_CHECKING:
    import onnx

_BEFORE = frozenset({"QuantizeLinear", "Clip", "Transpose", "ReorderInput"})  # clips of codes belong to the layer that makes them
_BEHIND = frozenset({"DequantizeLinear", "Transpose", "ReorderOutput"})


def cut_out(path: Path, x: Tensor, to: Path) -> tuple[Tensor, tuple[str, ...]]:
    """Write to the file ``to`` what ONNX Runtime runs of the one layer in ``path``, but for the conversions around it.

    Args:
        path: A file with one input and one output.
        x: Its input.
        to: A file for this machine only.

    Returns:
        What the new file takes when the old one takes ``x``, and its operators. Where operators do not follow one another one by one, all stay.

    Raises:
        MissingExtraError: onnx or onnxruntime is not installed.
        FileFormatError: ONNX Runtime does not accept the file.
    """
    import onnx

    model = optimized_model(path)
    onnx.save(model, to)
    chain, source = list(model.graph.node), model.graph.input[0].name
    if not _is_chain(chain, source):
        return x, tuple(node.op_type for node in chain)
    kept = _without_conversions(chain)
    first, inner = kept[0].input[0], x
    if first != source:
        inner = load_onnx(to, observe=(first,))(Inputs((x,)))[first]
        kind = onnx.helper.np_dtype_to_tensor_dtype(inner.numpy().dtype)
        model.graph.input[0].CopyFrom(onnx.helper.make_tensor_value_info(first, kind, inner.shape))
    model.graph.output[0].CopyFrom(onnx.helper.make_empty_tensor_value_info(kept[-1].output[0]))
    del model.graph.node[:], model.graph.value_info[:]
    model.graph.node.extend(kept)
    onnx.save(model, to)
    return inner, tuple(node.op_type for node in kept)


def write_empty(path: Path) -> None:
    """Write a file that passes on one number, ``x``: what a call takes of which nothing is computed."""
    from onnx import TensorProto, helper, save

    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "empty", [x], [y])
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8), path)


def _is_chain(nodes: Sequence[onnx.NodeProto], first: str) -> bool:
    """Whether each operator reads the one before it first, and nothing else of what is computed."""
    sources = [first, *(node.output[0] for node in nodes)]
    return all(node.input[0] == source and not set(node.input[1:]) & set(sources) for node, source in zip(nodes, sources, strict=False))


def _without_conversions(chain: list[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """The chain without the operators before and behind its layer; clips behind it stay, as they are its own."""
    start = len(list(takewhile(lambda node: node.op_type in _BEFORE, chain)))
    behind = list(takewhile(lambda node: node.op_type in _BEHIND | {"Clip"}, reversed(chain[start:])))[::-1]
    kept = chain[start : len(chain) - len(behind)]
    for clip in behind:
        if clip.op_type == "Clip":
            clip.input[0] = kept[-1].output[0]
            kept.append(clip)
    return kept
