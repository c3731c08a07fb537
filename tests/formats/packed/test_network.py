"""Networks from files: also from those that were written before operators got other names and forms."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import lowbit
from lowbit.errors import SpecError

FILES = Path(__file__).parent / "files"


@torch.no_grad()
@pytest.mark.parametrize("name", ["lsq", "xnor_net_input_scaling"])
def test_files_written_before_load_and_answer_the_same(name: str) -> None:
    known = load_file(FILES / f"{name}.safetensors")
    torch.testing.assert_close(lowbit.load(FILES / f"{name}.lowbit")(known["x"]), known["y"], rtol=1e-4, atol=1e-4)
    fast = lowbit.load(FILES / f"{name}.lowbit", kernels=True)(known["x"])
    torch.testing.assert_close(fast, known["kernels"], rtol=1e-4, atol=1e-4)
    assert fast.argmax(1).tolist() == known["y"].argmax(1).tolist()


@torch.no_grad()
def test_input_scaling_in_single_operators_is_computed_beside_the_layer() -> None:
    fast = lowbit.load(FILES / "xnor_net_input_scaling.lowbit", kernels=True)
    layers = {layer.name: layer for layer in fast.report.layers}  # type: ignore[attr-defined]
    assert [layers[name].kernel for name in ("3", "6", "9")] == ["binary"] * 3
    assert not any("input scaling" in layer.fused for layer in layers.values())
    assert sum(node.operator == "aten.conv2d.default" for node in fast.packed_graph.nodes) == 2  # K of layers 3 and 6


@torch.no_grad()
def test_each_image_is_answered_alone_and_a_wrong_shape_is_refused() -> None:
    known, network = load_file(FILES / "lsq.safetensors"), lowbit.load(FILES / "lsq.lowbit")
    one_by_one = torch.cat([network(image[None]) for image in known["x"]])  # type: ignore[misc]
    torch.testing.assert_close(one_by_one, known["y"], rtol=1e-4, atol=1e-4)
    with pytest.raises(SpecError, match=r"must be float32 \[batch, 1, 8, 8\], got float32 \[1, 3, 8, 8\]"):
        network(torch.zeros(1, 3, 8, 8))
