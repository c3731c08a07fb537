"""The operators that a packed graph may use.

These are torch's functional operators for deterministic inference, lowbit's own, and integer arithmetic on sizes. Operators that are not
listed here are neither written nor run, so a file can compute with its tensors and do nothing else: it cannot access files, draw random
numbers, change tensors in place or view memory outside of a tensor. ``arguments`` checks the arguments of operators, ``budget`` limits
their memory and time.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch

from lowbit.errors import FileFormatError
from lowbit.formats.program.arguments import RANDOM, check_settings, divides_integers, refusing_overflow
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
    addcmul addcdiv lerp nan_to_num fill
    eq ne lt le gt ge logical_and logical_or logical_not logical_xor bitwise_and bitwise_or bitwise_not bitwise_xor isnan isinf isfinite
    sum mean prod amax amin max min argmax argmin std var std_mean var_mean any all logsumexp cumsum cumprod sort argsort topk
    zeros ones full arange linspace eye scalar_tensor zeros_like ones_like full_like new_zeros new_ones new_full
    embedding embedding_bag one_hot bucketize searchsorted meshgrid
    scaled_dot_product_attention lstm gru rnn_tanh rnn_relu lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell sym_size sym_numel
"""
_ATEN = frozenset(_ATEN_NAMES.split())
_NOT_PACKED = frozenset({"lstm", "gru", "rnn_tanh", "rnn_relu"})  # their overload for packed sequences is not allowed
_LOWBIT = frozenset({"fake_quantize_affine", "fake_quantize_grid", "fake_quantize_codebook", "input_scale"})

_LARGEST = 2**62  # no size can be larger; repeated products in hostile files would exhaust the memory


def _on_numbers(function: Callable[..., float]) -> Function:
    """``function`` restricted to numbers of bounded size: Python's ``*`` would also repeat lists, and its integers are unbounded."""

    def checked(*values: object) -> float:
        if any(isinstance(value, (torch.SymInt, torch.SymFloat)) for value in values):  # open sizes, where the network is exported again
            return function(*values)
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


_ON_SIZES: dict[str, tuple[Function, Function]] = {  # name: (function in an exported graph, function that a loaded graph runs)
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


_NAMES_ON_SIZES = {found: name for name, (found, _) in _ON_SIZES.items()}


def operator_name(target: object) -> str | None:
    """The name by which a file refers to a node's target (``aten.conv2d.default``, ``mul``), or ``None`` if it is not allowed."""
    name = _NAMES_ON_SIZES.get(target) if callable(target) else None
    if name is not None:
        return str(name)
    return str(target) if isinstance(target, _OpOverload) and _is_listed(str(target)) and _is_function(target) else None


@functools.cache
def find_operator(name: str) -> Function:
    """The function of that name; FileFormatError if it is not allowed or this version of torch lacks it."""
    if name in _ON_SIZES:
        return _ON_SIZES[name][1]
    if not _is_listed(name):
        raise FileFormatError(f"operator {name[:80]!r} is not one that a packed file may use")
    overload = _overload(name)
    if not _is_function(overload):
        reason = "it writes into its arguments, is random or returns no tensor"
        raise FileFormatError(f"operator {name!r} is not one that a packed file may use: {reason}")
    return refusing_overflow(overload) if divides_integers(overload) else cast(Function, overload)


def check_arguments(name: str, args: Sequence[object], kwargs: Mapping[str, object]) -> None:
    """Raise FileFormatError if torch cannot be trusted with a constant setting of a graph."""
    if name in _ON_SIZES:
        return
    try:
        check_settings(_overload(name), args, kwargs)
    except ValueError as error:
        raise FileFormatError(f"operator {name!r}: {error}") from error


def find_overload(name: str) -> Any:
    """The torch operator with an allowed name; ``None`` for arithmetic on sizes."""
    return None if name in _ON_SIZES else _overload(name)


def _is_listed(name: str) -> bool:
    namespace, _, rest = name.partition(".")
    packet, _, overload = rest.partition(".")
    known = _ATEN if namespace == "aten" else _LOWBIT if namespace == "lowbit" else frozenset()
    if packet in _NOT_PACKED and overload != "input":
        return False
    return packet in known and overload.isidentifier() and not overload.startswith("prim")  # TorchScript overloads, which check nothing


def _is_function(overload: Any) -> bool:
    """Whether an operator changes none of its arguments, draws no random numbers, and returns tensors or a size.

    Operators that are random only with certain settings, such as attention with dropout, are allowed; ``arguments`` refuses the setting.
    """
    schema = overload._schema
    makes_tensors = any("Tensor" in str(result.type) for result in schema.returns)
    is_random = torch.Tag.nondeterministic_seeded in overload.tags and not any(argument.name in RANDOM for argument in schema.arguments)
    return not (schema.is_mutable or is_random) and (makes_tensors or str(overload) in ("aten.sym_size.int", "aten.sym_numel.default"))


@functools.cache
def _overload(name: str) -> Any:
    namespace, packet, overload = name.split(".")
    found = getattr(getattr(getattr(torch.ops, namespace), packet, None), overload, None)
    if not isinstance(found, _OpOverload):  # packets also have other attributes
        raise FileFormatError(f"operator {name!r} is unknown to torch {torch.__version__}; the file needs another version")
    return found
