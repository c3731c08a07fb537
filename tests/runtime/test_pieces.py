from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.runtime.test_compile import images, trained
from torch import Tensor, nn

import lowbit
from lowbit.errors import FileFormatError
from lowbit.formats.packed.file import package
from lowbit.formats.packed.network import PackedNetwork
from lowbit.formats.program.calls import OperatorCall
from lowbit.formats.program.program import export_program
from lowbit.runtime import compile as compiling
from lowbit.runtime.pieces import images_are_apart
from lowbit.runtime.profile import profile

Function = Callable[[Tensor], Tensor]


class Of(nn.Module):
    """A network of one function behind a convolution."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function, self.conv = function, nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.conv(x))


def verdict(function: Function) -> bool:
    network = PackedNetwork(package(export_program(Of(function).eval(), images()), None))
    shapes: dict[str, tuple[int, ...]] = {}

    def observe(node: OperatorCall, _seconds: float, result: object) -> None:
        if isinstance(result, Tensor):
            shapes[node.name] = tuple(result.shape)

    network.packed_observer = observe
    network(images(1))
    return images_are_apart(network.packed_graph, shapes)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.relu().mean((2, 3)).softmax(1),
        lambda x: (x + x.mean((-1, -2), keepdim=True)).flatten(1),
        lambda x: torch.cat([x, 2 * x], 1).view(x.shape[0], -1),
        lambda x: nn.functional.avg_pool2d(x, 2).reshape(-1, 4 * 7 * 7).unsqueeze(1),
    ],
)
def test_images_are_apart_where_each_result_comes_from_one(function: Function) -> None:
    assert verdict(function)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x - x.mean(0, keepdim=True),
        lambda x: x.mean(),
        lambda x: x.mean((2, 3)).softmax(-2),
        lambda x: x.mean((2, 3)).softmax(0),
        lambda x: x.flatten(),
        lambda x: torch.cat([x, x], 0),
        lambda x: x / x.shape[0],
        lambda x: x.mean(3).unsqueeze(0),
        lambda x: x.mean((2, 3)) @ x.mean((2, 3)).T,
        lambda x: nn.functional.linear(x.mean((2, 3)), x.mean((2, 3))),
        lambda x: x.mean((2, 3), keepdim=True) + x.mean((2, 3)),  # every image with every other one
    ],
)
def test_images_are_not_apart_where_results_come_from_several_or_none_can_tell(function: Function) -> None:
    assert not verdict(function)


@torch.no_grad()
def test_a_batch_in_pieces_gives_what_the_whole_batch_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained("bi_real_net")
    whole = lowbit.compile_runtime(model, sample=images())
    sizes: list[int] = []
    monkeypatch.setattr(compiling, "LARGEST_BYTES", 2 * 16 * 16 * 16 * 4)  # two images of the first layer's outputs
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    pieces = lowbit.compile_runtime(model, sample=images())
    plain_compute = PackedNetwork.compute

    def compute(self: PackedNetwork, inputs: dict[str, Tensor], stored: dict[str, Tensor]) -> list[object]:
        sizes.extend(tensor.shape[0] for tensor in inputs.values())
        return plain_compute(self, inputs, stored)

    monkeypatch.setattr(PackedNetwork, "compute", compute)
    found = pieces(images(7))
    assert sizes == [1, 2, 2, 2, 1]  # the first is asked what it takes
    torch.testing.assert_close(found, whole(images(7)), rtol=1e-5, atol=1e-5)
    sizes.clear()
    torch.testing.assert_close(pieces(images(3)), whole(images(3)), rtol=1e-5, atol=1e-5)
    assert sizes[:2] == [2, 1]


class Centred(nn.Module):
    """A network that takes the mean of the batch off its answers."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.network(x)
        return y - y.mean(0, keepdim=True)


@torch.no_grad()
def test_batches_whose_images_meet_stay_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "LARGEST_BYTES", 1)
    model = Centred(trained("bi_real_net"))
    content = package(export_program(model, images()), None)
    fast = compiling.RuntimeNetwork(content).eval()
    torch.testing.assert_close(fast(images(9)), model(images(9)), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_network_that_cannot_take_a_single_image_takes_whole_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "LARGEST_BYTES", 1)
    model = trained("bi_real_net")
    fast = lowbit.compile_runtime(model, sample=images())
    plain_compute = PackedNetwork.compute

    def compute(self: PackedNetwork, inputs: dict[str, Tensor], stored: dict[str, Tensor]) -> list[object]:
        if any(len(tensor) == 1 for tensor in inputs.values()):
            raise FileFormatError("it needs two images")
        return plain_compute(self, inputs, stored)

    monkeypatch.setattr(PackedNetwork, "compute", compute)
    torch.testing.assert_close(fast(images(5)), model(images(5)), rtol=1e-4, atol=1e-4)
    with pytest.raises(FileFormatError, match="two images"):
        fast(images(1))


@torch.no_grad()
def test_a_profile_adds_the_pieces_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "LARGEST_BYTES", 1)
    fast = lowbit.compile_runtime(trained("bi_real_net"), sample=images())
    found = profile(fast, images(4), runs=3)
    assert len(found.operators) == len(fast.packed_graph.nodes)
    assert all(entry.milliseconds > 0 for entry in found.operators) and found.milliseconds > 0
    total, shares = sum(entry.milliseconds for entry in found.operators), found.shares()
    assert shares["between"] == pytest.approx(max(found.milliseconds - total, 0.0))
    assert sum(shares.values()) == pytest.approx(max(found.milliseconds, total))
