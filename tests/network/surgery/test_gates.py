from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lowbit.network.graph.dataflow import capture
from lowbit.network.placement import place_at_tensors
from lowbit.network.surgery.gates import GatedSiLU, separate_activations, split_gates
from lowbit.workflows.quantize import quantize

IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Excited(nn.Module):
    """Squeeze-and-excitation: channels multiplied with a gate computed from their means, and a product of another kind."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.act = nn.Conv2d(3, 4, 1), nn.ReLU()
        self.squeeze, self.expand, self.gate = nn.Conv2d(4, 2, 1), nn.Conv2d(2, 4, 1), nn.Hardsigmoid()
        self.head, self.lonely = nn.Conv2d(4, 2, 1), nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem(x))
        x = self.head(x * self.gate(self.expand(self.squeeze(x.mean((2, 3), keepdim=True)).relu())))
        return x * self.lonely(x)


def shared() -> nn.Sequential:
    act = nn.SiLU()
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), act, nn.Conv2d(4, 4, 1), act).eval()


def test_a_gated_silu_is_silu() -> None:
    x = torch.linspace(-20, 20, 1001)
    torch.testing.assert_close(GatedSiLU()(x), nn.SiLU()(x))


def test_activation_functions_that_modules_share_become_their_own() -> None:
    act = nn.LeakyReLU(0.3)
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), act), nn.Sequential(nn.Linear(2, 2), act), act)
    separate_activations(model)
    leaky = [module for module in model.modules() if isinstance(module, nn.LeakyReLU)]
    assert len(leaky) == 3
    assert [module.negative_slope for module in leaky] == [0.3] * 3
    with_hook = nn.Sequential(act, act)
    act.register_forward_hook(lambda *_: None)
    separate_activations(with_hook)
    assert with_hook[0] is with_hook[1]


def test_silu_behind_a_layer_whose_output_is_quantized_is_split_in_the_network_and_in_its_dataflow() -> None:
    model = shared()
    before = model(IMAGE)
    separate_activations(model)
    graph = capture(model, IMAGE)
    graph.forget("1")
    split_gates(model, graph, ["0"])
    assert [type(module) for module in (model[2], model[4])] == [GatedSiLU, nn.SiLU]
    torch.testing.assert_close(model(IMAGE), before)
    gate, silu, other = (node for node in graph.nodes if node.op in ("sigmoid", "silu"))
    assert [(node.op, node.owner) for node in (gate, silu, other)] == [("sigmoid", "2.gate"), ("silu", "2"), ("silu", "4")]
    assert [node.name for node in graph.consumers(graph[silu.inputs[0]])] == [silu.name, gate.name]
    assert (silu.inputs, graph.consumers(gate)) == ([*gate.inputs, gate.name], [silu])
    assert graph.can_hold_quantizer("2.gate")


def test_gates_of_quantized_tensors_are_quantized_and_others_are_not() -> None:
    inputs = {"stem": 8, "squeeze": 8, "expand": 8, "head": 8}
    placements = place_at_tensors(capture(Excited().eval(), IMAGE), inputs, merge_bits=6)
    assert [(placement.name, placement.bit_width) for placement in placements if placement.purpose == "gate"] == [("gate.output", 6)]
    assert not any(placement.purpose == "gate" for placement in place_at_tensors(capture(Excited().eval(), IMAGE), inputs))


def test_quantizing_after_training_splits_silu_where_its_result_is_quantized_and_keeps_the_function() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(shared(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).eval()
    quantized = quantize(model, method="round_to_nearest", calibration=[IMAGE])
    assert [type(module) for module in (quantized[0][2], quantized[0][4])] == [GatedSiLU, GatedSiLU]
    assert type(model[0][2]) is nn.SiLU
    codes = quantized[0][2].gate(torch.linspace(-9, 9, 5000)).unique()
    assert 100 < len(codes) <= 256
    with torch.no_grad():
        wanted, got = model(IMAGE), quantized(IMAGE)
    assert 10 * torch.log10(wanted.var() / (wanted - got).square().mean()) > 25


@pytest.mark.parametrize(("method", "options"), [("dfq", {}), ("brecq", {"iterations": 4, "activation_iterations": 4})])
def test_methods_that_walk_the_dataflow_after_the_split_find_the_function_there(method: str, options: dict[str, int]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(shared(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).eval()
    data = {"sample": IMAGE, "input_range": (-3.0, 3.0)} if method == "dfq" else {"calibration": [IMAGE]}
    quantized = quantize(model, method=method, **data, **options)
    with torch.no_grad():
        wanted, got = model(IMAGE), quantized(IMAGE)
    assert type(quantized[0][2]) is GatedSiLU
    assert 10 * torch.log10(wanted.var() / (wanted - got).square().mean()) > 15
