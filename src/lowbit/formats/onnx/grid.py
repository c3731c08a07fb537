"""Codes of activations in a uint8 container."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

_FAR = 2**31  # farther from zero than any code
_WHOLE = 1e-4  # largest shift of the codes, in steps, that puts 0 on the grid


@dataclass(frozen=True)
class Grid:
    """Codes of an activation in a uint8 container: ``lo`` to ``hi``.

    A code is ``round((x - shift) / step) + origin`` and decodes to ``(code - zero_point) * scale``; usually both are the same grid and
    there is no shift.
    """

    step: np.float32
    origin: int
    lo: int
    hi: int
    scale: np.float32
    zero_point: int
    shift: float = 0.0

    @staticmethod
    def plain(scale: np.float32, zero_point: int, lo: int, hi: int) -> Grid:
        """A grid whose codes decode to the values that they are rounded from, without a shift."""
        return Grid(scale, zero_point, lo, hi, scale, zero_point)

    @property
    def is_plain(self) -> bool:
        """Whether codes decode to the values that they are rounded from."""
        return (self.step, self.origin, self.shift) == (self.scale, self.zero_point, 0.0)

    def moved_by(self, codes: int) -> Grid:
        """The same values with codes that are ``codes`` higher, in another container."""
        return replace(self, origin=self.origin + codes, lo=self.lo + codes, hi=self.hi + codes, zero_point=self.zero_point + codes)

    def code(self, value: float) -> int:
        """The code of ``value`` before clipping."""
        return int(np.clip(np.rint((np.float32(value) - np.float32(self.shift)) / self.step), -_FAR, _FAR)) + self.origin

    def within(self, lo: int, hi: int) -> Grid:
        """The same grid with a narrower range of codes."""
        return replace(self, lo=lo, hi=hi)


def uint8_grid(parts: Sequence[npt.NDArray[np.generic] | None], qmin: int, qmax: int) -> Grid | str:
    """The quantizer's grid in a uint8 container, or a description of what does not fit the container."""
    if any(part is None or part.size != 1 for part in parts):
        return "a grid that is not constant, or not one for the whole tensor"
    lower, step, scale, zero = (float(part.item()) for part in parts if part is not None)
    if qmax - qmin > 255 or not (step > 0 and scale > 0):
        return f"{qmax - qmin + 1} codes of scale {scale:g}"
    if zero != round(zero):
        return f"the zero point {zero:g}, which is not whole"
    if not 0 <= zero - qmin <= 255:
        return f"the zero point {zero:g}, which is outside their container"
    decoding = np.float32(scale), round(zero) - qmin
    start = -lower / step
    if abs(start - round(start)) <= _WHOLE and 0 <= round(start) - qmin <= 255:
        return Grid(np.float32(step), round(start) - qmin, 0, qmax - qmin, *decoding)
    return Grid(np.float32(step), 0, 0, qmax - qmin, *decoding, shift=lower + qmin * step)
