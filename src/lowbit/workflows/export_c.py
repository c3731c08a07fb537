"""Writes a quantized network as a C file that has been checked: against the float simulation, and compiled against the reference."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from lowbit.errors import SpecError
from lowbit.formats.checks.c_program import c_compiler, require_equal_codes
from lowbit.formats.checks.codes import CodeComparison, check_integer_parity
from lowbit.formats.checks.parity import FOLLOWED_SAMPLES, Parity, variations
from lowbit.formats.fixed_point.c_source import CSource, c_source
from lowbit.formats.fixed_point.network import compile_program
from lowbit.formats.fixed_point.requantize import RequantizerKind, Rounding
from lowbit.formats.packed.file import package, package_bytes
from lowbit.formats.program.program import Program
from lowbit.network.record import QuantizationRecord


@dataclass(frozen=True)
class WrittenC:
    """A C file and its header, checked.

    Attributes:
        source: Its text, and the memory that it takes.
        parity: Comparison of the integer network's outputs with the network's.
        codes: Comparison of its codes with those of the simulation in float.
        notes: Remarks for the user.
    """

    source: CSource
    parity: Parity
    codes: CodeComparison
    notes: tuple[str, ...]


def write_c(
    model: nn.Module, program: Program, path: Path, record: QuantizationRecord | None, requantizer: RequantizerKind, rounding: Rounding
) -> WrittenC:
    """Write ``path`` and the header beside it, unless they do not compute what the network computes.

    Raises:
        SpecError: The requantizer computes in float, or the file's name is no C identifier.
        LayerError: Something has no integer form.
        ParityError: The integers differ from the network by more than rounding, or the compiled file from the integers.
    """
    if requantizer == "onnx":
        raise SpecError("requantizer='onnx' multiplies in float32: a C file takes 'fixed_point' or 'dyadic'")
    network = compile_program(program, model, requantizer, rounding=rounding)
    source = c_source(network, path.stem)
    source = replace(source, memory=replace(source.memory, packed_bytes=len(package_bytes(package(program, record)))))
    parity, codes = check_integer_parity(model, program, network)
    parity.require(path)
    notes = [*program.notes, *network.graph.notes]
    if not parity.passed:
        notes.append(
            f"the file does not give the network's answers ({parity.figures}), although no layer alone is more than one code off: this network turns "
            "such differences into other answers, as those with random weights do"
        )
    compiler = c_compiler()
    if compiler is None:
        checked = "not compiled, as there is no C compiler (cc, gcc or clang) on this machine: compile it and compare it with lowbit.compile_integer"
    else:
        inputs = next(variations(program.sample, is_batch_open=program.is_batch_dynamic))
        samples = network.quantize(inputs.tensors[0])[: 8 * FOLLOWED_SAMPLES]
        require_equal_codes(network, source, samples, compiler)
        checked = (
            f"compiled by {Path(compiler).name} without warnings, it gives exactly the codes of the reference on {len(samples)} samples"
        )
    source.write(path)
    return WrittenC(source, parity, codes, (*notes, checked))
