"""Shortcuts around single convolutions, as binary networks have them.

Sources: Liu et al. 2018, "Bi-Real Net", section 3.2; Qin et al. 2020, "IR-Net", and Xu et al. 2021, "ReCU", for the forms without
weights of networks for small images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lowbit.errors import LayerError
from lowbit.inputs import Inputs
from lowbit.network.layers import evaluating


class PaddedShortcut(nn.Module):
    """A shortcut without weights where the shape changes: fewer positions; channels of zeros on both sides, or means of neighbouring channels.

    Args:
        in_channels: Number of input channels.
        out_channels: Number of output channels; if smaller, each is the mean of its share of the input channels.
        stride: Vertical and horizontal stride.
        pooled: Whether to average each ``stride x stride`` square, cropped at the edge; else its first element is taken.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, *, pooled: bool = False) -> None:
        super().__init__()
        self.out_channels, self.stride, self.pooled = out_channels, stride, pooled
        self.before = max(out_channels - in_channels, 0) // 2
        self.after = max(out_channels - in_channels, 0) - self.before

    def forward(self, x: Tensor) -> Tensor:
        if self.stride > 1:
            x = average(x, self.stride) if self.pooled else x[:, :, :: self.stride, :: self.stride]
        if x.shape[1] > self.out_channels:
            return functional.adaptive_avg_pool3d(x[:, None], (self.out_channels, *x.shape[2:]))[:, 0]
        return functional.pad(x, (0, 0, 0, 0, self.before, self.after))


def average(x: Tensor, stride: int) -> Tensor:
    """The mean of each ``stride x stride`` square, those at the edge as far as they reach."""
    return functional.avg_pool2d(x, stride, ceil_mode=True, count_include_pad=False)


class ShortcutUnit(nn.Module):
    """``activation(norm(conv(x)) + shortcut(x))``: one convolution with its own shortcut.

    Args:
        conv: The convolution.
        norm: Norm after the convolution.
        shortcut: Module that brings ``x`` to the output's shape.
        activation: Activation after the sum.
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


class ShortcutBlock(nn.Module):
    """A residual block whose convolutions each have a shortcut of their own: ``activation(norm(conv(x)) + shortcut)``, one after the other.

    It holds the modules of the block that it replaces under the same names. The block's own shortcut, the identity or a 1x1 convolution with
    norm behind an average pool that takes over the stride, goes around the first convolution if it has the shape of its output; else,
    as in bottlenecks, it leads from the block's input to behind the last one. The other convolutions have the identity, or a
    ``PaddedShortcut`` where they change the shape.

    Args:
        block: The block that is replaced.
        units: Names of a convolution and the norm behind it, in order.
        own_shortcut: Names of the convolution and the norm of the block's shortcut, or ``None`` for the identity.
        activation: ``activation(channels)`` builds the module after each sum.

    Raises:
        LayerError: A child of the block has a name that is needed here.
    """

    def __init__(
        self,
        block: nn.Module,
        units: Sequence[tuple[str, str]],
        own_shortcut: tuple[str, str] | None,
        activation: Callable[[int], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        children = dict(block.named_children())
        taken = children.keys() & {"unit_names", "own_shortcut", "own_stride", "unit_shortcuts", "unit_activations", "fits_first"}
        if taken:
            raise LayerError(f"{type(block).__name__} has a child named {min(taken)!r}, which a block with shortcuts needs: rename it")
        for name, child in children.items():
            self.add_module(name, child)
        self.unit_names, self.own_shortcut, self.own_stride = list(units), own_shortcut, 1
        convolutions = [self._conv(conv) for conv, _ in units]
        first, last = convolutions[0], convolutions[-1]
        if own_shortcut is not None:
            projection = self._conv(own_shortcut[0])
            self.own_stride, projection.stride = projection.stride[0], (1, 1)
        own = (last.out_channels, math.prod(conv.stride[0] for conv in convolutions))
        self.fits_first = own == (first.out_channels, first.stride[0]) and (
            own_shortcut is not None or own == (first.in_channels, 1)
        )  # fmt: skip
        self.unit_shortcuts = nn.ModuleList(map(_weightless, convolutions))
        self.unit_shortcuts[0 if self.fits_first else -1] = nn.Identity()
        self.unit_activations = nn.ModuleList(activation(conv.out_channels) if activation else nn.Identity() for conv in convolutions)
        self.to(first.weight.device, first.weight.dtype)
        self.train(block.training)

    def _conv(self, name: str) -> nn.Conv2d:
        layer = self.get_submodule(name)
        assert isinstance(layer, nn.Conv2d)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        own = average(x, self.own_stride) if self.own_stride > 1 else x
        for name in self.own_shortcut or ():
            own = self.get_submodule(name)(own)
        place = 0 if self.fits_first else len(self.unit_names) - 1
        for index, (conv, norm) in enumerate(self.unit_names):
            shortcut = own if index == place else self.unit_shortcuts[index](x)
            x = self.unit_activations[index](self.get_submodule(norm)(self.get_submodule(conv)(x)) + shortcut)
        return x


def _weightless(conv: nn.Conv2d) -> nn.Module:
    changes = conv.stride[0] > 1 or conv.in_channels != conv.out_channels
    return PaddedShortcut(conv.in_channels, conv.out_channels, conv.stride[0], pooled=True) if changes else nn.Identity()


@dataclass
class _Call:
    name: str
    module: nn.Module
    given: int  # id of the input tensor
    made: int  # id of the output tensor


@dataclass(frozen=True)
class GivenShortcuts:
    """What ``give_shortcuts`` did.

    Attributes:
        blocks: Names of the blocks that were replaced.
        own: Names of the convolutions in their old shortcuts.
        without: Names of the other convolutions except the network's first; they have no shortcut of their own.
    """

    blocks: tuple[str, ...]
    own: tuple[str, ...]
    without: tuple[str, ...]


def give_shortcuts(model: nn.Module, sample: Inputs, activation: Callable[[int], nn.Module] | None = None) -> GivenShortcuts:
    """Replace every residual block of two or more convolutions by a ``ShortcutBlock``.

    A block is a submodule that computes ``relu(... norm(conv(relu(norm(conv(x))))) + shortcut(x))`` with the identity or a 1x1 convolution
    and norm as shortcut. Blocks are found by running the sample and proven by computing them from their parts, so how they are
    written, and what their modules are called, does not matter.

    Args:
        model: The network, changed in place; ``model`` itself is no block.
        sample: Inputs of one call.
        activation: ``activation(channels)`` builds the module after each sum; default: none.

    Raises:
        LayerError: The network has no such block, or a child of one has a name that is needed.
    """
    kept: list[Tensor] = []  # keeps tensors alive, so that their ids stay their own
    calls: list[_Call] = []
    results: dict[str, tuple[Tensor, Tensor]] = {}

    def recording(name: str) -> Callable[..., None]:
        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> None:
            inputs = (*args, *kwargs.values())
            if len(inputs) == 1 and isinstance(inputs[0], Tensor) and isinstance(output, Tensor):
                kept.extend((inputs[0], output))
                calls.append(_Call(name, module, id(inputs[0]), id(output)))
                results[name] = inputs[0], output.clone()

        return record

    handles = [module.register_forward_hook(recording(name), with_kwargs=True) for name, module in model.named_modules() if name]
    try:
        with evaluating(model), torch.no_grad():
            model(*sample.args, **sample.kwargs)
    finally:
        for handle in handles:
            handle.remove()
    found: dict[str, _Parts] = {}
    with evaluating(model), torch.no_grad():
        for call in calls:  # blocks come before what holds them, a stage of one block for instance
            candidates = [] if any(name.startswith(f"{call.name}.") for name in found) else _parts_of(call, calls)
            proven = (parts for parts in candidates if _is_block(call.module, *parts, *results[call.name]))
            if (parts := next(proven, None)) is not None:
                found[call.name] = parts
    if not found:
        raise LayerError(
            f"{type(model).__name__} has no residual block of convolutions, norms and ReLUs in which each convolution could get a shortcut. "
            "Use a residual network, or shortcuts=no."
        )
    replaced = {path: ShortcutBlock(model.get_submodule(path), *parts, activation) for path, parts in found.items()}
    for path, block in replaced.items():
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, block)
    convolutions = [call.name for call in calls if isinstance(call.module, nn.Conv2d)]
    return GivenShortcuts(
        tuple(found),
        tuple(f"{path}.{own[0]}" for path, (_, own) in found.items() if own is not None),
        tuple(name for name in dict.fromkeys(convolutions[1:]) if not any(name.startswith(f"{path}.") for path in found)),
    )


_Parts = tuple[list[tuple[str, str]], tuple[str, str] | None]


def _parts_of(block: _Call, calls: list[_Call]) -> list[_Parts]:
    """Convolutions and norms that may make up ``block``, in order, and those of its shortcut, by names within it: each way to see it."""
    prefix = f"{block.name}."
    inner = [call for call in calls if call.name.startswith(prefix)]
    norms = {call.given: call for call in inner if isinstance(call.module, nn.BatchNorm2d)}
    pairs = [(call, norms[call.made]) for call in inner if isinstance(call.module, nn.Conv2d) and call.made in norms]
    is_whole = len(pairs) == sum(isinstance(call.module, nn.Conv2d) for call in inner)
    if not is_whole or len({conv.name for conv, _ in pairs}) < len(pairs):
        return []  # a layer without a norm, or one that is called twice

    def within(pair: tuple[_Call, _Call]) -> tuple[str, str]:
        return pair[0].name.removeprefix(prefix), pair[1].name.removeprefix(prefix)

    own = [pair for pair in pairs if pair[0].given == block.given and pair[0].module.kernel_size == (1, 1)]
    ways = [([within(pair) for pair in pairs if pair is not side], within(side) if side else None) for side in (None, *own)]
    return [(units, side) for units, side in ways if len(units) > 1]


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
