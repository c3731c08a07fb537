from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lowbit.data import load_data, loader
from lowbit.inputs import Inputs
from lowbit.measure.norm_shift import NormShift, first_norm_shift
from lowbit.models import load_default


def test_the_shift_is_that_of_the_statistics() -> None:
    norm = nn.BatchNorm1d(2)
    norm.running_mean = torch.tensor([1.0, 2.0])
    norm.running_var = torch.tensor([4.0, 4.0])
    inputs = Inputs((torch.tensor([[2.0, 4.0], [4.0, 8.0]]),))  # means 3 and 6, variances 1 and 4
    found = first_norm_shift(nn.Sequential(nn.Identity(), norm), inputs)
    assert found == NormShift("1", variance_ratio=0.25, mean_shift=1.0)  # a median of two is the lower one
    assert found.is_large


@pytest.fixture(scope="module")
def images() -> Tensor:
    found: Tensor = next(iter(loader(load_data("digits", split="test"), 64)))[0]
    return found


def test_inputs_like_those_of_the_training_are_near_and_others_are_not(images: Tensor) -> None:
    model = load_default()
    data = load_data("digits", split="test")
    near = first_norm_shift(model, Inputs((images,)))
    assert near is not None and not near.is_large and near.name == "norm"
    assert near.variance_ratio == pytest.approx(1, abs=0.1) and near.mean_shift < 0.1
    pixels = images * data.std[0] + data.mean[0]
    for wrong in (pixels, (pixels - 0.45) / 0.225, 255 * pixels):
        far = first_norm_shift(model, Inputs((wrong,)))
        assert far is not None and far.is_large
    assert not model.training


def test_networks_without_kept_statistics_have_no_shift(images: Tensor) -> None:
    for model in (nn.Conv2d(1, 2, 3), nn.BatchNorm2d(1), nn.BatchNorm2d(1, track_running_stats=False)):
        assert first_norm_shift(model, Inputs((images,))) is None


def test_hooks_are_taken_away_and_flags_stay(images: Tensor) -> None:
    model = load_default().train()
    first_norm_shift(model, Inputs((images,)))
    assert model.training and model.norm.training  # type: ignore[union-attr]
    assert not any(module._forward_pre_hooks for module in model.modules())
