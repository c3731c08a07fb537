"""Checks the arguments of operators that torch does not check itself.

Torch trusts its callers: it divides by a stride of zero, reads past the end of a short table, and writes statistics into its arguments.
Settings (numbers, flags) are checked by the names of their parameters, which mean the same in all operators, once when a file is read and
again if they are computed at run time; tensors are checked for each family of operators before each call.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

LARGEST_SETTING = 2**31  # larger sizes, strides and indices fit no tensor, and their sums and products overflow in torch

Values = Mapping[str, Any]

_LEAST = {  # smallest integers, by the name of the parameter
    **dict.fromkeys(("stride", "dilation", "kernel_size", "groups", "group", "num_groups", "num_layers", "step"), 1),
    **dict.fromkeys(("upscale_factor", "downscale_factor", "chunks", "sections", "divisor_override"), 1),
    **dict.fromkeys(("padding", "output_padding", "output_size", "repeats", "steps", "split_size", "split_sizes", "length", "k"), 0),
    **dict.fromkeys(("N", "C", "HxW", "n", "m", "normalized_shape"), 0),
    "num_classes": -1,
}
_CHOICES = {"interpolation_mode": (0, 1, 2), "padding_mode": (0, 1, 2)}  # torch accepts any number and then computes nothing
_OPEN = {"start", "end"}  # in a slice, the largest number means the end
_ANY_SIGN = {("rot90", "k")}
RANDOM = ("dropout", "dropout_p")
_TRAINING = ("train", "training", "use_input_stats")
_STATISTICS = ("running_mean", "running_var")
_INTEGER_DIVISIONS = {"floor_divide", "remainder", "fmod", "div"}


def check_settings(overload: Any, args: Sequence[object], kwargs: Mapping[str, object]) -> None:
    """Raise ValueError if a constant setting is out of range, makes results random or would change a stored tensor.

    Arguments that are computed at run time are skipped.
    """
    for name, parameter, value in _given(overload, args, kwargs):
        if parameter.is_listed and not (value is None or isinstance(value, (torch.dtype, torch.memory_format))):
            raise ValueError(f"{name} must be a dtype or memory format, got {str(value)[:80]}")
        if parameter.is_whole:
            _check_whole(overload, name, value)
        if name in RANDOM and isinstance(value, (int, float)) and value != 0:
            raise ValueError(f"{name} must be 0, so that equal inputs give equal results; got {value}")
        if (
            name in _TRAINING
            and value is True
            and any(other in _STATISTICS and stat is not None for other, _, stat in _given(overload, args, kwargs))
        ):
            raise ValueError(f"{name} must be false where there are running statistics: they would be changed")
        if value is torch.bool and str(overload) == "aten.view.dtype":
            raise ValueError("bytes cannot be used as booleans")
        if name == "sorter" and value is not None:
            raise ValueError("sorter must be left out: torch does not check its indices")


def _check_whole(overload: Any, name: str, value: object) -> None:
    for number in value if isinstance(value, (list, tuple)) else (value,):
        if not isinstance(number, int) or isinstance(number, bool):
            continue  # absent, or computed at run time
        if name not in _OPEN and abs(number) > LARGEST_SETTING:
            raise ValueError(f"{name} must be at most {LARGEST_SETTING} in size, got {number}")
        least = _LEAST.get(name)
        if least is not None and number < least and (overload._schema.name.removeprefix("aten::"), name) not in _ANY_SIGN:
            raise ValueError(f"{name} must be at least {least}, got {number}")
        if number not in _CHOICES.get(name, (number,)):
            raise ValueError(f"{name} must be one of {_CHOICES[name]}, got {number}")


def check_tensors(overload: Any, args: Sequence[object], kwargs: Mapping[str, object]) -> None:
    """Raise ValueError if torch cannot be trusted with the tensor arguments of a call."""
    check_settings(overload, args, kwargs)
    family = _FAMILIES.get(overload._schema.name)
    if family is not None:
        family({name: value for name, _, value in _given(overload, args, kwargs)})


class _Parameter:
    """The kind of a parameter in a schema: an integer or a list of integers, or one of torch's enumerations."""

    def __init__(self, argument: Any) -> None:
        kind = str(argument.real_type)
        self.name = str(argument.name)
        self.is_listed = any(listed in kind for listed in ("ScalarType", "MemoryFormat", "Layout"))
        self.is_whole = not self.is_listed and "int" in kind.lower()


@functools.cache
def _parameters(overload: Any) -> tuple[_Parameter, ...]:
    return tuple(_Parameter(argument) for argument in overload._schema.arguments)


def _given(overload: Any, args: Sequence[object], kwargs: Mapping[str, object]) -> list[tuple[str, _Parameter, Any]]:
    parameters = _parameters(overload)
    given = [(parameter.name, parameter, value) for parameter, value in zip(parameters, args, strict=False)]
    return given + [(p.name, p, kwargs[p.name]) for p in parameters if p.name in kwargs]


def _batch_norm(values: Values) -> None:
    """Check that each table has one element for each channel."""
    x = values["input"]
    tables = [values.get(name) for name in ("weight", "bias", *_STATISTICS)]
    if x.dim() < 2 or any(table is not None and table.shape != x.shape[1:2] for table in tables):
        raise ValueError(f"an input of shape {tuple(x.shape)} needs tables of one element for each channel")
    if any(table is not None and table.device != x.device for table in tables):
        raise ValueError("its tables must be on the device of its input")
    if values.get("running_mean") is None and values.get("training") is not True:
        raise ValueError("it needs running statistics, or training mode to compute them from its input")


def _group_norm(values: Values) -> None:
    """Check that the given sizes are those of the input."""
    x, batch, channels, rest = (values[name] for name in ("input", "N", "C", "HxW"))
    if x.dim() < 2 or x.shape[:2] != (batch, channels) or math.prod(x.shape[2:]) != rest:
        raise ValueError(f"an input of shape {tuple(x.shape)} is not {batch} x {channels} x {rest}")
    if channels % values["group"] or any(t is not None and t.shape != (channels,) for t in (values.get("weight"), values.get("bias"))):
        raise ValueError(f"{channels} channels must be divisible into its groups and need tables of one element for each channel")


def _recurrent(gates: int) -> Callable[[Values], None]:
    """A check that states and parameters have the shapes that the input requires; ``gates`` rows of a weight belong to one output."""

    def check(values: Values) -> None:
        x, hx, parameters, layers = values["input"], values["hx"], values["params"], values["num_layers"]
        states = hx if isinstance(hx, (list, tuple)) else [hx]
        if x.dim() != 3 or any(t.dtype != x.dtype or t.device != x.device or t.dim() > 3 for t in (*states, *parameters)):
            raise ValueError("its input must be a batch of sequences, and all its tensors of one dtype")
        if any(state.dim() != 3 for state in states) or len(states) != (2 if gates == 4 else 1):
            raise ValueError(f"its states or parameters do not fit an input of shape {tuple(x.shape)}")
        result, cell, directions = states[0].shape[-1], states[-1].shape[-1], 2 if values["bidirectional"] else 1
        projections = [(result, cell)] if result != cell else []
        biases = [(gates * cell,)] * 2 if values["has_biases"] else []
        expected: list[tuple[int, ...]] = []
        if len(parameters) == layers * directions * (2 + len(biases) + len(projections)):
            for layer in range(layers):
                inputs = x.shape[2] if layer == 0 else result * directions
                expected += [(gates * cell, inputs), (gates * cell, result), *biases, *projections] * directions
        batch = x.shape[0 if values["batch_first"] else 1]
        if [tuple(p.shape) for p in parameters] != expected or any(s.shape[:2] != (layers * directions, batch) for s in states):
            raise ValueError(f"its states or parameters do not fit an input of shape {tuple(x.shape)}")

    return check


def _bag(values: Values) -> None:
    """Check the table of rows, the indices and the offsets of the bags; torch checks the range of the indices."""
    weight, indices, offsets, factors = values["weight"], values["indices"], values["offsets"], values.get("per_sample_weights")
    if [t.dim() for t in (weight, indices, offsets)] != [2, 1, 1] or any(t.device != weight.device for t in (indices, offsets)):
        raise ValueError("it needs a table of rows, a list of indices and a list of offsets, all on one device")
    if indices.dtype != offsets.dtype or indices.dtype not in (torch.int32, torch.int64) or values.get("mode", 0) not in (0, 1, 2):
        raise ValueError("indices and offsets must be whole numbers, and its mode 0, 1 or 2")
    if factors is not None and (factors.shape != indices.shape or factors.dtype != weight.dtype or factors.device != weight.device):
        raise ValueError(f"its factors must be {weight.dtype}, one for each of {indices.numel()} indices")
    if not -weight.shape[0] <= (values.get("padding_idx") or 0) < max(weight.shape[0], 1):
        raise ValueError(f"padding_idx must be one of its {weight.shape[0]} rows")


def _resize(values: Values) -> None:
    """Check that scales fit the sizes: torch computes positions in the input, and the width of filters, from them."""
    x, sizes, factors = values.get("self", values.get("input")), values.get("output_size"), values.get("scale_factors")
    scales = factors if factors is not None else [value for name, value in values.items() if name.startswith("scales")]
    if not isinstance(x, Tensor) or x.dim() < 3:
        raise ValueError("it needs a batch of images with channels")
    space = x.shape[2:]
    if sizes is None:
        sizes = [before * scale for before, scale in zip(space, scales, strict=True)]
        if not all(1 <= size <= LARGEST_SETTING for size in sizes):  # also fails for NaN
            raise ValueError(f"scales of {list(scales)} do not resize {tuple(space)}")
        return
    for before, after, scale in zip(space, sizes, scales, strict=False):
        if scale is not None and not abs(before * scale - after) <= 1:
            raise ValueError(f"a scale of {scale} does not resize {before} to {after}")


def _attention(values: Values) -> None:
    """Check that there are as many keys as values, that widths are equal, and that heads and masks fit."""
    query, key, value, mask = values["query"], values["key"], values["value"], values.get("attn_mask")
    tensors = (query, key, value)
    if any(t.dim() < 2 or t.dim() != query.dim() or t.dtype != query.dtype or t.device != query.device for t in tensors):
        raise ValueError("query, key and value must have the same dtype and the same number of dimensions, two or more")
    if values.get("enable_gqa"):
        heads = [t.shape[-3] if t.dim() > 2 else 0 for t in tensors]
        if any(count == 0 for count in heads) or heads[1] != heads[2] or heads[0] % heads[1]:
            raise ValueError(f"shared heads need keys and values of at least one head, a divisor of the query's, got {heads}")
    if key.shape[:-1] != value.shape[:-1] or query.shape[-1] != key.shape[-1]:
        raise ValueError(
            f"there must be as many keys as values, and keys as wide as queries, got {', '.join(str(tuple(t.shape)) for t in tensors)}"
        )
    scale = values.get("scale")
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale must be a finite number, got {scale}")
    outer = query.shape[:-2] if values.get("enable_gqa") else torch.broadcast_shapes(query.shape[:-2], key.shape[:-2])
    if mask is not None:
        scores = (*outer, query.shape[-2], key.shape[-2])
        if values.get("is_causal") or mask.dtype not in (torch.bool, query.dtype) or mask.device != query.device:
            raise ValueError("a mask must have dtype bool or that of the query, and cannot be combined with is_causal")
        if not _broadcasts_to(mask.shape, scores):
            raise ValueError(f"a mask of shape {tuple(mask.shape)} does not fit scores of shape {scores}")


def _transposed(values: Values) -> None:
    """Check that output_padding is smaller than the stride or the dilation."""
    if values.get("transposed") is False:
        return
    defaults = {"output_padding": 0, "stride": 1, "dilation": 1}
    for added, stride, dilation in zip(*(_numbers(values.get(name, number)) for name, number in defaults.items()), strict=False):
        if added >= max(stride, dilation):
            raise ValueError(f"output_padding must be smaller than stride or dilation, got {added}")


def _numbers(value: object) -> list[Any]:
    """A number for each of up to three dimensions."""
    numbers = list(value) if isinstance(value, (list, tuple)) else [value]
    return numbers if len(numbers) > 1 else 3 * numbers


def _quantizer(values: Values) -> None:
    """Check that tables have one element or broadcast to the shape of the input, which is that of the result."""
    x, tables = values["x"], [value for name, value in values.items() if name != "x" and isinstance(value, Tensor)]
    if any(not _broadcasts_to(table.shape, x.shape) or table.device != x.device for table in tables):
        raise ValueError(f"scales and zero points must fit an input of shape {tuple(x.shape)}, got {[tuple(t.shape) for t in tables]}")


def _codebook(values: Values) -> None:
    boundaries, levels = values["boundaries"], values["levels"]
    if boundaries.dim() != 1 or levels.dim() != 1 or len(levels) != len(boundaries) + 1:
        raise ValueError(f"levels must be one more than boundaries, got {tuple(levels.shape)} and {tuple(boundaries.shape)}")


def _broadcasts_to(shape: Sequence[int], target: Sequence[int]) -> bool:
    ends = zip(reversed(shape), reversed(target), strict=False)
    return len(shape) <= len(target) and all(size in (1, other) for size, other in ends)


_FAMILIES: dict[str, Callable[[Values], None]] = {
    **dict.fromkeys(("aten::_native_batch_norm_legit_no_training", "aten::_native_batch_norm_legit"), _batch_norm),
    "aten::native_group_norm": _group_norm,
    "aten::lstm": _recurrent(4),
    "aten::gru": _recurrent(3),
    "aten::embedding_bag": _bag,
    **dict.fromkeys(("aten::rnn_tanh", "aten::rnn_relu"), _recurrent(1)),
    **dict.fromkeys(
        [f"aten::{prefix}{mode}" for prefix, modes in (
            ("upsample_", ("nearest1d", "nearest2d", "nearest3d", "linear1d", "bilinear2d", "trilinear3d", "bicubic2d")),
            ("_upsample_", ("nearest_exact1d", "nearest_exact2d", "nearest_exact3d", "bilinear2d_aa", "bicubic2d_aa")),
        ) for mode in modes],
        _resize,
    ),
    "aten::scaled_dot_product_attention": _attention,
    **dict.fromkeys(("aten::conv_transpose1d", "aten::conv_transpose2d", "aten::conv_transpose3d", "aten::convolution"), _transposed),
    **dict.fromkeys(("lowbit::fake_quantize_affine", "lowbit::fake_quantize_grid"), _quantizer),
    "lowbit::fake_quantize_codebook": _codebook,
}  # fmt: skip


def divides_integers(overload: Any) -> bool:
    """Whether an operator can perform integer division, where dividing the smallest integer by -1 crashes the process."""
    return overload._schema.name.removeprefix("aten::") in _INTEGER_DIVISIONS


def refusing_overflow(overload: Any) -> Callable[..., object]:
    """``overload``, raising ValueError if the smallest integer is divided by -1."""

    def checked(*args: Any, **kwargs: Any) -> object:
        is_exact = "div" in str(overload).split(".")[1:2] and kwargs.get("rounding_mode") is None
        if not (is_exact or torch.compiler.is_compiling() or torch.compiler.is_exporting()):
            dtype = torch.result_type(*args[:2])
            if dtype.is_signed and not dtype.is_floating_point and not dtype.is_complex:
                dividend, divisor = (torch.as_tensor(value).to(dtype) for value in args[:2])
                if bool((divisor == -1).any()) and bool((dividend == torch.iinfo(dtype).min).any()):
                    raise ValueError(f"the smallest number of {dtype} cannot be divided by -1")
        return overload(*args, **kwargs)

    return checked
