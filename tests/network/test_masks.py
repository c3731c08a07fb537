"""Masks with -inf beside the data: what they mask is quantized as usual; an infinity that reaches a quantizer is refused by its layer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import lowbit
from lowbit.errors import CalibrationError, NotFiniteError

X = torch.randn(16, 5, 8, generator=torch.Generator().manual_seed(0))
MASK = torch.zeros(16, 5, 5).masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)


class Attention(nn.Module):
    """One head of attention with an additive mask."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.head(functional.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x), attn_mask=mask))  # type: ignore[no-any-return]


class Added(nn.Module):
    """Adds the mask to what its second layer reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.second(self.first(x) + mask)  # type: ignore[no-any-return]


@pytest.mark.parametrize("method", ["round_to_nearest", "white_paper"])
def test_a_mask_beside_the_data_may_be_infinite(method: str) -> None:
    torch.manual_seed(0)
    net = Attention().eval()
    quantized = lowbit.quantize(net, method=method, weight_bits=8, activation_bits=8, calibration=[(X, MASK)])
    finite = lowbit.quantize(net, method=method, weight_bits=8, activation_bits=8, calibration=[(X, MASK.clamp(min=-1e9))])
    assert torch.equal(quantized(X, MASK), finite(X, MASK))


def test_an_infinity_that_reaches_a_quantizer_is_refused_by_its_layer() -> None:
    with pytest.raises(CalibrationError, match=r"activation 'second.input': 160 of 400 values are NaN or infinite"):
        lowbit.quantize(Added().eval(), method="round_to_nearest", weight_bits=8, activation_bits=8, calibration=[(X, MASK)])
    with pytest.raises(NotFiniteError, match=r"layer 'second' \(Linear\): 160 of 400 values to quantize are NaN or infinite"):
        lowbit.prepare(Added(), method="lsq", weight_bits=4, activation_bits=4, sample=(X, MASK))


@pytest.mark.parametrize("inputs", [(X / 0, MASK), (X, MASK.nan_to_num(torch.inf, neginf=torch.inf)), (X, MASK * torch.nan)])
def test_other_infinities_and_nan_are_refused_at_the_inputs(inputs: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(CalibrationError, match=r"calibration batch 0, input \d of shape .*values are NaN or infinite"):
        lowbit.quantize(Attention().eval(), method="round_to_nearest", weight_bits=8, activation_bits=8, calibration=[inputs])
