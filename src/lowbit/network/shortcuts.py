"""Shortcuts around single convolutions, as binary networks have them.

Sources: Liu et al. 2018, "Bi-Real Net", section 3.2; Qin et al. 2020, "IR-Net", and Xu et al. 2021, "ReCU", for the forms without
weights of networks for small images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lowbit.calibration import Inputs
from lowbit.errors import LayerError, SpecError
from lowbit.network.layers import evaluating


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
    """``activation(norm(conv(x)) + shortcut(x))``: one convolution with a shortcut of its own.

    Args:
        conv: The convolution.
        norm: Behind it.
        shortcut: Brings ``x`` to the output's shape.
        activation: Behind the sum.
    """

    def __init__(
        self,
        conv: nn.Module,
        norm: nn.Module,
        shortcut: nn.Module | None = None,
        activation: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.conv, self.norm = conv, norm
        self.shortcut = shortcut or nn.Identity()
        self.activation = activation or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.activation(self.norm(self.conv(x)) + self.shortcut(x))
        return out


class ShiftedPReLU(nn.Module):
    """``prelu(x + shift_in) + shift_out`` with a slope and two shifts for each channel; shifts start at 0, slopes at 0.25.

    Source: Liu et al. 2020, "ReActNet", section 4.2 (RPReLU).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.shift_in = nn.Parameter(torch.zeros(channels, 1, 1))
        self.prelu = nn.PReLU(channels)
        self.shift_out = nn.Parameter(torch.zeros(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.prelu(x + self.shift_in) + self.shift_out
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


class ShortcutBlock(nn.Module):
    """A residual block whose convolutions each have a shortcut of their own: ``activation(norm(conv(x)) + x)``, one after the other.

    It holds the modules of the block that it replaces under the same names. Where the first convolution changes the shape, its shortcut
    is the block's own 1x1 convolution with batch norm, behind an average pool that takes over the stride; without one, a ``PaddedShortcut``.

    Args:
        block: The block that is replaced.
        units: Names of a convolution and the norm behind it, in order.
        downsample: Names of the convolution and the norm of the block's shortcut, or ``None``.
        activation: ``activation(channels)`` makes what follows each sum.
    """

    def __init__(
        self,
        block: nn.Module,
        units: Sequence[tuple[str, str]],
        downsample: tuple[str, str] | None,
        activation: Callable[[int], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        for name, child in block.named_children():
            self.add_module(name, child)
        self.units, self.downsample_names = list(units), downsample
        self.shortcut: nn.Module = nn.Identity()
        convolutions = [self._conv(conv) for conv, _ in units]
        first = convolutions[0]
        if downsample is not None:
            projection = self._conv(downsample[0])
            if projection.stride[0] > 1:
                self.shortcut = nn.AvgPool2d(projection.stride[0], ceil_mode=True, count_include_pad=False)
                projection.stride = (1, 1)
        elif first.stride[0] > 1 or first.in_channels != first.out_channels:
            self.shortcut = PaddedShortcut(first.in_channels, first.out_channels, first.stride[0])
        self.activations = nn.ModuleList(activation(conv.out_channels) if activation else nn.Identity() for conv in convolutions)
        self.train(block.training)

    def _conv(self, name: str) -> nn.Conv2d:
        layer = self.get_submodule(name)
        assert isinstance(layer, nn.Conv2d)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.shortcut(x)
        for name in self.downsample_names or ():
            shortcut = self.get_submodule(name)(shortcut)
        for (conv, norm), activation in zip(self.units, self.activations, strict=True):
            x = activation(self.get_submodule(norm)(self.get_submodule(conv)(x)) + shortcut)
            shortcut = x
        return x


@dataclass
class _Call:
    name: str
    module: nn.Module
    given: int  # id of the input tensor
    made: int  # id of the output tensor


def give_shortcuts(model: nn.Module, sample: Inputs, activation: Callable[[int], nn.Module] | None = None) -> list[str]:
    """Replace every residual block of two or more convolutions by a ``ShortcutBlock``; gives the names of the layers of the old shortcuts.

    A block is a submodule that computes ``relu(... norm(conv(relu(norm(conv(x))))) + shortcut(x))`` with the identity or a 1x1 convolution
    and norm as shortcut. Blocks are found by running the sample and proven by computing them from their parts, so how they are
    written, and what their modules are called, does not matter.

    Args:
        model: The network, changed in place; ``model`` itself is no block.
        sample: Inputs of one call.
        activation: ``activation(channels)`` makes what follows each sum; nothing by default.

    Raises:
        LayerError: The network has no such block.
    """
    kept: list[Tensor] = []  # keeps tensors alive, so that their ids stay their own
    calls: list[_Call] = []
    results: dict[str, tuple[Tensor, Tensor]] = {}

    def recording(name: str) -> Callable[..., None]:
        def record(module: nn.Module, args: tuple[Any, ...], output: object) -> None:
            if len(args) == 1 and isinstance(args[0], Tensor) and isinstance(output, Tensor):
                kept.extend((args[0], output))
                calls.append(_Call(name, module, id(args[0]), id(output)))
                results[name] = args[0], output.clone()

        return record

    handles = [module.register_forward_hook(recording(name)) for name, module in model.named_modules() if name]
    try:
        with evaluating(model), torch.no_grad():
            model(*sample.args, **sample.kwargs)
    finally:
        for handle in handles:
            handle.remove()
    found: dict[str, _Parts] = {}
    with evaluating(model), torch.no_grad():
        for call in calls:  # blocks come before what holds them, a stage of one block for instance
            parts = None if any(name.startswith(f"{call.name}.") for name in found) else _parts_of(call, calls)
            if parts is not None and _is_block(call.module, *parts, *results[call.name]):
                found[call.name] = parts
    for path, parts in found.items():
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, ShortcutBlock(model.get_submodule(path), *parts, activation))
    if not found:
        raise LayerError(
            f"{type(model).__name__} has no residual block of convolutions, norms and ReLUs in which each convolution could get a shortcut. "
            "Use a residual network, or shortcuts=false."
        )
    return [f"{path}.{side[0]}" for path, (_, side) in found.items() if side is not None]


_Parts = tuple[list[tuple[str, str]], tuple[str, str] | None]


def _parts_of(block: _Call, calls: list[_Call]) -> _Parts | None:
    """Convolutions and norms of ``block``, in order, and those of its shortcut, by names within it; ``None`` where they do not fit."""
    prefix = f"{block.name}."
    inner = [call for call in calls if call.name.startswith(prefix)]
    norms = {call.given: call for call in inner if isinstance(call.module, nn.BatchNorm2d)}
    pairs = [(call, norms[call.made]) for call in inner if isinstance(call.module, nn.Conv2d) and call.made in norms]
    if len({conv.name for conv, _ in pairs}) < len(pairs):
        return None  # a layer that is called twice
    side = [(conv, norm) for conv, norm in pairs if conv.given == block.given and conv.module.kernel_size == (1, 1)]
    main = [pair for pair in pairs if pair not in side] if len(side) < len(pairs) else []
    if len(main) < 2 or len(side) > 1 or len(pairs) < sum(isinstance(call.module, nn.Conv2d) for call in inner):
        return None

    def within(pair: tuple[_Call, _Call]) -> tuple[str, str]:
        return pair[0].name.removeprefix(prefix), pair[1].name.removeprefix(prefix)

    return [within(pair) for pair in main], within(side[0]) if side else None


def _is_block(block: nn.Module, units: list[tuple[str, str]], side: tuple[str, str] | None, x: Tensor, expected: Tensor) -> bool:
    """Whether ``block(x)``, which is ``expected``, is the sum that its parts suggest."""
    y, shortcut = x, x
    try:
        for index, names in enumerate(units):
            y = functional.relu(y) if index else y
            for name in names:
                y = block.get_submodule(name)(y)
        for name in side or ():
            shortcut = block.get_submodule(name)(shortcut)
        return torch.allclose(functional.relu(y + shortcut), expected, rtol=1e-4, atol=1e-5)
    except RuntimeError:  # shapes that do not fit
        return False
