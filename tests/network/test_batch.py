from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import lowbit
from lowbit.errors import SpecError
from lowbit.inputs import Inputs
from lowbit.network.batch import calibration_for, checked_batch_dim, find_batch_dim
from lowbit.testing import post_training

SEQUENCE = torch.randn(5, 4, 8, generator=torch.Generator().manual_seed(0))
LONGER = torch.randn(7, 4, 8, generator=torch.Generator().manual_seed(1))
TOKENS = torch.randint(0, 20, (5, 4), generator=torch.Generator().manual_seed(2))


class LastStep(nn.Module):
    """Classes of whole sequences: the output begins with the samples, the input with time."""

    def __init__(self, *, batch_first: bool = False) -> None:
        super().__init__()
        self.table, self.rnn, self.head = nn.Embedding(20, 8), nn.GRU(8, 6, batch_first=batch_first), nn.Linear(6, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.rnn(self.table(tokens))[1][0])  # type: ignore[no-any-return]


class Mean(nn.Module):
    """One number for the whole call: no dimension holds samples."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean()


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...], int]] = {
    "lstm": (lambda: nn.LSTM(8, 6), (SEQUENCE,), 1),
    "lstm, both directions": (lambda: nn.LSTM(8, 6, bidirectional=True), (SEQUENCE,), 1),
    "lstm, one sample": (lambda: nn.LSTM(8, 6), (SEQUENCE[:, :1],), 1),
    "lstm, batch first": (lambda: nn.LSTM(8, 6, batch_first=True), (SEQUENCE,), 0),
    "attention": (lambda: nn.MultiheadAttention(8, 2), (SEQUENCE,) * 3, 1),
    "attention, longer keys": (lambda: nn.MultiheadAttention(8, 2), (SEQUENCE, LONGER, LONGER), 1),
    "attention, batch first": (lambda: nn.MultiheadAttention(8, 2, batch_first=True), (SEQUENCE,) * 3, 0),
    "transformer": (lambda: nn.Transformer(8, 2, 1, 1, 16), (LONGER, SEQUENCE), 1),
    "classes of tokens": (LastStep, (TOKENS,), 1),
    "classes of tokens, batch first": (lambda: LastStep(batch_first=True), (TOKENS,), 0),
    "both": (lambda: nn.Linear(8, 3), (SEQUENCE,), 0),
    "neither": (Mean, (SEQUENCE,), 0),
    "a vector": (lambda: nn.Embedding(20, 8), (TOKENS[0],), 0),
    "pictures": (lambda: nn.Conv2d(3, 4, 3), (torch.randn(2, 3, 8, 8),), 0),
}


@pytest.mark.parametrize("case", CASES)
def test_the_batch_is_the_dimension_whose_entries_do_not_mix(case: str) -> None:
    torch.manual_seed(0)
    make, inputs, expected = CASES[case]
    model = make().train()
    assert find_batch_dim(model, Inputs(inputs)) == expected
    assert model.training


def test_a_batch_dimension_that_no_input_has_is_refused() -> None:
    assert checked_batch_dim(2, Inputs((SEQUENCE,))) == 2
    with pytest.raises(SpecError, match=r"batch_dim=3: no input has that dimension; the inputs have the shapes \[5, 4, 8\]"):
        checked_batch_dim(3, Inputs((SEQUENCE,)))


@pytest.mark.parametrize("case", [case for case in CASES if len(CASES[case][1]) == 1 and case != "a vector"])
def test_calibration_data_are_cut_along_the_batch(case: str) -> None:
    make, (sample,), dim = CASES[case]
    repeated = torch.cat([sample] * 20, dim)
    for data in (repeated, [repeated], [sample] * 20):
        found = calibration_for(make(), data, limit=13)
        assert found.samples == 13 and {batch.batch_dim for batch in found} == {dim}
        assert {size for batch in found for size in (batch.args[0].shape[:dim] + batch.args[0].shape[dim + 1 :],)} == {
            sample.shape[:dim] + sample.shape[dim + 1 :]
        }
        assert torch.equal(torch.cat([batch.args[0] for batch in found], dim), repeated.narrow(dim, 0, 13))


@pytest.mark.parametrize("method", ["round_to_nearest", "white_paper", "adaround", "brecq"])
def test_a_network_whose_inputs_begin_with_time_is_quantized_as_one_with_samples_first(method: str) -> None:
    def build(batch_first: bool) -> nn.Module:
        torch.manual_seed(0)
        return LastStep(batch_first=batch_first).eval()

    tokens = torch.randint(0, 20, (5, 48), generator=torch.Generator().manual_seed(3))
    options = post_training.budget(method, 20)
    first, second = (
        lowbit.quantize(build(is_first), method=method, weight_bits=4, calibration=data, **options)
        for is_first, data in ((False, tokens), (True, tokens.t().contiguous()))
    )
    torch.testing.assert_close(first(tokens), second(tokens.t()))
