"""Files whose height, width or length is open compute what the network computes at other sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

import lowbit
from lowbit.errors import GraphError, SpecError
from lowbit.formats.onnx.sessions import load_onnx
from lowbit.inputs import Inputs

SAMPLE = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
OTHER = torch.randn(3, 3, 24, 40, generator=torch.Generator().manual_seed(1))


class UpAndDown(nn.Module):
    """Half the size, and back to the size of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.down = nn.Sequential(nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.ReLU())
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        stem = self.stem(x)
        up = interpolate(self.down(stem), size=stem.shape[-2:], mode="nearest")
        head: Tensor = self.head(up + stem)
        return head


def quantized(network: nn.Module, sample: Tensor = SAMPLE) -> nn.Module:
    torch.manual_seed(0)
    return lowbit.quantize(network.eval(), method="round_to_nearest", calibration=[sample])


def pooled() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


@pytest.mark.parametrize("build", [UpAndDown, pooled])
@pytest.mark.parametrize("suffix", [".lowbit", ".onnx"])
def test_pictures_of_other_sizes_give_what_the_network_gives(build: type[nn.Module], suffix: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = quantized(build())
    path = tmp_path / f"open{suffix}"
    lowbit.export(network, path, sample=SAMPLE, dynamic=("H", "W"), measure_speed=False)
    for x in (SAMPLE, OTHER, OTHER[:1]):
        with torch.no_grad():
            wanted = network(x)
        found = lowbit.load(path)(x) if suffix == ".lowbit" else next(iter(load_onnx(path)(Inputs((x,))).values()))
        assert found.shape == wanted.shape
        if suffix == ".lowbit":
            assert torch.equal(found, wanted)
        else:
            torch.testing.assert_close(found, wanted, atol=0.02 * float(wanted.abs().max()), rtol=0)


def test_inputs_of_an_onnx_file_are_named(tmp_path: Path) -> None:
    import onnx

    lowbit.export(quantized(pooled()), tmp_path / "open.onnx", sample=SAMPLE, dynamic=("H", "W"), measure_speed=False)
    shape = onnx.load(tmp_path / "open.onnx").graph.input[0].type.tensor_type.shape
    assert [dim.dim_param or dim.dim_value for dim in shape.dim] == ["batch", 3, "height", "width"]


def test_sequences_have_a_length(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sample, longer = torch.randn(2, 3, 16), torch.randn(5, 3, 37)
    network = quantized(nn.Sequential(nn.Conv1d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv1d(8, 4, 1)), sample)
    for index, dynamic in enumerate(("L", 2)):
        path = tmp_path / f"{index}.lowbit"
        lowbit.export(network, path, sample=sample, dynamic=(dynamic,))
        assert torch.equal(lowbit.load(path)(longer), network(longer))


def test_sizes_are_fixed_unless_they_are_asked_for(tmp_path: Path) -> None:
    lowbit.export(quantized(pooled()), tmp_path / "fixed.lowbit", sample=SAMPLE)
    with pytest.raises(SpecError, match=r"must be float32 \[batch, 3, 16, 16\]"):
        lowbit.load(tmp_path / "fixed.lowbit")(OTHER)


@pytest.mark.parametrize("suffix", [".lowbit", ".onnx"])
def test_a_network_of_one_size_is_refused_and_leaves_no_file(suffix: str, tmp_path: Path) -> None:
    network = quantized(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16 * 16, 4)))
    with pytest.raises(GraphError, match=r"H, W cannot stay open.*AdaptiveAvgPool2d"):
        lowbit.export(network, tmp_path / f"fixed{suffix}", sample=SAMPLE, dynamic=("H", "W"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrong", ["L", "height", 0, 4])
def test_a_dimension_that_no_input_has_is_refused(wrong: str | int, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"no input has the dimension.*\[4, 3, 16, 16\]"):
        lowbit.export(quantized(pooled()), tmp_path / "x.lowbit", sample=SAMPLE, dynamic=(wrong,))


def test_an_open_file_is_exported_again_with_open_sizes(tmp_path: Path) -> None:
    network = quantized(UpAndDown())
    lowbit.export(network, tmp_path / "open.lowbit", sample=SAMPLE, dynamic=("H", "W"))
    lowbit.export(lowbit.load(tmp_path / "open.lowbit"), tmp_path / "again.lowbit", sample=SAMPLE, dynamic=("H", "W"))
    assert torch.equal(lowbit.load(tmp_path / "again.lowbit")(OTHER), network(OTHER))


def test_kernels_take_any_size_too(tmp_path: Path) -> None:
    network = quantized(pooled())
    lowbit.export(network, tmp_path / "open.lowbit", sample=SAMPLE, dynamic=("H", "W"), kernels=True)
    torch.testing.assert_close(lowbit.load(tmp_path / "open.lowbit")(OTHER), network(OTHER), rtol=1e-3, atol=1e-4)
