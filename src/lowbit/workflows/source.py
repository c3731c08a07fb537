"""The network and the data that a request names."""

from __future__ import annotations

import math
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from lowbit.data import ImageData, Preprocessing, loader
from lowbit.data.image_data import Sample
from lowbit.data.loading import is_suite
from lowbit.errors import CalibrationError, SpecError, unknown_name
from lowbit.inputs import Calibration, Inputs, check_memory
from lowbit.models import full_name, load_model
from lowbit.options import convert_option
from lowbit.progress import Progress
from lowbit.provenance import Provenance, printable
from lowbit.qat.engine.batches import collated
from lowbit.qat.task import Task
from lowbit.reading import check_readable, shorten
from lowbit.synthesis.samples import SynthesizedData
from lowbit.workflows.domain import Domain, domain_of
from lowbit.workflows.fit import fit_notes
from lowbit.workflows.samples import Making, batches_of, described_file, is_made, made_names, samples_file
from lowbit.workflows.settings import NetworkSettings, SampleSettings
from lowbit.workflows.trust import remember_network
from lowbit.workfolder import weights_digest

LARGEST_NAMES = 2**24  # bytes
SAMPLES = 256  # to calibrate on, where nobody says how many
NO_DATA = (
    "name some with calibration= (a folder of images, or see 'lowbit data list'), let samples be made from the network with calibration=dsg, "
    "or for a method that needs none give the shape of one sample: input_shape='3x224x224'"
)


@dataclass(frozen=True)
class Source:
    """A network in evaluation mode, and what data there is for it.

    Attributes:
        name: What the user calls the network.
        sample: Inputs of one call: the first calibration samples, or noise of the input shape where there is no data.
        calibration_name, test_name: Where the samples come from.
        provenance: Where the network comes from, for its files.
        task: What the network is for.
        notes: What the user should know of it.
        making: How calibration samples are made, where there are to be some and ``with_samples`` has not made them yet.
        batch_size: Samples in a batch of these.
    """

    name: str
    model: nn.Module
    device: torch.device
    sample: Inputs
    calibration: Calibration | None
    calibration_name: str
    test: Iterable[object] | None
    test_name: str
    provenance: Provenance
    task: Task
    notes: tuple[str, ...] = ()
    making: Making | None = None
    batch_size: int = SampleSettings.batch_size

    def with_samples(self, progress: Progress, cache: Path | None = None) -> Source:
        """This source with the calibration samples that are to be made; itself where there are none.

        Args:
            progress: Progress display.
            cache: Folder where they are kept until the run is done, so that one that is stopped goes on to the same bits.

        Raises:
            LayerError, CalibrationError, DivergedError: As ``lowbit.synthesize``.
        """
        if self.making is None:
            return self
        made = self.making.make(self.model, self.sample, progress=progress, cache=cache)
        batches = batches_of(made, self.batch_size, self.device)
        facts = self.making.described(self.provenance, made)
        return replace(self, sample=batches.sample, calibration=batches, provenance=facts, making=None)

    @property
    def data_names(self) -> dict[str, str]:
        """Where samples come from, by what they are for."""
        found = {"test": self.test_name} if self.test_name else {}
        samples = "" if self.calibration is None else f", {self.calibration.samples} samples"
        return {"calibration": f"{self.calibration_name}{samples}", **found}


def is_network_named(settings: NetworkSettings) -> bool:
    """Whether the user names a network, or anything that belongs to one."""
    return not (settings.model is None and settings.weights is None and not settings.model_options)


def open_network(settings: NetworkSettings, device: str, seed: int = 0) -> tuple[str, nn.Module]:
    """The requested network and its name; the embedded one if none is named."""
    return make_network(settings.model, settings.weights, settings.model_options, device, seed, domain=domain_of(settings))


def make_network(
    model: str | None, weights: Path | str | None, options: Mapping[str, object], device: str, seed: int = 0, *, domain: Domain
) -> tuple[str, nn.Module]:
    """The network with that name, weights and factory arguments, and its full name; ``seed`` determines random weights."""
    if domain.is_embedded(model, weights, options):
        model, weights = domain.network, domain.weights()
    if model is None:
        raise SpecError("weights and model_options belong to a network: name it with model (see 'lowbit models list').")
    model = full_name(model)
    remember_network(model, options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = load_model(model, weights, **options)
    return model, network.to(open_device(device))


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
    opened: tuple[str, nn.Module] | None = None,
    batch_dim: int = 0,
) -> Source:
    """The network and its data.

    Calibration samples come from the training samples of ``samples.calibration``, or of ``settings.data`` where that is not named, in a fixed
    random order. ``missing`` is the advice for users when there is neither data nor ``samples.input_shape``. ``opened`` is a network with its
    name in place of the one that ``settings`` name. Samples are stacked along ``batch_dim``.

    Raises:
        LowbitError: Something cannot be found or read; the message says what to name instead.
    """
    samples, domain = samples or SampleSettings(), domain_of(settings)
    settings = domain.filled(settings, None if opened is None else opened[1])
    name, network = open_network(settings, device, seed) if opened is None else opened
    domain.check_network(network, settings)
    task = domain.make_task(settings)
    data = domain.data if settings.data is None and domain.network in (name, settings.model) else settings.data
    place, asked = open_device(device), preprocessing_of(settings.preprocess)
    looked_at = samples.calibration or data
    making = _making(samples, seed)
    labelled = None if data is None else domain.load(data, "test", settings, asked)
    facts = Provenance(
        model=name if opened is None else settings.model,
        model_options=settings.model_options,
        weights=settings.weights,
        weights_sha256=None if opened is not None else weights_digest(network),
        data=data,
        calibration=samples.calibration,
        classes=classes_of(labelled, settings.classes),
        task=type(task).__qualname__,
    )
    named = name_notes(settings, name) if opened is None else ()
    test = None if labelled is None or not labelled.has_targets else loader(labelled, samples.batch_size)
    test_name = "" if test is None else str(data)
    file = samples_file(looked_at)
    if looked_at is None or making is not None or file is not None:
        facts = replace(facts, preprocessing=asked if labelled is None else labelled.preprocessing)
        if file is not None:
            held = SynthesizedData.load(file)
            few = held.inputs.take(0, samples.calibration_samples or len(held))
            batches, facts = batches_of(few, samples.batch_size, place), described_file(facts, str(looked_at), held)
            _check_shape(samples.input_shape, batches.sample, str(looked_at))
            notes = (*named, *fit_notes(network, name, batches.sample, facts))
            return Source(name, network, place, batches.sample, batches, str(looked_at), test, test_name, facts, task, notes)
        shape = input_shape(samples.input_shape, labelled, asked)
        if shape is None:
            raise CalibrationError(f"there is no data for the network {name}: {missing if making is None else NO_SHAPE}")
        sample = Inputs((noise(shape, seed, batch_dim).to(place),), batch_dim=batch_dim)
        notes = (*named, *made_notes(making), *fit_notes(network, name, sample, replace(facts, calibration=None, data=None)))
        place_name = "no data" if making is None else str(making)
        return Source(name, network, place, sample, None, place_name, test, test_name, facts, task, notes, making, samples.batch_size)
    used = asked or (None if labelled is None or is_suite(looked_at) else labelled.preprocessing)
    found = domain.load(looked_at, "calibration", settings, used)
    facts = replace(facts, preprocessing=found.preprocessing)
    chosen = range(min(samples.calibration_samples or SAMPLES, len(found)))
    batches = Calibration.of(stacked(found.dataset, chosen, samples.batch_size, place, batch_dim), batch_dim=batch_dim)
    _check_shape(samples.input_shape, batches.sample, str(looked_at))
    notes = (*named, *default_notes(found, settings), *fit_notes(network, name, batches.sample, facts))
    return Source(name, network, place, batches.sample, batches, looked_at, test, test_name, facts, task, notes)


NO_SHAPE = "samples are to be made, and nothing says in which shape: give that of one sample, input_shape='3x224x224', or how pictures become inputs"


def _making(samples: SampleSettings, seed: int) -> Making | None:
    """How calibration samples are made; ``None`` where they are not."""
    if not is_made(samples.calibration):
        if samples.calibration_options:
            raise SpecError(
                f"calibration_options belong to a method that makes samples ({', '.join(made_names())}), and calibration is "
                f"{samples.calibration!r}. Leave them out, or name one."
            )
        return None
    return Making(samples.calibration, samples.calibration_options, samples.calibration_samples, seed)


def made_notes(making: Making | None) -> tuple[str, ...]:
    """A note where a folder has the name of what makes samples."""
    if making is None or not Path(making.name).exists():
        return ()
    return (f"{making.name} makes samples; the file or folder of that name is ./{making.name}",)


def input_shape(given: str | None, data: ImageData | None, preprocessing: Preprocessing | None) -> str | None:
    """The shape of one input: what the user says, else that of the data or of the preprocessing; ``None`` where nothing says it.

    >>> input_shape(None, None, Preprocessing(size=32))
    '3x32x32'
    """
    if given is not None:
        return given
    sizes = None if data is None else data.input_shape
    if sizes is None and preprocessing is not None:
        sizes = (1 if preprocessing.grey else 3, preprocessing.size, preprocessing.size)
    return None if sizes is None else "x".join(map(str, sizes))


def name_notes(settings: NetworkSettings, name: str) -> tuple[str, ...]:
    """A note on the network that was chosen if the user named only a file."""
    return (
        (f"the network is {name}, the only one that {settings.model} makes without arguments",)
        if settings.model not in (None, name)
        else ()
    )


def default_notes(data: ImageData, settings: NetworkSettings) -> tuple[str, ...]:
    """A note if pictures of a folder are preprocessed with defaults."""
    if settings.preprocess or is_suite(data.name) or data.preprocessing is None or data.preprocessing != Preprocessing():
        return ()
    return (
        f"no preprocessing was given: pictures of {data.name} become {data.preprocessing}, as for most ImageNet networks. "
        "If the network takes others, say so with preprocess=.",
    )


def classes_of(data: ImageData | None, asked: str | None) -> tuple[str, ...]:
    """Names of the classes: those that the user gave, else those of the data; none where neither knows them.

    Raises:
        SpecError: The user gave more or fewer than the data has.
    """
    names = class_names(asked)
    if data is None or data.num_classes is None:
        return names
    if names and (len(names) < data.num_classes or (data.class_names and len(names) != data.num_classes)):
        raise SpecError(f"classes= gives {len(names)} names ({shorten(', '.join(names))}), {data.name} has {data.num_classes} classes")
    return names or printable(data.class_names)


def class_names(asked: str | None) -> tuple[str, ...]:
    """The names in a text file, one a line, or joined by commas.

    >>> class_names("cat, dog")
    ('cat', 'dog')
    """
    if asked is None:
        return ()
    if not Path(asked).is_file():
        found = asked.split(",")
    else:
        try:
            found = check_readable(asked, max_bytes=LARGEST_NAMES).read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise SpecError(f"classes={asked!r}: cannot be read as text in UTF-8 ({error})") from error
    names = [name.strip() for name in found]
    if not all(names) or not names:
        raise SpecError(f"classes={asked!r}: a name is empty. Give a text file with a name a line, or names joined by commas.")
    return printable(names)


def noise(shape: str, seed: int, batch_dim: int = 0) -> Tensor:
    """Two samples of standard normal noise of the input shape that the user gave, for methods that look at no data."""
    sizes = parsed_shape(shape)
    check_memory(2 * 4 * math.prod(sizes), f"input_shape={shape!r}: two samples take")
    return _stack(list(torch.randn(2, *sizes, generator=torch.Generator().manual_seed(seed))), batch_dim)


def parsed_shape(shape: str) -> tuple[int, ...]:
    """The sizes that the user gave as an input's shape.

    >>> parsed_shape("3x224x224")
    (3, 224, 224)
    """
    sizes = shape.lower().split("x")
    if not all(size.isdecimal() and size.isascii() and int(size) for size in sizes):
        raise SpecError(f"input_shape={shape!r}: expected whole numbers joined by x, for example 3x224x224")
    return tuple(map(int, sizes))


def _check_shape(given: str | None, sample: Inputs, place: str) -> None:
    """SpecError where the user gave another shape than that of the data."""
    if given is None:
        return
    first = sample.tensors[0]
    held = tuple(size for dim, size in enumerate(first.shape) if dim != sample.batch_dim)
    if parsed_shape(given) != held:
        raise SpecError(
            f"input_shape={given!r} contradicts {place}, whose samples are {'x'.join(map(str, held))}. Leave it out: the data say their shape."
        )


def _stack(samples: Sequence[Tensor], batch_dim: int) -> Tensor:
    """A batch; SpecError where the samples have too few dimensions for that one."""
    if batch_dim > samples[0].dim():
        raise SpecError(
            f"batch_dim={batch_dim}: samples of shape {list(samples[0].shape)} make a batch of {samples[0].dim() + 1} dimensions. Count from 0."
        )
    return torch.stack(list(samples), batch_dim)


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


def stacked(dataset: Dataset[Sample], chosen: Iterable[int], batch_size: int, device: torch.device, batch_dim: int = 0) -> list[Tensor]:
    """The ``chosen`` samples without labels, in batches on ``device``."""
    items = (dataset[index] for index in chosen)
    images = [item[0] if isinstance(item, tuple) else item for item in items]
    return [_stack(images[start : start + batch_size], batch_dim).to(device) for start in range(0, len(images), batch_size)]


def labelled_batches(settings: NetworkSettings, samples: SampleSettings, source: Source) -> list[tuple[Tensor, Tensor]]:
    """The calibration samples of ``source`` with their targets; none where the data hold none, or samples were made."""
    if source.calibration is None or source.calibration_name == "" or source.provenance.synthesis:
        return []
    domain = domain_of(settings)
    settings = domain.filled(settings, source.model)
    found = domain.load(source.calibration_name, "calibration", settings, source.provenance.preprocessing)
    if not found.has_targets:
        return []
    chosen = range(min(samples.calibration_samples or SAMPLES, len(found)))
    labels = collated([found.dataset[index][1] for index in chosen]).to(source.device)
    images = (inputs.args[0] for inputs in source.calibration)
    return list(zip(images, labels.split(samples.batch_size), strict=True))
