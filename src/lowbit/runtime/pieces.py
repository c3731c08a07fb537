"""Splitting of batches into pieces whose activations stay in the processor's caches.

The activations of a large batch go to memory and back between any two layers, and allocating them costs as much again; those of a small
piece do not. The result is the same if no image's result depends on another image, which can be seen from the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from lowbit.formats.program.calls import Graph, OperatorCall, Result, references

LARGEST_BYTES = 8 * 2**20  # size of one activation of a piece, for each thread

Shape = tuple[int, ...]

_NUMBER_NAMES = """
    add sub rsub mul div abs neg sign exp log sqrt rsqrt square reciprocal clamp clamp_min clamp_max maximum minimum
    relu relu6 leaky_relu prelu _prelu_kernel elu selu celu gelu silu mish hardtanh hardswish hardsigmoid sigmoid tanh softplus
    eq ne lt le gt ge where alias detach clone contiguous to _to_copy fake_quantize_affine fake_quantize_grid fake_quantize_codebook
"""
_IMAGE_NAMES = """
    conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d linear layer_norm _native_batch_norm_legit_no_training
    max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d
    _adaptive_avg_pool2d pixel_shuffle pixel_unshuffle constant_pad_nd reflection_pad2d replication_pad2d
    input_scale binary_conv2d binary_linear planes_conv2d planes_linear int8_conv2d int8_linear packed_linear packed_conv2d
"""
_AXIS_NAMES = "mean sum amax amin softmax log_softmax _softmax _log_softmax flatten cat unsqueeze squeeze select slice split chunk"
_EACH_NUMBER, _EACH_IMAGE, _ALONG_AXES = (frozenset(names.split()) for names in (_NUMBER_NAMES, _IMAGE_NAMES, _AXIS_NAMES))
_RESHAPING = frozenset({"view", "reshape", "_unsafe_view"})


def images_are_apart(graph: Graph, shapes: Mapping[str, Shape]) -> bool:
    """Whether each output for an image depends on that image alone, as far as the operators of the graph show.

    Args:
        graph: Graph of the network; all its inputs have an open batch size.
        shapes: Shape of each node's (first) result in a call with one image.
    """
    batched = {item.name for item in graph.inputs if item.shape and item.shape[0] is None}
    if len(batched) != len(graph.inputs):
        return False
    sizes: set[str] = set()  # nodes that compute the size of the batch
    ranks = {name: len(shape) for name, shape in shapes.items()} | {item.name: len(item.shape) for item in graph.inputs}
    for node in graph.nodes:
        read = {r.name for value in (*node.args, *node.kwargs.values()) for r in references(value) if isinstance(r, Result)}
        name = _short(node.operator)
        if name == "sym_size":
            if node.args[1] == 0:
                sizes.add(node.name)
        elif name in _RESHAPING:
            if not _keeps_images(node, sizes) or not read <= batched | sizes or shapes[node.name][:1] != (1,):
                return False
            batched.add(node.name)
        elif read:
            rule = next((rule for names, rule in _RULES if name in names), None)
            if rule is None or not read <= batched or not rule(node, ranks) or shapes.get(node.name, ())[:1] != (1,):
                return False
            batched.add(node.name)
        else:
            return False
    return all(isinstance(output, Result) and output.name in batched for output in graph.outputs)


def _short(operator: str) -> str:
    """``relu`` of ``aten.relu.default``."""
    return operator.split(".")[1] if "." in operator else operator


def _keeps_images(node: OperatorCall, sizes: set[str]) -> bool:
    shape = node.args[1] if len(node.args) > 1 else None
    if not isinstance(shape, (list, tuple)) or not shape:
        return False
    first, *rest = shape
    is_batch = first == -1 or (isinstance(first, Result) and first.name in sizes)
    return is_batch and all(isinstance(size, int) for size in rest)


def _for_each_number(node: OperatorCall, ranks: Mapping[str, int]) -> bool:
    """Whether all operands have the rank of the result, so that broadcasting does not pair different images."""
    found = [ranks.get(r.name) for value in (*node.args, *node.kwargs.values()) for r in references(value) if isinstance(r, Result)]
    return len(set(found)) == 1 and found[0] == ranks.get(node.name)


def _for_each_image(node: OperatorCall, ranks: Mapping[str, int]) -> bool:
    """Whether the first argument has axes besides the batch, weights are stored tensors, and summands have the rank of the result."""
    first, *others = node.args
    weights = [r for value in others for r in references(value) if isinstance(r, Result)]
    added = (r for value in node.kwargs.values() for r in references(value) if isinstance(r, Result))
    has_axes = isinstance(first, Result) and ranks.get(first.name, 0) > 1
    return has_axes and not weights and all(ranks.get(r.name) == ranks.get(node.name) for r in added)


def _along_axes(node: OperatorCall, ranks: Mapping[str, int]) -> bool:
    """Whether the axes are explicit and the batch axis is not among them."""
    name = _short(node.operator)
    place = 2 if name in ("split", "chunk") else 1
    if len(node.args) <= place:
        return False
    axes = node.args[place]
    listed = list(axes) if isinstance(axes, (list, tuple)) else [axes]
    rank = min((ranks.get(r.name, 0) for r in references(node.args[0]) if isinstance(r, Result)), default=0) + (name == "unsqueeze")
    return bool(listed) and rank > 0 and all(isinstance(axis, int) and axis % rank > 0 for axis in listed)


def _item(node: OperatorCall, ranks: Mapping[str, int]) -> bool:
    return isinstance(node.args[0], Result)


_RULES: tuple[tuple[frozenset[str], Callable[[OperatorCall, Mapping[str, int]], bool]], ...] = (
    (_EACH_NUMBER, _for_each_number),
    (_EACH_IMAGE, _for_each_image),
    (_ALONG_AXES, _along_axes),
    (frozenset({"getitem"}), _item),
)
