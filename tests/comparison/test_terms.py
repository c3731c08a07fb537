from __future__ import annotations

import copy

import pytest
import torch
from tests.qat.adaptive import chain
from torch import Tensor, nn

import lowbit
from lowbit.comparison.terms import equal_terms


class Recurrent(nn.Module):
    """A recurrent layer with four weights, then two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.inner, self.head = nn.LSTM(4, 8, num_layers=2, batch_first=True), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(self.lstm(x)[0].mean(1)))  # type: ignore[no-any-return]


def test_the_first_layer_counts_with_all_its_weights() -> None:
    torch.manual_seed(0)
    model, inputs = Recurrent().eval(), torch.randn(8, 5, 4)
    policy = lowbit.BitPolicy.uniform(4, 8).with_rule(match="lstm", weight=6).with_rule(match="lstm.weight_hh_l1", weight=5)
    quantized = lowbit.quantize(copy.deepcopy(model), method="round_to_nearest", policy=policy, calibration=inputs, progress=False)
    terms = equal_terms(quantized, model, inputs)
    assert (terms["first_layer"], terms["inner_layers"], terms["last_layer"]) == ("6/float, 5/float", "4/8", "8/8")


@pytest.mark.parametrize(("method", "options"), [("adabits", {}), ("adabits", {"shares_affine": True}), ("sp_nets", {}), ("bit_mixer", {})])
def test_norms_of_several_widths_count_once(method: str, options: dict[str, object]) -> None:
    torch.manual_seed(0)
    model, images = chain(), torch.randn(8, 2, 6, 6)
    quantized = lowbit.prepare(model, method=method, bits=[8, 4, 2], sample=images, **options)
    for width in (8, 2):
        lowbit.set_bits(quantized, width)
        assert equal_terms(quantized, model, images)["norms"] == "kept"


def test_norms_that_were_folded_are_told_from_those_that_stay() -> None:
    torch.manual_seed(0)
    model, images = chain().eval(), torch.randn(8, 2, 6, 6)
    folded = lowbit.quantize(model, method="round_to_nearest", calibration=images, progress=False)
    assert equal_terms(folded, model, images)["norms"] == "folded"
    some = lowbit.prepare(model, method="adabits", bits=[8, 4], sample=images)
    some.norm1 = nn.Identity()
    assert equal_terms(some, model, images)["norms"] == "1 of 3 folded"
    plain = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    assert equal_terms(plain, plain, images)["norms"] == "none"
