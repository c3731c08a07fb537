from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.networks import settled
from torch import Tensor, nn

from lowbit.errors import GraphError, SpecError
from lowbit.models.resnet import resnet8
from lowbit.network.insert import activation_quantizers
from lowbit.network.record import record_of
from lowbit.qat.prepare import prepare
from lowbit.quantizers import LearnedScaleQuantizer
from lowbit.workflows.export import export

IMAGE = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def residual() -> nn.Module:
    torch.manual_seed(0)
    return settled(resnet8(), IMAGE)


def test_sums_their_results_and_what_is_pooled_get_quantizers_of_their_own() -> None:
    model = prepare(residual(), method="lsq", sample=IMAGE, merge_bits=8)
    found = {site: q for site, q in activation_quantizers(model).items() if site.endswith(".output")}
    # the stem's ReLU and the three blocks' give what is summed or pooled; both norms before each sum, where there are two
    assert sorted(found) == [
        "layer1.0.norm2.output", "layer1.0.relu2.output", "layer2.0.downsample.1.output", "layer2.0.norm2.output", "layer2.0.relu2.output",
        "layer3.0.downsample.1.output", "layer3.0.norm2.output", "layer3.0.relu2.output", "relu.output",
    ]  # fmt: skip
    for quantizer in found.values():
        assert isinstance(quantizer, LearnedScaleQuantizer)
        assert quantizer.bit_width == 8
        assert bool(quantizer.scale > 0)
    assert bool(found["layer1.0.norm2.output"].offset < 0)  # type: ignore[operator, arg-type] # signed
    assert found["relu.output"].offset.item() == 0.0  # type: ignore[arg-type]
    record = record_of(model)
    assert record is not None
    assert record.policy.merges == 8
    assert "sums, concatenations and what is pooled: 8 bits at 9 places" in record.table.notes


def test_they_change_the_outputs_a_little_and_no_running_statistics() -> None:
    model = residual()
    plain, merged = (
        prepare(model, method="lsq", sample=IMAGE, weight_bits=8, activation_bits=8, merge_bits=bits).eval() for bits in (None, 8)
    )
    with torch.no_grad():
        difference = (plain(IMAGE) - merged(IMAGE)).abs().max() / plain(IMAGE).abs().max()
    assert 0 < difference < 0.1
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, merged.get_buffer(name))


def test_they_are_trained_as_quantizers() -> None:
    model = prepare(residual(), method="lsq", sample=IMAGE, merge_bits=8).train()
    model(IMAGE).square().mean().backward()
    for quantizer in activation_quantizers(model).values():
        assert isinstance(quantizer, LearnedScaleQuantizer)
        assert quantizer.scale.grad is not None and bool(quantizer.scale.grad != 0)


def test_a_residual_network_then_runs_in_integers_from_end_to_end(tmp_path: Path) -> None:
    without, with_merges = (
        export(
            prepare(residual(), method="lsq", sample=IMAGE, merge_bits=bits).eval(), tmp_path / "m.onnx", sample=IMAGE, measure_speed=False
        )
        for bits in (None, 8)
    )
    assert without.integer is not None and with_merges.integer is not None
    assert (without.integer.conv_integer, without.integer.conv_total) == (3, 9)
    assert (with_merges.integer.conv_integer, with_merges.integer.conv_total) == (9, 9)
    assert with_merges.integer.operators["QLinearAdd"] == 3
    assert not any(note.startswith("computed in float") for note in with_merges.notes)
    assert with_merges.parity.passed


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.conv(x) if x.sum() > 0 else self.conv(-x))


def test_a_network_without_a_graph_and_wrong_bits_are_refused() -> None:
    with pytest.raises(GraphError, match="Branching"):
        prepare(Branching(), method="lsq", sample=IMAGE, merge_bits=8)
    with pytest.raises(SpecError, match="merge_bits: bit_width must be a whole number from 1 to 8, got 9"):
        prepare(residual(), method="lsq", sample=IMAGE, merge_bits=9)
