from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from lowbit.errors import CalibrationError, DataError
from lowbit.measure import measure_agreement


class Shift(nn.Module):
    """Adds a fixed tensor to its input."""

    def __init__(self, by: Tensor | float) -> None:
        super().__init__()
        self.register_buffer("by", torch.as_tensor(by))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.by


def test_figures_over_batches_equal_those_over_all_data() -> None:
    x = torch.randn(10, 3) * 3
    shift = torch.tensor([1.0, -0.5, 0.0])
    result = measure_agreement(Shift(0.0), Shift(shift), [x[:4], x[4:5], x[5:]])
    wanted, got = x.double(), (x + shift).double()
    p, q = wanted.softmax(1), got.softmax(1)
    assert result.samples == 10
    assert result.sqnr_db == pytest.approx(10 * math.log10(wanted.var(unbiased=False) / (got - wanted).square().mean()), abs=1e-5)
    assert result.kl == pytest.approx((p * (p / q).log()).sum(1).mean().item(), rel=1e-6)
    assert result.top1 == (wanted.argmax(1) == got.argmax(1)).double().mean().item()
    assert result.max_abs_error == pytest.approx(1.0, abs=1e-6)


def test_a_constant_shift_of_all_logits_is_noise_but_changes_no_prediction() -> None:
    result = measure_agreement(Shift(0.0), Shift(2.0), torch.randn(6, 4))
    assert result.top1 == 1.0
    assert result.kl == pytest.approx(0.0, abs=1e-6)
    assert result.sqnr_db < 0


def test_a_network_agrees_with_itself_without_end() -> None:
    model = Shift(1.0)
    result = measure_agreement(model, model, torch.randn(3, 4))
    assert (result.sqnr_db, result.top1, result.kl, result.max_abs_error) == (math.inf, 1.0, 0.0, 0.0)


def test_outputs_with_one_class_have_no_top1() -> None:
    result = measure_agreement(Shift(0.0), Shift(0.1), torch.randn(3, 1))
    assert result.top1 is None and result.kl is None
    assert math.isfinite(result.sqnr_db)


def test_labels_are_dropped_and_dense_outputs_compare_along_channels() -> None:
    x = torch.zeros(2, 3, 4, 4)
    x[:, 1] = 1
    shift = torch.zeros(3, 4, 4)
    shift[2, :2] = 5.0
    result = measure_agreement(Shift(0.0), Shift(shift), [(x, torch.tensor([0, 1]))])
    assert result.top1 == 0.5


def test_outputs_of_different_shape_and_empty_data_are_refused() -> None:
    with pytest.raises(DataError, match="differ in shape"):
        measure_agreement(Shift(0.0), nn.Flatten(0), torch.randn(3, 4))
    with pytest.raises(CalibrationError, match="no batch"):
        measure_agreement(Shift(0.0), Shift(0.0), [])
