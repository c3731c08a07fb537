from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from tests.networks import BranchNet, TinyNet
from torch import Tensor, nn

from lowbit.errors import LayerError
from lowbit.inputs import Inputs
from lowbit.methods.quantizer_design.lsq import Lsq
from lowbit.network import insert
from lowbit.network.record import record_of
from lowbit.qat import QatJob, Slot
from lowbit.qat.prepare import prepare
from lowbit.quantizers import LearnedScaleQuantizer, Quantizer, UniformQuantizer
from lowbit.spec import BitPolicy
from lowbit.workflows.export import export
from lowbit.workflows.load import load

X = torch.randn(8, 3, 10, 10, generator=torch.Generator().manual_seed(0))
OUTPUTS = BitPolicy.uniform(4, 8, 6).with_rule(match="head", output="float")


class Swish(nn.Module):
    """A residual network whose first convolution ends in a SiLU."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.act, self.body = nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem(x))
        return self.head((self.body(x) + x).mean((2, 3)))


def test_outputs_are_quantized_before_the_activation_function_to_the_bits_asked_for() -> None:
    model, seen = prepare(Swish(), policy=OUTPUTS, sample=X).eval(), []
    model.act.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    model(X)
    quantizer = insert.output_quantizer(model.stem)  # type: ignore[arg-type]
    assert isinstance(quantizer, LearnedScaleQuantizer) and quantizer.bit_width == 8  # the first layer
    assert torch.equal(seen[0], quantizer.encode(seen[0]).decode())
    assert insert.output_quantizer(model.body).bit_width == 6  # type: ignore[union-attr, arg-type]
    assert insert.output_quantizer(model.head) is None  # type: ignore[arg-type]
    record = record_of(model)
    assert record is not None and {row.name: row.output_bits for row in record.table} == {"stem": 8, "body": 6, "head": None}


def test_an_output_is_quantized_without_weights_and_inputs() -> None:
    policy = BitPolicy.uniform(None, None, first_last=None).with_rule(match="body", output=3)
    model = prepare(Swish(), policy=policy, sample=X).eval()
    assert list(insert.activation_quantizers(model)) == ["body.output"] and not insert.quantized_layers(model)
    with torch.no_grad():
        assert 2 < model.body(model.act(model.stem(X))).unique().numel() <= 8  # type: ignore[operator]


def test_quantizers_of_outputs_start_from_what_the_sample_gives_and_learn() -> None:
    model = prepare(Swish(), policy=OUTPUTS, sample=X)
    quantizer = insert.output_quantizer(model.body)  # type: ignore[arg-type]
    assert isinstance(quantizer, LearnedScaleQuantizer) and bool(quantizer.offset < 0)  # type: ignore[operator, arg-type]
    model(X).square().mean().backward()
    assert quantizer.scale.grad is not None and bool(quantizer.scale.grad != 0)


@pytest.mark.parametrize("merge_bits", ["float", 8])
def test_both_files_answer_as_a_network_with_quantized_outputs_does(tmp_path: Path, merge_bits: int | str) -> None:
    model = prepare(Swish(), policy=OUTPUTS, sample=X, merge_bits=merge_bits).eval()  # type: ignore[arg-type]
    for name in ("m.lowbit", "m.onnx"):
        written = export(model, tmp_path / name, sample=X, measure_speed=False)
        assert written.parity.passed and written.parity.max_abs_error < 0.02
    loaded = load(tmp_path / "m.lowbit")
    assert torch.equal(loaded(X), model(X))
    record, before = record_of(loaded), record_of(model)
    assert record is not None and before is not None
    assert list(record.table) == list(before.table) and record.policy == before.policy


def test_a_sum_leaves_the_input_of_the_layer_that_reads_its_operand_as_it_was() -> None:
    """The stem's ReLU is a function, so that the first place to hook its result is the input of ``conv1``."""
    plain, merged = (prepare(TinyNet(), sample=X, activation_bits=4, merge_bits=bits) for bits in (None, 8))  # type: ignore[arg-type]
    for model in (plain, merged):
        quantizer = insert.input_quantizer(model.conv1)  # type: ignore[arg-type]
        assert quantizer is not None and quantizer.bit_width == 4


@dataclass
class Shared(Lsq):
    """Operands of one sum share a grid, results stay float, the first and last layer have uniform grids, outputs one of another class."""

    slots: list[Slot] = field(default_factory=list)
    grids: dict[str, Quantizer] = field(default_factory=dict)

    def output_quantizer(self, slot: Slot) -> Quantizer:
        self.slots.append(slot)
        return LearnedScaleQuantizer(slot.bit_width, signed=True, is_batched=True)

    def merge_quantizer(self, slot: Slot) -> Quantizer | None:
        self.slots.append(slot)
        if not slot.operand_of:
            return None
        return self.grids.setdefault(slot.operand_of[0], LearnedScaleQuantizer(slot.bit_width, signed=True, is_batched=True))

    def edge_quantizer(self, slot: Slot) -> Quantizer:
        self.slots.append(slot)
        return UniformQuantizer(slot.bit_width, signed=True, symmetric=True)


def attached(method: Shared, policy: BitPolicy) -> nn.Module:
    job = QatJob(Swish(), policy, Inputs.of(X), edges=method.edge_quantizer)
    method.attach(job)
    job.insert_outputs(method.output_quantizer, method.merge_quantizer)
    job.finish()
    return job.model


def test_a_method_gives_the_quantizers_of_sums_and_operands_of_one_can_share_a_grid() -> None:
    method = Shared()
    model = attached(method, BitPolicy.uniform(4, 4, merge_bits=8))
    left, right = insert.output_quantizer(model.act), insert.output_quantizer(model.body)  # type: ignore[arg-type]
    assert left is not None and left is right and left.bit_width == 8
    sums = {slot.name: slot for slot in method.slots if slot.purpose == "sum"}
    assert list(sums) == ["act.output", "body.output"]
    assert sums["act.output"].operand_of == sums["body.output"].operand_of != ()
    assert all(slot.is_signed for slot in sums.values())
    with torch.no_grad():
        codes = (left(torch.linspace(-1, 1, 50)) + right(torch.linspace(-2, 2, 50))) / left.scale  # type: ignore[operator]
    torch.testing.assert_close(codes, codes.round())


def test_a_method_gives_the_quantizers_of_outputs_and_of_the_first_and_last_layer() -> None:
    method = Shared()
    model = attached(method, OUTPUTS.with_rule(match="head", output=5))
    edges = [(s.name, s.position, s.purpose, s.bit_width) for s in method.slots if s.position != "inner"]
    assert edges == [
        ("stem", "first", "weight", 8), ("head", "last", "weight", 8), ("stem", "first", "input", 8), ("head", "last", "input", 8),
        ("stem", "first", "output", 8), ("head", "last", "output", 5),
    ]  # fmt: skip
    assert [s.name for s in method.slots if s.purpose == "output" and s.position == "inner"] == ["body"]
    assert isinstance(insert.weight_quantizer(model.stem), UniformQuantizer)  # type: ignore[arg-type]
    assert isinstance(insert.output_quantizer(model.head), UniformQuantizer)  # type: ignore[arg-type]


def test_outputs_need_no_dataflow_and_a_layer_that_does_not_run_is_told_in_the_table() -> None:
    policy = BitPolicy.uniform(4, 4).with_rule(match="*", output=8)
    bright = X.abs()
    model = prepare(BranchNet(), policy=policy, sample=bright)
    record = record_of(model)
    assert record is not None
    assert {row.name: row.output_bits for row in record.table} == {"bright": 8, "head": 8, "dark": None}


def test_a_quantizer_of_an_output_that_cannot_be_made_names_the_layer() -> None:
    class Refusing(Shared):
        def output_quantizer(self, slot: Slot) -> Quantizer:
            return LearnedScaleQuantizer(9, signed=True)

    with pytest.raises(LayerError, match=r"layer 'body' \(Conv2d\): .*9"):
        attached(Refusing(), OUTPUTS)
