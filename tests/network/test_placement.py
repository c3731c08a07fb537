from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.networks import ReusedNet
from torch import Tensor, nn

import lowbit
from lowbit.inputs import Inputs
from lowbit.network.graph.dataflow import capture
from lowbit.network.placement import Placement, Site, before_functions, place_at_layers, place_at_tensors

IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Residual(nn.Module):
    """Two sums in a row, then pooling."""

    def __init__(self, activation: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.stem, self.stem_act = nn.Conv2d(3, 4, 3, padding=1), activation()
        self.conv1, self.act1 = nn.Conv2d(4, 4, 3, padding=1), activation()
        self.conv2, self.act2 = nn.Conv2d(4, 4, 3, padding=1), activation()
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem_act(self.stem(x))
        x = self.act1(self.conv1(x) + x)
        x = self.act2(self.conv2(x) + x)
        return self.head(self.pool(x).flatten(1))


class Joined(nn.Module):
    """A concatenation whose operands come from two layers, one of them behind a reshape, and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
        self.unshuffled, self.last = nn.PixelUnshuffle(2), nn.Conv2d(32, 2, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        left, right = torch.relu(self.left(x)), self.right(x)
        joined = torch.cat([left, right], 1)
        return self.last(self.unshuffled(joined)), right


def shown(placements: list[Placement]) -> dict[str, tuple[int, str, tuple[str, ...]]]:
    """Bits, purpose and layers of each placement by its sites."""
    return {" ".join(map(str, p.sites)): (p.bit_width, p.purpose, p.layers) for p in placements}


INPUTS = {"stem": 8, "conv1": 4, "conv2": 4, "head": 8}


def test_without_the_dataflow_quantizers_sit_at_the_layers() -> None:
    placements = place_at_layers({"stem": 8, "conv1": 4}, {"conv1": 6})
    assert shown(placements) == {
        "stem.input": (8, "input", ("stem",)), "conv1.input": (4, "input", ("conv1",)), "conv1.output": (6, "output", ()),
    }  # fmt: skip
    assert [p.layer for p in placements] == ["stem", "conv1", "conv1"]


def test_one_quantizer_serves_all_that_read_a_tensor_sums_included() -> None:
    assert shown(place_at_tensors(capture(Residual(), IMAGE), INPUTS, merge_bits=8)) == {
        "stem.input": (8, "input", ("stem",)),
        "stem_act.output": (4, "input", ("conv1",)),
        "conv1.output": (8, "sum", ()),
        "act1.output": (4, "input", ("conv2",)),
        "conv2.output": (8, "sum", ()),
        "act2.output": (8, "sum", ()),
        "pool.output": (8, "input", ("head",)),
    }


def test_without_bits_for_merges_only_what_layers_read_is_quantized() -> None:
    assert list(shown(place_at_tensors(capture(Residual(), IMAGE), INPUTS))) == [
        "stem.input", "stem_act.output", "act1.output", "pool.output",
    ]  # fmt: skip


def test_what_meets_in_a_sum_names_the_sum_and_so_does_its_result() -> None:
    dataflow = capture(Residual(), IMAGE)
    first, second = (node.name for node in dataflow.nodes if node.op == "add")
    merges = {p.name: (p.operand_of, p.result_of) for p in place_at_tensors(dataflow, {}, merge_bits=5)}
    assert merges == {
        "stem_act.output": ((first,), ""), "conv1.output": ((first,), ""), "act1.output": ((second,), first),
        "conv2.output": ((second,), ""), "act2.output": ((), second),
    }  # fmt: skip


def test_an_output_asked_for_is_quantized_before_the_activation_fused_with_the_layer() -> None:
    placements = place_at_tensors(capture(Residual(nn.Hardswish), IMAGE), INPUTS, {"stem": 6}, merge_bits=8)
    (output,) = (p for p in placements if p.purpose == "output")
    assert (output.sites, output.bit_width, output.output_of, output.layers) == ((Site("stem", "output"),), 6, "stem", ())
    assert shown(placements)["stem_act.output"] == (4, "input", ("conv1",))


def test_an_operand_that_is_an_output_asked_for_is_quantized_once_with_the_bits_of_the_output() -> None:
    placements = place_at_tensors(capture(Residual(), IMAGE), INPUTS, {"conv1": 6}, merge_bits=8)
    assert [(p.bit_width, p.purpose) for p in placements if p.name == "conv1.output"] == [(6, "output")]
    assert len({p.name for p in placements}) == len(placements)


def test_the_next_layer_reads_the_output_of_its_predecessor_where_both_have_the_same_bits() -> None:
    chain = capture(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 2)), IMAGE)
    assert shown(place_at_tensors(chain, {"2": 6}, {"0": 6})) == {"0.output": (6, "output", ("2",))}
    assert shown(place_at_tensors(chain, {"2": 4}, {"0": 6})) == {"0.output": (6, "output", ()), "2.input": (4, "input", ("2",))}


def test_readers_with_fewer_bits_quantize_their_own_input() -> None:
    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.act, self.wide, self.narrow = nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = self.act(self.stem(x))
            return self.wide(x), self.narrow(x)

    assert shown(place_at_tensors(capture(Fork(), IMAGE), {"wide": 8, "narrow": 2})) == {
        "act.output": (8, "input", ("wide",)), "narrow.input": (2, "input", ("narrow",)),
    }  # fmt: skip


class Attention(nn.Module):
    """Three layers, which get the same tensor through three arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return (self.q(query) @ self.k(key).transpose(1, 2)).softmax(-1) @ self.v(value)


class Attending(nn.Module):
    """A sum of the network itself, passed on in the given way."""

    def __init__(self, call: Callable[[Attention, Tensor], Tensor]) -> None:
        super().__init__()
        self.stem, self.attention, self.head, self.call = nn.Linear(8, 8), Attention(), nn.Linear(8, 2), call

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.call(self.attention, 2 * self.stem(x)))


@pytest.mark.parametrize(
    "call",
    [
        lambda attention, x: attention(x, x, x),
        lambda attention, x: attention(x, x, value=x),
        lambda attention, x: attention(x, x.flip(1), x),
        lambda attention, x: attention(x, x.contiguous().view(4, 5, 8), x),
    ],
    ids=["three times", "by keyword", "flipped", "viewed"],
)
def test_every_layer_reads_a_quantized_tensor_however_the_tensor_comes_to_it(call: Callable[[Attention, Tensor], Tensor]) -> None:
    x = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(0))
    network = lowbit.quantize(Attending(call), method="round_to_nearest", activation_bits=3, calibration=x)
    levels = {}
    for name in ("q", "k", "v"):
        network.attention.get_submodule(name).register_forward_pre_hook(
            lambda _layer, args, name=name: levels.update({name: len(args[0].unique())})
        )
    network(x)
    assert all(2 <= count <= 8 for count in levels.values()) and levels.keys() == {"q", "k", "v"}


def test_a_module_that_passes_a_tensor_on_does_not_quantize_for_those_that_read_it_before() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.same, self.right = nn.Conv2d(3, 4, 1), nn.Identity(), nn.Conv2d(3, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.left(x), self.same(x), self.right(x)], 1)

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branches = Branches()

        def forward(self, x: Tensor) -> Tensor:
            return self.branches(x)

    dataflow = capture(Whole(), Inputs((IMAGE,)))
    placements = place_at_tensors(dataflow, {"branches.left": 8, "branches.right": 8}, merge_bits=8)
    assert shown(placements)["branches.input"] == (8, "input", ("branches.left", "branches.right"))


def test_concatenations_are_told_from_sums_and_outputs_of_the_network_stay_float() -> None:
    dataflow = capture(Joined(), IMAGE)
    (joined,) = (node for node in dataflow.nodes if node.op == "cat")
    placements = place_at_tensors(dataflow, {}, merge_bits=7)
    # ``right`` is an output; the ReLU is a function of the network itself, of which no module can take hold
    assert shown(placements) == {"unshuffled.input": (7, "concatenation", ())}
    assert (placements[0].operand_of, placements[0].result_of) == ((), joined.name)
    assert shown(place_at_tensors(dataflow, {}, {"right": 8}, merge_bits=7))["right.output"] == (8, "output", ())


def test_what_is_pooled_has_a_purpose_of_its_own() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(4, 2, 1))
    placements = place_at_tensors(capture(net, IMAGE), {"3": 4}, merge_bits=8)
    assert shown(placements) == {"1.output": (8, "pool", ()), "2.output": (4, "input", ("3",))}


def test_a_layer_that_runs_twice_is_quantized_at_itself() -> None:
    placements = place_at_tensors(capture(ReusedNet(), IMAGE), {"stem": 8, "block.0": 4}, {"block.0": 5})
    assert shown(placements) == {
        "stem.input": (8, "input", ("stem",)), "block.0.input": (4, "input", ("block.0",)), "block.0.output": (5, "output", ()),
    }  # fmt: skip
    assert [p.tensor != "" for p in placements] == [True, False, False]


def test_convolutions_before_functions_that_no_kernel_takes_in_are_found() -> None:
    class Functions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.silu, self.relu, self.product, self.branch = (nn.Conv2d(3, 3, 1) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            x = nn.functional.silu(self.silu(x))
            x = torch.relu(self.relu(x))
            y = self.product(x)
            x = y * torch.sigmoid(y)
            z = self.branch(x)
            return nn.functional.gelu(z) + z

    dataflow = capture(Functions().eval(), Inputs((torch.randn(2, 3, 4, 4),)))
    assert before_functions(dataflow, ["silu", "relu", "product", "branch"]) == ["silu", "product"]
