"""A convolutional generator: noise in, samples of any shape out, with mean 0 and variance 1 in each channel of a batch.

Source: the generator of Liu, Zhang, Wang 2021, "Zero-shot Adversarial Quantization", CVPR, in the program that its authors published, which is that
of earlier data-free distillation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.functional import interpolate

from lowbit.errors import SpecError
from lowbit.network.layers import CONVOLUTIONS

SLOPE = 0.2  # of LeakyReLU
_NORMS = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)  # by the number of dimensions behind the channels


class Generator(nn.Module):
    """``z`` to samples, by a linear layer and three convolutions between two steps of upsampling.

    A linear layer makes ``2 width`` channels of a quarter of the size, rounded up; batch norm; nearest upsampling to half the size, 3x3 convolution,
    batch norm, LeakyReLU; nearest upsampling to the size, 3x3 convolution to ``width`` channels, batch norm, LeakyReLU; 3x3 convolution to the
    channels of the sample, tanh, batch norm without affine parameters. The last one gives each channel of a batch mean 0 and variance 1 in
    training mode.

    Samples of one dimension are vectors of features: linear layers take the place of convolutions, and nothing is upsampled.

    Args:
        shape: Channels of a sample, then up to three sizes.
        latent: Numbers in ``z``.
        width: Channels behind the second convolution; before it twice as many.

    Raises:
        SpecError: A shape of more dimensions, or a size below 1.

    >>> import torch
    >>> generator = Generator((1, 28, 30), latent=16, width=4)
    >>> generator(torch.randn(8, 16)).shape
    torch.Size([8, 1, 28, 30])
    """

    def __init__(self, shape: Sequence[int], *, latent: int = 256, width: int = 64) -> None:
        super().__init__()
        channels, *sizes = shape
        if len(sizes) > 3 or min(shape) < 1:
            raise SpecError(
                f"a generator makes samples of channels and up to three sizes, 1 or more each; got the shape {'x'.join(map(str, shape))}"
            )
        self.latent, self.sizes = latent, tuple(sizes)
        self.quarters = tuple(-(-size // 4) for size in sizes)
        self.halves = tuple(-(-size // 2) for size in sizes)
        norm = _NORMS[len(sizes)]

        def layer(inputs: int, outputs: int) -> nn.Module:
            return CONVOLUTIONS[len(sizes) - 1](inputs, outputs, 3, padding=1) if sizes else nn.Linear(inputs, outputs)

        self.start, self.norm = nn.Linear(latent, 2 * width * math.prod(self.quarters)), norm(2 * width)
        self.middle = nn.Sequential(layer(2 * width, 2 * width), norm(2 * width), nn.LeakyReLU(SLOPE))
        self.end = nn.Sequential(
            layer(2 * width, width), norm(width), nn.LeakyReLU(SLOPE), layer(width, channels), nn.Tanh(), norm(channels, affine=False)
        )

    def forward(self, z: Tensor) -> Tensor:
        """Samples ``[N, *shape]`` of ``z`` ``[N, latent]``."""
        x = self.norm(self.start(z).reshape(len(z), -1, *self.quarters))
        x = self.middle(self._enlarged(x, self.halves))
        samples: Tensor = self.end(self._enlarged(x, self.sizes))
        return samples

    def _enlarged(self, x: Tensor, size: tuple[int, ...]) -> Tensor:
        return interpolate(x, size=size) if size else x
