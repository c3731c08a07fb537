from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tests.networks import FunctionalNet
from torch import Tensor, nn

import lowbit
from lowbit.measure import compute_cost, count_macs


class Functional(nn.Module):
    """Weights used without calling their layers: as they are, converted, tied, and not at all."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.plain, self.masked, self.unused = nn.Embedding(7, 6), nn.Linear(6, 5), nn.Linear(5, 6), nn.Linear(6, 6)
        self.register_buffer("mask", torch.ones(6, 5))

    def forward(self, tokens: Tensor) -> Tensor:
        x = F.linear(self.table(tokens), self.plain.weight, self.plain.bias)
        x = x @ (self.masked.weight * self.mask).double().float().T
        return F.linear(x, self.table.weight)


def test_weights_that_functions_are_given_count() -> None:
    x = torch.zeros(4, 3, dtype=torch.int64)
    expected = {"table": 3 * 7 * 6, "plain": 3 * 30, "masked": 3 * 30, "unused": 0}
    assert count_macs(Functional(), x) == expected
    assert count_macs(lowbit.prepare(Functional(), method="lsq", sample=x), x) == expected
    assert count_macs(FunctionalNet(), torch.zeros(1, 3, 8, 8))["conv"] == 4 * 64 * 27


@pytest.mark.parametrize("is_quantized", [False, True])
def test_attention_counts_all_its_projections_whichever_way_it_is_computed(is_quantized: bool) -> None:
    model: nn.Module = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1, enable_nested_tensor=False).eval()
    x = torch.randn(2, 5, 8)
    if is_quantized:
        model = lowbit.quantize(model, method="round_to_nearest", weight_bits=4, calibration=x)
    layer = "layers.0"
    assert count_macs(model, x) == {
        f"{layer}.self_attn.in_proj_weight": 5 * 24 * 8, f"{layer}.self_attn.out_proj": 5 * 64, f"{layer}.linear1": 5 * 128,
        f"{layer}.linear2": 5 * 128,
    }  # fmt: skip
    assert torch.backends.mha.get_fastpath_enabled()
    if is_quantized:
        assert compute_cost(model, x)[f"{layer}.self_attn.in_proj_weight"].bops == 5 * 24 * 8 * 8 * 32  # the first layer: 8 bits


def test_recurrent_weights_multiply_every_token_and_lookups_none() -> None:
    model = nn.LSTM(4, 3, num_layers=2, bidirectional=True, proj_size=2, batch_first=True)
    macs = count_macs(model, torch.zeros(2, 7, 4))
    assert macs["weight_ih_l0"] == 7 * 12 * 4 and macs["weight_hh_l1_reverse"] == 7 * 12 * 2 and macs["weight_hr_l0"] == 7 * 2 * 3
    assert count_macs(nn.EmbeddingBag(5, 4), torch.zeros(2, 3, dtype=torch.int64)) == {"": 0}
    assert count_macs(nn.GRUCell(4, 3), torch.zeros(2, 4)) == {"weight_ih": 9 * 4, "weight_hh": 9 * 3}


def test_layers_that_share_a_weight_count_their_own_calls() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    assert count_macs(model, torch.zeros(3, 4)) == {"0": 16, "2": 16, "3": 16}
