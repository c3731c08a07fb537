"""Samples in place of data: those that a synthesis method makes for a network, noise, or a file of samples that were made before."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lowbit.autograd import records_gradients
from lowbit.data import SUITES, ImageData
from lowbit.errors import CalibrationError, SpecError, unknown_name
from lowbit.inputs import Calibration, Inputs
from lowbit.options import make_method
from lowbit.plugins import is_in_file, source_digest
from lowbit.progress import Progress
from lowbit.provenance import Provenance
from lowbit.registry import find_method, list_methods
from lowbit.synthesis.problem import SynthesisMethod, SynthesisProblem, make_problem, normal
from lowbit.synthesis.samples import SynthesizedData

NOISE = "noise"
NOISE_COUNT = 64  # samples of noise where nobody says how many
FILE = "samples.safetensors"  # in the folder that 'lowbit synthesize' writes
FACTS = "synthesis.json"  # beside it
CACHE = ".samples"  # in an output folder, until it is complete


def is_made(asked: object) -> bool:
    """Whether samples are to be made where data may be named: ``noise``, or a synthesis method by its name, file, class or object.

    A data set or a folder that is called as a method is ``./dsg``.

    >>> is_made("dsg"), is_made("noise"), is_made("./dsg"), is_made("digits")
    (True, True, False, False)
    """
    if isinstance(asked, str):
        return asked == NOISE or is_in_file(asked) or asked in made_names()
    return isinstance(asked, SynthesisMethod) or (isinstance(asked, type) and issubclass(asked, SynthesisMethod))


def made_names() -> list[str]:
    """The names of what makes samples."""
    return [NOISE, *(info.name for info in list_methods(kind="synthesis"))]


def samples_file(named: object) -> Path | None:
    """The file of samples that ``named`` is, or that the folder holds; ``None`` where it is something else."""
    if not isinstance(named, (str, Path)):
        return None
    path = Path(named)
    is_folder_of_samples = any(
        (path / name).exists() for name in (FILE, FACTS)
    )  # never taken for a folder of pictures, its file there or not
    return path if path.suffix == ".safetensors" else path / FILE if is_folder_of_samples else None


@dataclass(frozen=True)
class Making:
    """How samples are made for a network.

    Attributes:
        asked: ``noise``, or a synthesis method: its name, ``file.py:Class``, a class or an object.
        options: Its hyper-parameters.
        count: How many. Default: as in the method's paper.
        seed: Seed of everything random.

    Raises:
        UnknownNameError: No such method or option.
        SpecError: An option out of range, or one for noise.
    """

    asked: object
    options: Mapping[str, object] = field(default_factory=dict)
    count: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.asked != NOISE:
            self._method()
        elif self.options:
            raise SpecError(f"{NOISE} has no hyper-parameters, got {', '.join(self.options)}. Leave them out, or name a synthesis method.")

    @property
    def name(self) -> str:
        """What makes the samples."""
        return NOISE if self.asked == NOISE else self.asked if isinstance(self.asked, str) else find_method(self.asked).name

    def __str__(self) -> str:
        return f"{self.name} (no data: samples made with seed {self.seed})"

    def described(self, facts: Provenance, samples: Inputs) -> Provenance:
        """``facts`` with what made ``samples``."""
        return dataclasses.replace(facts, calibration=self.name, synthesis=self._facts(samples))

    def _facts(self, samples: Inputs) -> dict[str, object]:
        shapes = [[size for dim, size in enumerate(t.shape) if dim != samples.batch_dim_of(t)] for t in samples.tensors]
        facts: dict[str, object] = {"method": self.name, "seed": self.seed, "samples": samples.batch_size, "shapes": shapes}
        return facts if self.asked == NOISE else {**facts, "options": dict(self._method().hyper_parameter_values())}

    @records_gradients
    def make(self, model: nn.Module, template: Inputs, *, progress: Progress, cache: Path | None = None) -> Inputs:
        """The samples, on the processor.

        Args:
            model: The trained float network; it is not changed.
            template: Inputs of one call: their shapes count, and what is no floating-point tensor.
            progress: Progress display.
            cache: Folder where they are kept by network, method, options and seed; one that was stopped goes on there to the same bits.

        Raises:
            LayerError, CalibrationError, DivergedError: As ``lowbit.synthesize``.
        """
        if self.asked == NOISE:
            plain = SynthesisProblem(model, template, {}, (), seed=self.seed).with_count(self.count or NOISE_COUNT)
            return plain.cast(plain.draw(normal)).to("cpu")
        method = self._method()
        problem = make_problem(
            model, template, count=self.count or method.default_count, seed=self.seed, progress=progress, work_dir=cache
        )  # fmt: skip
        facts = {"samples of": method.info.name, "source": source_digest(type(method)), "options": method.hyper_parameter_values()}
        with _alone(cache, progress):
            state = problem.state(facts)
            kept = state.load("samples")
            if kept is None:
                made = method.synthesize(problem).inputs.to("cpu")
                state.save("samples", {str(place): tensor for place, tensor in enumerate(made.tensors)}, {})
                return made
        values = iter([kept[0][str(place)] for place in range(len(template.tensors))])
        return problem.template.map(lambda _: next(values))

    def _method(self) -> SynthesisMethod:
        return cast(SynthesisMethod, make_method(self.asked, "synthesis", self.options))


def forget_samples(out: Path) -> None:
    """Delete the samples that a run into the folder ``out`` has kept."""
    shutil.rmtree(out / CACHE, ignore_errors=True)


@contextmanager
def _alone(cache: Path | None, progress: Progress) -> Iterator[None]:
    """Within the context no other process makes samples in ``cache``: what one has made the next finds there."""
    if cache is None:
        yield
        return
    cache.mkdir(parents=True, exist_ok=True)
    lock = FileLock(cache / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        progress.say(f"waiting for another process that makes samples in {cache}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def batches_of(samples: Inputs, batch_size: int, device: torch.device) -> Calibration:
    """Samples as calibration data, so many in a batch."""
    starts = range(0, samples.batch_size, batch_size)
    return Calibration([samples.take(start, start + batch_size).to(device) for start in starts])


def calibration_in(
    model: nn.Module, calibration: object, sample: object, *, seed: int, progress: Progress, work_dir: Path | str | None
) -> tuple[object, Provenance | None]:
    """What a verb takes as ``calibration=``: data as they are, samples of a file, or those that are made for ``model``; and what is known of those.

    Raises:
        UnknownNameError: A text that names neither.
        CalibrationError: Samples are to be made, and their shape is not known; or the network cannot take them.
    """
    if not is_made(calibration):
        if not isinstance(calibration, (str, Path)):
            return calibration, None
        file = samples_file(calibration)
        if file is None:
            raise unknown_name(
                "calibration",
                str(calibration),
                made_names(),
                f"Or a file or folder of samples that lowbit made; for data pass a loader, such as lowbit.data.loader(lowbit.data.load_data({next(iter(SUITES))!r})).",
            )
        found = SynthesizedData.load(file)
        return found, described_file(Provenance(), str(calibration), found)
    if sample is None:
        raise CalibrationError(
            f"calibration={calibration!r} makes samples, and nothing says in which shape: pass sample=, inputs of one call, such as "
            "torch.zeros(1, 3, 224, 224), or samples of lowbit.synthesize(model, shape=...)."
        )
    making = Making(calibration, seed=seed)
    made = making.make(model, Inputs.of(sample, model), progress=progress, cache=None if work_dir is None else Path(work_dir))
    return Calibration.of(made), making.described(Provenance(), made)


def described_file(facts: Provenance, place: str, found: SynthesizedData) -> Provenance:
    """``facts`` with what made the samples in the file that ``place`` names."""
    known = {"method": found.method, "seed": found.seed, "samples": len(found), "options": dict(found.options)}
    return dataclasses.replace(facts, calibration=place, synthesis=known)


def training_data_of(samples: Inputs) -> object:
    """Samples as training data without targets: a tensor, a dict, or a data set of several inputs.

    Raises:
        SpecError: The samples of a call do not lie in the first dimension of all its inputs.
    """
    if any(samples.batch_dim_of(tensor) != 0 for tensor in samples.tensors) or (samples.args and samples.kwargs):
        raise SpecError(
            "samples that are trained on lie in the first dimension of every input, all of which are given by position or all by name. "
            "Pass a data set of your own."
        )
    if samples.kwargs:
        return dict(samples.kwargs)
    return samples.args[0] if len(samples.args) == 1 else TensorDataset(*samples.args)


def has_no_labels(data: object) -> bool:
    """Whether training data are known to hold no targets: one tensor, made samples, or pictures without labels."""
    return isinstance(data, (Tensor, SynthesizedData)) or (isinstance(data, ImageData) and not data.has_targets)


def samples_in(model: nn.Module, data: object, sample: object, *, count: int, seed: int, progress: Progress, cache: Path | None) -> object:
    """What a verb takes as training data: data as they are, or samples without labels where ``data`` names some.

    Raises:
        UnknownNameError: A text that names neither.
        SpecError: Samples are to be made, and nothing says in which shape.
    """
    if is_made(data):
        if sample is None:
            raise SpecError(
                f"train_data={data!r} makes samples, and nothing says in which shape: pass sample=, such as torch.zeros(1, 3, 32, 32)."
            )
        making = Making(data, count=count, seed=seed)
        return training_data_of(making.make(model, Inputs.of(sample, model), progress=progress, cache=cache))
    if isinstance(data, (str, Path)):
        file = samples_file(data)
        if file is None:
            raise unknown_name(
                "train_data", str(data), made_names(), "Or a file or folder of samples that lowbit made; else pass the data."
            )
        data = SynthesizedData.load(file)
    return training_data_of(data.inputs) if isinstance(data, SynthesizedData) else data
