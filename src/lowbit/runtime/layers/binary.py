"""Convolutions and linear layers whose weights are -1, 0 or +1 and whose inputs are signs: exclusive or, and counting bits.

``sum x w`` over ``n`` signs is ``n - 2 popcount(x ^ w)``; with a mask ``m`` of the weights that are not 0, ``popcount(m) - 2
popcount((x ^ w) & m)``. Source: Rastegari et al. 2016, "XNOR-Net", section 3.2.

Each function has a torch reference of the same signature beside it, which unpacks the signs and calls the float layer. Both give the
same integers; the reference is what runs where there are no kernels: without numba on the CPU, without Triton on CUDA devices, elsewhere.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional

from lowbit.errors import SpecError
from lowbit.quantizers.ops import input_scale
from lowbit.runtime.activation import activated
from lowbit.runtime.arguments import POINT, Epilogue, SignLayer, Window
from lowbit.runtime.cpu.bits import pack_signs, unpack_signs, unpack_weight, words_for
from lowbit.runtime.cpu.target import target_loops
from lowbit.runtime.cuda.target import cuda_target
from lowbit.runtime.layers.checks import check_input, check_layer, check_packed_input, check_residual, refuse_gradients
from lowbit.runtime.layers.operator import register_operator
from lowbit.runtime.layers.prepared import PreparedLayer, keep_layer, known_layer


def pack_conv_weight(weight: Tensor, groups: int = 1) -> tuple[Tensor, Tensor | None]:
    """The signs of a weight as words, and where it is not zero.

    Args:
        weight: ``[out, in / groups, kernel height, kernel width]`` or ``[out, in]``, of -1, 0 and +1.
        groups: Number of groups; ``out`` must be a multiple of it.

    Returns:
        int32 ``[out, kernel height, kernel width, words]`` or ``[out, words]`` with ``words = ceil(in / groups / 32)``, and a mask of the
        same shape, ``None`` where no weight is zero.

    Raises:
        SpecError: Another value or shape.
    """
    if weight.dim() not in (2, 4) or weight.shape[0] % groups:
        raise SpecError(
            f"a packed weight needs a shape [out, in] or [out, in / groups, h, w], got {tuple(weight.shape)} and {groups} groups"
        )
    if not bool(((weight == 0) | (weight.abs() == 1)).all()):
        raise SpecError("a packed weight holds -1, 0 and +1; divide by its scale first")
    channels_last = weight.movedim(1, -1)
    mask = None if bool((weight != 0).all()) else pack_signs(channels_last.ne(0) * 2 - 1)
    return pack_signs(channels_last), mask


def binary_conv2d_reference(x: Tensor, layer: SignLayer[Tensor], window: Window, epilogue: Epilogue[Tensor]) -> Tensor:
    """``binary_conv2d`` by the float convolution of unpacked signs."""
    if x.dtype == torch.int32:
        x = unpack_signs(x, layer.in_channels).permute(0, 3, 1, 2)
    top, left = window.padding
    signs = functional.pad(_signs_of(x, layer, (-1, 1, 1)), (left, left, top, top), value=float(window.pad_value))
    weight = unpack_weight(layer.words, layer.mask, layer.in_channels // window.groups).movedim(-1, 1)
    # With one channel both orders of memory look alike, and torch can read one as the other (pytorch issue 82060): copies are unambiguous.
    signs, weight = (tensor.clone(memory_format=torch.contiguous_format) for tensor in (signs.float(), weight))
    y = functional.conv2d(signs, weight, None, tuple(window.stride), 0, tuple(window.dilation), window.groups).round()
    factor = epilogue.scale.reshape(-1, 1, 1)
    if epilogue.input_scaling:
        factor = factor * _k_map(x, window).repeat_interleave(len(layer.words) // window.groups, 1)
    y = _finished(y * factor, epilogue, (-1, 1, 1))
    return y.contiguous(memory_format=torch.channels_last) if epilogue.out_threshold is None else _packed(y, epilogue)


def binary_linear_reference(x: Tensor, layer: SignLayer[Tensor], epilogue: Epilogue[Tensor]) -> Tensor:
    """``binary_linear`` by the float product of unpacked signs."""
    y = functional.linear(_signs_of(x, layer, (-1,)), unpack_weight(layer.words, layer.mask, layer.in_channels)).round()
    return _finished(y * epilogue.scale, epilogue, (-1,))


def _empty_conv2d(x: Tensor, layer: SignLayer[Tensor], window: Window, epilogue: Epilogue[Tensor]) -> Tensor:
    rows, columns = window.output_size(_image_size(x))
    out = layer.words.shape[0]
    if epilogue.out_threshold is not None:
        return torch.empty((x.shape[0], rows, columns, words_for(out)), dtype=torch.int32, device=x.device)
    strides = (rows * columns * out, 1, columns * out, out)
    return torch.empty_strided((x.shape[0], out, rows, columns), strides, dtype=torch.float32, device=x.device)


def _empty_linear(x: Tensor, layer: SignLayer[Tensor], epilogue: Epilogue[Tensor]) -> Tensor:
    return x.new_empty((*x.shape[:-1], layer.words.shape[0]), dtype=torch.float32)


@register_operator(_empty_conv2d)
def binary_conv2d(x: Tensor, layer: SignLayer[Tensor], window: Window, epilogue: Epilogue[Tensor]) -> Tensor:
    """Convolution of the signs of ``x`` with weights of -1, 0 and +1.

    ``y = activated(scale * K * sum(sign(x) w) + bias + residual)`` over the window, where ``sign(x)`` is +1 for ``x >= threshold`` and -1 else,
    the other way round where ``flip``; places outside the image count as ``pad_value``. The sums are exact. NaN counts as negative.

    With ``out_threshold`` it gives packed signs, +1 for ``y >= out_threshold`` or the other way round where ``out_flip``, as the next layer can
    take them in place of ``x``: int32 ``[N, H, W, words]``.

    Args:
        x: ``[N, in_channels, H, W]`` float32, channels-last is fastest; or packed signs, of whole words for each group.
        layer: The weight, and what the signs of ``x`` are.
        window: What an output reads.
        epilogue: What happens to the sums.

    Returns:
        ``[N, out, rows, columns]`` float32, channels-last; with ``out_threshold`` int32 ``[N, rows, columns, ceil(out / 32)]``.

    Raises:
        SpecError: An argument of another type or shape, or an image smaller than the kernel.
        LayerError: A gradient is expected: there is no derivative.

        >>> words, mask = pack_conv_weight(torch.ones(1, 2, 1, 1))
        >>> x = torch.tensor([[[[0.3]], [[-0.2]]]])
        >>> binary_conv2d(x, SignLayer(words, 2, mask), Window((1, 1)), Epilogue(torch.tensor([2.0]), torch.tensor([0.5])))
        tensor([[[[0.5000]]]])
    """
    if torch.is_grad_enabled():
        refuse_gradients("binary_conv2d", x, epilogue.scale, epilogue.bias, epilogue.residual, epilogue.activation)
    loops = compiled_loops() if x.is_cpu and x.numel() else None
    prepared = None if loops is None else known_layer(layer, window, epilogue)
    if prepared is None:
        window.check()
        check_layer(layer, window, epilogue)
    is_packed = x.dtype == torch.int32
    if is_packed:
        check_packed_input(x, layer, window.groups, epilogue.input_scaling)
    else:
        check_input(x, layer.in_channels, 4)
    if loops is None:
        return _conv2d_without_loops(x, layer, window, epilogue)
    if prepared is None:
        prepared = keep_layer(PreparedLayer(loops, layer, window, epilogue))
    n, *size = x.shape
    plan = prepared.plan(n, *(size[:2] if is_packed else size[1:]))
    residual = None if epilogue.residual is None else _channels_last(_residual(epilogue.residual, x, plan.shape))
    k_map = _k_map(x, window).movedim(1, -1).contiguous() if epilogue.input_scaling else None
    y = plan.empty_output()
    plan.run(x.contiguous() if is_packed else _channels_last(x), y, residual, k_map)
    return y


def _conv2d_without_loops(x: Tensor, layer: SignLayer[Tensor], window: Window, epilogue: Epilogue[Tensor]) -> Tensor:
    """``binary_conv2d`` by CUDA kernels, or by the reference."""
    if epilogue.residual is not None:
        _residual(epilogue.residual, x, (x.shape[0], layer.words.shape[0], *window.output_size(_image_size(x))))
    if x.is_cuda and x.numel() and (kernels := cuda_kernels()) is not None:
        numbers = unpack_signs(x, layer.in_channels).permute(0, 3, 1, 2) if x.dtype == torch.int32 else x
        y: Tensor = kernels.conv2d(numbers, layer, window, epilogue)
        y = activated(y, epilogue.activation, (-1, 1, 1))
        return y if epilogue.out_threshold is None else _packed(y, epilogue)
    return binary_conv2d_reference(x, layer, window, epilogue)


@register_operator(_empty_linear)
def binary_linear(x: Tensor, layer: SignLayer[Tensor], epilogue: Epilogue[Tensor]) -> Tensor:
    """Linear layer on the signs of ``x`` with weights of -1, 0 and +1; see ``binary_conv2d``.

    Args:
        x: ``[..., in_channels]`` float32.
        layer: The weight, and what the signs of ``x`` are.
        epilogue: What happens to the sums; there is no input scaling, and outputs are numbers.

    Returns:
        ``[..., out]`` float32.

    Raises:
        SpecError: An argument of another type or shape.
        LayerError: A gradient is expected: there is no derivative.
    """
    refuse_gradients("binary_linear", x, epilogue.scale, epilogue.bias, epilogue.residual, epilogue.activation)
    loops = compiled_loops() if x.is_cpu and x.numel() else None
    prepared = None if loops is None else known_layer(layer, POINT, epilogue)
    if prepared is None:
        check_layer(layer, None, epilogue)
    check_input(x, layer.in_channels, None)
    shape = (*x.shape[:-1], layer.words.shape[0])
    residual = None if epilogue.residual is None else _residual(epilogue.residual, x, shape)
    if x.is_cuda and x.numel() and (kernels := cuda_kernels()) is not None:
        y: Tensor = kernels.linear(x, layer, epilogue)
        return activated(y, epilogue.activation, (-1,))
    if loops is None:
        return binary_linear_reference(x, layer, epilogue)
    if prepared is None:
        prepared = keep_layer(PreparedLayer(loops, layer, POINT, epilogue))
    y = x.new_empty(shape)
    added = None if residual is None else residual.contiguous().resolve_neg()
    prepared.plan(1, 1, y.numel() // shape[-1]).run(x.contiguous().resolve_neg(), y, added, None)
    return y


def compiled_loops() -> ModuleType | None:
    """The compiled kernels of the active target; ``None`` where the reference is used. The first call compiles them, or reads them."""
    return target_loops("binary_loops")


@functools.cache
def cuda_kernels() -> ModuleType | None:
    """The Triton kernels of CUDA devices; ``None`` where the reference is used there."""
    return importlib.import_module("lowbit.runtime.cuda.kernels") if cuda_target()[0] else None


def _channels_last(x: Tensor) -> Tensor:
    """``x`` in the memory format channels-last, without gaps."""
    is_ready = x.is_contiguous(memory_format=torch.channels_last) and not x.is_neg()
    return x if is_ready else x.contiguous(memory_format=torch.channels_last).resolve_neg()


def _k_map(x: Tensor, window: Window) -> Tensor:
    """XNOR-Net's K, ``[N, groups, rows, columns]``."""
    return input_scale(x.detach(), window.kernel_size, window.stride, window.padding, window.dilation, window.groups)


def _signs_of(x: Tensor, layer: SignLayer[Tensor], shape: tuple[int, ...]) -> Tensor:
    """float32 -1 and +1; thresholds broadcast with ``x`` in ``shape``."""
    is_one = x >= (0.0 if layer.threshold is None else layer.threshold.reshape(shape))
    return (is_one if layer.flip is None else is_one ^ layer.flip.reshape(shape)) * 2.0 - 1.0


def _finished(y: Tensor, epilogue: Epilogue[Tensor], shape: tuple[int, ...]) -> Tensor:
    y = y if epilogue.bias is None else y + epilogue.bias.reshape(shape)
    return activated(y if epilogue.residual is None else y + epilogue.residual, epilogue.activation, shape)


def _packed(y: Tensor, epilogue: Epilogue[Tensor]) -> Tensor:
    """The signs of ``y`` ``[N, C, H, W]`` as int32 ``[N, H, W, words]``."""
    assert epilogue.out_threshold is not None
    is_one = y >= epilogue.out_threshold.reshape(-1, 1, 1)
    if epilogue.out_flip is not None:
        is_one = is_one ^ epilogue.out_flip.reshape(-1, 1, 1)
    return pack_signs(is_one.permute(0, 2, 3, 1) * 2 - 1).contiguous()


def _image_size(x: Tensor) -> tuple[int, int]:
    """Height and width of an image or of packed signs."""
    return (x.shape[1], x.shape[2]) if x.dtype == torch.int32 else (x.shape[2], x.shape[3])


def _residual(residual: Tensor, x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """What is added, checked and in the shape of the output."""
    check_residual(residual, x)
    if residual.shape == shape:
        return residual
    try:
        return residual.expand(shape)
    except RuntimeError as error:
        raise SpecError(f"residual must fit the output's shape {shape}, got {tuple(residual.shape)}") from error
