"""What the public verbs have to know of a task to open its networks and its data by their names."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, Literal, TypeVar, cast

import torch
from torch import nn

from lowbit.data import ImageData, Preprocessing, Split, load_data, load_pairs
from lowbit.errors import LowbitError, SpecError
from lowbit.models import BUILT_IN, default_weights, full_name, load_model, upscaling_weights
from lowbit.network.layers import evaluating
from lowbit.qat.task import Task
from lowbit.qat.tasks import Classification, SuperResolution
from lowbit.workflows.settings import EMBEDDED, NetworkSettings

TaskName = Literal["classification", "super-resolution"]
N = TypeVar("N", bound=NetworkSettings)
TRAINED_SCALE = 2  # of the embedded network
PATCH, EMBEDDED_PATCH = 48, 24  # pixels of small pictures
PROBE = 16  # pixels of the picture that a network is tried on


class Domain(ABC):
    """A task by its name.

    Attributes:
        task: The kind of task, by which files know it.
        network: The embedded network.
        data: The embedded data.
        trained: Arguments of the embedded network's factory that its weights are for.
    """

    task: ClassVar[type[Task]]
    network: ClassVar[str]
    data: ClassVar[str]
    trained: ClassVar[Mapping[str, object]] = {}

    @abstractmethod
    def weights(self) -> Path:
        """Trained weights of the embedded network."""

    @abstractmethod
    def make_task(self, settings: NetworkSettings) -> Task:
        """The task as ``settings`` have it."""

    @abstractmethod
    def load(
        self, spec: str, split: Split, settings: NetworkSettings, preprocessing: Preprocessing | None = None, *, strict: bool = True
    ) -> ImageData:
        """The data that ``spec`` names; errors as ``load_data``."""

    def filled(self, settings: N, network: nn.Module | None = None) -> N:
        """``settings`` with what follows from the network, which is ``network`` where it is there already."""
        return settings

    @abstractmethod
    def fitting_options(self, model: str | None, options: Mapping[str, object], data: ImageData) -> dict[str, object]:
        """The options of a built-in network, with what follows from the data where it is not given."""

    def check_network(self, network: nn.Module, settings: NetworkSettings) -> None:  # noqa: B027 - most networks fit
        """SpecError where a network is none for ``settings``."""

    def is_embedded(self, model: str | None, weights: object, options: Mapping[str, object]) -> bool:
        """Whether this is the embedded network with the weights of the package."""
        return model in (None, self.network) and weights is None and all(self.trained.get(key) == options[key] for key in options)


class Pictures(Domain):
    """Classification: pictures become inputs of one size."""

    task = Classification
    network = data = EMBEDDED["classification"]

    def weights(self) -> Path:
        return default_weights()

    def make_task(self, settings: NetworkSettings) -> Task:
        names = ("label_smoothing", "temperature")
        return Classification(**{name: getattr(settings, name) for name in names if hasattr(settings, name)})

    def load(
        self, spec: str, split: Split, settings: NetworkSettings, preprocessing: Preprocessing | None = None, *, strict: bool = True
    ) -> ImageData:
        return load_data(spec, split=split, preprocessing=preprocessing, strict=strict)

    def filled(self, settings: N, network: nn.Module | None = None) -> N:
        if settings.scale is not None:
            raise SpecError("scale= belongs to task='super-resolution'. Leave it out, or name that task.")
        return settings

    def fitting_options(self, model: str | None, options: Mapping[str, object], data: ImageData) -> dict[str, object]:
        if model not in BUILT_IN or model == self.network:
            return dict(options)
        return {"num_classes": data.num_classes, "in_channels": data.input_shape[0], **options}


class Upscaling(Domain):
    """Super-resolution: pictures stay as they are, small ones are made of them."""

    task = SuperResolution
    network, data = EMBEDDED["super-resolution"], "sample-photographs"
    trained: ClassVar = {"scale": TRAINED_SCALE}

    def weights(self) -> Path:
        return upscaling_weights()

    def make_task(self, settings: NetworkSettings) -> Task:
        return SuperResolution(scale=settings.scale)

    def load(
        self, spec: str, split: Split, settings: NetworkSettings, preprocessing: Preprocessing | None = None, *, strict: bool = True
    ) -> ImageData:
        assert settings.scale is not None  # filled
        patch = settings.patch or (EMBEDDED_PATCH if spec == self.data else PATCH)
        return load_pairs(spec, scale=settings.scale, split=split, patch=patch, strict=strict)

    def filled(self, settings: N, network: nn.Module | None = None) -> N:
        """With the scale: that of the network where it is not said, 2 for built-in ones; and with it for their factory."""
        for name in ("preprocess", "classes"):
            if getattr(settings, name):
                raise SpecError(f"{name}= is for classification: super-resolution takes pictures as they are. Leave it out.")
        options = dict(settings.model_options)
        scale = settings.scale or cast("int | None", options.get("scale"))
        is_built_in = settings.model is None or settings.model in BUILT_IN
        if network is not None:
            scale = scale or scale_of(network)
        elif is_built_in:
            scale = scale or TRAINED_SCALE
            if settings.model is None and scale != TRAINED_SCALE:
                raise SpecError(
                    f"scale={scale}: the embedded network is for scale {TRAINED_SCALE}. Name another one with model=, for example "
                    f"model={self.network!r} without trained weights."
                )
            if settings.model is not None and "scale" in inspect.signature(BUILT_IN[settings.model][0]).parameters:
                options = {"scale": scale, **options}
        elif scale is None:
            scale = scale_of(load_model(full_name(str(settings.model)), None, **options))
        return replace(settings, scale=scale, model_options=options)

    def fitting_options(self, model: str | None, options: Mapping[str, object], data: ImageData) -> dict[str, object]:
        return dict(options)

    def check_network(self, network: nn.Module, settings: NetworkSettings) -> None:
        found = scale_of(network)
        if found != settings.scale:
            raise SpecError(
                f"the network makes pictures {found} times larger, asked for is scale={settings.scale}. Name a network for that scale, for "
                f"a built-in one with model_options scale={settings.scale}, or leave out the scale."
            )


def scale_of(network: nn.Module) -> int:
    """How many times larger than its input a network's output is.

    Raises:
        SpecError: It takes no pictures ``[N, 3, H, W]``, or does not enlarge both sides by the same whole number.
    """
    tensor = next(network.parameters(), torch.zeros(()))
    picture = torch.full((1, 3, PROBE, PROBE + 2), 128.0, device=tensor.device)
    try:
        with evaluating(network):
            found = SuperResolution().output_in(network(picture))
    except LowbitError as error:
        raise SpecError(f"super-resolution needs a network of pictures: {error}") from error
    except Exception as error:  # whatever the network raises
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise SpecError(f"super-resolution needs a network that takes colour pictures of any size; this one does not ({reason})") from error
    scale = found.shape[-1] // picture.shape[-1] if found.dim() == 4 else 0
    if scale < 1 or tuple(found.shape) != (1, 3, scale * PROBE, scale * (PROBE + 2)):
        raise SpecError(
            f"super-resolution needs a network that makes colour pictures larger; this one makes {list(found.shape)} of {list(picture.shape)}"
        )
    return scale


DOMAINS: dict[TaskName, Domain] = {"classification": Pictures(), "super-resolution": Upscaling()}


def domain_of(settings: NetworkSettings) -> Domain:
    """That of the task that ``settings`` name; classification where they name none."""
    return DOMAINS[settings.task or "classification"]


def name_of_task(kind: str | None) -> TaskName | None:
    """The name of a kind of task that a file gives; ``None`` where the public verbs do not know it."""
    return next((name for name, domain in DOMAINS.items() if domain.task.__qualname__ == kind), None)
