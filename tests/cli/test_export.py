"""``lowbit export`` on networks of one's own: names of outputs, the dimension over samples, open sizes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

import lowbit
from lowbit.cli import app

SOURCE = """
import torch
from torch import nn

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.left, self.right = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 2, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        hidden = torch.relu(self.stem(x))
        return self.left(hidden), self.right(hidden).mean((2, 3))

class Steps(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.GRU(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.rnn(x)[1][0])

class Pointwise(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.last(torch.relu(self.first(x)))
"""


@pytest.fixture(scope="module")
def nets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("nets") / "export_nets.py"
    path.write_text(SOURCE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(path.parent / "cache"))
        yield path


def export(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["export", *map(str, arguments)])


def test_outputs_get_the_names_that_are_asked_for(nets: Path, tmp_path: Path) -> None:
    ort = pytest.importorskip("onnxruntime")
    out = tmp_path / "two.onnx"
    result = export("--model", f"{nets}:Two", "--input-shape", "3x8x8", "--to", out, "--output-names", "heat, score")
    assert result.exit_code == 0, result.output
    session = ort.InferenceSession(out)
    assert [entry.name for entry in session.get_outputs()] == ["heat", "score"]
    wrong = export("--model", f"{nets}:Two", "--input-shape", "3x8x8", "--to", tmp_path / "no.onnx", "--output-names", "heat")
    assert wrong.exit_code == 2 and "heat" in wrong.output and not (tmp_path / "no.onnx").exists()
    wrong = export("--model", f"{nets}:Two", "--input-shape", "3x8x8", "--to", tmp_path / "no.lowbit", "--output-names", "heat,score")
    assert wrong.exit_code == 2 and "only ONNX files name their outputs" in " ".join(wrong.output.split())


@pytest.mark.parametrize("asked", [["--batch-dim", "1"], []], ids=["asked for", "found"])
def test_samples_may_lie_in_the_second_dimension(nets: Path, tmp_path: Path, asked: list[str]) -> None:
    out = tmp_path / "steps.lowbit"
    shape = ["--input-shape", "7x6"]
    result = export("--model", f"{nets}:Steps", *shape, "--to", out, *asked)
    assert result.exit_code == 0, result.output
    loaded = lowbit.load(out)
    (item,) = loaded.packed_graph.inputs
    assert item.batch_dim == 1 and item.shape == ((7 if asked else 2), None, 6)
    assert loaded(torch.randn(item.shape[0] or 0, 5, 6)).shape == (5, 3)
    again = export(out, "--to", tmp_path / "again.lowbit", "--input-shape", f"{item.shape[0]}x6")  # the file says which dimension it is
    assert again.exit_code == 0, again.output
    assert lowbit.load(tmp_path / "again.lowbit").packed_graph.inputs[0] == item


def test_a_dimension_that_samples_do_not_have_is_refused(nets: Path, tmp_path: Path) -> None:
    result = export("--model", f"{nets}:Steps", "--input-shape", "7x6", "--to", tmp_path / "m.lowbit", "--batch-dim", "5")
    assert result.exit_code == 2 and "--batch-dim 5" in result.output and not (tmp_path / "m.lowbit").exists()


@pytest.mark.parametrize(
    ("net", "shape", "dynamic", "sizes"),
    [
        ("Two", "3x8x8", "H,W", (None, 3, None, None)),
        ("Two", "3x8x8", "2,3", (None, 3, None, None)),
        ("Pointwise", "7x6", "1", (None, None, 6)),
    ],
)
def test_sizes_are_open_by_letter_or_number(
    nets: Path, tmp_path: Path, net: str, shape: str, dynamic: str, sizes: tuple[int | None, ...]
) -> None:
    out = tmp_path / "open.lowbit"
    result = export("--model", f"{nets}:{net}", "--input-shape", shape, "--to", out, "--dynamic", dynamic)
    assert result.exit_code == 0, result.output
    assert lowbit.load(out).packed_graph.inputs[0].shape == sizes


@pytest.mark.parametrize("dynamic", ["Q", "9", "0"])
def test_dimensions_that_there_are_not_are_refused(nets: Path, tmp_path: Path, dynamic: str) -> None:
    result = export("--model", f"{nets}:Two", "--input-shape", "3x8x8", "--to", tmp_path / "m.lowbit", "--dynamic", dynamic)
    assert result.exit_code == 2 and dynamic in result.output and not (tmp_path / "m.lowbit").exists()


def test_a_quantized_folder_becomes_a_c_file(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["quantize", "--out", str(tmp_path / "o"), "-w", "4", "--no-onnx"])
    assert done.exit_code == 0, done.output
    result = export(tmp_path / "o", "--to", tmp_path / "net.c", "--rounding", "single")
    assert result.exit_code == 0, result.output
    printed = " ".join(result.output.split())
    assert "of codes equal those of the simulation in float; the largest difference is" in printed
    assert "RAM 3,360 bytes (arena 3,072 + 288 for unpacked weights)" in printed
    assert "int net_run(const int8_t *input, int8_t *output);" in (tmp_path / "net.h").read_text()
    refused = export("--to", tmp_path / "float.c")
    assert refused.exit_code == 2 and "it reads float values" in " ".join(refused.output.split()) and not (tmp_path / "float.c").exists()
