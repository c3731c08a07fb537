"""Laws of changing bits, for every registered method: there and back changes nothing, and codes say everything at each width."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lowbit.errors import SpecError
from lowbit.network.bits import get_bits, set_bits, switches_of
from lowbit.quantizers import Quantizer
from lowbit.registry import list_methods
from lowbit.testing import checks, post_training, tiny, training

METHODS = [(info.name, info.kind) for info in list_methods() if info.kind in ("training", "post_training")]
every_method = pytest.mark.parametrize(("name", "kind"), METHODS, ids=lambda part: part)


def ready(name: str, kind: str) -> nn.Module:
    """The tiny network under the method, in evaluation mode."""
    return training.prepared(name) if kind == "training" else post_training.quantized(name)


def try_width(quantizer: Quantizer, bits: int) -> bool:
    """Move to ``bits`` if the quantizer has that width; else see that it says so and stays."""
    if bits in quantizer.bit_widths:
        quantizer.set_bit_width(bits)
        return True
    before = quantizer.bit_width
    with pytest.raises(SpecError, match=f"has bit-widths .*{before}"):
        quantizer.set_bit_width(bits)
    assert quantizer.bit_width == before
    return False


@every_method
def test_changing_bits_there_and_back_changes_nothing(name: str, kind: str) -> None:
    model, images = ready(name, kind), tiny.held_out()[:16]
    expected, bits = tiny.outputs(model, images), get_bits(model)
    found = checks.grids(model)
    own = [quantizer.bit_width for _, quantizer, _ in found]
    for width in (8, 3, 1, 5, 2):
        for where, quantizer, values in found:
            if try_width(quantizer, width):
                with torch.no_grad():
                    forward, encoded = quantizer(values), quantizer.encode(values)
                assert torch.equal(encoded.decode(), forward), where
                assert encoded.bit_width == width
                for part in checks.single_grids(encoded):
                    assert max(row.unique().numel() for row in quantizer.granularity.flatten(part.decode())) <= 2**width, where
    for (_, quantizer, _), width in zip(found, own, strict=True):
        quantizer.set_bit_width(width)
    assert torch.equal(tiny.outputs(model, images), expected)
    if switches_of(model):
        with pytest.raises(SpecError, match="was trained for the widths"):
            set_bits(model, None)
    else:
        set_bits(model, None)
        assert not torch.equal(tiny.outputs(model, images), expected)
    set_bits(model, bits)
    assert torch.equal(tiny.outputs(model, images), expected) and get_bits(model) == bits
