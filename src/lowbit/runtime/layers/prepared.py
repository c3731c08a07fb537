"""Low-bit layers in the form that kernels read: prepared once, kept as long as their tensors do not change, run in threads."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from lowbit.runtime.arguments import Affine, Epilogue, PlanesLayer, SignLayer, Window
from lowbit.runtime.cpu.bits import WORD, pack_signs, unpack_weight, words_for
from lowbit.runtime.kept import PreparedWeights, version_of

PLANS = 4  # sizes of inputs of a layer whose plans are kept
THREAD_WORK = 2**27  # products of one bit by one bit that one thread gets; below, starting it costs more than it saves

NOTHING = torch.empty(0, 0)

Array = npt.NDArray[np.generic]
Table = npt.NDArray[np.int64]
AnyLayer = SignLayer[Tensor] | PlanesLayer[Tensor]


class PreparedLayer:
    """A layer of signs whose weights lie in the order in which the kernels of the active target read them.

    Args:
        loops: The compiled kernels.
        layer: The weight, and what the signs of inputs are. Weights of several bits have one more dimension at the front, and thresholds in
            ascending order too.
        window: What an output reads.
        epilogue: What happens to the sums; its residual is given to ``run``.
    """

    def __init__(self, loops: ModuleType, layer: SignLayer[Tensor], window: Window, epilogue: Epilogue[Tensor]) -> None:
        self.loops = loops
        self.made_of(layer, window, epilogue)
        self.window, self.groups = window, window.groups
        self.channels, self.outputs = layer.in_channels, len(epilogue.scale)
        per_group = self.channels // self.groups
        self.words = words_for(per_group)
        limits = torch.atleast_2d(torch.zeros(self.channels) if layer.threshold is None else layer.threshold).expand(-1, self.channels)
        self.packing = filled_limits(limits, self.groups), _flipped_bits(layer.flip, self.groups, self.words)
        ordered = _ordered.get(
            layer.words,
            layer.mask,
            (per_group, self.groups),
            lambda: _in_kernel_order(layer.words, layer.mask, per_group, self.groups, loops),
        )
        self.weight, self.total, self.missing = ordered[:2], *ordered[2:]
        self.planes = 1  # images of words, one for each bit of the inputs
        self.border = window.pad_value + 1 if any(window.padding) else 0
        bias = torch.zeros_like(epilogue.scale) if epilogue.bias is None else epilogue.bias
        activation = NOTHING if epilogue.activation is None else epilogue.activation
        self.finishing = self.in_tiles(epilogue.scale), self.in_tiles(bias), self.in_tiles(activation)
        limits = torch.empty(0) if epilogue.out_threshold is None else epilogue.out_threshold
        self.signing = filled_limits(limits[None], 1).reshape(-1), _flipped_bits(epilogue.out_flip, 1, words_for(len(limits)))[0]
        self.plans: dict[tuple[int, int, int], Plan] = {}

    def made_of(self, layer: AnyLayer, window: Window, epilogue: Affine[Tensor]) -> None:
        """Keep in mind what it was made of."""
        self.parts = weakref.ref(layer), weakref.ref(window), weakref.ref(epilogue.lasting)
        tensors = (*layer.tensors, *epilogue.tensors)
        self.tensors = tuple(tensor if tensor is None else weakref.ref(tensor) for tensor in tensors)
        self.versions = [
            (weakref.ref(tensor), version_of(tensor)) for tensor in tensors if tensor is not None and not tensor.is_inference()
        ]
        self.numbers = (*layer.numbers, *window.numbers, window.groups, window.pad_value)

    def fits(self, layer: AnyLayer, window: Window, epilogue: Affine[Tensor]) -> bool:
        """Whether it was made of this as it is now, whatever is added to its sums."""
        known_layer, known_window, known_epilogue = self.parts
        if known_layer() is not layer or known_window() is not window or known_epilogue() is not epilogue.lasting:
            tensors = (*layer.tensors, *epilogue.tensors)
            is_same = all(
                (kept if kept is None else kept()) is tensor for kept, tensor in zip(self.tensors, tensors, strict=True)
            ) and self.numbers == (*layer.numbers, *window.numbers, window.groups, window.pad_value)
            if not is_same:
                return False
            self.parts = weakref.ref(layer), weakref.ref(window), weakref.ref(epilogue.lasting)
        for tensor, version in self.versions:  # noqa: SIM110 (a generator takes longer than the loop)
            if tensor()._version != version:  # type: ignore[union-attr]
                return False
        return True

    def in_tiles(self, values: Tensor) -> Array:
        """``[..., out]`` as ``[groups, tiles, ..., CHANNELS]``, filled up with zeros."""
        if not values.numel():
            return np.empty((0,) * (values.dim() + 2), values.numpy().dtype)
        by_group = values.detach().unflatten(-1, (self.groups, -1))
        filled = functional.pad(by_group, (0, -by_group.shape[-1] % self.loops.CHANNELS))
        array: Array = filled.unflatten(-1, (-1, self.loops.CHANNELS)).movedim((-3, -2), (0, 1)).contiguous().numpy()
        return array

    def plan(self, n: int, height: int, width: int) -> Plan:
        """What all calls with inputs of this size share; the plans of the last few sizes are kept."""
        found = self.plans.get((n, height, width))
        if found is None:
            if len(self.plans) >= PLANS:
                self.plans.pop(next(iter(list(self.plans)), (0, 0, 0)), None)
            found = self.plans[n, height, width] = Plan(self, n, height, width)
        return found

    def empty_image(self, n: int, height: int, width: int) -> Array:
        """Padded images without bits, into which inputs are packed; behind them memory for windows that reach over the end."""
        top, left = self.window.padding
        shape = (self.planes * n, height + 2 * top, width + 2 * left, self.groups, self.words)
        reach = self.loops.ROWS * self.window.stride[1] + self.window.kernel_size[1] * self.window.dilation[1]
        return np.zeros((math.prod(shape) + reach * shape[3] * shape[4]), self.loops.IMAGE)[: math.prod(shape)].reshape(shape)


class Plan:
    """A layer with inputs of one size: all that its calls share, so that a call is little more than one of a compiled function.

    Args:
        layer: The layer.
        n, height, width: Size of its inputs.

    Attributes:
        shape: Shape of the output, ``[N, out, rows, columns]``.
    """

    def __init__(self, layer: PreparedLayer, n: int, height: int, width: int) -> None:
        self.layer, self.size = layer, (n, height, width)
        window, loops = layer.window, layer.loops
        self.rows, self.columns = window.output_size((height, width))
        out, pixels = layer.outputs, self.rows * self.columns
        self.shape, self.strides = (n, out, self.rows, self.columns), (pixels * out, 1, self.columns * out, out)
        inside = [
            _inside(*sizes)
            for sizes in zip(
                (height, width),
                (self.rows, self.columns),
                window.kernel_size,
                window.stride,
                window.padding,
                window.dilation,
                strict=True,
            )
        ]
        (row_kinds, row_kind), (column_kinds, column_kind) = (
            np.unique(part if layer.border else part[:, :0], axis=0, return_inverse=True) for part in inside
        )
        missing = layer.missing if layer.border else np.zeros((0, 0, out), int)
        outside = missing.sum((0, 1)) - np.einsum("yi,xj,ijo->yxo", row_kinds.astype(int), column_kinds.astype(int), missing.astype(int))
        totals = layer.in_tiles(torch.from_numpy((layer.total + layer.border * outside).astype(np.int32)))
        step = 4 * loops.CHANNELS
        row_kinds = step * len(column_kinds) * row_kind.ravel()
        column_kinds = np.pad(step * column_kind.ravel(), (0, loops.ROWS))
        self.arrays = (
            *layer.packing,
            *layer.weight,
            totals,
            row_kinds,
            column_kinds,
            *layer.finishing,
            *layer.signing,
        )  # the table has addresses
        (threshold, flip), (weight, mask), (scale, bias, activation), signing = layer.packing, layer.weight, layer.finishing, layer.signing
        weight_bits = len(weight) // layer.groups
        kernel, stride, padding, dilation = window.kernel_size, window.stride, window.padding, window.dilation
        self.table: Table = loops.table_of(
            IMAGES=n, HEIGHT=height, WIDTH=width, CHANNELS=layer.channels, ROWS=self.rows, COLUMNS=self.columns, OUTPUTS=out,
            KERNEL_H=kernel[0], KERNEL_W=kernel[1], STRIDE_H=stride[0], STRIDE_W=stride[1], TOP=padding[0], LEFT=padding[1],
            DILATION_H=dilation[0], DILATION_W=dilation[1], GROUPS=layer.groups, WORDS=layer.words,
            INPUT_BITS=layer.planes, WEIGHT_BITS=weight_bits, LEVELS=len(threshold), THRESHOLD=threshold, FLIP=flip,
            WEIGHT=weight, MASK=mask, TOTALS=totals, TILE_OF_TOTALS=totals.strides[1], ROW_KINDS=row_kinds, COLUMN_KINDS=column_kinds,
            SCALE=scale, BIAS=bias, ACTIVATION=activation, OUT_THRESHOLD=signing[0], OUT_FLIP=signing[1],
        )  # fmt: skip
        self.all_rows, self.gives_signs = n * self.rows, signing[0].size > 0
        self.work = n * pixels * layer.outputs * math.prod(window.kernel_size) * layer.words * 32 * layer.planes * weight_bits
        self.packing_work = n * height * width * layer.channels * 32 * len(threshold)
        self.workspaces: list[tuple[Table, Array]] = []  # for calls to come: only the inner part of an image changes

    def workspace(self) -> tuple[Table, Array]:
        """The table for the loops, with an image of its own that inputs are packed into."""
        image = self.layer.empty_image(*self.size)
        table = self.table.copy()
        table[self.layer.loops.Field.IMAGE] = image.ctypes.data
        return table, image

    def empty_output(self) -> Tensor:
        """Memory for outputs, channels-last, or for their signs."""
        if not self.gives_signs:
            return torch.empty_strided(self.shape, self.strides, dtype=torch.float32)
        n, out, *size = self.shape
        return torch.empty((n, *size, words_for(out)), dtype=torch.int32)

    def run(self, x: Tensor, y: Tensor, residual: Tensor | None, k_map: Tensor | None) -> None:
        """Convolve the signs of ``x`` into ``y``.

        All of these lie in memory as said, without gaps; images may also be ``[N, C, H, W]`` in the memory format channels-last.

        Args:
            x: float32 ``[N, H, W, C]``, or packed signs ``[N, H, W, words]``.
            y: What is written: float32 ``[N, rows, columns, out]``, or packed signs ``[N, rows, columns, words]``.
            residual: float32 ``[N, rows, columns, out]``.
            k_map: ``[N, rows, columns, groups]``.
        """
        try:
            workspace = self.workspaces.pop()
        except IndexError:
            workspace = self.workspace()
        table, image = workspace
        loops, inputs, outputs = self.layer.loops, x.data_ptr(), y.data_ptr()
        factors, added = 0 if k_map is None else k_map.data_ptr(), 0 if residual is None else residual.data_ptr()
        if x.dtype == torch.int32:
            loops.place(x.numpy(), image, *self.layer.window.padding)
            inputs = 0
        if self.work < 2 * THREAD_WORK or threads_for(self.all_rows, self.work) == 1:
            loops.layer(table, inputs, factors, added, outputs, 0, self.all_rows)
        else:
            if inputs:
                n, height, _ = self.size
                share(lambda first, last: loops.pack(table, inputs, first, last), n * height, self.packing_work)
            share(lambda first, last: loops.layer(table, 0, factors, added, outputs, first, last), self.all_rows, self.work)
        self.workspaces.append(workspace)


_layers: dict[int, PreparedLayer] = {}  # by the identity of the packed weight


def known_layer(layer: AnyLayer, window: Window, epilogue: Affine[Tensor]) -> PreparedLayer | None:
    """The layer that was prepared from this, if it is as it was."""
    known = _layers.get(id(layer.words))
    return known if known is not None and known.fits(layer, window, epilogue) else None


def keep_layer(layer: PreparedLayer) -> PreparedLayer:
    """Keep a layer as long as its packed weight lives."""
    words = layer.tensors[0]
    assert words is not None
    tensor = words()
    if id(tensor) not in _layers:
        weakref.finalize(tensor, _layers.pop, id(tensor), None)
    _layers[id(tensor)] = layer
    return layer


def _inside(image: int, outputs: int, kernel: int, stride: int, padding: int, dilation: int) -> npt.NDArray[np.bool_]:
    """``[outputs, kernel]``: whether an element of the kernel lies inside of the image, along one axis."""
    places = np.arange(outputs)[:, None] * stride - padding + np.arange(kernel) * dilation
    return (places >= 0) & (places < image)


def filled_limits(limits: Tensor, groups: int) -> Array:
    """Limits ``[levels, channels]`` as ``[levels, groups, 32 words]``, filled up with NaN, which no number reaches."""
    by_group = limits.detach().float().unflatten(1, (groups, -1))
    array: Array = functional.pad(by_group, (0, -by_group.shape[2] % WORD), value=math.nan).contiguous().numpy()
    return array


def _flipped_bits(flip: Tensor | None, groups: int, words: int) -> Array:
    """int32 ``[groups, words]``: ones where a sign is the other way round."""
    bits = torch.zeros(groups, words, dtype=torch.int32) if flip is None else pack_signs(flip.view(groups, -1) * 2 - 1)
    array: Array = bits.contiguous().numpy()
    return array


_Ordered = tuple[Array, Array, Array, Array]
_ordered: PreparedWeights[_Ordered] = PreparedWeights()


def _in_kernel_order(words: Tensor, mask: Tensor | None, per_group: int, groups: int, loops: ModuleType) -> _Ordered:
    """What ``convolve`` takes as ``weight``, ``mask``, ``total`` and ``missing``; several bits follow one another as groups do."""
    spread, spread_mask = (None if part is None else part if part.dim() > 3 else part.unsqueeze(-2).unsqueeze(-2) for part in (words, mask))
    assert spread is not None
    if spread.dim() == 5:
        groups *= len(spread)
        spread, spread_mask = spread.flatten(0, 1), None if spread_mask is None else spread_mask.flatten(0, 1)
    weight = unpack_weight(spread, spread_mask, per_group)
    first, second = spread, spread_mask
    if second is not None and loops.FORM == "lookup":  # the weights of -1 and those of +1
        first, second = second & ~spread, second & spread
    return (
        _in_tiles(first, groups, loops),
        np.empty((0,) * 4, loops.WEIGHT) if second is None else _in_tiles(second, groups, loops),
        weight.abs().sum((1, 2, 3)).int().numpy(),
        weight.sum(3).permute(1, 2, 0).int().contiguous().numpy(),
    )


def _in_tiles(words: Tensor, groups: int, loops: ModuleType) -> Array:
    """``[groups, tiles, words, ...]``."""
    by_group = words.flatten(1).unflatten(0, (groups, -1))
    tiles = -(-by_group.shape[1] // loops.CHANNELS)
    filled = functional.pad(by_group, (0, 0, 0, tiles * loops.CHANNELS - by_group.shape[1]))
    tiled = filled.unflatten(1, (tiles, loops.CHANNELS)).transpose(2, 3)
    if loops.FORM == "lookup":
        tiled = (tiled.unsqueeze(-2) >> torch.arange(0, WORD, 8)[:, None]).to(torch.uint8).flatten(-2)
    ready: Array = tiled.contiguous().numpy()
    return ready


_pools: dict[int, ThreadPoolExecutor] = {}


def threads_for(rows: int, work: int) -> int:
    """Threads for ``rows``: as many as torch has and ``work`` is worth."""
    most = min(rows, work // THREAD_WORK)
    return min(torch.get_num_threads(), most) if most > 1 else 1


def share(run: Callable[[int, int], None], rows: int, work: int) -> None:
    """``run(first, last)`` over ``rows``, in as many threads as torch has and the work is worth."""
    count = threads_for(rows, work)
    if count == 1:
        run(0, rows)
        return
    if count not in _pools:
        _pools[count] = ThreadPoolExecutor(count - 1, "lowbit-runtime")
    ends = [rows * piece // count for piece in range(count + 1)]
    waiting = [_pools[count].submit(run, ends[piece], ends[piece + 1]) for piece in range(1, count)]
    run(0, ends[1])
    for done in waiting:
        done.result()
