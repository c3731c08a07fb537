"""What every network of several widths is held to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from tests.qat.adaptive import chain
from tests.qat.training import RECIPE, assert_same, data, killed, train
from torch import Tensor, nn

import lowbit
from lowbit.network.bits import switches_of
from lowbit.network.insert import bake_weights, quantized_weights
from lowbit.qat import Classification, GivenNetworks, Recipe, TrainRun
from lowbit.spec import LayerBits

X, Y = data().tensors[0][:16], data().tensors[1][:16]


def network() -> nn.Module:
    """Three convolutions with norms and a classifier, untrained, the same each time."""
    torch.manual_seed(0)
    return chain()


def outputs(model: nn.Module) -> Tensor:
    """What it gives for the images in evaluation mode."""
    with torch.no_grad():
        return model.eval()(X)


def run_of(model: nn.Module, epochs: int = 1, given: GivenNetworks | None = None) -> TrainRun:
    """A run of four steps an epoch, in its first phase."""
    run = TrainRun(model.train(), model.lowbit_method, Classification(), Recipe(epochs), 4, given=given or GivenNetworks())  # type: ignore[arg-type]
    run.start_phase()
    return run


def weight_codes(model: nn.Module, name: str) -> Tensor:
    """The integer codes of a layer's weight at the current width."""
    site = quantized_weights(model)[name]
    assert site.quantizer is not None
    return site.quantizer.encode(site.original.detach()).codes.int()


def check_every_width_is_a_plain_network(model: nn.Module, folder: Path) -> None:
    """Codes say everything at each switch, one file holds them all, one of a switch alone too, and switching there and back changes no bit."""
    first, switches, seen = outputs(model), switches_of(model), dict[LayerBits, Tensor]()
    report = lowbit.export(model, folder / "all.lowbit", sample=X)
    assert report.widths is not None and len(report.widths.single_bytes) == len(switches)
    loaded = lowbit.load(folder / "all.lowbit")
    for index, switch in enumerate((*switches, *switches[::-1])):
        lowbit.set_bits(model, switch)
        lowbit.set_bits(loaded, switch)
        expected = outputs(model)
        baked, codes = bake_weights(model)
        assert torch.equal(outputs(baked), expected)
        bits = lowbit.get_bits(model)
        assert lowbit.get_bits(loaded) == bits
        assert {name: encoded.bit_width for name, encoded in codes.items()} == {
            f"{name}.weight": own.weight for name, own in bits.items() if own.weight is not None
        }
        torch.testing.assert_close(outputs(loaded), expected, rtol=1e-5, atol=1e-5)
        if index < len(switches):
            path = folder / f"{index}.lowbit"
            single = lowbit.export(model, path, sample=X, bits=switch)
            assert single.size_bytes == report.widths.single_bytes[index]
            torch.testing.assert_close(outputs(lowbit.load(path)), expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(outputs(model), seen.setdefault(switch, expected))
    assert torch.equal(outputs(model), first)


def check_resumes(steps: Sequence[int], folder: Path, **ask: object) -> None:
    """A training that is killed behind each of these steps, and begun again after each, ends with the same bits."""
    asked = {"recipe": RECIPE, "save_every": "1", **ask}
    whole = train(network(), **asked)
    for step in steps:
        killed(step, folder, model=network(), **asked)
    assert_same(train(network(), out=folder, **asked), whole)
