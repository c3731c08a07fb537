from __future__ import annotations

import copy

import torch
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
