"""Super-resolution: its loss and metrics by hand, batches of pictures of different sizes, and data that do not fit the network."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import lowbit
from lowbit.errors import DataError, UnknownNameError
from lowbit.inputs import sample_count
from lowbit.measure.picture_quality import luma, psnr, ssim
from lowbit.qat.task import Meter
from lowbit.qat.tasks import SuperResolution, as_task
from lowbit.resize import enlarge, imresize


def pair(height: int, width: int, seed: int = 0, scale: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    original = torch.randint(0, 256, (1, 3, scale * height, scale * width), generator=generator).float()
    return imresize(original, 1 / scale).clamp(0, 255).round().float(), original


def test_the_loss_is_the_mean_absolute_difference() -> None:
    small, original = pair(8, 8)
    assert SuperResolution().loss(original + 3, (small, original)).item() == pytest.approx(3)


def test_metrics_are_those_of_the_clipped_and_rounded_output_without_a_border() -> None:
    small, original = pair(12, 10)
    output = original + 20 * torch.randn(original.shape, generator=torch.Generator().manual_seed(1))
    meter = Meter(SuperResolution(2))
    meter.add(output, (small, original))
    shown, wanted = (luma(part[..., 2:-2, 2:-2]) for part in (output.clamp(0, 255).round(), original))
    assert meter.scores()["PSNR"] == pytest.approx(psnr(shown, wanted).item())
    assert meter.scores()["SSIM"] == pytest.approx(ssim(shown, wanted).item())


def test_a_network_that_enlarges_bicubically_has_the_metrics_of_the_baseline() -> None:
    class Bicubic(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return enlarge(x, 2).float()

    found = lowbit.evaluate(Bicubic(), [pair(12, 10), pair(9, 11, 1)], task="super-resolution")
    assert found["PSNR"] == found["bicubic PSNR"] == found.value
    assert found["SSIM"] == found["bicubic SSIM"]
    assert found.samples == 2


def test_metrics_are_means_over_pictures_not_over_pixels() -> None:
    batches = [pair(8, 8), pair(16, 24, 1)]
    model = nn.Upsample(scale_factor=2)
    single = [lowbit.evaluate(model, [batch], task=SuperResolution())["PSNR"] for batch in batches]
    assert lowbit.evaluate(model, batches, task=SuperResolution())["PSNR"] == pytest.approx(sum(single) / 2)


def test_a_batch_may_hold_pictures_of_different_sizes() -> None:
    batches = [pair(8, 8), pair(9, 12, 1)]
    listed = ([small[0] for small, _ in batches], [original[0] for _, original in batches])
    assert sample_count(listed) == 2
    model, task = nn.Upsample(scale_factor=2), SuperResolution()
    together, apart = (lowbit.evaluate(model, data, task=task) for data in ([listed], batches))
    assert together.samples == 2
    assert together.metrics == pytest.approx(dict(apart.metrics))
    losses = [task.loss(model(small), (small, original)) for small, original in batches]
    assert task.loss(task.predict(model, listed), listed).item() == pytest.approx(sum(losses).item() / 2)


def test_equal_pictures_count_100_decibels() -> None:
    small, original = pair(8, 8)
    meter = Meter(SuperResolution())
    meter.add(original, (small, original))
    assert meter.scores()["PSNR"] == 100
    assert meter.scores()["SSIM"] == pytest.approx(1)
    assert SuperResolution().quality(original, original, 2)["PSNR"].item() == math.inf


def test_scales_that_do_not_fit_are_refused() -> None:
    data = [pair(8, 8, scale=3)]
    with pytest.raises(DataError, match="makes 16 x 16 pixels of 8 x 8, the target has 24 x 24: it is no network for scale 3"):
        lowbit.evaluate(nn.Upsample(scale_factor=2), data, task=SuperResolution())
    with pytest.raises(DataError, match="targets must be 2 times larger"):
        lowbit.evaluate(nn.Upsample(scale_factor=2), data, task=SuperResolution(2))
    with pytest.raises(DataError, match="no network for scale 3"):
        SuperResolution().loss(torch.zeros(1, 3, 16, 16), data[0])


def test_targets_are_checked_against_the_output_of_a_batch_of_another_size() -> None:
    batch = torch.zeros(2, 3, 16, 16), torch.zeros(2, 3, 32, 32)
    SuperResolution().check(torch.zeros(5, 3, 32, 32), batch)
    with pytest.raises(DataError, match="no network for scale 2"):
        SuperResolution().check(torch.zeros(5, 3, 48, 48), batch)


def test_other_shapes_are_refused() -> None:
    with pytest.raises(DataError, match="must be colour pictures"):
        SuperResolution().loss(torch.zeros(2, 10), (torch.zeros(2, 3, 8, 8), torch.zeros(2, 10)))


def test_tasks_go_by_name() -> None:
    assert as_task("super-resolution") == SuperResolution()
    with pytest.raises(UnknownNameError, match=r"unknown task 'superresolution'. Did you mean 'super-resolution'\?"):
        as_task("superresolution")
