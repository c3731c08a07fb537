"""The contract of every quantizer: it knows tensors, never layers."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from lowbit.quantizers.qtensor import QTensor
from lowbit.spec import Granularity, check_bit_width


class Quantizer(nn.Module, ABC):
    """Maps a tensor to values on a grid of at most ``2**bit_width`` levels (for each scale of its granularity).

    The law every subclass keeps: in evaluation mode ``encode(x).decode()`` equals ``forward(x)`` bit for bit.
    """

    def __init__(self, bit_width: int, granularity: Granularity) -> None:
        super().__init__()
        self.bit_width = check_bit_width(bit_width, type(self).__name__)
        self.granularity = granularity

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Float values on the grid, shaped like ``x``; differentiable as the quantizer's paper says."""

    @abstractmethod
    def encode(self, x: Tensor) -> QTensor:
        """Integer codes of ``x`` and how to decode them."""

    @abstractmethod
    def initialize(self, x: Tensor) -> None:
        """Set the parameters of the grid from data."""

    def penalty(self) -> Tensor:
        """Regularization term to add to a training loss; zero unless a subclass has one."""
        return torch.zeros(())

    def project(self) -> None:
        """Bring the parameters back to where they are allowed, after an optimizer step; nothing unless a subclass needs it."""


class TableQuantizer(Quantizer):
    """A quantizer whose grid is a set of buffers that get their shape from the first tensor seen.

    ``load_state_dict`` accepts the saved shapes, so a fresh quantizer need not be initialized before loading.
    """

    tables: tuple[str, ...] = ("scale",)

    def __init__(self, bit_width: int, granularity: Granularity) -> None:
        super().__init__(bit_width, granularity)
        for name in self.tables:
            self.register_buffer(name, torch.tensor(float("nan")))
        self.register_load_state_dict_pre_hook(_take_saved_shapes)

    @property
    def is_initialized(self) -> bool:
        """Whether the grid has been set."""
        return not any(bool(getattr(self, name).isnan().any()) for name in self.tables)

    def _set_table(self, name: str, value: Tensor) -> None:
        current = getattr(self, name)
        value = value.detach().to(device=current.device, dtype=current.dtype)
        if isinstance(current, nn.Parameter) and current.shape == value.shape:
            current.data.copy_(value)
        else:
            setattr(self, name, nn.Parameter(value.clone()) if isinstance(current, nn.Parameter) else value.clone())


def _take_saved_shapes(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: object) -> None:
    assert isinstance(module, TableQuantizer)
    for name in module.tables:
        saved = state_dict.get(prefix + name)
        current = getattr(module, name)
        if saved is not None and saved.shape != current.shape:
            fresh = torch.empty(saved.shape, dtype=current.dtype, device=current.device)
            setattr(module, name, nn.Parameter(fresh) if isinstance(current, nn.Parameter) else fresh)
