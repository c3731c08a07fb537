"""A tensor as the sum of several low-bit tensors, each with its own scale."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lowbit.errors import SpecError
from lowbit.quantizers.base import Quantizer
from lowbit.quantizers.qtensor import QTensor, SumDecoder
from lowbit.surrogates import pass_gradient


class SumQuantizer(Quantizer):
    """Quantizes ``x`` with the first part, the residual with the second, and so on.

    Forward: ``y_1 + y_2 + ...`` with ``y_1 = part_1(x)``, ``y_2 = part_2(x - y_1)``. Backward: 1 (straight-through).
    Parts have equal bit-width, signedness and granularity, and change their bit-width together.
    """

    def __init__(self, parts: Sequence[Quantizer]) -> None:
        if not parts or any(part.bit_width != parts[0].bit_width or part.granularity != parts[0].granularity for part in parts):
            raise SpecError("a sum needs at least one part, and parts of equal bit_width and granularity")
        super().__init__(parts[0].bit_width, parts[0].granularity)
        self.parts = nn.ModuleList(parts)

    @property
    def bit_widths(self) -> Sequence[int]:
        parts = self._parts()
        return [bits for bits in parts[0].bit_widths if all(bits in part.bit_widths for part in parts)]

    def has_grid_for(self, bits: int) -> bool:
        return all(part.has_grid_for(bits) for part in self._parts())

    def _change_bit_width(self, bits: int, values: Tensor | None) -> None:
        is_new = not self.has_grid_for(bits)
        for part in self._parts():
            part.set_bit_width(bits)
        self.bit_width = bits
        if is_new and values is not None:
            self.initialize(values)

    def initialize(self, x: Tensor) -> None:
        """Each part in turn from the residual of the parts before it."""
        residual = x.detach()
        for part in self._parts():
            part.initialize(residual)
            residual = residual - part.encode(residual).decode()

    def forward(self, x: Tensor) -> Tensor:
        return pass_gradient(x, self.encode(x).decode().to(x.dtype))

    def encode(self, x: Tensor) -> QTensor:
        residual, encoded = x.detach(), []
        for part in self._parts():
            encoded.append(part.encode(residual))
            residual = residual - encoded[-1].decode()
        codes = torch.stack([q.codes for q in encoded])
        return QTensor(codes, SumDecoder(tuple(q.decoder for q in encoded), self.granularity), self.bit_width)

    def _parts(self) -> list[Quantizer]:
        return [part for part in self.parts if isinstance(part, Quantizer)]
