from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lowbit.errors import SpecError
from lowbit.formats.program.batch import checked_batch_dim, find_batch_dim
from lowbit.inputs import Inputs

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
