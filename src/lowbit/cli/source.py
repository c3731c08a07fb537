"""The network and the data that a command works on."""

from __future__ import annotations

from collections.abc import Iterable, Sized
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from torch import Tensor, nn

from lowbit.calibration import Calibration
from lowbit.cli.options import key_values
from lowbit.data import load_data
from lowbit.errors import CalibrationError, SpecError
from lowbit.models import default_weights, load_default, load_model

DEFAULT = "digits"  # the embedded network and its data go by one name


@dataclass(frozen=True)
class Source:
    """A network in evaluation mode, its calibration data, and labelled data where there is any.

    Attributes:
        name: What the user calls the network.
        calibration_name, test_name: Where the samples come from.
    """

    name: str
    model: nn.Module
    device: torch.device
    calibration: Calibration
    calibration_name: str
    test: Iterable[object] | None
    test_name: str


def open_network(model: str | None, weights: Path | None, model_options: list[str] | None, device: str) -> tuple[str, nn.Module]:
    """The network that the options name, and what to call it; the embedded one when they name none."""
    options = {key: yaml.safe_load(value) for key, value in key_values(model_options or [], "--model-option").items()}
    if model is None and weights is None and not options:
        return DEFAULT, load_default().to(open_device(device))
    if model is None:
        raise SpecError("--weights and --model-option belong to a network: name it with --model (see 'lowbit models list').")
    if model == DEFAULT and weights is None and not options:
        weights = default_weights()
    return model, load_model(model, weights, **options).to(open_device(device))


def open_device(name: str) -> torch.device:
    """The device called ``name``; SpecError when torch does not know it or this machine lacks it."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SpecError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return device


def open_source(
    model: str | None,
    weights: Path | None,
    data: str | None,
    calibration: str | None,
    calibration_samples: int,
    *,
    model_options: list[str] | None = None,
    batch_size: int = 32,
    device: str = "cpu",
    seed: int = 0,
) -> Source:
    """The network and its data.

    Calibration samples are drawn at random from the training samples of ``calibration``, or of ``data`` where that is not named;
    the same seed draws the same ones.

    Raises:
        LowbitError: Something cannot be found or read; the message says what to name instead.
    """
    name, network = open_network(model, weights, model_options, device)
    if data is None and name == DEFAULT:
        data = DEFAULT
    if calibration is None and data is None:
        raise CalibrationError(
            f"there is no data for the network {name}: name some with --calibration (a folder of images, or see 'lowbit data list')."
        )
    place = open_device(device)
    looked_at = calibration or data
    assert looked_at is not None
    return Source(
        name,
        network,
        place,
        Calibration.of(samples_of(looked_at, calibration_samples, batch_size, place, seed), limit=calibration_samples),
        looked_at,
        None if data is None else labelled_batches(data, batch_size),
        data or "",
    )


def labelled_batches(data: str, batch_size: int) -> Iterable[object]:
    """The test samples of a data suite or folder, with their labels."""
    return load_data(data, split="test", batch_size=batch_size)


def samples_of(data: str, count: int, batch_size: int, device: torch.device, seed: int) -> list[Tensor]:
    """At most ``count`` training samples of a data suite or folder, drawn at random, in batches on ``device``."""
    dataset = load_data(data, split="train", batch_size=batch_size).dataset
    assert isinstance(dataset, Sized)
    drawn = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))[:count].tolist()
    images = [item[0] if isinstance(item, tuple) else item for item in (dataset[index] for index in drawn)]
    return [torch.stack(images[start : start + batch_size]).to(device) for start in range(0, len(images), batch_size)]
