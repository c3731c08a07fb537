"""The contract of every quantizer: it knows tensors, never layers."""

from __future__ import annotations

import html
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from lowbit.errors import SpecError
from lowbit.plotting import as_html
from lowbit.quantizers.qtensor import QTensor
from lowbit.quantizers.staircase import quantizer_picture
from lowbit.spec import Granularity, check_bit_width

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_AT_WIDTH = "_at_width_"  # between the name of a table and the bit-width that it is kept for


class Quantizer(nn.Module, ABC):
    """Maps a tensor to values on a grid of at most ``2**bit_width`` levels for each scale of its granularity.

    A subclass writes ``forward``, ``encode`` and ``initialize``. The law it keeps: in evaluation mode ``encode(x).decode()`` equals
    ``quantizer(x)`` bit for bit. Calling the quantizer checks ``enabled`` first, so ``forward`` need not.

    Attributes:
        bit_width: Width of the grid.
        granularity: Which elements share a scale.
        enabled: Whether values are quantized; else they pass unchanged.
        is_dynamic: Whether every input has its own grid (see ``quantizers.dynamic``).

    Example:
        >>> import torch
        >>> from lowbit.quantizers import UniformQuantizer
        >>> quantizer = UniformQuantizer(2, signed=False, symmetric=False)
        >>> quantizer.initialize(torch.tensor([0.0, 3.0]))
        >>> codes = quantizer.encode(torch.tensor([0.9, 2.2]))
        >>> codes.codes, codes.decode()
        (tensor([1, 2], dtype=torch.uint8), tensor([1., 2.]))
    """

    is_dynamic = False

    def __init__(self, bit_width: int, granularity: Granularity) -> None:
        super().__init__()
        self.bit_width = check_bit_width(bit_width, type(self).__name__)
        self.granularity = granularity
        self.enabled = True

    def __call__(self, x: Tensor) -> Tensor:
        """``forward(x)`` with its hooks, or ``x`` itself where the quantizer is not enabled."""
        return cast(Tensor, super().__call__(x)) if self.enabled else x

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Float values on the grid, shaped like ``x``; differentiable as the quantizer's paper says."""

    @abstractmethod
    def encode(self, x: Tensor) -> QTensor:
        """Integer codes of ``x`` and how to decode them."""

    @abstractmethod
    def initialize(self, x: Tensor) -> None:
        """Fit the parameters of the grid to data."""

    def plot(self, values: Tensor | tuple[float, float] | None = None) -> Figure:
        """The staircase of this quantizer and the gradient that autograd gives through it, as a matplotlib figure.

        Args:
            values: The tensor that it quantizes, such as a weight, of which one element is moved while all others stay; or the ends of a
                range, for a quantizer with one scale. Default: somewhat more than the range of its levels.

        Raises:
            SpecError: A range for a quantizer with several scales, or one that is not initialized.
            MissingExtraError: matplotlib is not installed.
        """
        return quantizer_picture(self, self._shown_values(values), f"{type(self).__name__}, {self.bit_width} bits").figure()

    def _repr_html_(self) -> str | None:
        """In a notebook: what it is, and its staircase where it has one scale; the text alone without matplotlib."""
        try:
            picture = quantizer_picture(self, self._shown_values(None), f"{type(self).__name__}, {self.bit_width} bits")
        except (SpecError, RuntimeError, ValueError):  # several scales, not initialized, or inputs of one shape only
            return None
        drawn = as_html(picture)
        return None if drawn is None else f"<pre>{html.escape(repr(self))}</pre>{drawn}"

    def _shown_values(self, values: Tensor | tuple[float, float] | None) -> Tensor:
        if isinstance(values, Tensor):
            return values
        if self.granularity.axes or self.granularity.group_size:
            raise SpecError(
                f"{type(self).__name__} has a scale for each index of axis {self.granularity.axis}: pass the tensor that it quantizes to plot()."
            )
        if values is None:
            with torch.no_grad():
                ends = self.encode(torch.tensor([-1e4, 1e4])).decode()
            low, high = float(ends.min()), float(ends.max())
            values = low - (high - low) / 4, high + (high - low) / 4
        return torch.linspace(*values, 161)

    def penalty(self) -> Tensor:
        """Regularization term to add to a training loss; zero unless a subclass has one."""
        return torch.zeros(())

    def project(self) -> None:
        """Bring the parameters back into their allowed range after an optimizer step; does nothing by default."""

    @property
    def is_resting(self) -> bool:
        """Whether values pass unchanged at present, so that parameters get no gradient."""
        return not self.enabled

    @property
    def bits(self) -> int | None:
        """Current width of the values: ``bit_width``, or ``None`` while they pass unchanged."""
        return self.bit_width if self.enabled else None

    @property
    def bit_widths(self) -> Sequence[int]:
        """Widths that ``set_bit_width`` accepts; only the current one unless a subclass defines how its grid changes."""
        return (self.bit_width,)

    def set_bit_width(self, bits: int | None, values: Tensor | None = None) -> None:
        """Quantize to ``bits`` from now on, or with ``None`` let values pass; going there and back changes nothing.

        What was learned is kept: parameters that mean the same at every width stay as they are, those that belong to a width are put
        aside and come back with it.

        Args:
            bits: One of ``bit_widths``, or ``None``.
            values: Tensor (a weight, say) to fit the grid to if this width is new and needs its own grid. Without it the new grid
                is derived from the current one and covers the same range.

        Raises:
            SpecError: The quantizer does not support this width; the message lists those it does.

        >>> from lowbit.quantizers import UniformQuantizer
        >>> quantizer = UniformQuantizer(8, signed=False, symmetric=False)
        >>> quantizer.initialize(torch.tensor([0.0, 3.0]))
        >>> quantizer.set_bit_width(2)
        >>> quantizer(torch.tensor([0.9, 1.6]))
        tensor([1., 2.])
        >>> quantizer.set_bit_width(None)
        >>> quantizer(torch.tensor([0.9, 1.6]))
        tensor([0.9000, 1.6000])
        """
        if bits is None:
            self.enabled = False
            return
        self.check_has(bits)
        if bits != self.bit_width:
            self._change_bit_width(bits, values)
        self.enabled = True

    def check_has(self, bits: int) -> None:
        """SpecError listing ``bit_widths`` unless ``bits`` is one of them."""
        if isinstance(bits, bool) or bits not in self.bit_widths:
            raise SpecError(
                f"{type(self).__name__} has bit-widths {', '.join(map(str, self.bit_widths))}, got {bits!r}. "
                "Choose one of them, or None to let values pass."
            )

    def has_grid_for(self, bits: int) -> bool:
        """Whether there already is a grid of this width."""
        return bits == self.bit_width

    def forget_grid_for(self, bits: int) -> None:
        """Drop the grid of a width that is not in use, so that ``set_bit_width`` derives it anew from the one in use."""

    def _change_bit_width(self, bits: int, values: Tensor | None) -> None:
        """Change to another width of ``bit_widths``."""
        self.bit_width = bits


class TableQuantizer(Quantizer):
    """A quantizer whose grid is a set of buffers that get their shape from the first tensor seen.

    ``load_state_dict`` accepts the saved shapes, so a fresh quantizer need not be initialized before loading.

    Attributes:
        tables: Names of these buffers (or parameters).
        tables_by_width: Names of the tensors that each bit-width has its own version of. Those of unused widths are kept as buffers, so
            that copies, checkpoints and state dicts contain them.
    """

    tables: tuple[str, ...] = ("scale",)
    tables_by_width: tuple[str, ...] = ()

    def __init__(self, bit_width: int, granularity: Granularity) -> None:
        super().__init__(bit_width, granularity)
        for name in self.tables:
            self.register_buffer(name, torch.tensor(float("nan")))
        self.register_load_state_dict_pre_hook(_take_saved_shapes)

    @property
    def is_initialized(self) -> bool:
        """Whether the grid has been set."""
        return not any(bool(getattr(self, name).isnan().any()) for name in self.tables)

    def has_grid_for(self, bits: int) -> bool:
        return super().has_grid_for(bits) or not self.tables_by_width or f"{self.tables_by_width[0]}{_AT_WIDTH}{bits}" in self._buffers

    def forget_grid_for(self, bits: int) -> None:
        for name in self.tables_by_width if bits != self.bit_width else ():
            self._buffers.pop(f"{name}{_AT_WIDTH}{bits}", None)

    def resize(self) -> None:
        """Set what follows from ``bit_width`` alone, such as the range of the codes; does nothing by default."""

    def carry_over(self, old_bits: int) -> None:
        """Derive the ``tables_by_width`` of a new width from those of ``old_bits``, which are still in place."""

    def _change_bit_width(self, bits: int, values: Tensor | None) -> None:
        was_there, was_set, old_bits = self.has_grid_for(bits), self.is_initialized, self.bit_width
        for name in self.tables_by_width:
            self.register_buffer(f"{name}{_AT_WIDTH}{old_bits}", getattr(self, name).detach().clone())
        self.bit_width = bits
        self.resize()
        if was_there:
            for name in self.tables_by_width:
                kept = f"{name}{_AT_WIDTH}{bits}"
                self._set_table(name, self.get_buffer(kept))
                del self._buffers[kept]
        elif values is not None:
            self.initialize(values)
        elif was_set:
            self.carry_over(old_bits)

    def _set_table(self, name: str, value: Tensor) -> None:
        current = getattr(self, name)
        value = value.detach().to(device=current.device, dtype=current.dtype)
        if isinstance(current, nn.Parameter) and current.shape == value.shape:
            current.data.copy_(value)
        else:
            setattr(self, name, nn.Parameter(value.clone()) if isinstance(current, nn.Parameter) else value.clone())


def _take_saved_shapes(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: object) -> None:
    assert isinstance(module, TableQuantizer)
    for name in dict.fromkeys((*module.tables, *module.tables_by_width)):
        saved = state_dict.get(prefix + name)
        current = getattr(module, name)
        if saved is not None and saved.shape != current.shape:
            fresh = torch.empty(saved.shape, dtype=current.dtype, device=current.device)
            setattr(module, name, nn.Parameter(fresh) if isinstance(current, nn.Parameter) else fresh)
    if not any(prefix + name in state_dict for name in module.tables_by_width):
        return
    for name in [name for name in module._buffers if _AT_WIDTH in name]:
        del module._buffers[name]
    for name in (f"{table}{_AT_WIDTH}{bits}" for table in module.tables_by_width for bits in range(1, 9)):
        if prefix + name in state_dict:
            module.register_buffer(
                name, torch.empty_like(state_dict[prefix + name], device=getattr(module, module.tables_by_width[0]).device)
            )


@contextmanager
def disabled(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within the context these quantizers (or transforms that know ``enabled``) pass their input unchanged."""
    switched = [module for module in dict.fromkeys(modules) if getattr(module, "enabled", True)]
    for module in switched:
        module.enabled = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in switched:
            module.enabled = True  # type: ignore[assignment]


@contextmanager
def replace_forward(replacements: Mapping[Quantizer, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Within the context each quantizer that is enabled does what its replacement does, wherever it sits."""
    try:
        for quantizer, replacement in replacements.items():
            quantizer.forward = replacement  # type: ignore[method-assign, assignment]
        yield
    finally:
        for quantizer in replacements:
            del quantizer.forward
