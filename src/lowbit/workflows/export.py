"""``lowbit.export``: a quantized network as a file that has been checked against it."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from lowbit.autograd import records_gradients
from lowbit.errors import FileFormatError, GraphError, SpecError
from lowbit.files import replacing
from lowbit.formats.checks.codes import CodeComparison
from lowbit.formats.checks.parity import Parity, check_onnx_parity, check_packed_parity
from lowbit.formats.checks.speed import Speed, compare_speed
from lowbit.formats.fixed_point.c_source import MemoryUse
from lowbit.formats.fixed_point.network import IntegerNetwork
from lowbit.formats.fixed_point.requantize import RequantizerKind, Rounding
from lowbit.formats.onnx.sessions import PROVENANCE_KEY, SATURATION_NOTE, IntegerCount, count_integer_kernels, saturates
from lowbit.formats.onnx.translate import INT4_OPSET, OPSET, WeightContainer, require_onnx, translate
from lowbit.formats.packed.file import package, package_bytes, package_widths, read_package, write_package
from lowbit.formats.packed.network import PackedNetwork
from lowbit.formats.packed.tensor import PackedTensor
from lowbit.formats.packed.widths import Nesting
from lowbit.formats.program.program import GRID_OF_ITS_OWN, Program, export_program, export_switches
from lowbit.formats.program.structure import output_names as names_of
from lowbit.inputs import Inputs, check_values
from lowbit.measure.outputs import device_of
from lowbit.network.bits import WidthLike, current_switch, layer_widths, set_bits, switches_of, switching_layers
from lowbit.network.layers import is_random
from lowbit.network.record import QuantizationRecord, record_of
from lowbit.progress import Progress
from lowbit.provenance import Provenance, attach_provenance, provenance_of
from lowbit.runtime.compile import RuntimeNetwork
from lowbit.spec import LayerBits, switch_name
from lowbit.workflows.export_c import write_c
from lowbit.workflows.fit import misfit
from lowbit.workflows.load import load
from lowbit.workflows.origin import Origin
from lowbit.workflows.output import prepare_folder
from lowbit.workflows.requests import ExportRequest
from lowbit.workflows.source import open_source

FORMATS = (".lowbit", ".onnx", ".c")


@dataclass(frozen=True)
class SeveralWidths:
    """Several widths of a network in one packed file.

    Attributes:
        names: The widths, ``8/8`` and so on, from the highest on.
        single_bytes: What a file for each of them alone takes.
        nesting: How codes of fewer bits are stored.
        size_bytes: What the one file takes.
    """

    names: tuple[str, ...]
    single_bytes: tuple[int, ...]
    nesting: Nesting
    size_bytes: int

    def __str__(self) -> str:
        total = sum(self.single_bytes)
        head = (
            f"holds the widths {', '.join(self.names)}; a file for each takes {' + '.join(f'{size:,}' for size in self.single_bytes)} = "
            f"{total:,} bytes, {total / self.size_bytes:.2f} times as much"
        )
        return "\n".join(filter(None, (head, str(self.nesting))))


@dataclass(frozen=True)
class ExportReport:
    """A written file and the results of its checks.

    Attributes:
        path: The file.
        format: ``lowbit``, ``onnx`` or ``c``.
        size_bytes: Its size.
        parity: Comparison of its outputs with the quantized network's; where it has not passed, a note says why there is a file.
        speed: Speed compared with the float network in ONNX Runtime; ``None`` for a packed file, whose codes are decoded to float.
        integer: Layers that ONNX Runtime computes in integers; ``None`` for a packed file.
        notes: Notes for the user, such as what was left in float and why.
        widths: The widths that the file holds, where it holds several; ``parity`` is then that of the width with the largest differences.
        codes: For a C file: its codes compared with those of the simulation in float.
        memory: For a C file: flash and RAM that it takes.

    Example:
        >>> import torch, lowbit
        >>> inputs = torch.rand(32, 8)
        >>> quantized = lowbit.quantize(torch.nn.Linear(8, 4), method="round_to_nearest", calibration=inputs)
        >>> report = lowbit.export(quantized, "network.lowbit", sample=inputs)
        >>> report.path.name, report.size_bytes == report.path.stat().st_size
        ('network.lowbit', True)
    """

    path: Path
    format: str
    size_bytes: int
    parity: Parity
    speed: Speed | None = None
    integer: IntegerCount | None = None
    notes: tuple[str, ...] = ()
    widths: SeveralWidths | None = None
    codes: CodeComparison | None = None
    memory: MemoryUse | None = None

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.size_bytes:,} bytes", f"parity {self.parity}"]
        lines += [str(part) for part in (self.widths, self.integer, self.speed, self.codes, self.memory) if part is not None]
        return "\n".join([*lines, *self.notes])


@records_gradients
def export(
    model: nn.Module,
    path: Path | str,
    *,
    sample: object,
    bits: WidthLike = None,
    weight_container: WeightContainer = "int8",
    measure_speed: bool = True,
    kernels: bool = False,
    dynamic: Sequence[str | int] = (),
    batch_dim: int | None = None,
    output_names: Sequence[str] = (),
    requantizer: RequantizerKind = "fixed_point",
    rounding: Rounding = "double",
    provenance: Provenance | None = None,
) -> ExportReport:
    """Write a quantized network to a file, check it against the network, and time it against the float network.

    The suffix chooses the format: ``.lowbit`` stores exactly the bits of the codes and loads without the network's code;
    ``.onnx`` holds codes that ONNX Runtime and OpenVINO compute with in integers; ``.c`` is a C99 file, with a header beside it, for chips without
    floating point (``lowbit.compile_integer``), compiled and compared where there is a C compiler. A file that was there stays until the new one
    has passed. A packed file keeps the network's floating-point type (float16, bfloat16, float64); an ONNX file, and one that runs on
    kernels, computes in float32, and a note says so where that is another type.

    Args:
        model: The quantized network, or what ``lowbit.compile_runtime`` made of one; it is not changed.
        path: The file to write.
        sample: Inputs of one call, real ones if possible: the check runs on them.
        bits: The one width that the file is to hold, as ``lowbit.set_bits`` takes it (``"float"`` for float). Default: a packed file holds all
            widths between which the network switches, and starts with the current one (``lowbit.load(path, bits=2)`` with another); an
            ONNX file holds the current one; a C file takes one.
        weight_container: For ONNX: ``int8`` is fast; ``int4`` takes half a byte for codes of up to 4 bits, but runtimes compute with
            them in float.
        measure_speed: Whether to time the ONNX file.
        kernels: For ``.lowbit``: let ``lowbit.load`` put the network on low-bit kernels of whatever processor it runs on; implied for a
            network from ``lowbit.compile_runtime``. The size stays the same, and the check compares the results of the kernels.
        dynamic: Dimensions that stay open besides the batch: ``("H", "W")`` for height and width, ``"D"`` for the depth of volumes, ``"L"`` for
            the length of sequences ``[N, C, L]``, or numbers of dimensions.
        batch_dim: The dimension over samples: 0, or 1 where time comes first. Left out: the one where one entry of the inputs decides one of
            the outputs and no other, so that ``nn.LSTM`` and ``nn.MultiheadAttention`` without ``batch_first`` keep an open batch.
        output_names: For ONNX: a name for each output tensor. Left out: the keys of a dictionary, ``out0``, ``out1`` ... for a tuple or list.
        requantizer, rounding: For C: how sums of products become codes, see ``lowbit.compile_integer``.
        provenance: Where the network comes from, which the file keeps. Default: what the network carries.

    NaN in the inputs leads to NaN in the outputs of the network and of a packed file, also on kernels. ONNX runtimes turn NaN into
    some number where they quantize, so check inputs before a call. ``lowbit.load(..., check_finite=True)`` refuses them.

    Raises:
        SpecError: Bits that the network does not have, an unknown suffix, container or dimension (``batch_dim`` among them), names that do not
            fit the outputs, or ``kernels`` for an ONNX file.
        LayerError: ``kernels`` where no layer can run on them; says why for each. For C: a layer or operation without an integer form.
        CalibrationError: A sample that holds nothing, or NaN, or that the network cannot take.
        GraphError: The network has no single graph, or an operation that the format does not have, or needs a fixed size of a dimension in
            ``dynamic``; names it. Also a network that answers at random.
        ParityError: The file does not compute what the network computes; names the first layer that diverges.
        OutputError: The file cannot be written.
        MissingExtraError: A package for ONNX is not installed.

    Example:
        >>> import torch, lowbit
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> inputs = torch.rand(32, 8)
        >>> quantized = lowbit.quantize(model, method="round_to_nearest", calibration=inputs)
        >>> report = lowbit.export(quantized, "network.lowbit", sample=inputs)
        >>> report.format, report.parity.passed
        ('lowbit', True)
    """
    path = Path(path)
    if path.suffix not in FORMATS:
        raise SpecError(f"cannot tell the format from {path.name!r}. Allowed suffixes: {', '.join(FORMATS)}.")
    if weight_container not in ("int8", "int4"):
        raise SpecError(f"weight_container must be 'int8' or 'int4', got {weight_container!r}")
    if kernels and path.suffix != ".lowbit":
        raise SpecError(f"{path}: {path.suffix} files are run by other runtimes. Low-bit kernels need a .lowbit file.")
    if output_names and path.suffix != ".onnx":
        raise SpecError(f"output_names={output_names!r}, {path}: only ONNX files name their outputs. Leave it out, or write an .onnx file.")
    if isinstance(model, IntegerNetwork):
        raise SpecError(f"{path}: an integer network is compiled from a quantized one. Export that; a .c file holds the same integers.")
    if isinstance(model, RuntimeNetwork):
        model, kernels = model.in_float(), True
    inputs = check_values(Inputs.of(sample, model), "sample", infinite="allowed").to("cpu")
    provenance = provenance or provenance_of(model)
    is_whole = path.suffix == ".lowbit" and bits is None and len(switches_of(model)) > 1
    if device_of(model).type != "cpu" or bits is not None or is_whole:
        model = copy.deepcopy(model).cpu()
    if bits is not None:
        set_bits(model, bits)
    _refuse_random(model, inputs)
    notes: tuple[str, ...] = ()
    if path.suffix == ".c" and bits is None and len(switches_of(model)) > 1:
        held = ", ".join(switch_name(switch) for switch in switches_of(model))
        raise SpecError(f"{path}: the network switches between the widths {held}, and a C file holds one. Choose it with bits=.")
    if path.suffix != ".lowbit" or kernels:
        model, inputs, notes = _in_float32(model, inputs)
    if is_whole:
        return _export_widths(model, export_switches(model, inputs, dynamic, batch_dim), path, kernels, notes, provenance)
    program = export_program(model, inputs, dynamic, batch_dim)
    program = replace(program, notes=(*program.notes, *notes))
    if path.suffix == ".onnx":
        require_onnx()
        return _export_onnx(model, program, path, weight_container, measure_speed, output_names, provenance)
    if path.suffix == ".c":
        written = write_c(model, program, path, record_of_one(model), requantizer, rounding)
        size, memory = path.stat().st_size, written.source.memory
        return ExportReport(path, "c", size, written.parity, notes=written.notes, codes=written.codes, memory=memory)
    return _export_packed(model, program, path, kernels, provenance)


def _in_float32(model: nn.Module, inputs: Inputs) -> tuple[nn.Module, Inputs, tuple[str, ...]]:
    """Network and inputs converted to float32, and a note on the types that they had."""
    tensors = (*model.parameters(), *model.buffers(), *inputs.tensors)
    others = sorted({str(t.dtype).removeprefix("torch.") for t in tensors if t.is_floating_point() and t.dtype != torch.float32})
    if not others:
        return model, inputs, ()
    converted = inputs.map(lambda t: t.float() if t.is_floating_point() else t)
    return copy.deepcopy(model).float(), converted, (f"converted from {' and '.join(others)} to float32",)


def _refuse_random(model: nn.Module, inputs: Inputs) -> None:
    """GraphError where two calls with the same inputs differ."""
    try:
        answers_at_random = is_random(model, inputs)
    except Exception as error:  # whatever the network raises
        raise misfit(type(model).__name__, inputs, error, "Pass a sample that fits the network.") from error
    if answers_at_random:
        raise GraphError(
            f"{type(model).__name__} is random: two calls in evaluation mode with the same inputs give different outputs, so no file can be "
            "checked against it. Look for dropout that is always on (training=True, or p= without self.training) and for torch.rand."
        )


def _export_packed(model: nn.Module, program: Program, path: Path, kernels: bool, provenance: Provenance | None) -> ExportReport:
    with replacing(path) as temporary:
        content = package(program, record_of_one(model), provenance)
        size = write_package(replace(content, runs_on_kernels=kernels), temporary)
        loaded = load(temporary)
        if isinstance(loaded, RuntimeNetwork):
            loaded.require_kernels()
        parity = check_packed_parity(model, program, loaded, _decoded(temporary))
        parity.require(path)
    return ExportReport(path, "lowbit", size, parity, notes=_packed_notes(program, loaded))


def _export_widths(
    model: nn.Module, programs: list[Program], path: Path, kernels: bool, notes: tuple[str, ...], provenance: Provenance | None
) -> ExportReport:
    """Write all widths of ``model``, a copy whose bits may be changed, and check each; where layers have their own, some mixtures too."""
    record = record_of(model)
    assert record is not None
    content = model.packed_content if isinstance(model, PackedNetwork) else package_widths(model, programs, record, provenance)
    content, program = (
        replace(content, runs_on_kernels=kernels, provenance=provenance),
        replace(programs[0], notes=(*programs[0].notes, *notes)),
    )
    assert content.widths is not None
    single, found = [], []
    with replacing(path) as temporary:
        size = write_package(content, temporary)
        loaded = load(temporary)
        if isinstance(loaded, RuntimeNetwork):
            loaded.require_kernels()
        notes = _packed_notes(program, loaded)
        for switch, program in zip(record.switches, programs, strict=True):
            set_bits(model, switch)
            set_bits(loaded, switch)
            decoded = {name: tensor.decode() for name, tensor in loaded.packed_content.tensors.items() if isinstance(tensor, PackedTensor)}
            found.append(check_packed_parity(model, program, loaded, decoded))
            found[-1].require(f"{path} at {switch_name(switch)}")
            single.append(len(package_bytes(replace(package(program, record_of_one(model), provenance), runs_on_kernels=kernels))))
        for mixture in _mixtures(model, record):
            set_bits(model, mixture)
            set_bits(loaded, mixture)
            found.append(check_packed_parity(model, programs[0], loaded, {}))
            found[-1].require(f"{path} at {', '.join(f'{name} {switch_name(bits)}' for name, bits in mixture.items())}")
    worst = min(found, key=lambda parity: (parity.passed, parity.sqnr_db))
    widths = SeveralWidths(tuple(map(switch_name, record.switches)), tuple(single), Nesting.of(content.widths), size)
    return ExportReport(path, "lowbit", size, worst, notes=notes, widths=widths)


MIXTURES = 2  # of layers' widths that are checked besides those that all layers have


def _mixtures(model: nn.Module, record: QuantizationRecord) -> list[dict[str, LayerBits]]:
    """Some drawn bits of layers for a network in which each has its own."""
    generator, count = torch.Generator().manual_seed(0), MIXTURES if record.switching == "layer" else 0
    own = layer_widths(model)
    layers = {name: own[name].at for name in switching_layers(model)}
    draws = torch.randint(len(record.switches), (count, len(layers)), generator=generator).tolist()
    return [{name: at[place] for place, (name, at) in zip(places, layers.items(), strict=True)} for places in draws]


def record_of_one(model: nn.Module) -> QuantizationRecord | None:
    """The record of a network for a file that holds its current width alone."""
    record, switch = record_of(model), current_switch(model)
    return record if record is None or switch is None else replace(record, policy=replace(record.policy, default=switch))


def _decoded(path: Path) -> dict[str, Tensor]:
    return {name: tensor.decode() for name, tensor in read_package(path).tensors.items() if isinstance(tensor, PackedTensor)}


def _packed_notes(program: Program, loaded: PackedNetwork) -> tuple[str, ...]:
    emulated = [f"emulated in float, because {GRID_OF_ITS_OWN}: {', '.join(program.emulated)}"] if program.emulated else []
    return (*program.notes, *emulated, *([loaded.report.head] if isinstance(loaded, RuntimeNetwork) else []))


def _export_onnx(
    model: nn.Module,
    program: Program,
    path: Path,
    weight_container: WeightContainer,
    measure_speed: bool,
    output_names: Sequence[str],
    provenance: Provenance | None,
) -> ExportReport:
    import onnx_ir as ir

    from lowbit.formats.onnx.rewrite import float_network, integer_network
    from lowbit.formats.onnx.surgery import name_outputs

    names = _checked_names(output_names, program) or names_of(program.structure)
    marked = translate(program, opset=INT4_OPSET if weight_container == "int4" else OPSET)
    rewritten = integer_network(marked, program.weights, weight_container=weight_container, emulated=program.emulated)
    notes = [*program.notes, *rewritten.notes]
    name_outputs(rewritten.model, names)
    if provenance is not None:
        rewritten.model.metadata_props[PROVENANCE_KEY] = json.dumps(provenance.to_json(), sort_keys=True)
    speed = None
    with replacing(path) as temporary, tempfile.TemporaryDirectory() as folder:
        ir.save(rewritten.model, temporary)
        parity = check_onnx_parity(model, program, temporary)
        parity.require(path)
        if not parity.passed:
            notes.append(
                f"the file does not give the network's answers ({parity.figures}), although every layer alone is within what rounding at ties can "
                "do: this network turns such differences into other answers, as deep ones with random weights do"
            )
        integer = count_integer_kernels(temporary)
        if integer.conv_integer + integer.linear_integer and saturates():
            notes.append(SATURATION_NOTE)
        if measure_speed:
            unquantized = Path(folder) / "float.onnx"
            ir.save(float_network(marked), unquantized)
            speed = compare_speed(unquantized, temporary, program.sample)
            if not speed.is_faster:
                notes.append("the file is not faster than the float network on this machine")
        size = temporary.stat().st_size
    return ExportReport(path, "onnx", size, parity, speed, integer, tuple(notes))


def _checked_names(names: Sequence[str], program: Program) -> list[str | None]:
    signature, outputs = program.exported.graph_signature, len(names_of(program.structure))
    taken = {*map(str, signature.user_inputs), *signature.inputs_to_parameters.values(), *signature.inputs_to_buffers.values()}
    is_listed = not isinstance(names, str) and all(isinstance(name, str) and name for name in names)
    if names and not (is_listed and len(names) == outputs == len(set(names))):
        raise SpecError(
            f"output_names={names!r}: the network has {outputs} output tensor{'s' if outputs > 1 else ''}. Give each a name of its own."
        )
    for name in names:
        if name in taken:
            raise SpecError(f"output_names: {name!r} is the name of an input or a weight. Choose another one.")
    return list(names)


def load_and_export(request: ExportRequest, *, progress: Progress | None = None) -> ExportReport:
    """Write the packed file, or the float network, that ``request`` names to another file; what ``lowbit export`` does.

    The data only provides the inputs that the check runs on.

    Raises:
        LowbitError: Something cannot be found, read or written, or is not allowed.
    """
    if request.threads is not None:
        torch.set_num_threads(request.threads)
    if request.bits is not None and request.packed is None:
        raise SpecError(f"bits={request.bits} chooses one of the widths that a packed file holds. Name that file, or leave bits out.")
    to = Path(request.to)
    if to.suffix not in FORMATS:
        raise SpecError(f"to={str(to)!r}: cannot tell the format. Allowed suffixes: {', '.join(FORMATS)}.")
    if request.runtime and to.suffix != ".lowbit":
        raise SpecError(f"runtime=True, to={str(to)!r}: {to.suffix} files are run by other runtimes. Write a .lowbit file.")
    prepare_folder(to.parent, needed_bytes=0, name="to")
    is_quantized = request.packed is not None  # the float network would be timed against itself
    if request.packed is None:
        source = open_source(request, request, device=request.device, seed=request.seed, batch_dim=request.batch_dim or 0)
        attach_provenance(source.model, source.provenance)
    else:
        path = packed_file(Path(request.packed))
        loaded = load(path, bits=request.bits)
        request = _with_noise(request, loaded)
        origin = Origin(str(path), loaded.provenance)
        batch_dim = loaded.packed_graph.inputs[0].batch_dim if request.batch_dim is None else request.batch_dim
        source = origin.open(request, request, device=request.device, seed=request.seed, opened=(str(path), loaded), batch_dim=batch_dim)
    source = source.with_samples(progress or Progress.silent())
    report = export(
        source.model,
        to,
        sample=source.sample,
        bits=request.bits,
        weight_container=request.weight_container,
        measure_speed=request.speed and is_quantized,
        kernels=request.runtime,
        dynamic=source.task.open_dimensions
        if request.dynamic is None
        else [int(name) if name.isdecimal() else name for name in request.dynamic.split(",") if name],
        batch_dim=request.batch_dim,
        output_names=[] if request.output_names is None else [name.strip() for name in request.output_names.split(",")],
        requantizer=request.requantizer,
        rounding=request.rounding,
    )
    return replace(report, notes=(*report.notes, *source.notes))


def _with_noise(request: ExportRequest, loaded: PackedNetwork) -> ExportRequest:
    """``request`` with the input shape of a file that was made without any data."""
    (first, *others), known = loaded.packed_graph.inputs, loaded.provenance
    is_without = known is not None and known.data is None and (known.calibration is None or bool(known.synthesis))
    is_without = is_without and request.calibration is None
    sample = [size for dim, size in enumerate(first.shape) if dim != first.batch_dim]
    if request.input_shape or not is_without or others or not first.dtype.is_floating_point or None in sample:
        return request
    return replace(request, input_shape="x".join(map(str, sample)))


def packed_file(path: Path) -> Path:
    """``path`` itself, or the packed file in that folder; FileFormatError when there is none."""
    found = path / "model.lowbit" if path.is_dir() else path
    if not found.is_file():
        raise FileFormatError(f"{found}: there is no such file. Name a .lowbit file or a folder that 'lowbit quantize' wrote.")
    if found.suffix != ".lowbit":
        raise FileFormatError(f"{found}: expected a .lowbit file, got {found.suffix or 'no suffix'}")
    return found
