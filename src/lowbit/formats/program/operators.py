"""The operators that a packed graph may use.

Torch's functional operators that deterministic inference needs, lowbit's own, and whole-number arithmetic on sizes. What is not listed
here is neither written nor run, so a file can compute with its tensors and do nothing else: no files, no random numbers, no
changing of tensors in place, no views that reach outside a tensor. Where torch trusts the sizes that it is given, they are checked here.
Time and memory have no bound: a file can ask for as much as any network.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import FileFormatError
from lowbit.quantizers import ops as ops  # registers lowbit's own operators

Function = Callable[..., object]
_OpOverload = type(torch.ops.aten.relu.default)

_ATEN_NAMES = """
    conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution linear bilinear
    matmul mm bmm mv dot outer addmm baddbmm addbmm addmv einsum linalg_vector_norm norm
    _native_batch_norm_legit_no_training _native_batch_norm_legit layer_norm native_layer_norm group_norm native_group_norm
    instance_norm rms_norm
    relu relu6 leaky_relu prelu _prelu_kernel elu selu celu gelu silu mish glu hardtanh hardswish hardsigmoid hardshrink softshrink
    sigmoid log_sigmoid tanh softplus softmax log_softmax _softmax _log_softmax threshold logit
    max_pool1d max_pool2d max_pool3d max_pool2d_with_indices max_pool3d_with_indices avg_pool1d avg_pool2d avg_pool3d
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d
    adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d
    upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d
    upsample_linear1d upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa
    grid_sampler grid_sampler_2d grid_sampler_3d affine_grid_generator pixel_shuffle pixel_unshuffle channel_shuffle
    view reshape _unsafe_view view_as reshape_as flatten unflatten permute transpose t numpy_T movedim moveaxis swapaxes squeeze unsqueeze
    expand expand_as broadcast_to broadcast_tensors repeat repeat_interleave tile cat concat stack hstack vstack
    split split_with_sizes chunk tensor_split unbind select slice narrow diagonal unfold im2col col2im
    index index_select gather take_along_dim slice_scatter select_scatter scatter scatter_add index_put index_add masked_fill where
    roll flip rot90 tril triu pad constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d
    replication_pad1d replication_pad2d replication_pad3d alias detach clone contiguous lift_fresh_copy copy _to_copy to type_as
    add sub rsub mul div floor_divide true_divide fmod remainder neg abs sign exp exp2 expm1 log log2 log10 log1p sqrt rsqrt square pow
    reciprocal sin cos tan asin acos atan atan2 sinh cosh erf floor ceil round trunc frac clamp clamp_min clamp_max maximum minimum
    addcmul addcdiv lerp nan_to_num
    eq ne lt le gt ge logical_and logical_or logical_not logical_xor bitwise_and bitwise_or bitwise_not bitwise_xor isnan isinf isfinite
    sum mean prod amax amin max min argmax argmin std var std_mean var_mean any all logsumexp cumsum cumprod sort argsort topk
    zeros ones full arange linspace eye scalar_tensor zeros_like ones_like full_like new_zeros new_ones new_full
    embedding one_hot bucketize searchsorted meshgrid
    scaled_dot_product_attention lstm gru rnn_tanh rnn_relu sym_size sym_numel
"""
_ATEN = frozenset(_ATEN_NAMES.split())
_NOT_PACKED = frozenset({"lstm", "gru", "rnn_tanh", "rnn_relu"})  # only their overload for plain batches, not that for packed sequences
_LOWBIT = frozenset({"fake_quantize_affine", "fake_quantize_grid", "fake_quantize_codebook", "input_scale"})

_LARGEST = 2**62  # sizes beyond it cannot be sizes; repeated products of hostile files would fill the memory


def _on_numbers(function: Callable[..., float]) -> Function:
    """``function`` for numbers of bounded size only: Python's ``*`` would also repeat lists, its integers grow without end."""

    def checked(*values: object) -> float:
        if not all(isinstance(value, (int, float)) for value in values):
            raise TypeError(f"needs numbers, got {', '.join(type(value).__name__ for value in values)}")
        result = function(*values)
        if abs(result) > _LARGEST:
            raise OverflowError("the result is too large")
        return result

    return checked


def _item(values: object, index: object) -> object:
    if not isinstance(values, (list, tuple)) or not isinstance(index, int):
        raise TypeError(f"needs a list and a whole number, got {type(values).__name__} and {type(index).__name__}")
    return values[index]


_ON_SIZES: dict[str, tuple[Function, Function]] = {  # name: (what export finds in a graph, what a loaded graph runs)
    "getitem": (operator.getitem, _item),
    "add": (operator.add, _on_numbers(operator.add)),
    "sub": (operator.sub, _on_numbers(operator.sub)),
    "mul": (operator.mul, _on_numbers(operator.mul)),
    "floordiv": (operator.floordiv, _on_numbers(operator.floordiv)),
    "truediv": (operator.truediv, _on_numbers(operator.truediv)),
    "mod": (operator.mod, _on_numbers(operator.mod)),
    "neg": (operator.neg, _on_numbers(operator.neg)),
    "sym_max": (torch.sym_max, _on_numbers(max)),
    "sym_min": (torch.sym_min, _on_numbers(min)),
    "sym_int": (torch.sym_int, _on_numbers(int)),
    "sym_float": (torch.sym_float, _on_numbers(float)),
}


def _batch_norm(function: Function) -> Function:
    """``function`` where each table has one element for each channel: torch would read past the end of a shorter one."""

    def checked(x: Tensor, weight: Tensor | None, bias: Tensor | None, *args: object) -> object:
        tables = [table for table in (weight, bias, *args) if isinstance(table, Tensor)]
        if x.dim() < 2 or any(table.shape != x.shape[1:2] for table in tables):
            raise ValueError(f"an input of shape {tuple(x.shape)} needs tables of one element for each channel")
        if not (args and (isinstance(args[0], Tensor) or args[0] is True)):
            raise ValueError("it needs statistics, or to take them from its input")
        return function(x, weight, bias, *args)

    return checked


def _lstm(function: Function) -> Function:
    """``function`` where states and parameters have the shapes that its input asks for: torch would read and write past their ends."""

    def checked(
        x: Tensor, states: list[Tensor], parameters: list[Tensor], has_biases: bool, layers: int, dropout: float, train: bool,
        bidirectional: bool, batch_first: bool,
    ) -> object:  # fmt: skip
        (result, cell), directions = (state.shape[-1] for state in states), 2 if bidirectional else 1
        projections = [(result, cell)] if result != cell else []
        biases = [(4 * cell,)] * 2 if has_biases else []
        expected: list[tuple[int, ...]] = []
        if len(parameters) == layers * directions * (2 + len(biases) + len(projections)):
            for layer in range(layers):
                inputs = x.shape[2] if layer == 0 else result * directions
                expected += [(4 * cell, inputs), (4 * cell, result), *biases, *projections] * directions
        batch = x.shape[0 if batch_first else 1]
        if [tuple(p.shape) for p in parameters] != expected or any(s.shape[:2] != (layers * directions, batch) for s in states):
            raise ValueError(f"its states or parameters do not fit an input of shape {tuple(x.shape)}")
        if x.dim() != 3 or any(t.dtype != x.dtype or t.dim() > 3 for t in (*states, *parameters)):
            raise ValueError("its input must be a batch of sequences, and all its tensors of one dtype")
        return function(x, states, parameters, has_biases, layers, dropout, train, bidirectional, batch_first)

    return checked


def _resize(function: Function) -> Function:
    """``function`` with scales that fit the sizes: torch makes its filter as wide as the scale says."""

    def checked(x: Tensor, sizes: list[int], align_corners: bool, *scales: float | None) -> object:
        for before, after, scale in zip(x.shape[-2:], sizes, scales, strict=False):
            if scale is not None and not abs(before * scale - after) <= 1:  # NaN too
                raise ValueError(f"a scale of {scale} does not resize {before} to {after}")
        return function(x, sizes, align_corners, *scales)

    return checked


def _group_norm(function: Function) -> Function:
    """``function`` after checking that its size arguments are those of its input: torch divides by them and counts with them."""

    def checked(x: Tensor, weight: Tensor | None, bias: Tensor | None, batch: int, channels: int, rest: int, *args: object) -> object:
        if x.dim() < 2 or x.shape[:2] != (batch, channels) or math.prod(x.shape[2:]) != rest:
            raise ValueError(f"an input of shape {tuple(x.shape)} is not {batch} x {channels} x {rest}")
        return function(x, weight, bias, batch, channels, rest, *args)

    return checked


def _attention(function: Function) -> Function:
    """``function`` with at least one head of keys and values where heads are shared: torch divides by their number."""

    def checked(query: Tensor, key: Tensor, value: Tensor, *args: object, enable_gqa: bool = False, **options: object) -> object:
        if enable_gqa and any(t.dim() < 3 or t.shape[-3] == 0 for t in (query, key, value)):
            raise ValueError("shared heads need keys and values of at least one head")
        return function(query, key, value, *args, enable_gqa=enable_gqa, **options)

    return checked


_GUARDS: dict[str, Callable[[Function], Function]] = {
    "aten._native_batch_norm_legit_no_training.default": _batch_norm,
    "aten._native_batch_norm_legit.no_stats": _batch_norm,
    "aten.native_group_norm.default": _group_norm,
    "aten.scaled_dot_product_attention.default": _attention,
    "aten.lstm.input": _lstm,
    "aten._upsample_bilinear2d_aa.default": _resize,
    "aten._upsample_bicubic2d_aa.default": _resize,
}
_NAMES_ON_SIZES = {found: name for name, (found, _) in _ON_SIZES.items()}


def operator_name(target: object) -> str | None:
    """The name under which a file refers to a node's target (``aten.conv2d.default``, ``mul``), or ``None`` if it is not allowed."""
    name = _NAMES_ON_SIZES.get(target) if callable(target) else None
    if name is not None:
        return str(name)
    return str(target) if isinstance(target, _OpOverload) and _is_listed(str(target)) and _is_function(target) else None


@functools.cache
def find_operator(name: str) -> Function:
    """The function behind a name in a file; FileFormatError when it is not allowed or this torch does not have it."""
    if name in _ON_SIZES:
        return _ON_SIZES[name][1]
    if not _is_listed(name):
        raise FileFormatError(f"operator {name[:80]!r} is not one that a packed file may use")
    overload = _overload(name)
    if not _is_function(overload):
        raise FileFormatError(f"operator {name!r} is not one that a packed file may use: it writes into its arguments or makes no tensor")
    return _GUARDS[name](overload) if name in _GUARDS else overload


def check_arguments(name: str, args: Sequence[object], kwargs: Mapping[str, object]) -> None:
    """FileFormatError where a number stands for a dtype or memory format: torch looks it up in a table without checking it."""
    if name in _ON_SIZES:
        return
    expected = _overload(name)._schema.arguments
    given = [*zip(expected, args, strict=False), *((argument, kwargs[argument.name]) for argument in expected if argument.name in kwargs)]
    for argument, value in given:
        is_listed = any(kind in str(argument.real_type) for kind in ("ScalarType", "MemoryFormat", "Layout"))
        if is_listed and not (value is None or isinstance(value, (torch.dtype, torch.memory_format))):
            raise FileFormatError(f"operator {name!r}: {argument.name} must be a dtype or memory format, got {str(value)[:80]}")


def _is_listed(name: str) -> bool:
    namespace, _, rest = name.partition(".")
    packet, _, overload = rest.partition(".")
    known = _ATEN if namespace == "aten" else _LOWBIT if namespace == "lowbit" else frozenset()
    if packet in _NOT_PACKED and overload != "input":
        return False
    return packet in known and overload.isidentifier() and not overload.startswith("prim")  # of TorchScript, without checks


def _is_function(overload: Any) -> bool:
    """Whether it writes into none of its arguments and makes tensors, or reads a size: what a functional graph of tensors calls."""
    schema = overload._schema
    makes_tensors = any("Tensor" in str(result.type) for result in schema.returns)
    return not schema.is_mutable and (makes_tensors or str(overload) in ("aten.sym_size.int", "aten.sym_numel.default"))


def _overload(name: str) -> Any:
    namespace, packet, overload = name.split(".")
    found = getattr(getattr(getattr(torch.ops, namespace), packet, None), overload, None)
    if not isinstance(found, _OpOverload):  # packets have other attributes too
        raise FileFormatError(f"operator {name!r} is unknown to torch {torch.__version__}; the file needs another version")
    return found
