"""``lowbit.synthesize``: samples for a trained network without any data; and the same by a request, written to files."""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import nn

from lowbit.autograd import records_gradients
from lowbit.errors import LowbitError, SpecError
from lowbit.files import replacing, write_text
from lowbit.inputs import Calibration, Inputs
from lowbit.network.batch import calibration_for
from lowbit.options import make_method
from lowbit.plugins import source_digest
from lowbit.progress import Progress
from lowbit.qat.engine.curve import versions
from lowbit.report.facts import run_facts
from lowbit.report.json_text import to_json
from lowbit.report.synthesis import contact_sheet, png, write_synthesis_page
from lowbit.synthesis.problem import SynthesisMethod, SynthesisProblem, Synthesized, make_problem, normal
from lowbit.synthesis.samples import NormMatch, SynthesizedData
from lowbit.synthesis.statistics import Match, measure_match
from lowbit.workflows.origin import WORK
from lowbit.workflows.output import prepare_folder
from lowbit.workflows.requests import SynthesizeRequest
from lowbit.workflows.settings import SampleSettings
from lowbit.workflows.source import Source, open_source
from lowbit.workfolder import exclusive_run, open_work_folder, weights_digest

MEASURED_TOGETHER = 32  # samples of a pass that measures the match
FILES = ("samples.safetensors", "samples.png", "synthesis.json", "report.html")


@records_gradients
def synthesize(
    model: nn.Module,
    *,
    method: str | type[SynthesisMethod] | SynthesisMethod = SynthesizeRequest.method,
    count: int | None = None,
    shape: Sequence[int] | None = None,
    sample: object = None,
    data: object = None,
    seed: int = SynthesizeRequest.seed,
    progress: bool | Progress | None = None,
    work_dir: Path | str | None = None,
    **options: object,
) -> SynthesizedData:
    """Make samples for a trained network without any data.

    Args:
        model: The trained float network; it is not changed.
        method: Name of a synthesis method (``lowbit.list_methods(kind="synthesis")``), ``"path/to/file.py:Class"``, or a class or an object
            derived from ``SynthesisMethod``.
        count: How many samples. Default: as in the method's paper, for ``dsg`` as many as there are norms, else 64.
        shape: Shape of one sample, such as ``(3, 224, 224)``.
        sample: In its place inputs of one call, for networks with several inputs: their shapes count. What is no floating-point tensor with
            samples, such as masks and token ids, stays as it is.
        data: Real samples to compare with, where there are some: their statistics are measured beside those of the samples.
        seed: Seed of everything random.
        progress: ``True`` to show progress on standard error, ``False`` for silence, or a ``Progress``. Default: a bar where standard
            error is a terminal, and in a notebook.
        work_dir: Folder where samples are kept by network, method, options and seed; a killed synthesis goes on there, to the same samples.
        **options: The method's hyper-parameters.

    Returns:
        The samples, a data set that goes wherever calibration data do.

    Raises:
        UnknownNameError: No such method or option.
        SpecError: No shape, a count below 1, or an option out of range.
        LayerError: The network has no norm with statistics from training, or is not finite.
        CalibrationError: It cannot take inputs of that shape, or takes integers alone.
        DivergedError: The loss is not finite.

    Example:
        >>> import torch, lowbit
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU())
        >>> _ = model(torch.rand(32, 1, 6, 6))  # in training mode, so that the norm sees data
        >>> data = lowbit.synthesize(model, method="zeroq", shape=(1, 6, 6), count=8, iterations=100)
        >>> data.statistics[0].samples.std_error < data.statistics[0].noise.std_error
        True
    """
    arguments = dict.fromkeys(set(inspect.signature(synthesize).parameters) - {"options"}, "It is an argument of lowbit.synthesize.")
    chosen = make_method(method, "synthesis", options, arguments)
    assert isinstance(chosen, SynthesisMethod)
    problem = make_problem(
        model,
        _inputs(model, shape, sample),
        count=chosen.default_count if count is None else count,
        seed=seed,
        progress=Progress.of(progress),
        work_dir=None if work_dir is None else Path(work_dir),
    )
    real = None if data is None else calibration_for(problem.model, data)
    made = chosen.synthesize(problem)
    return SynthesizedData(
        made.inputs,
        chosen.info.name,
        chosen.hyper_parameter_values(),
        seed,
        made.losses,
        _statistics(problem, made, real),
        problem.notes,
        made.facts,
    )


def _inputs(model: nn.Module, shape: Sequence[int] | None, sample: object) -> Inputs:
    """Inputs of one call."""
    if (shape is None) == (sample is None):
        raise SpecError(
            "pass shape=, the shape of one sample without the batch, such as (3, 224, 224), or sample=, inputs of one call, for networks with "
            "several inputs" + ("." if shape is None else "; not both.")
        )
    if sample is not None:
        return Inputs.of(sample, model)
    sizes = tuple(shape or ())
    if not sizes or not all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in sizes):
        raise SpecError(f"shape={shape!r}: expected the positive sizes of one sample without the batch, such as (3, 224, 224).")
    parameter = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
    return Inputs((torch.zeros(1, *sizes, dtype=parameter.dtype),))


def _statistics(problem: SynthesisProblem, made: Synthesized, real: Calibration | None) -> tuple[NormMatch, ...]:
    """The match of the samples, of as many of noise, and of real data where there are some, norm by norm."""

    def measured(batches: Iterable[Inputs]) -> dict[str, Match]:
        device = problem.template.tensors[0].device
        return measure_match(problem.model, problem.kept, (inputs.to(device) for inputs in batches))

    def parts(inputs: Inputs) -> Iterable[Inputs]:
        return (problem.cast(part) for _, part in problem.batches(inputs, MEASURED_TOGETHER))

    samples, noise = measured(parts(made.inputs)), measured(parts(problem.draw(normal, "noise")))
    data = {} if real is None else measured(real)
    channels = {name: len(one.mean) for name, one in problem.kept.items()}
    return tuple(NormMatch(name, channels[name.partition("#")[0]], samples[name], noise[name], data.get(name)) for name in problem.norms)


@dataclass(frozen=True)
class Written:
    """The result of ``synthesize_and_write``.

    Attributes:
        data: The samples.
        out: The folder with the files.
        files: Their names.
        notes: What users should know, of the network and of the samples.
    """

    data: SynthesizedData
    out: Path
    files: tuple[str, ...]
    notes: tuple[str, ...]


def synthesize_and_write(request: SynthesizeRequest, *, progress: Progress | None = None) -> Written:
    """Make samples for the network that ``request`` names and write the files of ``FILES``; what ``lowbit synthesize`` does.

    A synthesis that was stopped goes on where the request is the same, to the same samples.

    Raises:
        LowbitError: Something cannot be found, read or written, is not allowed, or another run works in the folder.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     request = SynthesizeRequest(method="zeroq", count=4, options={"iterations": 10}, compared=32, out=folder)
        ...     written = synthesize_and_write(request)
        >>> len(written.data), written.files
        (4, ('samples.safetensors', 'samples.png', 'synthesis.json', 'report.html'))
    """
    progress, started = progress or Progress.silent(), time.time()
    if request.threads is not None:
        torch.set_num_threads(request.threads)
    method = request.chosen_method()  # unknown names and wrong types fail here, before anything is loaded
    shape = SampleSettings(calibration_samples=max(request.compared, 1), input_shape=request.input_shape)
    source = open_source(request, shape, device=request.device, seed=request.seed, missing=NO_SHAPE)
    real = source.calibration if request.compared else None
    for line in (str(source.provenance), *source.notes):
        progress.say(line)
    out = prepare_folder(Path(request.out), needed_bytes=10_000_000)
    fingerprint = {
        "kind": "synthesize", "version": versions()["lowbit"], "method": request.method, "source": source_digest(type(method)),
        "settings": dict(request.options), "count": request.count, "seed": request.seed, "weights": weights_digest(source.model),
        "shapes": [list(tensor.shape[1:]) for tensor in source.sample.tensors], "device": str(source.device),
    }  # fmt: skip
    with exclusive_run(out):
        work = open_work_folder(out / WORK, fingerprint, resume=request.resume, facts=source.provenance.to_json())
        if work.is_resumed:
            progress.say("resuming the synthesis that was stopped")
        try:
            data = synthesize(
                source.model,
                method=cast(SynthesisMethod, method),
                count=request.count,
                sample=source.sample,
                data=real,
                seed=request.seed,
                progress=progress,
                work_dir=work.path,
            )
        except LowbitError:
            work.remove_if_useless()
            raise
        files, notes = _write(data, source, out, run_facts(started, source.data_names if real is not None else {}))
        work.remove()
    return Written(data, out, files, (*data.notes, *notes))


def _write(data: SynthesizedData, source: Source, out: Path, run: Mapping[str, object]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Write the files; their names, and notes."""
    samples, picture, facts, page = FILES
    data.save(out / samples)
    sheet = contact_sheet(data, source.provenance.preprocessing)
    drawn = None if sheet is None else png(sheet)
    if drawn is None:
        (out / picture).unlink(missing_ok=True)
    else:
        with replacing(out / picture) as temporary:
            temporary.write_bytes(drawn)
    write_text(
        out / facts, to_json({"network": source.name, "provenance": source.provenance.to_json(), **data.to_dict(), "run": run}) + "\n"
    )
    write_synthesis_page(data, source.name, drawn, run, out / page)
    if drawn is None:
        return (samples, facts, page), (f"no {picture}: the inputs are no pictures of one or three channels",)
    return FILES, ()


NO_SHAPE = "give the shape of one sample: input_shape='3x224x224', or name data with data=, whose shape counts"
