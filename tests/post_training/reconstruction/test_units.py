"""Which units are reconstructed, in which order, and what flows from one to the next."""

from __future__ import annotations

import pytest
import torch
from tests.networks import BranchNet, LoopNet, ReusedNet, TinyNet, settled
from torch import Tensor, nn

from lowbit.errors import LayerError
from lowbit.inputs import Inputs
from lowbit.models.resnet import ResidualBlock, resnet8
from lowbit.network.graph.blocks import Block
from lowbit.post_training.pipeline import PtqJob
from lowbit.post_training.reconstruction.units import PlannedUnit, block_units, layer_units, plan_units
from lowbit.spec import BitPolicy


def job_of(model: nn.Module, *inputs: Tensor, policy: BitPolicy | None = None) -> PtqJob:
    job = PtqJob(model=settled(model, *inputs), policy=policy or BitPolicy.uniform(4, 8), sample=Inputs(inputs), calibration=None)
    job.fold()
    return job


def image() -> Tensor:
    return torch.randn(4, 3, 8, 8)


def summary(units: list[PlannedUnit]) -> list[tuple[str, bool, bool]]:
    """Name, whether an activation function was taken in, whether samples are carried over."""
    return [(unit.name, unit.activation is not None, unit.is_carried) for unit in units]


def test_layers_run_in_execution_order_with_the_activation_that_directly_follows() -> None:
    job = job_of(TinyNet(), image())
    units = plan_units(job, layer_units(job))
    # conv1 reads the stem's ReLU, conv2 reads that of conv1 (its batch norm is folded); conv2's ReLU comes after the add
    assert summary(units) == [("stem", True, False), ("conv1", True, True), ("conv2", False, True), ("head", False, False)]
    x = torch.tensor([-2.0, 0.0, 3.0])
    assert units[0].finish(x).tolist() == [0, 0, 3]
    assert units[2].finish(x).tolist() == [-2, 0, 3]
    assert [unit.channel_axis for unit in units] == [1, 1, 1, -1]
    assert [unit.cost for unit in units] == [3 * 8 * 9 * 64, 8 * 8 * 9 * 64, 8 * 8 * 9 * 64, 32]


def test_activation_functions_can_be_left_out() -> None:
    job = job_of(TinyNet(), image())
    assert not any(unit.activation for unit in plan_units(job, layer_units(job), use_activations=False))


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (nn.ReLU6(), [0.0, 0.0, 6.0]), (nn.LeakyReLU(0.25), [-1.0, 0.0, 8.0]), (nn.Hardtanh(-2.0, 0.5), [-2.0, 0.0, 0.5]),
        (nn.Hardswish(), [0.0, 0.0, 8.0]), (nn.Softmax(1), None), (nn.GELU(), None),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_activation_functions_keep_their_arguments(function: nn.Module, expected: list[float] | None) -> None:
    job = job_of(nn.Sequential(nn.Linear(3, 4), function, nn.Linear(4, 2)), torch.randn(5, 3))
    first, second = plan_units(job, layer_units(job))
    x = torch.tensor([[-4.0, 0.0, 8.0]])
    assert first.finish(x).flatten().tolist() == ([-4.0, 0.0, 8.0] if expected is None else expected)
    assert second.is_carried == (expected is not None)


def test_an_output_read_twice_or_returned_is_not_cut_off_by_its_activation() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.a(x)
            z = self.b(y.relu() + y)
            return z, z.relu()

    job = job_of(Twice(), torch.randn(5, 3))
    assert summary(plan_units(job, layer_units(job))) == [("a", False, False), ("b", False, False)]


def test_blocks_are_planned_between_stem_and_classifier() -> None:
    job = job_of(resnet8(), image())
    units = plan_units(job, block_units(job, ()))
    assert summary(units) == [
        ("conv", True, False),
        ("layer1.0", False, True),
        ("layer2.0", False, True),
        ("layer3.0", False, True),
        ("fc", False, False),
    ]
    assert units[2].layers == ("layer2.0.conv1", "layer2.0.conv2", "layer2.0.downsample.0")
    assert units[2].cost == 16 * (16 * 32 * 9 + 32 * 32 * 9 + 16 * 32)
    assert job.table.notes == []


def test_without_blocks_layers_are_taken_with_a_note() -> None:
    job = job_of(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)), image())
    assert [unit.name for unit in plan_units(job, block_units(job, ()))] == ["0", "2"]
    assert len(job.table.notes) == 1
    assert "no residual or repeated block was found" in job.table.notes[0]
    assert "blocks='PATTERN'" in job.table.notes[0]


def test_layers_that_the_policy_keeps_in_float_are_not_planned() -> None:
    policy = BitPolicy.uniform(4, 8).keep_float("layer2.*").keep_float("layer1.0.conv2")
    job = job_of(resnet8(), image(), policy=policy)
    units = plan_units(job, block_units(job, ()))
    assert [unit.name for unit in units] == ["conv", "layer1.0", "layer3.0", "fc"]
    assert units[1].layers == ("layer1.0.conv1",)
    assert not units[2].is_carried


def test_a_layer_that_runs_several_times_is_rounded_to_nearest_and_noted() -> None:
    job = job_of(LoopNet(repeats=3), torch.randn(5, 6))
    units = plan_units(job, layer_units(job))
    assert [unit.name for unit in units] == ["layers.0", "layers.1"]
    assert job.table.notes == ["layer 'layers.2' is rounded to nearest: one pass calls it 4 times, reconstruction needs exactly one"]


def test_a_block_that_runs_twice_or_returns_no_single_tensor_is_taken_apart() -> None:
    job = job_of(ReusedNet(), image())
    units = plan_units(job, block_units(job, ("block",)))
    assert [unit.name for unit in units] == ["stem", "head"]
    assert "block 'block' runs 2 times" in job.table.notes[0]

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.left(x), self.right(x)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pair, self.head = Pair(), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            left, right = self.pair(x)
            return self.head(left * right)

    job = job_of(Net(), torch.randn(5, 4))
    assert [unit.name for unit in plan_units(job, block_units(job, ("pair",)))] == ["pair.left", "pair.right", "head"]
    assert "does not return one tensor" in job.table.notes[0]


def test_layers_that_a_pass_never_calls_are_noted() -> None:
    job = job_of(BranchNet(), torch.rand(4, 3, 8, 8))
    assert job.graph is None
    units = plan_units(job, layer_units(job))
    assert summary(units) == [("bright", False, False), ("head", False, False)]
    assert "layer 'dark' is rounded to nearest: one pass calls it 0 times" in job.table.notes[-1]


def test_nothing_to_reconstruct_is_an_error() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.only = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.only(self.only(x))

    job = job_of(Twice(), torch.randn(5, 3))
    with pytest.raises(LayerError, match=r"no layer of Twice runs exactly once.*round_to_nearest"):
        plan_units(job, layer_units(job))


def test_units_follow_execution_not_definition() -> None:
    class Swapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.late, self.early = nn.Linear(4, 2), nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.late(self.early(x))

    job = job_of(Swapped(), torch.randn(5, 3))
    assert summary(plan_units(job, layer_units(job))) == [("early", False, False), ("late", False, True)]


def test_what_stands_between_two_units_or_comes_in_beside_prevents_carrying() -> None:
    class Between(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
            self.block = ResidualBlock(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.block(self.b(self.a(x) * 2))

    job = job_of(Between(), image())
    units = plan_units(
        job, [Block("a", ("a",), "layer"), Block("b", ("b",), "layer"), Block("block", ("block.conv1", "block.conv2"), "block")]
    )
    assert [unit.is_carried for unit in units] == [False, False, True]
