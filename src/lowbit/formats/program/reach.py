"""How far around a pixel a network of pictures looks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, cast

import torch

from lowbit.formats.program.calls import Graph, OperatorCall, Result, Stored, references
from lowbit.formats.program.operators import find_overload

_BY_DIM = {"cat": 1, "slice": 1, "narrow": 1, "select": 1, "split": 2, "split_with_sizes": 2, "chunk": 2}  # which argument is the dimension
_SAME_PLACE = frozenset(
    {
        *("item", "clone", "alias", "detach", "contiguous", "_to_copy", "to", "zeros_like", "ones_like", "full_like"),
        *("fake_quantize_affine", "fake_quantize_grid", "fake_quantize_codebook"),
        *("prelu", "_prelu_kernel", "_native_batch_norm_legit_no_training"),
    }
)
_REDUCTIONS = frozenset({"mean", "sum", "amax", "amin", "std", "var"})
_CHANNELS = ([1], [-3])
_NOT_PIXELS = (0, 1, -3, -4)  # dimensions of ``[N, C, H, W]``


@dataclass(frozen=True)
class _Span:
    """How many pixels of the input before and behind its own place a value depends on, and how many values there are for a pixel."""

    before: Fraction = Fraction(0)
    behind: Fraction = Fraction(0)
    scale: int = 1

    def plus(self, before: int, behind: int) -> _Span:
        """The span of a value that depends on so many of these more."""
        return _Span(self.before + Fraction(before, self.scale), self.behind + Fraction(behind, self.scale), self.scale)


def reach_of(graph: Graph, tensors: Mapping[str, torch.Tensor]) -> int | None:
    """The most pixels to a side that an output of a network of pictures ``[N, C, H, W]`` depends on, besides its own.

    Kernels, dilations and padding are added up along the longest path, in pixels of the input: behind a pixel shuffle they count less.

    Args:
        graph: What the network computes.
        tensors: Its stored tensors by name.

    Returns:
        ``None`` where an operator looks at the whole picture, such as a mean over rows, or is not known to look no farther than it is counted for.
    """
    spans: dict[str, _Span] = {item.name: _Span() for item in graph.inputs}
    for call in graph.nodes:
        values = (call.args, tuple(call.kwargs.values()))
        read = [spans[part.name] for part in references(values) if isinstance(part, Result) and part.name in spans]
        if not read or _name(call).startswith("sym_"):
            continue
        joined = _Span(max(span.before for span in read), max(span.behind for span in read), min(span.scale for span in read))
        found = _behind(call, joined, tensors)
        if found is None:
            return None
        spans[call.name] = found
    ends = [spans[part.name] for part in references(graph.outputs) if isinstance(part, Result) and part.name in spans]
    return max((math.ceil(max(span.before, span.behind)) for span in ends), default=0)


def _behind(call: OperatorCall, span: _Span, tensors: Mapping[str, torch.Tensor]) -> _Span | None:
    """The span of what an operator makes of values with the span ``span``."""
    name, args = _name(call), cast("Sequence[Any]", call.args)
    if name == "conv2d":
        return _behind_convolution(span, args, tensors)
    if name == "pixel_shuffle":
        return _Span(span.before, span.behind, span.scale * args[1])
    if name in ("pad", "constant_pad_nd"):
        widths = args[1]
        return span.plus(max(widths[0::2], default=0), -min(widths[0::2], default=0))
    if name in _REDUCTIONS:
        return span if len(args) > 1 and args[1] in _CHANNELS else None
    if name in _BY_DIM:  # of samples or channels; else pixels change their places
        return span if (args[_BY_DIM[name]] if len(args) > _BY_DIM[name] else call.kwargs.get("dim", 0)) in _NOT_PIXELS else None
    overload = find_overload(call.operator)
    is_local = overload is None or torch.Tag.pointwise in overload.tags or name in _SAME_PLACE
    return span if is_local else None


def _behind_convolution(span: _Span, args: Sequence[Any], tensors: Mapping[str, torch.Tensor]) -> _Span | None:
    weight = args[1]
    stride, padding, dilation = (args[place] if len(args) > place else default for place, default in ((3, [1]), (4, [0]), (5, [1])))
    if not isinstance(weight, Stored) or set(stride) != {1}:
        return None
    found = []
    for side, size in enumerate(tensors[weight.name].shape[2:]):
        width = (size - 1) * dilation[side % len(dilation)]
        before = {"valid": 0, "same": width // 2}[padding] if isinstance(padding, str) else padding[side % len(padding)]
        found.append((before, width - before))
    return span.plus(max(before for before, _ in found), max(behind for _, behind in found))


def _name(call: OperatorCall) -> str:
    return call.operator.split(".")[1] if "." in call.operator else call.operator
