from __future__ import annotations

import pytest
import torch

from lowbit.errors import CalibrationError
from lowbit.inputs import Calibration, Inputs


def test_labels_are_dropped_and_samples_counted() -> None:
    loader = [(torch.rand(3, 1, 4, 4), torch.tensor([0, 1, 2])), (torch.rand(2, 1, 4, 4), torch.tensor([1, 0]))]
    calibration = Calibration.of(loader)
    assert [len(inputs.args) for inputs in calibration] == [1, 1]
    assert calibration.samples == 5 and len(calibration) == 2


def test_two_image_tensors_are_two_inputs() -> None:
    assert len(Inputs.of((torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4))).args) == 2


def test_a_generator_can_be_read_twice() -> None:
    calibration = Calibration.of(torch.rand(2, 3) for _ in range(3))
    assert sum(1 for _ in calibration) == sum(1 for _ in calibration) == 3


def test_the_limit_cuts_the_last_batch() -> None:
    calibration = Calibration.of([torch.rand(4, 2)] * 3, limit=6)
    assert [inputs.batch_size for inputs in calibration] == [4, 2]


def test_keyword_inputs_pass_through() -> None:
    inputs = Inputs.of({"image": torch.ones(2, 3), "scale": torch.ones(2, 1)})
    assert set(inputs.kwargs) == {"image", "scale"} and inputs.batch_size == 2


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "holds no batch"),
        ([torch.tensor([[1.0, float("nan")]])], "1 of 2 values are NaN"),
        ([torch.full((2, 2), float("inf"))], "4 of 4 values are NaN or infinite"),
        ([torch.zeros(0, 3)], "holds no value"),
        (["text"], "got str"),
        (3, "got int"),
    ],
)
def test_bad_data_gets_a_clear_error(data: object, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        list(Calibration.of(data))
