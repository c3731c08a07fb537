from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from lowbit.formats.program.constants import constant_of, fold_constants

X = torch.tensor([1.0, 2.0])


class Scaled(nn.Module):
    """``x * exp(log_scale) + shift`` and what depends on parameters alone, of ``size`` numbers."""

    def __init__(self, size: int = 2) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.full((size,), 2.0).log())
        self.register_buffer("shift", torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        shift: Tensor = self.shift
        return x * self.log_scale.exp() + (shift + 1)


def exported(module: nn.Module, x: Tensor = X) -> ExportedProgram:
    return torch.export.export(module.eval(), (x,)).run_decompositions({})


def calls(program: ExportedProgram) -> list[str]:
    return [str(node.target).split(".")[1] for node in program.graph.nodes if node.op == "call_function"]


def test_what_parameters_and_buffers_alone_give_becomes_a_constant_of_the_same_value() -> None:
    program = exported(Scaled())
    assert sorted(calls(program)) == ["add", "add", "exp", "mul"]
    fold_constants(program)
    assert calls(program) == ["mul", "add"]
    added = {name: value.tolist() for name, value in program.constants.items()}
    assert sorted(added.values(), key=str) == [1.5, [2.0, 2.0]]
    torch.testing.assert_close(program.module()(X), Scaled()(X))


def test_more_than_256_numbers_stay_computed() -> None:
    program = exported(Scaled(257), torch.ones(257))
    fold_constants(program)
    assert "exp" in calls(program)


def test_constants_are_found_behind_placeholders_and_inputs_are_none() -> None:
    program = exported(Scaled())
    found = {node.name: constant_of(program, node) for node in program.graph.nodes if node.op == "placeholder"}
    values = {name: None if value is None else value.flatten().tolist() for name, value in found.items()}
    assert values["b_shift"] == [0.5]
    assert values["x"] is None
    torch.testing.assert_close(found["p_log_scale"], torch.full((2,), 2.0).log())
