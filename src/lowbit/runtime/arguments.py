"""What the operators of low-bit layers are given, in parts.

Tensors are ``T``: a ``Tensor`` where a layer is computed, a reference to one where a layer is described in a graph. The operators of torch
take the fields of all parts one by one; ``layers.operator`` flattens and rebuilds them.
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
    """What a convolution reads for one output; pairs are vertical and horizontal.

    Attributes:
        kernel_size: Size of the kernel.
        stride: Step from one output to the next.
        padding: Places beyond each border of the image.
        dilation: Step from one place of the kernel to the next.
        groups: Number of groups.
        pad_value: What places beyond the border count as: -1, 0 or +1.
    """

    kernel_size: Pair
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    pad_value: int = 0

    @property
    def numbers(self) -> tuple[int, ...]:
        """Kernel, stride, padding and dilation in a row, as loops take them."""
        return (*self.kernel_size, *self.stride, *self.padding, *self.dilation)

    def output_size(self, image: Pair) -> tuple[int, int]:
        """Rows and columns of the convolution of an image of this height and width; SpecError where there are none.

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
        """SpecError unless all pairs are pairs, padding is at least 0, the rest at least 1, and ``pad_value`` is one of the three."""
        for name, least in (("kernel_size", 1), ("stride", 1), ("padding", 0), ("dilation", 1)):
            pair = getattr(self, name)
            if len(pair) != 2 or min(pair) < least:
                raise SpecError(f"{name} must be two whole numbers of at least {least}, got {list(pair)}")
        if self.pad_value not in (-1, 0, 1):
            raise SpecError(f"pad_value must be -1, 0 or 1, got {self.pad_value}")

    def check_zero_padding(self) -> None:
        """What ``check`` raises, and SpecError where places beyond the border do not count as 0."""
        self.check()
        if self.pad_value != 0:
            raise SpecError(f"only layers of signs have a pad_value, got {self.pad_value}")


POINT = Window((1, 1))  # of a linear layer, whose rows are an image of one line


@dataclass(frozen=True)
class SignLayer(Generic[T]):
    """Weights of -1, 0 and +1 that are multiplied by the signs of the inputs.

    Attributes:
        words: Signs of the weight, from ``pack_conv_weight``.
        in_channels: Number of input channels.
        mask: Mask of nonzero weights; ``None``: no weight is 0.
        threshold: ``[in_channels]`` float32: inputs from there on are +1, others -1. ``None``: 0.
        flip: ``[in_channels]`` bool: the other way round.
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
    """Whole-numbered weights of up to 2 bits that are multiplied by input codes of up to 4 bits.

    Attributes:
        words: Bits of the weight, from ``pack_planes``.
        in_channels: Number of input channels.
        thresholds: ``[levels, 1 or in_channels]`` float32, ascending: an input's code is the number of those it reaches.
        zero_code: The code that stands for 0.
        mask: Mask of nonzero bits of the weight; ``None``: no bit is 0.
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
        """The part that stays from call to call: what this was made of by ``with_residual``, else this itself."""
        found: Affine[T] = vars(self).get("_lasting", self)
        return found


@dataclass(frozen=True)
class Epilogue(Affine[T]):
    """What happens to sums of products: ``y = activated(scale * K * sum + bias + residual)``.

    Attributes:
        residual: Shaped like the output, or broadcasting to it; float32.
        input_scaling: Multiply by XNOR-Net's ``K``: the mean of ``|x|`` over the channels of a group and the window.
        activation: ``[5, out]`` float32, see ``lowbit.runtime.activation``.
        out_threshold: ``[out]`` float32: give packed signs, +1 for ``y >= out_threshold``, in place of ``y``.
        out_flip: ``[out]`` bool: the other way round.
    """

    residual: T | None = None
    input_scaling: bool = False
    activation: T | None = None
    out_threshold: T | None = None
    out_flip: T | None = None

    def with_residual(self, residual: T) -> Epilogue[T]:
        """The same with ``residual``; ``dataclasses.replace`` takes as long as a tenth of a small layer."""
        found: Epilogue[T] = object.__new__(Epilogue)
        vars(found).update(vars(self), residual=residual, _lasting=self.lasting)
        return found

    @property
    def tensors(self) -> tuple[T | None, ...]:
        """Tensors that belong to the layer: all but the residual."""
        return self.scale, self.bias, self.activation, self.out_threshold, self.out_flip
