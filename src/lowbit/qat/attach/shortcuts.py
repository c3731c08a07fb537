"""What methods for binary inputs change in a network before quantizers come into it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import nn

from lowbit.errors import LayerError
from lowbit.network.layers import replace_modules
from lowbit.network.surgery.shortcuts import ShortcutBlock, ShortcutUnit, give_shortcuts
from lowbit.qat import QatJob

Shortcuts = Literal["auto", "yes", "no"]


def change_network(
    job: QatJob, shortcuts: Shortcuts, activation: Callable[[int], nn.Module] | None = None, relu: type[nn.Module] = nn.Identity
) -> None:
    """Shortcuts around the convolutions of residual blocks, other activations, and shortcuts' 1x1 convolutions in float.

    Args:
        job: The network, before quantizers are inserted.
        shortcuts: Give each convolution of a residual block its own shortcut: ``auto``: if the network has residual blocks; ``yes``:
            an error if it has none; ``no``.
        activation: ``activation(channels)`` makes what follows each sum; nothing by default.
        relu: What stands in the place of ``nn.ReLU`` modules in networks with such shortcuts.

    Raises:
        LayerError: ``shortcuts`` is ``yes`` and there is no residual block.
    """
    for name, module in job.model.named_modules():
        for conv in _own_convolutions(module):
            job.keep_float(f"{name}.{conv}" if name else conv, "a shortcut stays in float")
    has_blocks = any(isinstance(module, ShortcutBlock | ShortcutUnit) for module in job.model.modules())
    if shortcuts != "no" and not has_blocks:
        try:
            given = give_shortcuts(job.model, job.sample, activation)
        except LayerError as error:
            if shortcuts == "yes":
                raise
            job.table.note(f"no shortcuts were added: {error}")
        else:
            for name in given.own:
                job.keep_float(name, "a shortcut stays in float")
            has_blocks = True
            job.table.note(f"each convolution of {len(given.blocks)} residual blocks has its own shortcut")
            if given.without:
                job.table.note(
                    f"without a shortcut of their own, for they are in no residual block that was understood: {', '.join(given.without)}"
                )
    if has_blocks:
        replace_modules(job.model, nn.ReLU, relu)


def _own_convolutions(module: nn.Module) -> list[str]:
    """Names, within ``module``, of the convolutions of its shortcut."""
    if isinstance(module, ShortcutBlock):
        return [module.own_shortcut[0]] if module.own_shortcut else []
    if isinstance(module, ShortcutUnit):
        return [f"shortcut.{name}" for name, layer in module.shortcut.named_modules() if name and isinstance(layer, nn.Conv2d)]
    return []
