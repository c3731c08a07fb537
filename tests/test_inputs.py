from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lowbit.errors import CalibrationError
from lowbit.inputs import Calibration, Inputs, map_tensors, sample_count, tensors_of


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


class Optional(nn.Module):
    def forward(self, x: Tensor, mask: Tensor | None = None, *, return_mask: bool = False) -> Tensor:
        return x if mask is None else x * mask


class Two(nn.Module):
    def forward(self, image: Tensor, scale: Tensor) -> Tensor:
        return image * scale


X = torch.ones(2, 3, 4, 4)
ONE = nn.Conv2d(3, 1, 1)


@pytest.mark.parametrize(
    "target",
    [torch.zeros(2, 4, 4), torch.eye(2), torch.zeros(2, 1), X, [{"boxes": 1}] * 2, ["a", "b"], None, 3],
    ids=["mask", "one-hot", "column", "picture", "dicts", "names", "None", "number"],
)
@pytest.mark.parametrize("model", [ONE, nn.DataParallel(ONE), nn.Sequential(ONE)], ids=["layer", "wrapped", "sequence"])
def test_what_a_network_does_not_take_is_dropped(model: nn.Module, target: object) -> None:
    for batch in ((X, target), (X, target, torch.arange(2)), [X, target], ([X], target)):
        assert [tensor is X for tensor in Inputs.of(batch, model).tensors] == [True]


def test_inputs_are_taken_by_number_and_name() -> None:
    scale = torch.full((2, 1, 1, 1), 2.0)
    for batch in ((X, scale), (X, scale, None), ((X, scale), None)):
        assert Inputs.of(batch, Two()).args == (X, scale)
    named = Inputs.of({"labels": None, "scale": scale, "image": X, "weight": X}, Two())
    assert list(named.kwargs) == ["image", "scale"]
    assert Inputs.of({"values": X, "labels": torch.zeros(2)}, ONE).args == (X,)  # the only tensor that can be the input
    assert Inputs.of((X, X), Optional()).args == (X, X) and Inputs.of((X, torch.arange(2)), Optional()).args == (X,)
    assert Inputs.of((X, None), Optional()).args == (X,)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((X,), r"takes 2 inputs \(image, scale\); a batch has 1"),
        ({"image": X, "size": X}, "takes image, scale; the batch holds the tensors image, size"),
        ((X, ["a", "b"]), "got tuple of Tensor, list"),
    ],
)
def test_a_missing_input_is_named(batch: object, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        Inputs.of(batch, Two())


def test_samples_are_counted_in_batches_of_any_structure() -> None:
    boxes = [{"boxes": torch.zeros(5, 4)}, {"boxes": torch.zeros(0, 4)}]
    assert [sample_count(b) for b in (X, (X, None), {"name": ["a"], "x": X}, ((X, X), X), (X, boxes), torch.tensor(3.0), None)] == [
        2,
        2,
        2,
        2,
        2,
        1,
        1,
    ]


def test_tensors_are_changed_wherever_they_are() -> None:
    found = map_tensors({"x": (X, [X, "a"]), "n": None}, lambda tensor: tensor + 1)
    assert found["x"][0][0, 0, 0, 0] == 2 and found["x"][1][0][0, 0, 0, 0] == 2 and found["x"][1][1] == "a" and found["n"] is None  # type: ignore[index]
    assert [tensor is X for tensor in tensors_of([None, {"x": X}, (X,)])] == [True, True]


def test_a_label_behind_all_inputs_is_not_taken_for_an_optional_one() -> None:
    class Masked(nn.Module):
        def forward(self, x: Tensor, z: Tensor, mask: Tensor | None = None) -> Tensor:
            return x + z if mask is None else (x + z) * mask

    class Padded(nn.Module):
        def forward(self, x: Tensor, z: Tensor, lengths: Tensor | None = None) -> Tensor:
            return x + z

    x, labels = torch.randn(4, 3), torch.arange(4)
    assert len(Inputs.of((x, x, labels), Masked()).args) == 2
    assert len(Inputs.of((x, x, x > 0), Masked()).args) == 3
    assert len(Inputs.of((x, x, labels, labels), Masked()).args) == 3  # what follows is the target
    assert len(Inputs.of((x, x, labels), Padded()).args) == 3
