"""Networks whose inputs begin with time, the batch behind it, in both files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

import lowbit
from lowbit.errors import FileFormatError, GraphError, SpecError
from lowbit.formats.onnx.sessions import load_onnx
from lowbit.formats.program.calls import graph_from_json, graph_to_json
from lowbit.inputs import Inputs, tensors_of

QUERY = torch.randn(5, 12, 16, generator=torch.Generator().manual_seed(0))
KEY = torch.randn(7, 12, 16, generator=torch.Generator().manual_seed(1))
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...]]] = {
    "lstm": (lambda: nn.LSTM(16, 8), (QUERY,)),
    "gru": (lambda: nn.GRU(16, 8, num_layers=2, bidirectional=True), (QUERY,)),
    "attention to itself": (lambda: nn.MultiheadAttention(16, 2), (QUERY, QUERY, QUERY)),
    "attention": (lambda: nn.MultiheadAttention(16, 2), (QUERY, KEY, KEY)),
    "transformer": (lambda: nn.Transformer(16, 2, 1, 1, 32), (KEY, QUERY)),
}


class Masked(nn.Module):
    """Tokens with time first, a padding mask with the samples first."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32)
        self.table, self.encoder = nn.Embedding(20, 16), nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def forward(self, tokens: Tensor, padding: Tensor) -> Tensor:
        return self.encoder(self.table(tokens), src_key_padding_mask=padding)[0]  # type: ignore[no-any-return]


def quantized(make: Callable[[], nn.Module], inputs: tuple[Tensor, ...]) -> nn.Module:
    torch.manual_seed(0)
    return lowbit.quantize(make().eval(), method="round_to_nearest", weight_bits=8, calibration=[inputs])


def leaves(output: object) -> list[Tensor]:
    return list(tensors_of(output))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_both_files_take_another_batch_and_return_tuples_as_the_network_does(case: str, tmp_path: Path) -> None:
    make, inputs = CASES[case]
    model = quantized(make, inputs)
    fewer = tuple(tensor[:, :3] + 0.1 for tensor in inputs)
    with torch.no_grad():
        expected = model(*fewer)

    report = lowbit.export(model, tmp_path / "m.lowbit", sample=inputs)
    assert report.parity.passed and "dimension 1 of the inputs is the batch" in report.notes[0]
    found = lowbit.load(tmp_path / "m.lowbit")(*fewer)
    assert isinstance(found, type(expected))
    for want, got in zip(leaves(expected), leaves(found), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)

    assert lowbit.export(model, tmp_path / "m.onnx", sample=inputs, measure_speed=False).parity.passed
    assert [dim.dim_param for dim in onnx.load(tmp_path / "m.onnx").graph.input[0].type.tensor_type.shape.dim] == ["", "batch", ""]
    for want, got in zip(leaves(expected), load_onnx(tmp_path / "m.onnx")(Inputs(fewer)).values(), strict=True):
        assert want.shape == got.shape and float((want - got).norm() / want.norm()) < 0.01


def test_a_mask_with_the_samples_first_stands_beside_inputs_with_time_first(tmp_path: Path) -> None:
    tokens = torch.randint(0, 20, (5, 6), generator=torch.Generator().manual_seed(0))
    padding = torch.arange(5).expand(6, 5) >= torch.tensor([5, 3, 4, 5, 2, 5])[:, None]
    model = quantized(Masked, (tokens, padding))
    for suffix in ("lowbit", "onnx"):
        assert lowbit.export(model, tmp_path / f"m.{suffix}", sample=(tokens, padding), measure_speed=False).parity.passed
    loaded = lowbit.load(tmp_path / "m.lowbit")
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens[:, :2], padding[:2]), model(tokens[:, :2], padding[:2]))
    with pytest.raises(SpecError, match="the inputs differ in their batch size: tokens 2, padding 3"):
        loaded(tokens[:, :2], padding[:3])


def test_the_length_is_fixed_unless_it_is_asked_for(tmp_path: Path) -> None:
    make, inputs = CASES["attention to itself"]
    model, longer = quantized(make, inputs), (KEY, KEY, KEY)
    lowbit.export(model, tmp_path / "fixed.lowbit", sample=inputs)
    with pytest.raises(SpecError, match=r"must be float32 \[5, batch, 16\], got float32 \[7, 12, 16\]"):
        lowbit.load(tmp_path / "fixed.lowbit")(*longer)
    for suffix in ("lowbit", "onnx"):
        assert lowbit.export(model, tmp_path / f"open.{suffix}", sample=inputs, dynamic=[0], measure_speed=False).parity.passed
    with torch.no_grad():
        expected = model(*longer)[0]
    torch.testing.assert_close(lowbit.load(tmp_path / "open.lowbit")(*longer)[0], expected)
    torch.testing.assert_close(next(iter(load_onnx(tmp_path / "open.onnx")(Inputs(longer)).values())), expected, rtol=1e-3, atol=1e-4)


def test_a_wrong_batch_dimension_is_refused_with_the_remedy(tmp_path: Path) -> None:
    make, inputs = CASES["lstm"]
    model = quantized(make, inputs)
    with pytest.raises(GraphError, match=r"dimension 0 of the inputs cannot stay open as the batch.*35 entries in place of 5.*batch_dim=1"):
        lowbit.export(model, tmp_path / "m.onnx", sample=inputs, batch_dim=0)
    with pytest.raises(SpecError, match="batch_dim=4"):
        lowbit.export(model, tmp_path / "m.lowbit", sample=inputs, batch_dim=4)
    assert list(tmp_path.iterdir()) == []


def test_a_file_with_a_batch_dimension_that_its_input_lacks_is_refused(tmp_path: Path) -> None:
    make, inputs = CASES["lstm"]
    lowbit.export(quantized(make, inputs), tmp_path / "m.lowbit", sample=inputs)
    graph = lowbit.load(tmp_path / "m.lowbit").packed_graph
    content = graph_to_json(graph)
    assert isinstance(content, dict) and content["inputs"] == [["input", [5, None, 16], "float32", 1]]
    assert graph_from_json(content, graph.tensors) == graph
    for wrong in (3, -1, True, "1"):
        with pytest.raises(FileFormatError, match="batch_dim"):
            graph_from_json({**content, "inputs": [["input", [5, None, 16], "float32", wrong]]}, graph.tensors)
