from __future__ import annotations

import pytest
import torch
from torch import nn

import lowbit
from lowbit.errors import LayerError
from lowbit.network.unwrap import plain_copy


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 5, 1)).eval()


def compiled_and_run(model: nn.Module) -> nn.Module:
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(torch.randn(8, 3, 8, 8))
    return compiled


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    with torch.no_grad():
        model(torch.randn(8, 3, 8, 8))
    return model


def compiled_inside(model: nn.Module) -> nn.Module:
    compiled = nn.Sequential(compiled_and_run(model[:2]), model[2])
    compiled(torch.randn(8, 3, 8, 8))
    return compiled


WRAPPED = {
    "compiled": compiled_and_run,
    "compiled in place": compiled_in_place,
    "a compiled part": compiled_inside,
    "data parallel": nn.DataParallel,
    "compiled and data parallel": lambda model: nn.DataParallel(compiled_and_run(model)),
    "traced by fx": torch.fx.symbolic_trace,
}


@pytest.mark.parametrize("case", WRAPPED)
def test_a_wrapped_network_is_quantized_as_the_plain_one(case: str) -> None:
    torch.compiler.reset()
    x = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    options = {"method": "round_to_nearest", "weight_bits": 8, "activation_bits": 2, "calibration": [x]}
    expected = lowbit.quantize(network(), **options)(x)
    torch.testing.assert_close(lowbit.quantize(WRAPPED[case](network()), **options)(x), expected, rtol=1e-5, atol=1e-6)
    trained = lowbit.prepare(WRAPPED[case](network()), method="lsq", weight_bits=2, activation_bits=2, sample=x).eval()
    plain = lowbit.prepare(network(), method="lsq", weight_bits=2, activation_bits=2, sample=x).eval()
    torch.testing.assert_close(trained(x), plain(x), rtol=1e-5, atol=1e-6)


def test_names_of_layers_are_those_of_the_plain_network_and_the_wrapped_one_stays_as_it_was() -> None:
    wrapped = nn.DataParallel(network())
    taken = plain_copy(wrapped)
    assert [name for name, _ in taken.named_parameters()] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    taken[0].weight.data.zero_()
    assert wrapped.module[0].weight.abs().sum() > 0


@pytest.mark.parametrize("inside", [False, True])
def test_a_scripted_network_is_refused_with_what_to_pass(inside: bool) -> None:
    scripted = torch.jit.script(network())
    model = nn.Sequential(scripted) if inside else scripted
    with pytest.raises(LayerError, match=r"its part '0' is a|it is a") as caught:
        lowbit.quantize(model, calibration=[torch.randn(8, 3, 8, 8)])
    assert "Pass the network that it was made from" in str(caught.value)
