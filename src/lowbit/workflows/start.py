"""The start of training: network, data and teacher of a request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from lowbit.data import ImageData, Split
from lowbit.data.folders import SPLIT_FOLDERS
from lowbit.errors import DataError, SpecError
from lowbit.inputs import Calibration
from lowbit.models import BUILT_IN
from lowbit.models.loading import TRAINED_WORDS
from lowbit.provenance import Provenance
from lowbit.qat.engine.batches import evaluation_batches
from lowbit.workflows.domain import Domain, domain_of
from lowbit.workflows.fit import fit_notes
from lowbit.workflows.origin import Origin
from lowbit.workflows.requests import TrainRequest
from lowbit.workflows.source import Source, classes_of, default_notes, make_network, name_notes, preprocessing_of, stacked
from lowbit.workfolder import weights_digest

SAMPLES = 256  # that the report looks at where there are no labels
BATCH = 32  # of these at a time: exported files are timed with so many
SELF = "self"  # a teacher: the float network that training starts from


@dataclass(frozen=True)
class Start:
    """The starting point of training.

    Attributes:
        source: The float network and what the report looks at.
        train, test: Data.
        teacher: A network for soft targets.
        is_trained: Whether the float network has weights that somebody trained.
        notes: What the user should know.
    """

    source: Source
    train: ImageData
    test: ImageData | None
    teacher: nn.Module | None
    is_trained: bool
    notes: tuple[str, ...]


def open_start(asked: TrainRequest) -> Start:
    """Open the network, the data and the teacher of a request.

    Raises:
        LowbitError: Something cannot be found or read, or does not fit.
    """
    domain = domain_of(asked)
    asked = domain.filled(asked)
    is_embedded = asked.model is None and asked.weights is None and not asked.model_options
    named = asked.data or (domain.data if is_embedded or asked.model == domain.network else None)
    if named is None:
        raise DataError(f"there is no data to train {asked.model} on: name some with data= (see 'lowbit data list').")
    notes: list[str] = []
    train, test = _load(named, "train", asked), _load_test(asked, named, notes)
    if not train.has_targets:
        raise DataError(
            f"{named}: there are no labels to train with. Name a folder with one sub-folder for each class, or see 'lowbit data list'."
        )
    notes += [
        f"{len(data.skipped)} pictures of {data.name} cannot be decoded and are left out" for data in (train, test) if data and data.skipped
    ]

    options = domain.fitting_options(asked.model, asked.model_options, train)
    name, network = make_network(asked.model, asked.weights, options, "cpu", asked.recipe.seed, domain=domain)
    domain.check_network(network, asked)
    is_trained = has_trained_weights(asked.model, asked.weights, asked.model_options, domain)
    if not is_trained:
        notes.append(f"no weights: training of {name} starts from random weights. Low-bit networks become better from trained float ones.")
        if "pretrained" in asked.method_info.needs:
            notes.append(f"{asked.method_info.name} is made for trained weights: give some with weights=")
    teacher = _teacher(asked, network, options, train)
    if teacher is None and "teacher" in asked.method_info.needs:
        notes.append(f"{asked.method} needs a teacher: it is the float network that training starts from. Name another one with teacher=.")
        teacher = network
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:SAMPLES].tolist()
    calibration = Calibration.of(stacked(train.dataset, order, BATCH, torch.device("cpu")))
    labelled = None if test is None else evaluation_batches(test, asked.recipe.batch_size)
    facts = Provenance(
        model=name,
        model_options=options,
        weights=asked.weights,
        weights_sha256=weights_digest(network) if is_trained else None,
        data=named,
        preprocessing=train.preprocessing,
        classes=classes_of(train, asked.classes),
        task=domain.task.__qualname__,
    )
    if test is not None:
        Origin(train.name, facts).require_classes(classes_of(test, asked.classes), test.name)
    notes += [*name_notes(asked, name), *default_notes(train, asked), *fit_notes(network, name, calibration.sample, facts)]
    place, test_name = torch.device("cpu"), "" if test is None else test.name
    task = domain.make_task(asked)
    source = Source(name, network, place, calibration.sample, calibration, named, labelled, test_name, facts, task)
    return Start(source, train, test, teacher, is_trained, tuple(notes))


def _load(data: str, split: Split, asked: TrainRequest) -> ImageData:
    domain: Domain = domain_of(asked)
    return domain.load(data, split, asked, preprocessing_of(asked.preprocess), strict=asked.strict)


def _load_test(asked: TrainRequest, named: str, notes: list[str]) -> ImageData | None:
    if asked.test_data is not None:
        found = _load(asked.test_data, "test", asked)
        if not found.has_targets:
            raise DataError(f"test_data={asked.test_data!r}: there are no labels to measure with")
        return found
    path = Path(named)
    if path.is_dir() and any((path / part).is_dir() for part in SPLIT_FOLDERS["train"]):
        if not any((path / part).is_dir() for part in SPLIT_FOLDERS["test"]):
            notes.append(f"{named} has no test part: metrics are not measured. Name labelled data with test_data=.")
            return None
    elif path.exists():
        notes.append(f"{named} has no test part: metrics are measured on the training samples. Name other data with test_data=.")
    return _load(named, "test", asked)


def has_trained_weights(model: str | None, weights: str | None, options: Mapping[str, object], domain: Domain) -> bool:
    """Whether a network has weights that somebody trained; a user's own factory is believed to return them."""
    is_embedded = domain.is_embedded(model, weights, options)
    return weights is not None or is_embedded or any(options.get(word) for word in TRAINED_WORDS) or not _is_known_untrained(model)


def _is_known_untrained(model: str | None) -> bool:
    """Whether the factory is known to return random weights."""
    return model is not None and (model in BUILT_IN or model.partition(":")[0] in ("timm", "torchvision"))


def _teacher(asked: TrainRequest, network: nn.Module, options: Mapping[str, object], data: ImageData) -> nn.Module | None:
    weights = asked.teacher_weights
    if asked.teacher is None:
        if weights is not None or asked.teacher_options:
            raise SpecError("teacher_weights and teacher_options belong to a teacher: name its network with teacher=.")
        return None
    if asked.teacher == SELF:
        return network
    domain = domain_of(asked)
    if Path(asked.teacher).suffix in (".safetensors", ".pt", ".pth"):
        return make_network(asked.model or domain.network, Path(asked.teacher), options, "cpu", domain=domain)[1]
    fitting = domain.fitting_options(asked.teacher, asked.teacher_options, data)
    is_trained = weights is not None or asked.teacher == domain.network or any(fitting.get(word) for word in TRAINED_WORDS)
    if not is_trained and _is_known_untrained(asked.teacher):
        raise SpecError(f"teacher={asked.teacher!r} has random weights: give trained ones with teacher_weights=.")
    return make_network(asked.teacher, weights, fitting, "cpu", domain=domain)[1]
