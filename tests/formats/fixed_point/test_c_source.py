from __future__ import annotations

import re
from collections import OrderedDict

import pytest
import torch
from tests.formats.fixed_point.integer_networks import digits, images, network_of
from torch import nn

import lowbit
from lowbit.errors import SpecError
from lowbit.formats.checks.c_program import c_compiler, run_c
from lowbit.formats.fixed_point.c_source import c_source
from lowbit.formats.fixed_point.graph import Convolution
from lowbit.formats.fixed_point.network import compile_integer

COMPILER = c_compiler()
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="this machine has no C compiler")
SANITIZED = ("-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


@needs_compiler
@pytest.mark.parametrize(("requantizer", "rounding"), [("fixed_point", "single"), ("fixed_point", "double"), ("dyadic", "single")])
def test_the_digits_network_in_c_gives_the_codes_of_the_reference_on_all_test_images(requantizer: str, rounding: str) -> None:
    assert COMPILER is not None
    network = compile_integer(digits(), requantizer, sample=images("train", 64), rounding=rounding)  # type: ignore[arg-type]
    codes = network.quantize(images("test", 600))
    assert len(codes) == 600
    found = run_c(c_source(network, "net"), codes, COMPILER)
    assert torch.equal(found, network.run(codes))


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize(("name", "requantizer"), [
        ("digits", "fixed_point"), ("branches", "dyadic"), ("branches", "fixed_point"), ("upward", "fixed_point"), ("upward", "dyadic"),
        ("volumes", "fixed_point"), ("volumes", "dyadic"), ("joined", "fixed_point"), ("joined", "dyadic"),
    ],
)  # fmt: skip
def test_sanitizers_find_nothing(name: str, requantizer: str) -> None:
    """Codes of all values too, as a caller may pass them."""
    assert COMPILER is not None
    quantized, x = network_of(name)
    network = compile_integer(quantized, requantizer, sample=x)  # type: ignore[arg-type]
    codes = torch.cat([network.quantize(x)[:4], torch.randint(-128, 128, (4, *x.shape[1:]), dtype=torch.int8)])
    assert torch.equal(run_c(c_source(network, "net"), codes, COMPILER, SANITIZED), network.run(codes).reshape(8, -1))


@needs_compiler
@pytest.mark.parametrize("name", ["mobilenet", "resnet20"])
def test_depthwise_and_residual_networks_in_c_give_the_codes_of_the_reference(name: str) -> None:
    assert COMPILER is not None
    quantized, x = network_of(name)
    network = compile_integer(quantized, sample=x)
    codes = network.quantize(x)
    assert torch.equal(run_c(c_source(network, "net"), codes, COMPILER), network.run(codes))


@needs_compiler
def test_levels_with_zero_midway_between_two_take_a_ninth_bit_in_memory_alone() -> None:
    """DoReFa's 255 steps from -1 to 1 of 8 bits are codes -255, -253 ... 255 of half a step; stored from the lowest on they take 8 bits."""
    assert COMPILER is not None
    net, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), torch.rand(16, 3)
    prepared = lowbit.prepare(
        net, method="dorefa", weight_bits=8, activation_bits=8, policy=lowbit.BitPolicy.uniform(8, 8), sample=x
    ).eval()
    prepared(x)
    network = compile_integer(prepared, sample=x)
    (middle,) = (weight for weight in network.graph.weights() if weight.name == "2.weight")  # the ends have another quantizer
    assert middle.bit_width == 8 and int(middle.codes.abs().max()) == 255 and bool((middle.codes % 2 == 1).all())
    assert float((network(x) - prepared(x)).detach().abs().max()) <= 2 * float(network.graph.output.grid.scale)
    codes = network.quantize(x)
    source = c_source(network, "net")
    assert "int16_t filter_t" in source.source and source.memory.filter_bytes == 8
    assert torch.equal(run_c(source, codes, COMPILER, SANITIZED), network.run(codes))


def test_weights_are_packed_to_their_bits_and_memory_is_counted() -> None:
    sizes = {bits: c_source(compile_integer(digits(bits), sample=images("train", 64)), "net").memory for bits in (8, 4)}
    network = compile_integer(digits(4), sample=images("train", 64))
    few = [weight for weight in network.graph.weights() if weight.bit_width == 4]
    saved = sum(weight.codes.numel() for weight in few) // 2
    assert len(few) == 7
    assert abs(sizes[8].flash_bytes - sizes[4].flash_bytes - saved) <= 4 * sum(len(weight.bias) for weight in few)  # their factors
    assert sizes[8].filter_bytes == 0
    assert sizes[4].filter_bytes == max(weight.codes[0].numel() for weight in few) == 288
    assert sizes[4].arena_bytes == 3072 and sizes[4].io_bytes == 64 + 10  # three of 16 x 8 x 8 at once around the first sum


def test_the_file_includes_nothing_but_two_headers_and_has_no_floating_point() -> None:
    source = c_source(compile_integer(digits(), sample=images("train", 64)), "chip")
    includes = [line for line in (source.source + source.header).splitlines() if line.startswith("#include")]
    assert includes == ['#include "chip.h"', "#include <string.h>", "#include <stdint.h>"]
    assert "float " not in source.source and "double" not in source.source
    assert "int chip_run(const int8_t *input, int8_t *output);" in source.header
    assert "#define CHIP_INPUT_SIZE 64" in source.header and "#define CHIP_OUTPUT_SIZE 10" in source.header


def test_shared_layers_keep_their_shape() -> None:
    network = compile_integer(network_of("mobilenet")[0], sample=network_of("mobilenet")[1])
    depthwise = [operation for operation in network.graph.operations if isinstance(operation, Convolution) and operation.window.groups > 1]
    assert len(depthwise) == 7 and all(operation.weight.codes.shape[1] == 1 for operation in depthwise)


def test_a_requantizer_in_float_and_a_name_that_c_does_not_take_are_refused() -> None:
    sample = images("train", 8)
    with pytest.raises(SpecError, match="float32"):
        c_source(compile_integer(digits(), "onnx", sample=sample), "net")
    for name in ("4bit", "_STDINT", "a-b", ""):
        with pytest.raises(SpecError, match=f"'{name}' is no name"):
            c_source(compile_integer(digits(), sample=sample), name)


def test_no_name_of_a_layer_becomes_code() -> None:
    x = torch.rand(8, 4, generator=torch.Generator().manual_seed(0))
    for name in ("a*/int evil;/*", "a*\u2028/ int evil; /*\t*", "a\u202eb"):
        network = compile_integer(lowbit.quantize(nn.Sequential(OrderedDict({name: nn.Linear(4, 2)})), calibration=x), sample=x)
        (comment,) = (line for line in c_source(network, "net").source.splitlines() if line.startswith("    /*"))
        assert re.fullmatch(r"    /\* [\w.-]+ \*/", comment, re.ASCII)


@needs_compiler
@pytest.mark.parametrize(("method", "bits", "filter_bytes"), [("dorefa", 8, 2 * 40), ("round_to_nearest", 4, 4)])
def test_rows_of_whole_bytes_may_be_longer_than_those_that_are_unpacked(method: str, bits: int, filter_bytes: int) -> None:
    """Beside weights of a ninth bit they are copied into the same memory; beside others they are read where they are."""
    assert COMPILER is not None
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 40), nn.ReLU(), nn.Linear(40, 2)), torch.rand(16, 3)
    if method == "dorefa":
        quantized = lowbit.prepare(net, method=method, policy=lowbit.BitPolicy.uniform(bits, 8), sample=x).eval()
        quantized(x)
    else:
        quantized = lowbit.quantize(net, method=method, weight_bits=bits, calibration=x)
    network = compile_integer(quantized, sample=x)
    source, codes = c_source(network, "net"), network.quantize(x)
    assert source.memory.filter_bytes == filter_bytes
    assert torch.equal(run_c(source, codes, COMPILER, SANITIZED), network.run(codes))
