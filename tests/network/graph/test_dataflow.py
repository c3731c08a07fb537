from __future__ import annotations

import pytest
import torch
from tests.networks import BranchNet, ReusedNet, SharedWeightNet, TinyNet
from torch import Tensor, nn

from lowbit.errors import GraphError
from lowbit.network.graph.dataflow import Dataflow, Node, capture

IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def only(dataflow: Dataflow, op: str) -> Node:
    (node,) = (node for node in dataflow.nodes if node.op == op)
    return node


def test_layers_come_in_the_order_in_which_they_run_each_once() -> None:
    assert capture(TinyNet(), IMAGE).order() == ["stem", "conv1", "conv2", "head"]
    assert capture(ReusedNet(), IMAGE).order() == ["stem", "block.0", "head"]


def test_a_residual_sum_reads_the_norm_and_the_stem_and_is_read_by_its_relu() -> None:
    dataflow = capture(TinyNet(), IMAGE)
    total = only(dataflow, "add")
    norm, stem = dataflow.producers(total)
    assert (norm.op, norm.returned_by) == ("batch_norm", ["bn2"])
    assert (stem.op, dataflow[stem.inputs[0]].layer) == ("relu", "stem")
    assert [reader.op for reader in dataflow.consumers(total)] == ["relu"]
    assert sorted(reader.op for reader in dataflow.consumers(stem)) == ["add", "conv2d"]
    assert total.shape == (2, 8, 8, 8) and total.owner == ""


def test_weights_and_constants_are_no_activations() -> None:
    dataflow = capture(TinyNet(), IMAGE)
    (conv,) = dataflow.of_layer("stem")
    assert [dataflow[name].is_activation for name in conv.inputs] == [True, False, False]
    assert [node.op for node in dataflow.producers(conv)] == ["input"]


def test_a_reused_layer_has_one_node_for_each_call_and_holds_no_quantizer_of_its_own() -> None:
    dataflow = capture(ReusedNet(), IMAGE)
    assert dataflow.calls("block.0") == 2
    assert [node.shape for node in dataflow.of_layer("block.0")] == [(2, 4, 8, 8), (2, 4, 4, 4)]
    assert not dataflow.can_hold_quantizer("block.0") and dataflow.can_hold_quantizer("stem")


def test_layers_that_share_a_weight_are_two_layers() -> None:
    dataflow = capture(SharedWeightNet(), torch.randn(3, 6))
    (encode,), (decode,) = dataflow.of_layer("encode"), dataflow.of_layer("decode")
    assert encode.inputs[1] == decode.inputs[1]


class Branches(nn.Module):
    """Two outputs, a concatenation between them, and a container whose forward runs its children."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
        self.left, self.right = nn.Conv2d(4, 2, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.body(x)
        left = self.left(x)
        return left, torch.cat([left, self.right(x)], 1)


def test_all_outputs_are_known_and_a_concatenation_keeps_the_order_of_its_operands() -> None:
    dataflow = capture(Branches(), IMAGE)
    joined = only(dataflow, "cat")
    assert [node.layer for node in dataflow.producers(joined)] == ["left", "right"]
    assert [dataflow.is_output(node) for node in (*dataflow.producers(joined), joined)] == [True, False, True]


def test_a_tensor_knows_the_modules_that_return_and_receive_it_from_the_inside_out() -> None:
    dataflow = capture(Branches(), IMAGE)
    relu = only(dataflow, "relu")
    assert relu.returned_by == ["body.1", "body"] and sorted(relu.received_by) == ["left", "right"]
    (image,) = (node for node in dataflow.nodes if node.op == "input")
    assert image.received_by == ["body.0", "body"]
    assert not dataflow.can_hold_quantizer("body") and dataflow.can_hold_quantizer("body.1")


def test_a_folded_norm_becomes_the_identity() -> None:
    dataflow = capture(TinyNet(), IMAGE)
    dataflow.forget("bn2")
    assert [node.op for node in dataflow.nodes if node.owner in ("bn1", "bn2")] == ["batch_norm", "identity"]
    assert not dataflow.can_hold_quantizer("bn2")


def test_a_network_that_branches_on_values_is_refused_with_its_line() -> None:
    with pytest.raises(GraphError, match=r"BranchNet cannot be captured because of .*networks\.py:\d+: if x\.mean\(\) > 0"):
        capture(BranchNet(), IMAGE)


def test_what_passes_modules_untouched_belongs_to_each_and_what_is_changed_in_place_to_those_behind() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Identity(), nn.ReLU(inplace=True), nn.Identity(), nn.Sequential(nn.Conv2d(4, 2, 1)))
    dataflow = capture(net, IMAGE)
    first, last = (node for node in dataflow.nodes if node.op == "conv2d")
    relu = only(dataflow, "relu")
    assert (first.returned_by, sorted(first.received_by)) == (["0", "1"], ["1", "2"])
    assert (relu.returned_by, sorted(relu.received_by)) == (["2", "3"], ["3", "4", "4.0"])
    assert relu.received_by[0] == "4.0"  # innermost first
    assert (last.returned_by, last.inputs[0]) == (["4.0", "4"], relu.name)
