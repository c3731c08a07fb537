"""What networks do with their raw input, with parts of tensors and with volumes becomes integers, or is refused with the reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.formats.fixed_point.integer_networks import onnx_codes
from torch import Tensor, nn

import lowbit
from lowbit.errors import LayerError
from lowbit.formats.fixed_point.network import compile_integer
from lowbit.network.insert import sites

X = torch.randn(32, 4, 6, 6, generator=torch.Generator().manual_seed(0))
VOLUMES = torch.randn(16, 4, 4, 5, 6, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A convolution whose result and input go where ``body`` says, and a linear layer."""

    def __init__(self, body: Callable[[nn.Module, Tensor], Tensor], x: Tensor = X) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = (nn.Conv2d if x.dim() == 4 else nn.Conv3d)(4, 4, 3, padding=1)
        self.left, self.right = nn.Conv2d(2, 3, 1), nn.Conv2d(2, 3, 1)
        self.body = body
        self.head = nn.Linear(body(self, x[:1]).flatten(1).shape[1], 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self, x).flatten(1))  # type: ignore[no-any-return]


def _halves(net: nn.Module, x: Tensor) -> Tensor:
    left, right = net.conv(x).chunk(2, 1)  # type: ignore[operator]
    return net.left(left) + net.right(right)  # type: ignore[operator, no-any-return]


BODIES: dict[str, tuple[Callable[[nn.Module, Tensor], Tensor], Tensor]] = {
    "sum": (lambda net, x: x + net.conv(x), X),  # type: ignore[operator]
    "clipped sum": (lambda net, x: (x + net.conv(x)).relu(), X),  # type: ignore[operator]
    "concatenation": (lambda net, x: torch.cat([x, net.conv(x)], 1), X),  # type: ignore[operator]
    "halves": (_halves, X),
}


@pytest.mark.parametrize("name", BODIES)
def test_codes_are_those_of_the_onnx_file(name: str, tmp_path: Path) -> None:
    body, x = BODIES[name]
    quantized = lowbit.quantize(Net(body, x).eval(), method="white_paper", calibration=x)
    lowbit.export(quantized, tmp_path / "network.onnx", sample=x, measure_speed=False)
    theirs = onnx_codes(tmp_path / "network.onnx", x)
    network = compile_integer(quantized, "onnx", sample=x)
    ours = network.all_codes(network.quantize(x))
    compared = [name for name in ours if name in theirs and not theirs[name].is_floating_point()]
    assert len(compared) >= 2 and all(torch.equal(ours[name], theirs[name]) for name in compared)


@pytest.mark.parametrize(
    "pool", [lambda x: nn.functional.max_pool3d(x, (2, 3, 2), padding=(1, 0, 1)), lambda x: nn.functional.adaptive_max_pool3d(x, (2, 2, 3))]
)
def test_the_largest_values_of_volumes_are_taken_plane_by_plane(pool: Callable[[Tensor], Tensor]) -> None:
    quantized = lowbit.quantize(
        Net(lambda net, x: pool(net.conv(x).relu()), VOLUMES).eval(),  # type: ignore[operator]
        method="white_paper",
        calibration=VOLUMES,
    )
    network = compile_integer(quantized, sample=VOLUMES)
    difference = (network(VOLUMES) - quantized(VOLUMES)).abs().max()
    assert float(difference) <= 1.01 * float(network.graph.output.grid.scale)


def test_an_input_that_a_sum_reads_too_is_quantized_once_for_all_readers() -> None:
    quantized = lowbit.quantize(Net(BODIES["sum"][0]).eval(), method="white_paper", calibration=X)
    assert "input" in sites(quantized) and "conv.input" not in sites(quantized)
    assert "conv.input" in sites(lowbit.quantize(Net(lambda net, x: net.conv(x)).eval(), method="white_paper", calibration=X))  # type: ignore[operator]


@pytest.mark.parametrize(
    ("body", "x", "reason"),
    [
        (lambda net, x: nn.functional.avg_pool3d(net.conv(x).relu(), 2), VOLUMES, r"\(avg_pool3d\): of average pools over 3 dimensions"),
        (lambda net, x: nn.functional.adaptive_avg_pool3d(net.conv(x), 2), VOLUMES, r"\(adaptive_avg_pool3d\): of average pools over 3"),
        (lambda net, x: net.left(x.chunk(2, 1)[0]), X, r"\(split\): it reads float values, the network's input 'x'"),
    ],
)
def test_what_has_no_integer_form_is_refused_with_the_reason(body: Callable[[nn.Module, Tensor], Tensor], x: Tensor, reason: str) -> None:
    quantized = lowbit.quantize(Net(body, x).eval(), method="white_paper", calibration=x)
    with pytest.raises(LayerError, match=reason):
        compile_integer(quantized, sample=x)
