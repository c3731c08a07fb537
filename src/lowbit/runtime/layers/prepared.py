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

THREAD_WORK = 2**27  # products of one bit by one bit that one thread gets; below, starting it costs more than it saves

NOTHING = torch.empty(0, 0)

Array = npt.NDArray[np.generic]
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
        self.shape, self.groups = window.numbers, window.groups
        channels = layer.in_channels
        per_group = channels // self.groups
        self.words = words_for(per_group)
        limits = torch.atleast_2d(torch.zeros(channels) if layer.threshold is None else layer.threshold).expand(-1, channels)
        self.packing = _floats(limits), _flipped_bits(layer.flip, self.groups, self.words)
        self.weight = _ordered.get(
            layer.words,
            layer.mask,
            (per_group, self.groups),
            lambda: _in_kernel_order(layer.words, layer.mask, per_group, self.groups, loops),
        )
        self.planes = 1  # images of words, one for each bit of the inputs
        border = window.pad_value + 1 if any(window.padding) else 0
        bias = torch.zeros_like(epilogue.scale) if epilogue.bias is None else epilogue.bias
        activation = NOTHING if epilogue.activation is None else epilogue.activation
        self.finishing = border, _floats(epilogue.scale), _floats(bias), _floats(activation)
        limits = torch.empty(0) if epilogue.out_threshold is None else epilogue.out_threshold
        self.signing = _floats(limits), _flipped_bits(epilogue.out_flip, 1, words_for(len(limits)))[0]
        self.nothing, self.no_signs = np.empty((0, 0, 0, 0), np.float32), np.empty((0, 0, 0, 0), np.int32)

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
        return all(tensor()._version == version for tensor, version in self.versions)  # type: ignore[union-attr]

    def run(self, x: Tensor, y: Tensor, residual: Tensor | None, k_map: Tensor | None) -> None:
        """Convolve the signs of ``x`` into ``y``.

        Args:
            x: float32 ``[N, H, W, C]``, or packed signs ``[N, H, W, words]``, without gaps and gradient like all of these.
            y: What is written: float32 ``[N, rows, columns, out]``, or packed signs ``[N, rows, columns, words]`` full of zeros.
            residual: float32 ``[N, rows, columns, out]``.
            k_map: ``[N, rows, columns, groups]``.
        """
        loops, shape = self.loops, self.shape
        n, height, width, channels = x.shape
        top, left = shape[4], shape[5]
        image = self.empty_image(n, height, width)
        pixels = x.numpy()
        if x.dtype == torch.int32:
            loops.place(pixels, image, top, left)
        else:
            share(
                lambda first, last: loops.pack(pixels, *self.packing, image, top, left, self.groups, first, last),
                n * height,
                n * height * width * channels * 32 * len(self.packing[0]),
            )
        outputs = len(self.finishing[1])
        are_signs = y.dtype == torch.int32
        arguments = (
            image, *self.weight, *self.finishing, self.nothing if k_map is None else k_map.numpy(),
            self.nothing if residual is None else residual.numpy(), self.nothing if are_signs else y.numpy(), *self.signing,
            y.numpy() if are_signs else self.no_signs, (*y.shape[:3], outputs), (height, width), shape,
        )  # fmt: skip
        pairs = self.planes * len(self.weight[0]) // self.groups
        work = math.prod(y.shape[:3]) * outputs * shape[0] * shape[1] * self.words * 32 * pairs
        share(lambda first, last: loops.convolve(*arguments, first, last), n * y.shape[1], work)

    def empty_image(self, n: int, height: int, width: int) -> Array:
        """Padded images without bits, into which inputs are packed; behind them memory for windows that reach over the end."""
        top, left = self.shape[4], self.shape[5]
        shape = (self.planes * n, height + 2 * top, width + 2 * left, self.groups, self.words)
        reach = self.loops.ROWS * self.shape[3] + shape[2]
        return np.zeros((math.prod(shape) + reach * shape[3] * shape[4]), self.loops.IMAGE)[: math.prod(shape)].reshape(shape)


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


def _flipped_bits(flip: Tensor | None, groups: int, words: int) -> Array:
    """int32 ``[groups, words]``: ones where a sign is the other way round."""
    bits = torch.zeros(groups, words, dtype=torch.int32) if flip is None else pack_signs(flip.view(groups, -1) * 2 - 1)
    array: Array = bits.contiguous().numpy()
    return array


def _floats(tensor: Tensor) -> Array:
    array: Array = tensor.detach().float().contiguous().numpy()
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


def share(run: Callable[[int, int], None], rows: int, work: int) -> None:
    """``run(first, last)`` over ``rows``, in as many threads as torch has and the work is worth."""
    count = max(min(torch.get_num_threads(), rows, work // THREAD_WORK), 1)
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
