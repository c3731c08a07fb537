"""What methods are compared on: a network with its data and task, opened from settings or given as objects."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from lowbit.data import ImageData
from lowbit.data.folders import PictureFiles
from lowbit.data.image_data import TensorImages
from lowbit.data.upscaling import FixedPatches, PicturePairs
from lowbit.errors import CalibrationError, DataError, LowbitError, SpecError
from lowbit.inputs import Calibration, Inputs, tensors_of
from lowbit.models.loading import find_factory
from lowbit.network.batch import calibration_for
from lowbit.qat.engine.batches import collated, evaluation_batches, seeded
from lowbit.qat.task import Task
from lowbit.qat.tasks import as_task
from lowbit.workflows.domain import domain_of
from lowbit.workflows.source import make_network, preprocessing_of, stacked
from lowbit.workflows.start import has_trained_weights
from lowbit.workflows.suite import SubjectSettings
from lowbit.workfolder import tensors_digest, weights_digest


@dataclass(frozen=True)
class Subject:
    """A network with its data and task, for ``lowbit.compare``.

    Attributes:
        name: What tables call it.
        model: The float network; pickled where cells run in other processes, so its class must be importable there.
        train_data: Of the kinds that ``lowbit.train`` takes; needed by training methods.
        test_data: Labelled data that metrics are measured on.
        calibration: Samples without labels, needed by post-training methods: ``ImageData`` or a tensor, of which each seed draws its own, or
            batches, which are used as they come. Default: the training data.
        task: What the network is for. Default: classification.
        follows_seed: Whether the weights are random ones of the seed.

    Example:
        >>> import lowbit, tempfile, torch
        >>> inputs = torch.randn(64, 4)
        >>> data = inputs, (inputs[:, 0] > 0).long()
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> subject = lowbit.Subject("halves", model, train_data=data, test_data=data)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     suite = lowbit.Suite(methods=("round_to_nearest",), bits=("4/8",), seeds=1, workers=0, out=folder)
        ...     comparison = lowbit.compare(suite, subjects=[subject])
        >>> comparison.tables.tables[0].title
        'halves, 4/8, post-training, aligned'
    """

    name: str
    model: nn.Module
    train_data: object = None
    test_data: object = None
    calibration: object = None
    task: Task | None = None
    follows_seed: bool = False

    def facts(self) -> dict[str, object]:
        """What results depend on: digests of weights and data, sizes of the splits, the task."""
        data = [data for data in (self.train_data, self.test_data, self.calibration) if data is not None]
        return {
            "weights": weights_digest(self.model),
            "weights_follow_seed": self.follows_seed,
            "data": hashlib.sha256("".join(map(data_digest, data)).encode()).hexdigest(),
            "split": ", ".join(
                f"{name} {sample_total(data)}" for name, data in (("train", self.train_data), ("test", self.test_data)) if data is not None
            ),
            "task": as_task(self.task).facts(),
        }

    def draw_calibration(self, count: int, batch_size: int, seed: int) -> Calibration:
        """``count`` samples that depend on the data and the seed, and on nothing else.

        Raises:
            CalibrationError: There are no samples to draw from.
        """
        data = self.train_data if self.calibration is None else self.calibration
        if isinstance(data, ImageData):
            order = torch.randperm(len(data), generator=seeded(seed, count))[:count].tolist()
            return Calibration.of(stacked(data.fixed, order, batch_size, torch.device("cpu")))
        if isinstance(data, tuple) and data and isinstance(data[0], Tensor):
            data = data[0]
        if isinstance(data, Tensor):
            rows = data[torch.randperm(len(data), generator=seeded(seed, count))[:count]]
            return calibration_for(self.model, list(rows.split(batch_size)))
        if data is None:
            raise CalibrationError(f"{self.name}: there are no samples to calibrate on. Give it calibration or training data.")
        return calibration_for(self.model, data, limit=count)

    def one_input(self) -> Inputs:
        """The inputs of one test sample, whose shapes are those of samples that are made.

        Raises:
            DataError: There are no test data.
        """
        batch = None if self.test_data is None else next(iter(evaluation_batches(self.test_data, 1)), None)
        if batch is None:
            raise DataError(f"{self.name}: there is no data to measure on, whose shape made samples could have. Give it test data.")
        return Inputs.of(batch, self.model).take(0, 1)

    def draw_labelled(self, count: int, batch_size: int, seed: int) -> list[tuple[Tensor, Tensor]] | None:
        """The samples of ``draw_calibration`` with their labels; ``None`` where they have none."""
        data = self.train_data if self.calibration is None else self.calibration
        if isinstance(data, ImageData) and data.has_targets:
            order = torch.randperm(len(data), generator=seeded(seed, count))[:count].tolist()
            images = stacked(data.fixed, order, batch_size, torch.device("cpu"))
            labels: Tensor = collated([data.fixed[index][1] for index in order])
            return list(zip(images, labels.split(batch_size), strict=True))
        if isinstance(data, tuple) and len(data) == 2 and all(isinstance(part, Tensor) for part in data):
            rows = torch.randperm(len(data[0]), generator=seeded(seed, count))[:count]
            return [(data[0][part], data[1][part]) for part in rows.split(batch_size)]
        return None


def open_subject(settings: SubjectSettings, seed: int) -> Subject:
    """The network and the data that ``settings`` name; random weights are drawn from ``seed``.

    Args:
        settings: Names.
        seed: For networks without trained weights.

    Raises:
        LowbitError: Something cannot be found or read, or does not fit.
    """
    if settings.subject is not None:
        return _made(settings)
    domain = domain_of(settings)
    settings = domain.filled(settings)
    data = _data(settings)
    if data is None and settings.test_data is None:
        raise DataError(f"networks, {settings.title}: there is no data to measure on: name some with data= (see 'lowbit data list').")
    preprocessing = preprocessing_of(settings.preprocess)
    test = domain.load(settings.test_data or str(data), "test", settings, preprocessing)
    if not test.has_targets:
        raise DataError(f"networks, {settings.title}: {test.name} has no labels to measure with. Name labelled data.")
    try:
        train = training_data(settings)
    except DataError:  # only methods that train need them, and say then what is wrong
        train = None
    calibration = settings.calibration or (data if train is None else None)  # else training samples, whatever methods are compared
    samples = None if calibration is None else domain.load(calibration, "calibration", settings, preprocessing)
    options = domain.fitting_options(settings.model, settings.model_options, test)
    is_trained = has_trained_weights(settings.model, settings.weights, settings.model_options, domain)
    _, model = make_network(settings.model, settings.weights, options, "cpu", seed, domain=domain)
    domain.check_network(model, settings)
    return Subject(settings.title, model.eval(), train, test, samples, domain.make_task(settings), follows_seed=not is_trained)


def _made(settings: SubjectSettings) -> Subject:
    """What the function that ``settings.subject`` names returns, under the settings' name."""
    assert settings.subject is not None
    place = f"networks, subject {settings.subject}"
    others = [f.name for f in fields(settings) if f.name not in ("name", "subject") and getattr(settings, f.name) != f.default]
    others = [name for name in others if getattr(settings, name) not in ({}, ())]
    if others:
        raise SpecError(f"{place}: the function gives the network, its data and task, so leave out {', '.join(others)}")
    source, colon, name = settings.subject.rpartition(":")
    if not colon:
        raise SpecError(f"{place}: name a file and the function in it, as file.py:function")
    try:
        made = find_factory(source, name)()
    except LowbitError:
        raise
    except Exception as error:  # whatever the user's code raises
        raise SpecError(f"{place}: calling it failed with {type(error).__name__}: {error}") from error
    if not isinstance(made, Subject):
        raise SpecError(f"{place}: it returned {type(made).__name__}, expected a lowbit.Subject")
    return replace(made, name=settings.title)


def training_data(settings: SubjectSettings) -> ImageData | None:
    """The training samples that ``settings`` name; ``None`` where they name no data.

    Raises:
        DataError: The data have no training samples, or they cannot be read.
    """
    data = _data(settings)
    if data is None:
        return None
    domain = domain_of(settings)
    train = domain.load(data, "train", domain.filled(settings), preprocessing_of(settings.preprocess))
    return train if settings.train_samples is None else _first(train, settings.train_samples)


def _data(settings: SubjectSettings) -> str | None:
    domain = domain_of(settings)
    return settings.data or (domain.data if settings.model in (None, domain.network) else None)


def _first(data: ImageData, count: int) -> ImageData:
    """The first ``count`` samples."""
    held = data.dataset
    if isinstance(held, TensorImages):
        labels = None if held.labels is None else held.labels[:count]
        return replace(data, dataset=TensorImages(held.images[:count], labels, data.mean, data.std, white=held.white))
    return replace(data, dataset=Subset(held, range(min(count, len(data)))))


def data_digest(data: object) -> str:
    """SHA-256 of what ``data`` hold: of tensors their values, of folders the names and sizes of files, of other data all batches."""
    if isinstance(data, ImageData):
        return hashlib.sha256(f"{data.mean} {data.std} {data.input_shape} {data_digest(data.dataset)}".encode()).hexdigest()
    if isinstance(data, Subset):
        return hashlib.sha256(f"{data_digest(data.dataset)} {list(data.indices)}".encode()).hexdigest()
    if isinstance(data, TensorImages):
        return tensors_digest([data.images, *([] if data.labels is None else [data.labels])])
    if isinstance(data, PicturePairs):
        return data.digest()
    if isinstance(data, FixedPatches):
        return hashlib.sha256(f"{data.patch} {data.pairs.digest()}".encode()).hexdigest()
    if isinstance(data, PictureFiles):
        files = [(Path(path).name, Path(path).stat().st_size) for path in data.paths]
        return hashlib.sha256(f"{files} {data.labels}".encode()).hexdigest()
    found = list(tensors_of(data))
    if isinstance(data, (Tensor, tuple, dict)) and found:
        return tensors_digest(found)
    return tensors_digest(tensor for batch in evaluation_batches(data, 256) for tensor in tensors_of(batch))


def sample_total(data: object) -> int:
    """Number of samples of ``data``; 0 where they do not know."""
    if isinstance(data, (tuple, dict)):
        found = list(tensors_of(data))
        return len(found[0]) if found else 0
    return len(data) if hasattr(data, "__len__") else 0
