"""The network and the data that a request names."""

from __future__ import annotations

import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from lowbit.data import Preprocessing, load_data, loader
from lowbit.data.image_data import Sample
from lowbit.errors import CalibrationError, SpecError, unknown_name
from lowbit.inputs import Calibration, Inputs
from lowbit.models import default_weights, load_default, load_model
from lowbit.options import convert_option
from lowbit.workflows.requests import NetworkSettings, SampleSettings

DEFAULT = "digits"  # the embedded network and its data go by one name
NO_DATA = (
    "name some with calibration= (a folder of images, or see 'lowbit data list'), "
    "or for a method that needs none give the shape of one sample: input_shape='3x224x224'"
)


@dataclass(frozen=True)
class Source:
    """A network in evaluation mode, and what data there is for it.

    Attributes:
        name: What the user calls the network.
        sample: Inputs of one call: the first calibration samples, or noise of the input shape where there is no data.
        calibration_name, test_name: Where the samples come from.
    """

    name: str
    model: nn.Module
    device: torch.device
    sample: Inputs
    calibration: Calibration | None
    calibration_name: str
    test: Iterable[object] | None
    test_name: str

    @property
    def data_names(self) -> dict[str, str]:
        """Where samples come from, by what they are for."""
        found = {"test": self.test_name} if self.test_name else {}
        samples = "" if self.calibration is None else f", {self.calibration.samples} samples"
        return {"calibration": f"{self.calibration_name}{samples}", **found}


def open_network(settings: NetworkSettings, device: str) -> tuple[str, nn.Module]:
    """The network that is asked for, and what to call it; the embedded one when none is named."""
    return make_network(settings.model, settings.weights, settings.model_options, device)


def make_network(model: str | None, weights: Path | str | None, options: Mapping[str, object], device: str) -> tuple[str, nn.Module]:
    """The network of that name, weights and arguments of its factory, and what to call it."""
    if model is None and weights is None and not options:
        return DEFAULT, load_default().to(open_device(device))
    if model is None:
        raise SpecError("weights and model_options belong to a network: name it with model (see 'lowbit models list').")
    if model == DEFAULT and weights is None and not options:
        weights = default_weights()
    return model, load_model(model, weights, **options).to(open_device(device))


def open_device(name: str) -> torch.device:
    """The device called ``name``; SpecError when torch does not know it or this machine lacks it."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        there = [kind for kind, found in (("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available())) if found]
        raise SpecError(f"device={name!r}: {str(error).splitlines()[0]}. This machine has: {', '.join(['cpu', *there])}.") from error
    return device


def open_source(
    settings: NetworkSettings,
    samples: SampleSettings | None = None,
    *,
    device: str = "cpu",
    seed: int = 0,
    missing: str = NO_DATA,
) -> Source:
    """The network and its data.

    Calibration samples come from the training samples of ``samples.calibration``, or of ``settings.data`` where that is not named, in a fixed
    random order. ``missing`` tells users what to do where there is neither data nor ``samples.input_shape``.

    Raises:
        LowbitError: Something cannot be found or read; the message says what to name instead.
    """
    samples = samples or SampleSettings()
    name, network = open_network(settings, device)
    data = DEFAULT if settings.data is None and name == DEFAULT else settings.data
    place, preprocessing = open_device(device), preprocessing_of(settings.preprocess)
    looked_at = samples.calibration or data
    if looked_at is None:
        if samples.input_shape is None:
            raise CalibrationError(f"there is no data for the network {name}: {missing}")
        sample = Inputs((noise(samples.input_shape, seed).to(place),))
        return Source(name, network, place, sample, None, "no data", None, "")
    found = samples_of(looked_at, samples.calibration_samples, samples.batch_size, place, preprocessing)
    batches = Calibration.of(found)
    test = None if data is None else labelled_batches(data, samples.batch_size, preprocessing)
    return Source(name, network, place, batches.sample, batches, looked_at, test, "" if test is None else str(data))


def noise(shape: str, seed: int) -> Tensor:
    """Two samples of standard normal noise of the input shape that the user gave, for methods that look at no data."""
    sizes = shape.lower().split("x")
    if not all(size.isdigit() and int(size) for size in sizes):
        raise SpecError(f"input_shape={shape!r}: expected whole numbers joined by x, for example 3x224x224")
    return torch.randn(2, *map(int, sizes), generator=torch.Generator().manual_seed(seed))


def preprocessing_of(settings: Mapping[str, object]) -> Preprocessing | None:
    """How pictures become inputs; ``None`` when the user did not say.

    Raises:
        UnknownNameError: There is no such setting.
        SpecError: A value that is not allowed.
    """
    if not settings:
        return None
    hints = typing.get_type_hints(Preprocessing)
    values: dict[str, Any] = {}
    for name, value in settings.items():
        if name not in hints:
            raise unknown_name("setting of preprocess", name, hints)
        values[name] = convert_option("preprocess", name, value, hints[name])
    return Preprocessing(**values)


def labelled_batches(data: str, batch_size: int, preprocessing: Preprocessing | None) -> Iterable[object] | None:
    """The test samples of a data suite or folder with their labels; ``None`` when it has no labels."""
    found = load_data(data, split="test", preprocessing=preprocessing)
    return None if found.num_classes is None else loader(found, batch_size)


def samples_of(data: str, count: int, batch_size: int, device: torch.device, preprocessing: Preprocessing | None) -> list[Tensor]:
    """The first ``count`` samples for calibration of a data suite or folder, in batches on ``device``."""
    dataset = load_data(data, split="calibration", preprocessing=preprocessing)
    return stacked(dataset.dataset, range(min(count, len(dataset))), batch_size, device)


def stacked(dataset: Dataset[Sample], chosen: Iterable[int], batch_size: int, device: torch.device) -> list[Tensor]:
    """The ``chosen`` samples without labels, in batches on ``device``."""
    items = (dataset[index] for index in chosen)
    images = [item[0] if isinstance(item, tuple) else item for item in items]
    return [torch.stack(images[start : start + batch_size]).to(device) for start in range(0, len(images), batch_size)]
