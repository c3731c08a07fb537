"""Shortcuts around single convolutions, as binary networks have them.

Sources: Liu et al. 2018, "Bi-Real Net", section 3.2; Qin et al. 2020, "IR-Net", and Xu et al. 2021, "ReCU", for the forms without
weights of networks for small images.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional

from lowbit.errors import SpecError


class PaddedShortcut(nn.Module):
    """A shortcut without weights where the shape changes: fewer positions, and channels of zeros on both sides.

    Args:
        in_channels: Of the input.
        out_channels: Of the output, at least as many.
        stride: Vertical and horizontal.
        pooled: Average each ``stride x stride`` square; else take its first element.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, *, pooled: bool = False) -> None:
        super().__init__()
        if out_channels < in_channels:
            raise SpecError(f"a shortcut without weights adds channels and takes none away, got {in_channels} and {out_channels}")
        self.stride, self.pooled = stride, pooled
        self.before = (out_channels - in_channels) // 2
        self.after = out_channels - in_channels - self.before

    def forward(self, x: Tensor) -> Tensor:
        x = functional.avg_pool2d(x, self.stride) if self.pooled else x[:, :, :: self.stride, :: self.stride]
        return functional.pad(x, (0, 0, 0, 0, self.before, self.after))


def pooled_shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """The identity where nothing changes; else average pool, 1x1 convolution in float and batch norm. Source: Bi-Real Net, section 3.2."""
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    pool = [nn.AvgPool2d(stride)] if stride > 1 else []
    return nn.Sequential(*pool, nn.Conv2d(in_channels, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels))


class ShortcutUnit(nn.Module):
    """``activation(norm(conv(before(x))) + shortcut(x))``: one convolution with a shortcut of its own.

    Args:
        conv: The convolution.
        norm: Behind it.
        shortcut: Brings ``x`` to the output's shape.
        activation: Behind the sum.
        before: In front of the convolution alone.
    """

    def __init__(
        self,
        conv: nn.Module,
        norm: nn.Module,
        shortcut: nn.Module | None = None,
        activation: nn.Module | None = None,
        before: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.before = before or nn.Identity()
        self.conv, self.norm = conv, norm
        self.shortcut = shortcut or nn.Identity()
        self.activation = activation or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.activation(self.norm(self.conv(self.before(x))) + self.shortcut(x))
        return out


def shortcut_block(
    in_channels: int,
    out_channels: int,
    stride: int = 1,
    *,
    shortcut: Callable[[int, int, int], nn.Module] = pooled_shortcut,
    activation: Callable[[], nn.Module] | None = None,
    convolutions: int = 2,
) -> nn.Sequential:
    """``convolutions`` 3x3 convolutions with batch norm, each with a shortcut; the first one changes the shape.

    Args:
        in_channels, out_channels, stride: Of the first convolution.
        shortcut: ``shortcut(in_channels, out_channels, stride)`` makes the first shortcut, if the shape changes.
        activation: Makes what follows each sum.
        convolutions: How many.
    """
    units = []
    for index in range(convolutions):
        channels, step = (in_channels, stride) if index == 0 else (out_channels, 1)
        changes = channels != out_channels or step != 1
        units.append(
            ShortcutUnit(
                nn.Conv2d(channels, out_channels, 3, step, 1, bias=False),
                nn.BatchNorm2d(out_channels),
                shortcut(channels, out_channels, step) if changes else None,
                activation() if activation else None,
            )
        )
    return nn.Sequential(*units)
