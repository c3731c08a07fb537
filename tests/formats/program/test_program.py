from __future__ import annotations

import copy
import re
from collections import OrderedDict
from dataclasses import dataclass

import pytest
import torch
from tests.formats.networks import quantized
from tests.networks import BranchNet, DictOutputNet, FunctionalNet, LoopNet, ReusedNet, SharedWeightNet, TinyNet, Torture, TwoInputNet
from torch import Tensor, nn
from torch.nn import functional as F

from lowbit.errors import GraphError
from lowbit.formats.program.program import Program, export_program
from lowbit.network.insert import quantized_layers, weight_quantizer

IMAGE = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
VECTOR = torch.randn(1, 5, generator=torch.Generator().manual_seed(1))


def operators(program: Program) -> list[str]:
    return [str(node.target) for node in program.exported.graph.nodes if node.op == "call_function"]


def run(program: Program, *inputs: Tensor) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return program.exported.module(check_guards=False)(*inputs)


@pytest.mark.parametrize(
    ("network", "inputs"),
    [
        (TinyNet, (IMAGE,)),
        (LoopNet, (torch.randn(2, 6),)),
        (ReusedNet, (IMAGE,)),
        (FunctionalNet, (IMAGE,)),
        (SharedWeightNet, (torch.randn(1, 6),)),
        (TwoInputNet, (IMAGE, VECTOR)),
        (DictOutputNet, (IMAGE,)),
        (Torture, (IMAGE, VECTOR)),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_the_graph_computes_what_the_network_computes_at_any_batch_size(network: type[nn.Module], inputs: tuple[Tensor, ...]) -> None:
    model = quantized(network(), *inputs)
    program = export_program(model, inputs if len(inputs) > 1 else inputs[0])
    assert program.is_batch_dynamic
    assert program.notes == ()
    for batch in (1, 3):
        batched = tuple(torch.randn(batch, *t.shape[1:]) for t in inputs)
        with torch.no_grad():
            expected = model(*batched)
        leaves = list(expected.values()) if isinstance(expected, dict) else [expected]
        for got, want in zip(run(program, *batched), leaves, strict=True):
            assert torch.equal(got, want)


def test_every_activation_quantizer_is_one_node_and_no_weight_is_quantized_in_the_graph() -> None:
    program = export_program(quantized(TinyNet(), IMAGE), IMAGE)
    names = operators(program)
    assert names.count("lowbit.fake_quantize_affine.default") == 4
    assert not any("round" in name for name in names)
    assert names.count("aten.conv2d.default") == 3
    assert names.count("aten.linear.default") == 1


def test_the_weights_of_the_program_are_the_codes_of_its_placeholders() -> None:
    model = quantized(TinyNet(), IMAGE)
    program = export_program(model, IMAGE)
    names = program.exported.graph_signature.inputs_to_parameters.values()
    assert list(program.weights) == ["stem.weight", "conv1.weight", "conv2.weight", "head.weight"]
    assert set(program.weights) <= set(names)
    for name, layer in quantized_layers(model).items():
        assert weight_quantizer(layer) is not None
        assert torch.equal(program.exported.state_dict[f"{name}.weight"], program.weights[f"{name}.weight"].decode())


def test_exporting_leaves_the_model_as_it_was() -> None:
    model = quantized(TinyNet(), IMAGE).train()
    before = copy.deepcopy(model.state_dict())
    export_program(model, IMAGE)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert isinstance(model(IMAGE), Tensor)  # the hook that flattens outputs is on the copy


def test_a_batch_norm_that_changes_nothing_is_removed() -> None:
    model = quantized(TinyNet(), IMAGE)
    assert isinstance(model, TinyNet)
    kept = export_program(model, IMAGE)
    assert sum("batch_norm" in name for name in operators(kept)) == 2
    for tensor, value in ((model.bn1.weight, 1.0), (model.bn1.bias, 0.0), (model.bn1.running_mean, 0.0), (model.bn1.running_var, 1.0)):
        assert tensor is not None
        nn.init.constant_(tensor, value)
    model.bn1.eps = 0.0
    program = export_program(model, IMAGE)
    assert sum("batch_norm" in name for name in operators(program)) == 1
    with torch.no_grad():
        assert torch.equal(run(program, IMAGE)[0], model(IMAGE))


def test_dropout_and_in_place_operators_leave_no_trace() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, 2))
    program = export_program(quantized(network, IMAGE), IMAGE)
    assert {name for name in operators(program) if "clone" in name or "dropout" in name or "relu_" in name} == set()


class FixedBatch(nn.Module):
    """Only works for one sample."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(3, 8, 8).sum(0)


def test_a_model_with_a_fixed_batch_size_is_exported_with_it_and_says_so() -> None:
    program = export_program(FixedBatch(), IMAGE)
    assert not program.is_batch_dynamic
    assert len(program.notes) == 1
    assert program.notes[0].startswith("the batch size is fixed to 1: ")
    assert torch.equal(run(program, IMAGE)[0], IMAGE[0].sum(0))


def test_a_branch_on_values_is_refused_with_the_line_that_blocks() -> None:
    with pytest.raises(GraphError, match=r"BranchNet cannot be exported: .*networks\.py, line \d+, in forward: `if x\.mean\(\) > 0:`"):
        export_program(quantized(BranchNet(), IMAGE), IMAGE)


class Counter(nn.Module):
    """Counts its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Tensor
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return x + self.calls


def test_a_model_that_changes_its_state_is_refused() -> None:
    with pytest.raises(GraphError, match="changes 'calls' while it runs"):
        export_program(Counter(), IMAGE)


@dataclass
class Result:
    logits: Tensor
    extras: tuple[Tensor, list[Tensor]]
    temperature: float = 2.0
    mask: None = None


class Nested(nn.Module):
    def forward(self, x: Tensor) -> Result:
        y = F.relu(x)
        return Result(y, (x + 1, [x * 2, y]))


def test_nested_outputs_are_flattened_and_described() -> None:
    program = export_program(Nested(), IMAGE)
    assert program.structure == {
        "dict": [
            ["logits", {"tensor": 0}],
            ["extras", {"tuple": [{"tensor": 1}, {"list": [{"tensor": 2}, {"tensor": 3}]}]}],
            ["temperature", {"value": 2.0}],
            ["mask", None],
        ]
    }
    assert len(run(program, IMAGE)) == 4


def test_keyword_inputs_are_exported() -> None:
    model = quantized(TwoInputNet(), IMAGE, VECTOR)
    program = export_program(model, {"vector": VECTOR, "image": IMAGE})
    assert set(program.exported.graph_signature.user_inputs) == {"image", "vector"}
    with torch.no_grad():
        got = program.exported.module(check_guards=False)(vector=VECTOR, image=IMAGE)
        assert torch.equal(got[0], model(IMAGE, VECTOR))


@pytest.mark.parametrize("name", ['a"b', "a\\b", "a\nb", "a\r", "a\0b"])
def test_a_name_that_torch_cannot_write_into_a_graph_is_refused_by_name(name: str) -> None:
    model = nn.Sequential(OrderedDict([("body", nn.Sequential(OrderedDict([(name, nn.Linear(3, 3))])))]))
    with pytest.raises(GraphError, match=re.escape(f"Sequential holds {'body.' + name!r}: torch.export cannot write names with")):
        export_program(model, torch.randn(2, 3))


@pytest.mark.parametrize("name", ["a b", "a/b", "a'b", "ü", "a[0]", "-a", "a:b", "a=b", "a{b}", "0"])
def test_other_odd_names_are_kept(name: str) -> None:
    model = nn.Sequential(OrderedDict([(name, nn.Linear(3, 3))]))
    x = torch.randn(2, 3)
    program = export_program(model, x)
    assert f"{name}.weight" in program.exported.state_dict
    torch.testing.assert_close(program.exported.module()(x)[0], model(x))
