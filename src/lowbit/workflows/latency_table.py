"""``lowbit.latency_table``: the time of each layer at each pair of widths, measured on this machine; what ``lowbit latency-table`` does."""

from __future__ import annotations

import hashlib
import math
import platform
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import get_args

import torch
from torch import nn

from lowbit.autograd import records_gradients
from lowbit.errors import LayerError, MissingExtraError, SpecError
from lowbit.files import read_tensors, write_tensors
from lowbit.formats.onnx.translate import require_onnx
from lowbit.inputs import Inputs
from lowbit.measure.hardware_models import ALL_WIDTHS, MODELS, analytic_table
from lowbit.measure.latency_table import LatencyTable
from lowbit.measure.macs import count_macs
from lowbit.network.insert import WeightSite, quantized_weights, weight_sites
from lowbit.network.layers import weights_of
from lowbit.network.unwrap import plain_copy
from lowbit.progress import Progress
from lowbit.qat.engine.curve import PACKAGES, versions
from lowbit.report.facts import RUNTIMES, processor_name
from lowbit.runtime.cpu.target import active_target
from lowbit.spec import LayerBits, parse_bits, parse_switches, switch_name
from lowbit.workflows.layer_times import EIGHT, FLOAT, LayerTime, Runtime, captured_calls, time_call
from lowbit.workflows.output import prepare_folder
from lowbit.workflows.requests import LatencyTableRequest
from lowbit.workflows.source import open_source
from lowbit.workfolder import WorkFolder, exclusive_run, open_work_folder

WEIGHT_BITS = tuple(range(1, 9))
ACTIVATION_BITS = (*WEIGHT_BITS, None)
NOT_CALLED = "never called as a layer, so not measured"


@records_gradients
def latency_table(
    model: nn.Module,
    sample: object,
    *,
    weight_bits: Iterable[object] = WEIGHT_BITS,
    activation_bits: Iterable[object] = ACTIVATION_BITS,
    batch_size: int = 1,
    threads: int = 1,
    runs: int = 20,
    runtime: Runtime = "fastest",
    progress: bool | Progress | None = None,
    work_dir: Path | str | None = None,
    resume: bool = True,
) -> LatencyTable:
    """Measure the time of each layer of a network at each pair of widths, by the kernels that this machine has for it.

    Each layer is timed alone, on inputs of the shape that it gets in the network: quantized and on the kernels that ``lowbit.compile_runtime``
    puts it on (signs, bit planes, packed weights, 8 bits, float), and as ONNX Runtime runs it in the middle of a network, which passes codes
    from layer to layer. What a call takes besides its kernels is left out, as it is paid once for a whole network. All ways are timed in
    turns; the table holds the least median of those that ``runtime`` allows, and what achieved it. Layers of the same shape are measured
    once, and so are widths that run on one kernel: 3/8 takes as long as 8/8 where codes take a byte. What is
    between layers (norms that no kernel takes in, sums, pooling) is not in the table.

    Weights of several bits stand on grids around zero, inputs on grids from zero on; inputs of 1 bit are signs where weights have 1 bit, but 0 and 1 in
    ONNX Runtime, which has no kernel for signs. Layers that compute in float whatever their weights are (embeddings, recurrent layers,
    attention) take the same time at all widths, which their weights share.

    Args:
        model: The float network; it is not changed.
        sample: Inputs of one call.
        weight_bits: Widths of weights: 1 to 8, or ``None`` for float.
        activation_bits: Widths of what layers read, likewise. 8/8, float/float and float inputs of layers that know no others come besides.
        batch_size: Samples in a call; times are those of whole calls.
        threads: Processor threads.
        runs: Timed calls of each kernel.
        runtime: ``lowbit`` or ``onnxruntime`` for what networks will run on, or ``fastest`` of the two for each layer by itself.
        progress: As for ``lowbit.quantize``.
        work_dir: Folder that keeps what was measured, so that a stopped run goes on where it was.
        resume: Whether to use what that folder holds.

    Returns:
        Milliseconds by layer and pair of widths, the kernels, and in ``facts`` the machine and the settings.

    Raises:
        SpecError: A width, number or runtime that is not allowed, or a folder with a stopped run of other settings.
        LayerError: A network that is quantized already, or has no layers.
        MissingExtraError: ONNX Runtime is asked for and not installed.

    Example:
        >>> import torch, lowbit
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> table = lowbit.latency_table(model, torch.rand(1, 8), weight_bits=[4], activation_bits=[8], runtime="lowbit", runs=3)
        >>> table.unit, list(table.times["0"]), table.time("2", lowbit.LayerBits(4, 8)) > 0
        ('ms', ['4/8', '8/8', 'float/float'], True)
    """
    if runtime not in get_args(Runtime):
        raise SpecError(f"runtime must be one of {', '.join(get_args(Runtime))}, got {runtime!r}")
    for name, number in (("batch_size", batch_size), ("threads", threads), ("runs", runs)):
        if number < 1:
            raise SpecError(f"{name} must be at least 1, got {number}")
    weights, activations = _widths(weight_bits, "weight_bits"), _widths(activation_bits, "activation_bits")
    widths = tuple(dict.fromkeys([*(LayerBits(w, a) for w in weights for a in activations), EIGHT, FLOAT]))
    shown = Progress.of(progress)
    if runtime != "lowbit" and not _has_onnx_runtime(is_needed=runtime == "onnxruntime"):
        shown.say("onnx and onnxruntime are not both installed, so that only lowbit's own kernels are measured")
        runtime = "lowbit"
    network = _float_network(model)
    calls = captured_calls(network, _batch(Inputs.of(sample, model), batch_size))
    needed = {call.key: call for name in calls for call in calls[name]}
    settings = {
        "processor": processor_name(),
        "system": platform.platform(),
        "kernels": active_target()[0].name,
        "versions": versions((*PACKAGES, *RUNTIMES)),
        "threads": threads,
        "batch_size": batch_size,
        "runs": runs,
        "runtime": runtime,
    }
    with _kept(work_dir, {**settings, "kind": "latency-table", "widths": list(map(switch_name, widths))}, resume=resume) as work:
        known = {key: kept for key in needed if (kept := _read(work, key)) is not None}
        if known:
            shown.say(f"{len(known)} of {len(needed)} layers were measured before")
        with _threads(threads), shown.stage("layers", total=len(needed), done=len(known)) as stage:
            for key, call in needed.items():
                if key not in known:
                    done, every = stage.done, (*widths, *(LayerBits(bits, None) for bits in weights if not call.has_kernels))
                    known[key] = time_call(call, every, runtime=runtime, threads=threads, runs=runs, advance=stage.advance)
                    stage.advance(done + 1 - stage.done)
                    _write(work, key, known[key])
        if work is not None:
            work.mark_done()
    times: dict[str, dict[str, float]] = {}
    kernels: dict[str, dict[str, str]] = {}
    for name, site in weight_sites(network).items():
        found = [known[call.key] for call in calls[site.layer_name]]
        own = (*widths, *(LayerBits(bits, None) for bits in weights if site.is_weight_only))
        rows = {switch_name(bits): [entry[bits] for entry in found] for bits in dict.fromkeys(own)}
        times[name] = {pair: _share(site) * sum(entry.milliseconds for entry in row) for pair, row in rows.items()}
        kernels[name] = {pair: "; ".join(dict.fromkeys(entry.kernel for entry in row)) or NOT_CALLED for pair, row in rows.items()}
        if not found:
            shown.say(f"layer {name}: {NOT_CALLED}; the table says 0 ms")
    return LatencyTable("ms", times, kernels, settings)


def open_latency_table(
    name_or_path: Path | str, model: nn.Module, sample: object, widths: Iterable[LayerBits] = ALL_WIDTHS
) -> LatencyTable:
    """The table in a file, or that of a model of hardware for this network.

    Args:
        name_or_path: A file that ``LatencyTable.save`` wrote, or ``bit_serial`` or ``bit_fusion`` (``lowbit.measure.hardware_models``).
        model, sample: The network and inputs of one call, whose multiply-accumulates a model of hardware needs.
        widths: Pairs of widths that such a model's table is to have; default: all.

    Raises:
        SpecError: It is neither, or the file is no latency table.
    """
    if name_or_path in MODELS:
        return analytic_table(str(name_or_path), count_macs(model, sample), widths)
    if not Path(name_or_path).exists():
        raise SpecError(
            f"latency_table={str(name_or_path)!r}: there is no such file, and no model of hardware of this name ({', '.join(MODELS)}). "
            "'lowbit latency-table' measures one."
        )
    return LatencyTable.load(name_or_path)


def measure_and_save(request: LatencyTableRequest, *, progress: Progress | None = None) -> LatencyTable:
    """Measure the network that ``request`` names and write the table to ``request.out``; what ``lowbit latency-table`` does.

    What was measured lies in a folder beside that file until it is complete, so that a stopped run goes on where it was.

    Raises:
        LowbitError: Something cannot be found, read or written, or is not allowed.
    """
    progress, out = progress or Progress.silent(), Path(request.out)
    weights, activations = request.weight_bits.split(","), request.activation_bits.split(",")
    _widths(weights, "weight_bits"), _widths(activations, "activation_bits")  # errors come before anything is loaded
    prepare_folder(out.parent, needed_bytes=1_000_000)
    source = open_source(request, request, seed=request.seed)
    for line in (str(source.provenance), *source.notes):
        progress.say(line)
    work = out.with_name(f"{out.name}.work")
    table = latency_table(
        source.model,
        source.sample,
        weight_bits=weights,
        activation_bits=activations,
        batch_size=request.batch_size,
        threads=request.threads,
        runs=request.runs,
        runtime=request.runtime,
        progress=progress,
        work_dir=work,
        resume=request.resume,
    )
    table = LatencyTable(table.unit, table.times, table.kernels, {"network": source.name, **table.facts})
    table.save(out)
    shutil.rmtree(work, ignore_errors=True)
    return table


def _widths(given: Iterable[object], where: str) -> tuple[int | None, ...]:
    widths = tuple(dict.fromkeys(parse_bits(bits.strip() if isinstance(bits, str) else bits, where) for bits in given))
    if not widths:
        raise SpecError(f"{where} must list at least one width, such as 2,4,8")
    return widths


def _has_onnx_runtime(*, is_needed: bool) -> bool:
    try:
        require_onnx()
    except MissingExtraError:
        if is_needed:
            raise
        return False
    return True


def _float_network(model: nn.Module) -> nn.Module:
    """A copy on the processor, in float32 and evaluation mode."""
    network = plain_copy(model).eval().cpu().float()
    if quantized_weights(network):
        raise LayerError(f"{type(model).__name__} is quantized already. Measure the float network: the table has all widths of it.")
    if not weight_sites(network):
        raise LayerError(f"{type(model).__name__} has no layer to measure.")
    return network


def _batch(inputs: Inputs, size: int) -> Inputs:
    """``size`` samples, repeated where there are fewer."""
    inputs = inputs.map(lambda tensor: tensor.cpu().float() if tensor.is_floating_point() else tensor.cpu())
    return inputs.repeat(math.ceil(size / max(inputs.batch_size, 1))).take(0, size)


def _share(site: WeightSite) -> float:
    """The share of its layer's time that a weight gets: that of the layer's weights."""
    return site.original.numel() / sum(site.layer.get_parameter(name).numel() for name in weights_of(site.layer))


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _kept(folder: Path | str | None, settings: Mapping[str, object], *, resume: bool) -> Iterator[WorkFolder | None]:
    """The folder with what was measured, which no other run may use meanwhile; ``None`` where there is none."""
    if folder is None:
        yield None
        return
    with exclusive_run(Path(folder)):
        yield open_work_folder(Path(folder) / "layers", settings, resume=resume)


def _file_of(work: WorkFolder, key: str) -> Path:
    return work.path / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"


def _write(work: WorkFolder | None, key: str, times: Mapping[LayerBits, LayerTime]) -> None:
    if work is None:
        return
    milliseconds = torch.tensor([entry.milliseconds for entry in times.values()], dtype=torch.float64)
    kernels = {switch_name(bits): entry.kernel for bits, entry in times.items()}
    write_tensors(_file_of(work, key), {"milliseconds": milliseconds}, {"layer": key, "kernels": kernels})


def _read(work: WorkFolder | None, key: str) -> dict[LayerBits, LayerTime] | None:
    if work is None or not _file_of(work, key).exists():
        return None
    tensors, facts = read_tensors(_file_of(work, key))
    assert isinstance(facts, dict)
    rows = zip(facts["kernels"].items(), tensors["milliseconds"].tolist(), strict=True)
    return {parse_switches(name)[0]: LayerTime(milliseconds, kernel) for (name, kernel), milliseconds in rows}
