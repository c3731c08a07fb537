"""The linear quantizers of HAQ: weights clipped where calibration says, inputs clipped at a learned level, both calibrated on one batch.

Paper: Wang, Liu, Lin, Lin, Han, CVPR 2019, "HAQ: Hardware-Aware Automated Quantization with Mixed Precision". Section 3.4.
    Authors' code: mit-han-lab/haq.
Symbols: c and r -> clip, a_k or b -> bit_width, n -> qmax.
Differs from the paper:
    - The divergence is taken between cumulative distributions, with the levels of signed weights for inputs too, as in the authors' code;
      the paper has the values themselves.
    - A bin in which both distributions are 0 adds nothing, and where every divergence is infinite, as with values that keep away from 0, the
      largest magnitude is taken. In the authors' code such a bin makes the divergence NaN and the narrowest range win.
    - Tensors of zeros get the clip level 1 (weights) or the initial one (inputs); in the authors' code they become NaN.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from lowbit.errors import CalibrationError, SpecError
from lowbit.quantizers.affine import qrange
from lowbit.quantizers.grid import Grid, GridQuantizer
from lowbit.surrogates import pass_gradient, straight_through

FEW_BITS = 4  # up to which clip levels are searched; above it the largest magnitude is taken
SMALLEST_CLIP = 1e-4
WeightClip = float | Literal["kl", "max"]


def kl_threshold(x: Tensor, bits: int) -> float:
    """The clip level whose levels lose least of the distribution of ``|x|``.

    With ``C`` the cumulative histogram of ``|x|`` in ``B`` bins of equal width (square root rule) and ``n = 2**(bits - 1)`` levels: for each
    ``i`` in ``n + 1 .. B`` the distribution that is clipped behind bin ``i`` is interpolated at ``n`` even places and back, which gives
    ``Q``; the threshold is ``(i + 1/2) * width`` of the first ``i`` with the least ``sum (C - Q) log2(C / Q)``.

    Args:
        x: Values of any shape.
        bits: Bit-width, with the sign.

    Returns:
        The clip level, up to half a bin above ``max|x|``; ``max|x|`` itself where there are too few bins or every
        divergence is infinite.

    Raises:
        CalibrationError: No values, or some that are not finite.

    Source: section 3.4, as the authors' code computes it.
    """
    magnitudes = x.detach().float().abs().reshape(-1).cpu().numpy()
    largest = float(magnitudes.max()) if magnitudes.size else float("nan")
    if not np.isfinite(largest):
        raise CalibrationError("a clip level needs values, and none may be NaN or infinite")
    if largest == 0:
        return 0.0
    counts, _ = np.histogram(magnitudes, bins="sqrt", range=(0, largest))
    bins, levels = len(counts), 2 ** (bits - 1)
    if levels + 1 > bins:
        return largest
    cumulative = np.cumsum(counts / counts.sum())
    coarse = np.linspace(0, 1, levels)
    divergences = []
    for kept in range(levels + 1, bins + 1):
        clipped, fine = cumulative.copy(), np.linspace(0, 1, kept)
        clipped[kept - 1 :] = 1
        clipped[:kept] = np.interp(fine, coarse, np.interp(coarse, fine, clipped[:kept]))
        with np.errstate(divide="ignore", invalid="ignore"):
            terms = (cumulative - clipped) * np.log2(cumulative / clipped)
        divergences.append(np.where(cumulative == clipped, 0, terms).sum())
    if not np.isfinite(min(divergences)):
        return largest
    best = levels + 1 + int(np.argmin(divergences))
    return float((best + 0.5) * largest / bins)


class HaqWeight(GridQuantizer):
    """Weights on ``2**b - 1`` levels in ``[-clip, clip]``, one clip level for the tensor.

    Forward: ``round(clamp(w, -clip, clip) / scale) * scale`` with ``scale = clip / (2**(b - 1) - 1)``. Backward: 1 everywhere, also beyond
    the clip level, which is no parameter. With ``tanh``, ``tanh(w) / max|tanh(w)|`` takes the place of ``w``, and the clip level is 1 unless one is given.
    Each bit-width has its own clip level.

    Args:
        bit_width: 2 to 8.
        clip: A level, ``max`` (the largest magnitude) or ``kl`` (``kl_threshold`` up to 4 bits, else the largest magnitude).
        tanh: Squash weights first, as in DoReFa.

    Source: section 3.4.
    """

    tables = tables_by_width = ("clip",)
    bit_widths = range(2, 9)

    def __init__(self, bit_width: int, *, clip: WeightClip = "kl", tanh: bool = False) -> None:
        if bit_width < 2:
            raise SpecError(f"haq: linear weights need 2 to 8 bits, got {bit_width}. For 1 bit choose weights='kmeans'.")
        super().__init__(bit_width, *self.code_range(bit_width), surrogate=straight_through)
        self.clip: Tensor
        self.clip_rule, self.tanh = clip, tanh

    def code_range(self, bit_width: int) -> tuple[int, int]:
        return qrange(bit_width, signed=True, narrow=True)

    def initialize(self, x: Tensor) -> None:
        """Set the clip level as ``clip`` asks."""
        if not isinstance(self.clip_rule, str):
            clip = float(self.clip_rule)
        elif self.tanh:
            clip = 1.0
        elif self.clip_rule == "kl" and self.bit_width <= FEW_BITS:
            clip = kl_threshold(x, self.bit_width)
        else:
            clip = float(x.detach().float().abs().amax())
        self._set_table("clip", torch.tensor(clip or 1.0))

    def prepare(self, x: Tensor) -> Tensor:
        if not self.tanh:
            return x
        squashed = x.tanh()
        return squashed / squashed.abs().amax().clamp(min=torch.finfo(squashed.dtype).tiny)

    def grid(self, x: Tensor) -> Grid:
        scale, zero = self.clip / self.qmax, torch.zeros_like(self.clip)
        return Grid(zero, scale, scale, zero)


class HaqActivation(GridQuantizer):
    """Inputs on ``[0, clip]``, or with ``is_signed`` on ``[-clip, clip]``, one bit being the sign.

    Forward: ``round(u / scale) * scale`` with ``scale = clip / n``, ``n = 2**b - 1`` (signed: ``2**(b - 1) - 1``) and
    ``u = (|x| - |x - clip| + clip) / 2`` (signed: ``(|x + clip| - |x - clip|) / 2``), which is ``x`` clipped.
    Backward: that of ``u``: to ``x`` 1 within the range and 1/2 on its ends, to ``clip`` the sum of the gradients of clipped values (less
    those below ``-clip``), 1/2 of those on the ends. Nothing through the scale. Each bit-width has its own clip level.

    Args:
        bit_width: 1 to 8, signed 2 to 8.
        is_signed: Whether inputs can be negative.
        initial_clip: Clip level before calibration, and the most that calibration gives.
        learns_clip: Whether the clip level is trained; else it gets no gradient, and values on the ends get 1.

    Source: section 3.4; Choi et al. 2018, "PACT", for the learned level.
    """

    tables = tables_by_width = ("clip",)

    def __init__(self, bit_width: int, *, is_signed: bool = False, initial_clip: float = 6.0, learns_clip: bool = True) -> None:
        self.is_signed, self.initial_clip, self.learns_clip = is_signed, initial_clip, learns_clip
        if bit_width not in self.bit_widths:
            raise SpecError(f"haq: inputs that can be negative need 2 to 8 bits, got {bit_width}")
        super().__init__(bit_width, *self.code_range(bit_width), surrogate=straight_through)
        self.clip: Tensor
        del self._buffers["clip"]
        clip = torch.tensor(float(initial_clip))
        if learns_clip:
            self.clip = nn.Parameter(clip)
        else:
            self.register_buffer("clip", clip)

    @property
    def bit_widths(self) -> range:
        return range(1 + self.is_signed, 9)

    def code_range(self, bit_width: int) -> tuple[int, int]:
        return qrange(bit_width, signed=self.is_signed, narrow=True) if self.is_signed else qrange(bit_width, signed=False)

    def initialize(self, x: Tensor) -> None:
        """The largest magnitude, up to 4 bits beside the sign the ``kl_threshold`` where that is less, and at most ``initial_clip``."""
        clip = min(self.initial_clip, float(x.detach().float().abs().amax()))
        inner = self.bit_width - self.is_signed
        if inner <= FEW_BITS:
            clip = min(clip, kl_threshold(x, inner))
        self._set_table("clip", torch.tensor(clip or self.initial_clip))

    def prepare(self, x: Tensor) -> Tensor:
        if torch.compiler.is_exporting() or not torch.is_grad_enabled():
            return x  # the range of the codes clips it
        clip = self.clip
        low = -clip if self.is_signed else torch.zeros_like(clip)
        if not self.learns_clip:
            return x.clamp(low, clip)
        both = (x + clip).abs() if self.is_signed else x.abs() + clip
        return pass_gradient((both - (x - clip).abs()) / 2, x.detach().clamp(low, clip).detach())

    def grid(self, x: Tensor) -> Grid:
        scale = self.clip.detach() / self.qmax
        zero = torch.zeros_like(scale)
        return Grid(zero, scale, scale, zero)

    @torch.no_grad()
    def project(self) -> None:
        """Keep the clip level positive."""
        self.clip.clamp_(min=SMALLEST_CLIP)
