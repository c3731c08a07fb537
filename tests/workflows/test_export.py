from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.formats.networks import quantized
from tests.networks import BranchNet, TinyNet
from torch import Tensor, nn

import lowbit.methods.post_training.round_to_nearest
from lowbit.errors import CalibrationError, DataError, GraphError, LayerError, OutputError, ParityError, SpecError
from lowbit.formats.checks.parity import Parity
from lowbit.formats.onnx.sessions import load_onnx
from lowbit.formats.program.program import Program
from lowbit.inputs import Inputs, tensors_of
from lowbit.spec import BitPolicy
from lowbit.workflows.export import export
from lowbit.workflows.load import load
from lowbit.workflows.quantize import quantize

MODULE = importlib.import_module("lowbit.workflows.export")  # the name lowbit.export is the function
IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_the_report_of_an_onnx_file_holds_size_parity_speed_and_kernels(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    report = export(quantized(TinyNet(), IMAGE), path, sample=IMAGE)
    assert (report.path, report.format, report.size_bytes) == (path, "onnx", path.stat().st_size)
    assert report.parity.passed
    assert report.parity.samples >= 256
    assert report.integer is not None
    assert (report.integer.conv_total, report.integer.linear_total) == (3, 1)
    assert report.speed is not None
    assert min(report.speed.float_ms, report.speed.quantized_ms) > 0
    assert any("not faster" in note for note in report.notes) == (not report.speed.is_faster)
    lines = str(report).splitlines()
    assert lines[0] == f"{path}: {report.size_bytes:,} bytes"
    assert lines[1].startswith("parity passed: largest difference ")
    assert list(tmp_path.iterdir()) == [path]


def test_the_report_of_a_packed_file_holds_size_and_parity(tmp_path: Path) -> None:
    path = tmp_path / "m.lowbit"
    report = export(quantized(TinyNet(), IMAGE), path, sample=IMAGE)
    assert (report.path, report.format, report.size_bytes) == (path, "lowbit", path.stat().st_size)
    assert report.parity.passed
    assert report.parity.max_abs_error == 0
    assert (report.speed, report.integer) == (None, None)


@pytest.mark.parametrize("name", ["m.pt", "m", "m.ONNX"])
def test_an_unknown_suffix_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(SpecError, match=rf"cannot tell the format from '{name}'\. Allowed suffixes: \.lowbit, \.onnx, \.c"):
        export(TinyNet(), tmp_path / name, sample=IMAGE)


@pytest.mark.parametrize("suffix", [".lowbit", ".onnx", ".c"])
@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (torch.zeros(0, 6), r"sample, input 0 of shape \(0, 6\): holds no value"),
        (torch.full((4, 6), float("nan")), r"sample, input 0 .*: 24 of 24 values are NaN"),
        (torch.zeros(4, 7), "Linear cannot take inputs of shape 7"),
    ],
    ids=["empty", "NaN", "shape"],
)
def test_a_sample_that_proves_nothing_is_refused(sample: Tensor, message: str, suffix: str, tmp_path: Path) -> None:
    model = quantized(nn.Linear(6, 2), torch.rand(8, 6))
    with pytest.raises(CalibrationError, match=message):
        export(model, tmp_path / f"net{suffix}", sample=sample)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("setting", ["requantizer", "rounding"])
def test_unknown_settings_of_a_c_file_are_refused(setting: str, tmp_path: Path) -> None:
    x = torch.rand(8, 6)
    with pytest.raises(SpecError, match=f"{setting} must be one of .*; got 'other'"):
        export(quantized(nn.Linear(6, 2), x), tmp_path / "net.c", sample=x, **{setting: "other"})  # type: ignore[arg-type]


@pytest.mark.parametrize("suffix", ["onnx", "lowbit"])
def test_a_file_that_fails_its_check_is_not_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    def failing(*_: object) -> Parity:
        return Parity(2, 1.0, 0.5, 3.0, passed=False, diverging="layer 'conv1'")

    monkeypatch.setattr(MODULE, "check_onnx_parity", failing)
    monkeypatch.setattr(MODULE, "check_packed_parity", failing)
    path = tmp_path / f"m.{suffix}"
    path.write_text("the file before")
    with pytest.raises(ParityError, match="first diverges at layer 'conv1'"):
        export(quantized(TinyNet(), IMAGE), path, sample=IMAGE)
    assert path.read_text() == "the file before"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("suffix", ["onnx", "lowbit"])
def test_a_folder_that_does_not_exist_is_an_output_error(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(OutputError, match="cannot write"):
        export(quantized(TinyNet(), IMAGE), tmp_path / "absent" / f"m.{suffix}", sample=IMAGE)


@pytest.mark.parametrize("suffix", ["onnx", "lowbit"])
def test_a_network_without_one_graph_is_refused_with_the_line_that_blocks(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(GraphError, match=r"`if x\.mean\(\) > 0:`"):
        export(quantized(BranchNet(), IMAGE), tmp_path / f"m.{suffix}", sample=IMAGE)


def test_exporting_leaves_the_network_as_it_was(tmp_path: Path) -> None:
    model = quantized(TinyNet(), IMAGE).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    export(model, tmp_path / "m.onnx", sample=IMAGE, measure_speed=False)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_check_runs_on_the_given_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []

    def check(_model: object, program: Program, _path: object) -> Parity:
        seen.append(program.sample.args[0])
        return Parity(2, 0.0, 1.0, 90.0, passed=True)

    monkeypatch.setattr(MODULE, "check_onnx_parity", check)
    export(quantized(TinyNet(), IMAGE), tmp_path / "m.onnx", sample=IMAGE, measure_speed=False)
    assert torch.equal(seen[0], IMAGE)


class Outputs(nn.Module):
    """Two layers whose results are returned as ``make`` says."""

    def __init__(self, make: Callable[[Tensor, Tensor, Tensor], object]) -> None:
        super().__init__()
        self.scores, self.boxes, self.make = nn.Linear(6, 3), nn.Linear(6, 4), make

    def forward(self, x: Tensor) -> object:
        return self.make(x, self.scores(x), self.boxes(x))


ROWS = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("make", "given", "names"),
    [
        (lambda x, a, b: {"scores": a, "boxes": b, "loss": None}, (), ["scores", "boxes"]),
        (lambda x, a, b: (a, b), (), ["out0", "out1"]),
        (lambda x, a, b: (a, a), (), ["out0", "out1"]),
        (lambda x, a, b: {"x": x, "twice": [a, a]}, (), ["x", "twice.out0", "twice.out1"]),
        (lambda x, a, b: {"linear_1": a, "linear": b}, (), ["linear_1", "linear"]),
        (lambda x, a, b: (a, b), ("classes", "places"), ["classes", "places"]),
    ],
)
def test_outputs_of_an_onnx_file_carry_the_names_of_the_networks_outputs(
    make: Callable[[Tensor, Tensor, Tensor], object], given: tuple[str, ...], names: list[str], tmp_path: Path
) -> None:
    model = quantize(Outputs(make).eval(), method="round_to_nearest", calibration=[ROWS])
    export(model, tmp_path / "m.onnx", sample=ROWS, measure_speed=False, output_names=given)
    results = load_onnx(tmp_path / "m.onnx")(Inputs((ROWS,)))
    assert list(results) == names
    for wanted, got in zip(tensors_of(model(ROWS)), results.values(), strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-3, rtol=1e-3)


def test_names_must_fit_the_outputs(tmp_path: Path) -> None:
    model = quantize(Outputs(lambda x, a, b: (a, b)).eval(), method="round_to_nearest", calibration=[ROWS])
    with pytest.raises(SpecError, match="the network has 2 output tensors"):
        export(model, tmp_path / "m.onnx", sample=ROWS, output_names=["one"])
    for names in (["one", "one"], ["one", ""], "ab"):
        with pytest.raises(SpecError, match="Give each a name of its own"):
            export(model, tmp_path / "m.onnx", sample=ROWS, output_names=names)
    with pytest.raises(SpecError, match="'x' is the name of an input or a weight"):
        export(model, tmp_path / "m.onnx", sample=ROWS, output_names=["x", "y"])
    with pytest.raises(SpecError, match="only ONNX files name their outputs"):
        export(model, tmp_path / "m.lowbit", sample=ROWS, output_names=["one", "two"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["m.onnx", "m.lowbit"])
def test_a_network_with_dropout_that_is_always_on_is_called_random(name: str, tmp_path: Path) -> None:
    model = quantize(
        Outputs(lambda x, a, b: nn.functional.dropout(a, 0.5, training=True)).eval(), method="round_to_nearest", calibration=[ROWS]
    )
    with pytest.raises(GraphError, match="is random"):
        export(model, tmp_path / name, sample=ROWS)


@pytest.mark.parametrize("name", ["m.onnx", "m.lowbit"])
def test_a_network_that_torch_fx_traced_is_written_whole(name: str, tmp_path: Path) -> None:
    traced = torch.fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval())
    model = quantize(traced, method="round_to_nearest", calibration=[IMAGE])
    assert export(model, tmp_path / name, sample=IMAGE, measure_speed=False).parity.passed
    if name == "m.lowbit":
        assert torch.equal(load(tmp_path / name)(IMAGE), model(IMAGE))


@pytest.mark.parametrize("kernels", [False, True])
def test_nan_gives_nan_or_is_refused(kernels: bool, tmp_path: Path) -> None:
    model = quantize(TinyNet().eval(), method="round_to_nearest", calibration=[IMAGE])
    export(model, tmp_path / "m.lowbit", sample=IMAGE, kernels=kernels)
    broken = IMAGE.clone()
    broken[1, 0, 2, 2] = float("nan")
    assert load(tmp_path / "m.lowbit")(broken).isnan().any(1).tolist() == model(broken).isnan().any(1).tolist() == [False, True]
    checked = load(tmp_path / "m.lowbit", check_finite=True)
    assert checked(IMAGE).isfinite().all()
    with pytest.raises(DataError, match="1 of 384 values are NaN or infinite in sample 1"):
        checked(broken)


def test_nan_becomes_some_number_in_onnx_runtime(tmp_path: Path) -> None:
    ort = pytest.importorskip("onnxruntime")
    model = quantize(TinyNet().eval(), method="round_to_nearest", calibration=[IMAGE])
    export(model, tmp_path / "m.onnx", sample=IMAGE, measure_speed=False)
    broken = IMAGE.clone()
    broken[1, 0, 2, 2] = float("nan")
    session = ort.InferenceSession(tmp_path / "m.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: broken.numpy()})
    assert torch.from_numpy(found).isfinite().all()  # so inputs have to be checked before the call, as lowbit.export says


@pytest.mark.parametrize("activation", [nn.SiLU(), nn.Hardswish(), nn.LeakyReLU(0.1), nn.GELU(), nn.PReLU(), nn.Sigmoid()])
def test_convolutions_before_activation_functions_run_in_integers(activation: nn.Module, tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), activation, nn.Conv2d(8, 8, 1), activation]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()
    report = export(quantize(model, method="round_to_nearest", calibration=[IMAGE]), tmp_path / "m.onnx", sample=IMAGE, measure_speed=False)
    assert report.integer is not None
    assert (report.integer.conv_integer, report.integer.conv_total) == (2, 2)
    policy = BitPolicy.uniform(8, 8, before_functions="float")
    plain = quantize(model, method="round_to_nearest", policy=policy, calibration=[IMAGE])
    kept = export(plain, tmp_path / "m.onnx", sample=IMAGE, measure_speed=False).integer
    assert kept is not None
    assert kept.conv_integer == 0


def test_a_c_file_is_written_with_its_header_and_checked(tmp_path: Path) -> None:
    x = torch.rand(32, 1, 8, 8)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    small = lowbit.quantize(net, method="round_to_nearest", weight_bits=4, calibration=x)
    report = export(small, tmp_path / "chip.c", sample=x, requantizer="dyadic")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chip.c", "chip.h"]
    assert "dyadic arithmetic" in (tmp_path / "chip.c").read_text()
    assert (report.format, report.size_bytes, report.parity.passed) == ("c", (tmp_path / "chip.c").stat().st_size, True)
    assert report.codes is not None and report.codes.farthest <= 1
    assert report.memory is not None and report.memory.arena_bytes == 4 * 6 * 6 and report.memory.io_bytes == 64 + 3
    packed = export(small, tmp_path / "chip.lowbit", sample=x)
    assert abs(packed.size_bytes - report.memory.packed_bytes) < 200  # without what the file says of its origin
    assert f"the .lowbit file takes {report.memory.packed_bytes:,} bytes" in str(report)


def test_what_a_c_file_cannot_be_leaves_nothing_behind(tmp_path: Path) -> None:
    x = torch.rand(32, 6)
    small = lowbit.quantize(nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3)), method="round_to_nearest", calibration=x)
    with pytest.raises(LayerError, match=r"layer '1' \(gelu\): this operation has no integer form"):
        export(small, tmp_path / "net.c", sample=x)
    with pytest.raises(SpecError, match="are run by other runtimes"):
        export(small, tmp_path / "net.c", sample=x, kernels=True)
    with pytest.raises(SpecError, match="multiplies in float32"):
        export(small, tmp_path / "net.c", sample=x, requantizer="onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_c_file_without_a_compiler_says_that_it_was_not_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowbit.workflows.export_c.c_compiler", lambda: None)
    x = torch.rand(32, 6)
    report = export(lowbit.quantize(nn.Linear(6, 3), method="round_to_nearest", calibration=x), tmp_path / "net.c", sample=x)
    assert any("there is no C compiler" in note for note in report.notes) and not any("gives exactly" in note for note in report.notes)
