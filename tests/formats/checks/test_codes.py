from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

import lowbit
from lowbit.formats.checks.codes import check_integer_parity, compare_codes
from lowbit.formats.fixed_point.graph import IntegerGraph, Linear
from lowbit.formats.fixed_point.network import IntegerNetwork, compile_program
from lowbit.formats.program.program import Program, export_program
from lowbit.inputs import Inputs


def compiled() -> tuple[nn.Module, Program, IntegerNetwork, torch.Tensor]:
    x = torch.rand(32, 6)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    quantized = lowbit.quantize(net, method="round_to_nearest", calibration=x)
    program = export_program(quantized, x)
    return quantized, program, compile_program(program, quantized), x


def with_bias_moved(network: IntegerNetwork, by: int) -> IntegerNetwork:
    """The network with a wrong bias in its second layer."""
    first, second, *rest = network.graph.operations
    assert isinstance(second, Linear)
    wrong = replace(second, weight=replace(second.weight, bias=second.weight.bias + by))
    return IntegerNetwork(IntegerGraph(network.graph.input, network.graph.output, (first, wrong, *rest)), network.arithmetic)


def test_each_operation_is_compared_on_the_codes_of_the_simulation() -> None:
    _, program, network, x = compiled()
    found = compare_codes(program, network, Inputs.of(x))
    assert [operation.layer for operation in found.operations] == ["0", "2", "4"]
    assert [operation.codes for operation in found.operations] == [32 * 8, 32 * 8, 32 * 3]
    assert found.farthest <= 1 and found.share >= 0.99


def test_an_error_is_that_of_the_operation_which_makes_it() -> None:
    """A bias that is far too large changes the codes of its own layer, and none of the next one's, which gets the simulation's."""
    model, program, network, x = compiled()
    wrong = with_bias_moved(network, 20_000)
    before, after = (compare_codes(program, each, Inputs.of(x)) for each in (network, wrong))
    assert after.operations[0] == before.operations[0] and after.operations[2] == before.operations[2]
    assert after.operations[1].farthest > 1 and after.worst.layer == "2"
    parity, _ = check_integer_parity(model, program, wrong)
    assert not parity.passed and not parity.is_within_ties and "layer '2'" in str(parity.diverging)
    right, _ = check_integer_parity(model, program, network)
    assert right.is_within_ties and right.sqnr_db > 40
