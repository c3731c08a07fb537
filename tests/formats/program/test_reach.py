from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lowbit
from lowbit.formats.packed.network import PackedNetwork
from lowbit.formats.program.reach import reach_of
from lowbit.models import load_model, upscaling_weights
from lowbit.workflows.enlarge import UNKNOWN_REACH, Tiling, enlarge_tensor

PICTURE = torch.rand(1, 3, 20, 20, generator=torch.Generator().manual_seed(0)) * 255


class Gray(nn.Module):
    """Scales pixels by their mean over channels, after a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) * x.mean(1, keepdim=True)


class Exposure(Gray):
    """Subtracts the mean over the picture."""

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) - x.mean((2, 3), keepdim=True)


class Shifted(Gray):
    """Lays each pixel over one that is two rows away."""

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)[:, :, 2:] + x[:, :, :-2]


def packed(model: nn.Module, folder: Path) -> PackedNetwork:
    quantized = lowbit.quantize(model, method="round_to_nearest", calibration=[PICTURE])
    lowbit.export(quantized, folder / "a.lowbit", sample=PICTURE, dynamic=("H", "W"))
    found = lowbit.load(folder / "a.lowbit")
    assert isinstance(found, PackedNetwork)
    return found


def reach(model: nn.Module, folder: Path) -> int | None:
    network = packed(model, folder)
    return reach_of(network.packed_graph, network.stored_tensors())


def test_kernels_add_up_and_count_less_behind_a_pixel_shuffle(tmp_path: Path) -> None:
    convolutions = (nn.Conv2d(3, 12, 5, padding=2), nn.Conv2d(12, 12, 3, padding=2, dilation=2), nn.PixelShuffle(2))
    assert reach(nn.Sequential(*convolutions, nn.Conv2d(3, 3, 3, padding=1)), tmp_path) == 5  # 2 + 2 + 1/2, rounded up
    assert reach(nn.Sequential(nn.ZeroPad2d(1), nn.Conv2d(3, 3, 3)), tmp_path) == 1


def test_it_is_as_far_as_gradients_reach(tmp_path: Path) -> None:
    model = load_model("srresnet", scale=2, blocks=1, width=4)
    x = torch.rand(1, 3, 41, 41, requires_grad=True)
    model(x)[0, :, 40:42, 40:42].sum().backward()  # the pixels of the one in the middle
    assert x.grad is not None
    touched = (x.grad.abs().sum((0, 1)) > 0).nonzero()
    assert reach(model, tmp_path) == 20 - int(touched.min()) == int(touched.max()) - 20


@pytest.mark.parametrize(("model", "wanted"), [(Gray(), 1), (Exposure(), None), (Shifted(), None)])
def test_means_over_channels_stay_at_their_place_and_what_moves_or_mixes_pixels_has_no_known_end(
    model: nn.Module, wanted: int | None, tmp_path: Path
) -> None:
    assert reach(model, tmp_path) == wanted


def test_tiles_overlap_as_far_as_the_network_looks_and_do_not_show(tmp_path: Path) -> None:
    network = packed(load_model("edsr_small", upscaling_weights(), scale=2), tmp_path)
    picture = (torch.rand(3, 40, 53, generator=torch.Generator().manual_seed(1)) * 255).to(torch.uint8)
    tiling, note = Tiling.of(network, 16)
    assert (tiling.overlap, note) == (12, "")
    fast = lowbit.compile_runtime(network)
    is_integer = all(layer.kernel == "int8" for layer in fast.report.layers)
    for upscaler, allowed in ((fast, 0 if is_integer else 4), (network, 4)):  # in integers to the bit; floats can round to another code
        whole, tiled = (enlarge_tensor(upscaler, picture, 2, cut).int() for cut in (Tiling(64, 0), tiling))
        assert (whole - tiled).abs().max() <= allowed
        assert ((whole - tiled) != 0).float().mean() < 0.05
    seams, note = Tiling.of(network, 16, overlap=0)
    assert "looks 12 pixels far" in note
    assert (whole - enlarge_tensor(network, picture, 2, seams).int()).abs().max() > 4


def test_networks_that_look_at_the_whole_picture_are_noted(tmp_path: Path) -> None:
    tiling, note = Tiling.of(packed(Exposure(), tmp_path), 16)
    assert tiling.overlap == UNKNOWN_REACH
    assert "looks at the whole picture" in note
