"""Weights as bit planes: two tensors for each bit of the magnitude, one for positive and one for negative weights, which can be trained.

Source: Yang, Duan, Chen, Li 2021, "BSQ: Exploring Bit-Level Sparsity for Mixed-Precision Neural Network Quantization", ICLR,
    section 3.1 (planes and their gradients), 3.2 (group lasso), 3.3 (re-quantization and adjustment).
Symbols: p and n -> planes[0] and planes[1], s -> scale, N -> count, B_GL -> group_lasso.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from lowbit.errors import SpecError
from lowbit.quantizers.base import Quantizer
from lowbit.quantizers.qtensor import AffineDecoder, QTensor
from lowbit.spec import Granularity
from lowbit.surrogates import straight_through
from lowbit.surrogates.base import scale_gradient

MOST, MOST_STORED = 8, 7  # planes: the paper's, and those that with the sign are the 8 bits that a file can hold
_EPSILON = 1e-8


def planes_of(codes: Tensor, count: int) -> Tensor:
    """The planes of integer codes: the magnitude's bits, the most significant first, in ``planes[0]`` where positive, else in ``planes[1]``.

    Args:
        codes: Whole numbers from ``-(2**count - 1)`` to ``2**count - 1``, any shape.
        count: Number of planes.

    Returns:
        Zeros and ones, float32 ``[2, *codes.shape, count]``. Source: section 3.1.

    >>> planes_of(torch.tensor([5.0, -2.0]), 3).tolist()
    [[[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]], [[0.0, 0.0, 0.0], [0.0, 1.0, 0.0]]]
    """
    bits = (codes.abs().long().unsqueeze(-1) >> torch.arange(count - 1, -1, -1, device=codes.device)) & 1
    is_positive = codes.unsqueeze(-1) > 0
    return torch.stack([bits * is_positive, bits * ~is_positive]).float()


def value_of(planes: Tensor) -> Tensor:
    """``sum_b 2**b (p_b - n_b)``, ``planes`` without its first and last dimension."""
    powers = 2 ** torch.arange(planes.shape[-1] - 1, -1, -1, device=planes.device)
    return torch.mul(planes[0] - planes[1], powers).sum(-1)


def scale_of(weight: Tensor) -> Tensor:
    """``max|w|``, shape ``()``; 1 for a weight of zeros. Source: section 3.1."""
    largest = weight.abs().max()
    return torch.where(largest > 0, largest, torch.ones_like(largest))


def to_planes(weight: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The planes of ``round(w (2**count - 1) / scale)``, and ``scale = scale_of(w)``. Source: section 3.1."""
    scale = scale_of(weight)
    return planes_of((weight * (2**count - 1) / scale).round(), count), scale


def requantize(planes: Tensor, scale: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Trained planes as zeros and ones again, and their scale.

    Where a code does not fit, there is one more plane, ``scale`` growing with the largest code, as long as there are fewer than ``most``;
    else it saturates. Source: section 3.3.
    """
    codes, count = value_of(planes).round(), planes.shape[-1]
    top = 2**count - 1
    if count < most and bool((codes.abs() > top).any()):
        count, scale = count + 1, scale * (2 ** (count + 1) - 1) / top
    return planes_of(codes.clamp(1 - 2**count, 2**count - 1), count), scale


def trim(planes: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """``planes`` of zeros and ones without the empty ones at either end, at least one, and the scale that leaves the weights as they are.

    Source: section 3.3.
    """
    count = planes.shape[-1]
    used = planes.flatten(0, -2).any(0).nonzero().flatten().tolist() or [0]
    kept = planes[..., used[0] : used[-1] + 1]
    below = count - 1 - used[-1] if bool(planes.any()) else 0
    return kept, scale * (2**below * (2 ** kept.shape[-1] - 1) / (2**count - 1))  # by 1 exactly where no plane is dropped


def group_lasso(planes: Tensor) -> Tensor:
    """``sum_b sqrt(1e-8 + sum (p_b**2 + n_b**2))``, shape ``()``. Source: section 3.2."""
    return (planes.flatten(0, -2).square().sum(0) + _EPSILON).sqrt().sum()


class BitPlanes(Quantizer):
    """Weights as trained bit planes between ``begin`` and ``finish``; before and after, ordinary weights on the same grid.

    Forward: ``scale r / n`` with ``r = round(clamp(v n, -n, n))``, ``n = 2**count - 1``, where ``v = value_of(planes) / n``, whatever the
    weight that is passed, and without planes ``v = x / unit``. Backward: 1 for rounding and clamping, so that with the gradient ``g`` plane
    b gets ``+-g scale 2**b / n``, the scale ``sum g r / n``, and the weight ``g scale unit``. A layer of zeros stays one.

    Args:
        bit_width: 2 to 8, the sign counted: one plane to six, and 8 bits at first eight planes, of which evaluation sees seven.
        most: Planes up to which ``adjust`` lets it grow. Default: those at first.

    Attributes:
        planes: ``[2, *weight.shape, count]``, the most significant first, or ``None``.
        scale: What the largest code stands for, shape ``()``.
        count: Number of planes; without planes that of the grid.
        is_zero: Whether the last adjustment left nothing but zeros.
        adjusted: The phases before which ``adjust`` has been called.
        unit: What a weight is divided by: the scale when planes became weights, or when the weight was measured.
        is_frozen: Whether the weight is not to change.
        strength: Factor of the group lasso in the loss.
    """

    def __init__(self, bit_width: int, *, most: int | None = None) -> None:
        super().__init__(bit_width, Granularity.tensor())
        if bit_width < 2:
            raise SpecError(f"bit planes: bit_width must be 2 to 8, got {bit_width}: 1 bit holds the sign and no plane.")
        self.scale = nn.Parameter(torch.tensor(float("nan")))  # before the planes, which change their shape: so parameters keep their order
        self.planes: nn.Parameter | None
        self.register_parameter("planes", None)
        self.count = MOST if bit_width == 8 else bit_width - 1
        self.most = self.count if most is None else most
        self.is_zero, self.adjusted, self.unit = False, 0, 1.0
        self.is_frozen, self.strength = False, 0.0
        self.register_load_state_dict_pre_hook(_take_saved_planes)

    @property
    def top(self) -> int:
        """The largest code that is stored."""
        return int(2 ** (self.bit_width - 1) - 1)

    @property
    def found(self) -> int:
        """Planes that are in use: ``count``, or 0 for a layer of zeros."""
        return 0 if self.is_zero else self.count

    @property
    def weights(self) -> int:
        """Number of weights in planes."""
        return 0 if self.planes is None else self.planes[0, ..., 0].numel()

    def set_planes(self, planes: Tensor, scale: Tensor) -> None:
        """Let these be the weights, as new parameters."""
        self.planes, self.scale = nn.Parameter(planes.detach().clone()), nn.Parameter(scale.detach().clone().reshape(()))
        self._set_count(planes.shape[-1])

    def _set_count(self, count: int) -> None:
        self.count, self.bit_width = count, min(count, MOST_STORED) + 1

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """``scale = max|x|``; 1 for zeros."""
        self.scale.data = scale_of(x.detach().float())
        self.unit = float(self.scale.detach())

    def begin(self, weight: Tensor) -> None:
        """Let the planes of ``weight`` be trained."""
        self.set_planes(*to_planes(weight.detach().float(), self.count))

    def normalized(self, x: Tensor) -> Tensor:
        """``v``, differentiable: the weights before rounding in units of the scale."""
        if self.planes is not None:
            return value_of(self.planes) / float(2**self.count - 1)
        return scale_gradient(x.float(), self.unit**2) / self.unit

    def _codes(self, x: Tensor, top: int) -> Tensor:
        codes = straight_through(self.normalized(x) * top, -top, top)
        return codes * 0 if self.is_zero else codes  # times 0, so that there is a gradient, which gradients of several processes need

    def forward(self, x: Tensor) -> Tensor:
        top = 2**self.count - 1 if self.training else self.top
        return (self._codes(x, top) * (self.scale / top)).to(x.dtype)

    @torch.no_grad()
    def encode(self, x: Tensor) -> QTensor:
        codes, step = self._codes(x, self.top), self.scale.detach() / self.top
        codes = torch.where(step < 0, -codes, codes)
        return QTensor(codes.to(torch.int8), AffineDecoder(step.abs(), torch.zeros_like(step), self.granularity), self.bit_width)

    def penalty(self) -> Tensor:
        """``strength`` times the group lasso of the planes."""
        return super().penalty() if self.planes is None else self.strength * group_lasso(self.planes)

    @torch.no_grad()
    def project(self) -> None:
        """Planes stay from 0 to 2."""
        if self.planes is not None:
            self.planes.clamp_(0, 2)

    @torch.no_grad()
    def adjust(self) -> None:
        """``requantize`` and ``trim``, with new parameters."""
        assert self.planes is not None
        planes = self.planes if self.scale >= 0 else self.planes.flip(0)
        planes, scale = trim(*requantize(planes, self.scale.abs(), self.most))
        self.set_planes(planes, scale)
        self.is_zero = not bool(planes.any())

    @torch.no_grad()
    def finish(self) -> Tensor:
        """End with the planes; gives the weights that they stood for, which are trained in their place from then on."""
        weight = self.normalized(self.scale) * self.scale
        self.planes, self.unit = None, float(self.scale) or 1.0
        self._set_count(min(self.count, MOST_STORED))
        return weight

    @torch.no_grad()
    def keep_inside(self, weight: Tensor) -> None:
        """Keep a weight that is finetuned where its codes are, in place."""
        weight.clamp_(-self.unit, self.unit)

    def get_extra_state(self) -> Tensor:
        return torch.tensor([self.count, self.is_zero, self.adjusted, self.unit], dtype=torch.float32, device=self.scale.device)

    def set_extra_state(self, state: Tensor) -> None:
        count, is_zero, adjusted, self.unit = state.tolist()
        self.is_zero, self.adjusted = bool(is_zero), int(adjusted)
        self._set_count(int(count))

    def extra_repr(self) -> str:
        return f"bit_width={self.bit_width}, planes={self.found}"


def _take_saved_planes(module: nn.Module, state_dict: Mapping[str, Tensor], prefix: str, *_: object) -> None:
    """Planes of the saved shape, or none where none were saved."""
    assert isinstance(module, BitPlanes)
    saved, has_state = state_dict.get(f"{prefix}planes"), f"{prefix}_extra_state" in state_dict
    if saved is None:
        module.planes = None if has_state else module.planes
    elif module.planes is None or module.planes.shape != saved.shape:
        module.planes = nn.Parameter(torch.empty_like(saved, device=module.scale.device))


def size_of(quantizers: Iterable[BitPlanes]) -> tuple[int, int]:
    """Number of weights in planes, and the bits that these take, without signs."""
    held = [(quantizer.weights, quantizer.found) for quantizer in quantizers]
    return sum(weights for weights, _ in held), sum(weights * count for weights, count in held)
