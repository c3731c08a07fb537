"""Arguments of the operators of low-bit layers, grouped into dataclasses.

Tensors are of type ``T``: a ``Tensor`` where a layer is computed, a reference where a graph describes the layer. The torch operators take
the fields of all dataclasses one by one; ``layers.operator`` flattens and rebuilds them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from lowbit.errors import SpecError

T = TypeVar("T")
Pair = Sequence[int]


@dataclass(frozen=True)
class Window:
    """Geometry of a convolution; pairs are vertical and horizontal.

    Attributes:
        kernel_size: Size of the kernel.
        stride: Step from one output to the next.
        padding: Rows and columns added at each border of the image.
        dilation: Step between neighbouring kernel elements.
        groups: Number of groups.
        pad_value: Value of the padding: -1, 0 or +1.
    """

    kernel_size: Pair
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    pad_value: int = 0

    @property
    def numbers(self) -> tuple[int, ...]:
        """Kernel size, stride, padding and dilation as one tuple, as the loops expect them."""
        return (*self.kernel_size, *self.stride, *self.padding, *self.dilation)

    def output_size(self, image: Pair) -> tuple[int, int]:
        """Rows and columns of the output for an image of this height and width; SpecError if there are none.

        >>> Window((3, 3), stride=(2, 2), padding=(1, 1)).output_size((8, 7))
        (4, 4)
        """
        (kernel_h, kernel_w), (pad_h, pad_w), (dilation_h, dilation_w) = self.kernel_size, self.padding, self.dilation
        reach_h, reach_w = dilation_h * (kernel_h - 1) + 1, dilation_w * (kernel_w - 1) + 1
        height, width = image[0] + 2 * pad_h, image[1] + 2 * pad_w
        if height < reach_h or width < reach_w:
            raise SpecError(f"an image of {height} x {width} with its padding is smaller than the kernel's reach of {reach_h} x {reach_w}")
        return (height - reach_h) // self.stride[0] + 1, (width - reach_w) // self.stride[1] + 1

    def check(self) -> None:
        """Raise SpecError unless all pairs are pairs, padding is at least 0, the rest at least 1, and ``pad_value`` is -1, 0 or 1."""
        for name, least in (("kernel_size", 1), ("stride", 1), ("padding", 0), ("dilation", 1)):
            pair = getattr(self, name)
            if len(pair) != 2 or min(pair) < least:
                raise SpecError(f"{name} must be two whole numbers of at least {least}, got {list(pair)}")
        if self.pad_value not in (-1, 0, 1):
            raise SpecError(f"pad_value must be -1, 0 or 1, got {self.pad_value}")

    def check_zero_padding(self) -> None:
        """Raise what ``check`` raises, and SpecError where the padding is not 0."""
        self.check()
        if self.pad_value != 0:
            raise SpecError(f"only layers of signs have a pad_value, got {self.pad_value}")


POINT = Window((1, 1))  # for linear layers, whose inputs are treated as an image of one row


@dataclass(frozen=True)
class SignLayer(Generic[T]):
    """Weights of -1, 0 and +1 that are multiplied by the signs of the inputs.

    Attributes:
        words: Signs of the weight, from ``pack_conv_weight``.
        in_channels: Number of input channels.
        mask: Mask of nonzero weights; ``None`` if no weight is 0.
        threshold: ``[in_channels]`` float32: inputs at or above it count as +1, others as -1. Default: 0.
        flip: ``[in_channels]`` bool: invert these channels.
    """

    words: T
    in_channels: int
    mask: T | None = None
    threshold: T | None = None
    flip: T | None = None

    @property
    def tensors(self) -> tuple[T | None, ...]:
        """All tensors."""
        return self.words, self.mask, self.threshold, self.flip

    @property
    def numbers(self) -> tuple[int, ...]:
        """All numbers."""
        return (self.in_channels,)


@dataclass(frozen=True)
class PlanesLayer(Generic[T]):
    """Integer weights of up to 2 bits that are multiplied by input codes of up to 4 bits.

    Attributes:
        words: Bits of the weight, from ``pack_planes``.
        in_channels: Number of input channels.
        thresholds: ``[levels, 1 or in_channels]`` float32, ascending: the code of an input is the number of thresholds it reaches.
        zero_code: The code of 0.
        mask: Mask of nonzero bits of the weight; ``None`` if no bit is 0.
    """

    words: T
    in_channels: int
    thresholds: T
    zero_code: int
    mask: T | None = None

    @property
    def tensors(self) -> tuple[T | None, ...]:
        """All tensors."""
        return self.words, self.mask, self.thresholds

    @property
    def numbers(self) -> tuple[int, ...]:
        """All numbers."""
        return self.in_channels, self.zero_code


@dataclass(frozen=True)
class Affine(Generic[T]):
    """``y = scale * sum + bias``, both ``[out]`` float32."""

    scale: T
    bias: T | None = None

    @property
    def tensors(self) -> tuple[T | None, ...]:
        """Tensors that belong to the layer."""
        return self.scale, self.bias

    @property
    def lasting(self) -> Affine[T]:
        """The part that does not change between calls: the object that ``with_residual`` was called on, else this one."""
        found: Affine[T] = vars(self).get("_lasting", self)
        return found


@dataclass(frozen=True)
class Epilogue(Affine[T]):
    """Computes outputs from sums of products: ``y = activated(scale * K * sum + bias + residual)``.

    Attributes:
        residual: float32, shaped like the output or broadcasting to it.
        input_scaling: Multiply by XNOR-Net's ``K``: the mean of ``|x|`` over the channels of a group and the window.
        activation: ``[5, out]`` float32, see ``lowbit.runtime.activation``.
        out_threshold: ``[out]`` float32: return packed signs, +1 for ``y >= out_threshold``, instead of ``y``.
        out_flip: ``[out]`` bool: invert the signs of these channels.
    """

    residual: T | None = None
    input_scaling: bool = False
    activation: T | None = None
    out_threshold: T | None = None
    out_flip: T | None = None

    def with_residual(self, residual: T) -> Epilogue[T]:
        """A copy with ``residual``; ``dataclasses.replace`` would take a tenth of the time of a small layer."""
        found: Epilogue[T] = object.__new__(Epilogue)
        vars(found).update(vars(self), residual=residual, _lasting=self.lasting)
        return found

    @property
    def tensors(self) -> tuple[T | None, ...]:
        """Tensors that belong to the layer: all but the residual."""
        return self.scale, self.bias, self.activation, self.out_threshold, self.out_flip
