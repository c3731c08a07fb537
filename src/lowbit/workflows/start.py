"""The start of training: network, data and teacher of a request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from lowbit.data import ImageData, Split
from lowbit.data.folders import SPLIT_FOLDERS
from lowbit.errors import DataError, SpecError
from lowbit.inputs import Calibration, Inputs
from lowbit.models import BUILT_IN
from lowbit.models.loading import TRAINED_WORDS
from lowbit.progress import Progress
from lowbit.provenance import Provenance
from lowbit.qat.engine.batches import evaluation_batches
from lowbit.qat.method import generates_samples, without_data
from lowbit.synthesis.samples import SynthesizedData
from lowbit.workflows.domain import Domain, domain_of
from lowbit.workflows.fit import fit_notes
from lowbit.workflows.origin import Origin
from lowbit.workflows.requests import TrainRequest
from lowbit.workflows.samples import Making, batches_of, described_file, is_made, samples_file
from lowbit.workflows.source import (
    Source,
    classes_of,
    default_notes,
    input_shape,
    make_network,
    name_notes,
    noise,
    preprocessing_of,
    stacked,
)
from lowbit.workfolder import weights_digest

SAMPLES = 256  # that the report looks at where there are no labels
BATCH = 32  # of these at a time: exported files are timed with so many
SELF = "self"  # a teacher: the float network that training starts from


@dataclass(frozen=True)
class Start:
    """The starting point of training.

    Attributes:
        source: The float network and what the report looks at.
        train, test: Data; no training data for a method that makes its own samples.
        teacher: A network for soft targets.
        is_trained: Whether the float network has weights that somebody trained.
        notes: What the user should know.
        initial: Noise that quantizers are initialized from, where the method makes its own samples.
        made: Samples without labels to train on, where they are no data.
    """

    source: Source
    train: ImageData | None
    test: ImageData | None
    teacher: nn.Module | None
    is_trained: bool
    notes: tuple[str, ...]
    initial: Inputs | None = None
    made: Inputs | None = None

    @property
    def train_name(self) -> str:
        """What the network is trained on, in words."""
        if self.made is not None:
            return f"{self.source.calibration_name}, {self.made.batch_size} samples"
        return "samples that the method makes" if self.train is None else f"{self.train.name}, {len(self.train)} samples"

    def with_samples(self, progress: Progress, cache: Path) -> Start:
        """This start with the samples that are to be made; itself where there are none, see ``Source.with_samples``."""
        making, source = self.source.making, self.source
        if making is None:
            return self
        made = making.make(source.model, source.sample, progress=progress, cache=cache)
        return replace(self, made=made, source=_looking_at(source, made, making.described(source.provenance, made)))


def open_start(asked: TrainRequest) -> Start:
    """Open the network, the data and the teacher of a request.

    Raises:
        LowbitError: Something cannot be found or read, or does not fit.
    """
    domain = domain_of(asked)
    asked = domain.filled(asked)
    generates, file = generates_samples(asked.method_info), samples_file(asked.data)
    is_unlabelled = is_made(asked.data) or file is not None
    _check_samples(asked, generates, is_unlabelled)
    is_embedded = asked.model is None and asked.weights is None and not asked.model_options
    named = None if is_unlabelled else asked.data or (domain.data if is_embedded or asked.model == domain.network else None)
    if named is None and not generates and not is_unlabelled:
        raise DataError(f"there is no data to train {asked.model} on: name some with data= (see 'lowbit data list'), or {without_data()}.")
    notes: list[str] = []
    train = None if generates or named is None else _load_train(asked, named)
    test = _load_test(asked, named, notes)
    data = test if train is None else train
    skipped = [part for part in (train, test) if part is not None and part.skipped]
    notes += [f"{len(part.skipped)} pictures of {part.name} cannot be decoded and are left out" for part in skipped]

    options = dict(asked.model_options) if data is None else domain.fitting_options(asked.model, asked.model_options, data)
    name, network = make_network(asked.model, asked.weights, options, "cpu", asked.recipe.seed, domain=domain)
    domain.check_network(network, asked)
    is_trained = has_trained_weights(asked.model, asked.weights, asked.model_options, domain)
    if not is_trained:
        notes.append(f"no weights: training of {name} starts from random weights. Low-bit networks become better from trained float ones.")
        if "pretrained" in asked.method_info.needs:
            notes.append(f"{asked.method_info.name} is made for trained weights: give some with weights=")
    teacher = _teacher(asked, network, options, data)
    if teacher is None and "teacher" in asked.method_info.needs:
        notes.append(f"{asked.method} needs a teacher: it is the float network that training starts from. Name another one with teacher=.")
        teacher = network
    facts = Provenance(
        model=name,
        model_options=options,
        weights=asked.weights,
        weights_sha256=weights_digest(network) if is_trained else None,
        data=asked.test_data if is_unlabelled else named,
        preprocessing=preprocessing_of(asked.preprocess) if data is None else data.preprocessing,
        classes=classes_of(data, asked.classes),
        task=domain.task.__qualname__,
    )
    if train is not None and test is not None:
        Origin(train.name, facts).require_classes(classes_of(test, asked.classes), test.name)
    is_shaped = generates or (is_unlabelled and file is None)
    initial = Inputs((noise(_input_shape(asked, data), asked.recipe.seed),)) if is_shaped else None
    if not is_unlabelled:
        source, made = _source(asked, name, network, data, test, facts, initial), None
    else:
        source, made = _source_without_data(asked, name, network, test, facts, initial)
    defaults = () if data is None else default_notes(data, asked)
    notes += [*name_notes(asked, name), *defaults, *fit_notes(network, name, initial or source.sample, facts)]
    return Start(source, train, test, teacher, is_trained, tuple(notes), initial if generates else None, made)


def _check_samples(asked: TrainRequest, generates: bool, is_unlabelled: bool) -> None:
    """DataError or SpecError where samples without labels, or their settings, do not fit the rest of the request."""
    if is_unlabelled and generates:
        raise SpecError(
            f"{asked.method} makes its own samples: leave data={asked.data!r} out, and name data to measure on with test_data=."
        )
    if is_unlabelled and asked.teacher is None:
        raise DataError(
            f"data={asked.data!r}: samples that are made have no labels. Name a teacher whose outputs are learned in their place: teacher='self', "
            "the float network that training starts from."
        )
    if asked.input_shape is not None and not generates and not is_made(asked.data):
        raise SpecError(f"input_shape is for samples that are made; {asked.method} takes those of its data. Leave it out.")
    if asked.data_options and not is_made(asked.data):
        raise SpecError(f"data_options belong to a method that makes samples, and data is {asked.data!r}. Leave them out, or name one.")


def _source_without_data(
    asked: TrainRequest, name: str, network: nn.Module, test: ImageData | None, facts: Provenance, initial: Inputs | None
) -> tuple[Source, Inputs | None]:
    """The network and samples without labels: those of a file, or how they are made."""
    labelled = None if test is None else evaluation_batches(test, asked.recipe.batch_size)
    place, test_name = torch.device("cpu"), "" if test is None else test.name
    task = domain_of(asked).make_task(asked)
    if initial is not None:
        making = Making(asked.data, asked.data_options, asked.synthesized_samples, asked.recipe.seed)
        return Source(name, network, place, initial, None, str(making), labelled, test_name, facts, task, making=making), None
    file = samples_file(asked.data)
    assert file is not None
    held = SynthesizedData.load(file)
    source = Source(name, network, place, held.inputs.take(0, 1), None, str(asked.data), labelled, test_name, facts, task)
    return _looking_at(source, held.inputs, described_file(facts, str(asked.data), held)), held.inputs


def _looking_at(source: Source, made: Inputs, facts: Provenance) -> Source:
    """``source`` with the first of the samples that were made for the report to look at."""
    looked_at = batches_of(made.take(0, SAMPLES), BATCH, source.device)
    return replace(source, sample=looked_at.sample, calibration=looked_at, provenance=facts, making=None)


def _source(
    asked: TrainRequest,
    name: str,
    network: nn.Module,
    data: ImageData | None,
    test: ImageData | None,
    facts: Provenance,
    initial: Inputs | None,
) -> Source:
    """The network and what the report looks at: samples of the data, or noise where there are none."""
    place, test_name = torch.device("cpu"), "" if test is None else test.name
    task = domain_of(asked).make_task(asked)
    if data is None:
        assert initial is not None
        return Source(name, network, place, initial, None, "no data", None, test_name, facts, task)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:SAMPLES].tolist()
    calibration = Calibration.of(stacked(data.fixed, order, BATCH, place))
    labelled = None if test is None else evaluation_batches(test, asked.recipe.batch_size)
    return Source(name, network, place, calibration.sample, calibration, facts.data or test_name, labelled, test_name, facts, task)


def _input_shape(asked: TrainRequest, data: ImageData | None) -> str:
    """The shape of an input as text: what the user says, else that of the data or of the preprocessing."""
    shape = input_shape(asked.input_shape, data, preprocessing_of(asked.preprocess))
    if shape is None:
        raise DataError(
            f"samples are made ({asked.data if is_made(asked.data) else asked.method}), and nothing says in which shape: give that of one input, "
            "input_shape='3x32x32', or name data to measure on with test_data=."
        )
    return shape


def _load_train(asked: TrainRequest, named: str) -> ImageData:
    found = _load(named, "train", asked)
    if not found.has_targets:
        raise DataError(
            f"{named}: there are no labels to train with. Name a folder with one sub-folder for each class, or see 'lowbit data list'."
        )
    return found


def _load(data: str, split: Split, asked: TrainRequest) -> ImageData:
    domain: Domain = domain_of(asked)
    return domain.load(data, split, asked, preprocessing_of(asked.preprocess), strict=asked.strict)


def _load_test(asked: TrainRequest, named: str | None, notes: list[str]) -> ImageData | None:
    if asked.test_data is not None:
        found = _load(asked.test_data, "test", asked)
        if not found.has_targets:
            raise DataError(f"test_data={asked.test_data!r}: there are no labels to measure with")
        return found
    if named is None:
        return None
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


def _teacher(asked: TrainRequest, network: nn.Module, options: Mapping[str, object], data: ImageData | None) -> nn.Module | None:
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
    fitting = dict(asked.teacher_options) if data is None else domain.fitting_options(asked.teacher, asked.teacher_options, data)
    is_trained = weights is not None or asked.teacher == domain.network or any(fitting.get(word) for word in TRAINED_WORDS)
    if not is_trained and _is_known_untrained(asked.teacher):
        raise SpecError(f"teacher={asked.teacher!r} has random weights: give trained ones with teacher_weights=.")
    return make_network(asked.teacher, weights, fitting, "cpu", domain=domain)[1]
