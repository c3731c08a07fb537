"""Trained networks in files: batch norms stay behind their layers, levels stand for other values, and zero is often no level."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from onnx import numpy_helper
from tests.networks import settled
from torch import Tensor, nn

from lowbit.formats.program.program import export_program
from lowbit.network.insert import set_input_quantizer, set_weight_quantizer
from lowbit.qat.prepare import prepare
from lowbit.quantizers import UniformQuantizer
from lowbit.quantizers.base import TableQuantizer
from lowbit.quantizers.grid import Grid, GridQuantizer
from lowbit.quantizers.ops import mark_codebook
from lowbit.quantizers.qtensor import CodebookDecoder, QTensor
from lowbit.spec import BitPolicy, Granularity
from lowbit.workflows.export import ExportReport, export
from lowbit.workflows.load import load

IMAGE = torch.randn(3, 3, 12, 12, generator=torch.Generator().manual_seed(0))


class Chain(nn.Module):
    """Convolutions with batch norms; the input of ``conv2`` is signed, that of ``conv3`` is not. The norms' scales have either sign."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.norm2, self.relu2 = nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.BatchNorm2d(8), nn.ReLU()
        self.conv3, self.norm3 = nn.Conv2d(8, 6, 1, bias=False), nn.BatchNorm2d(6)
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu2(self.norm2(self.conv2(self.norm1(self.conv1(x)))))
        return self.head(self.pool(self.norm3(self.conv3(x))).flatten(1))


def chain() -> nn.Module:
    torch.manual_seed(0)
    model = Chain()
    for norm in (model.norm1, model.norm2, model.norm3):
        nn.init.uniform_(norm.weight, -1.5, 1.5)
        nn.init.normal_(norm.bias, std=0.3)
    return settled(model, IMAGE)


def trained(method: str, bits: int, model: nn.Module | None = None, **options: object) -> nn.Module:
    policy = BitPolicy.uniform(bits, bits, first_last=None)
    return prepare(model or chain(), method=method, policy=policy, sample=IMAGE, **options).eval()


def write(model: nn.Module, path: Path, sample: Tensor = IMAGE) -> ExportReport:
    return export(model, path, sample=sample, measure_speed=False)


def check_both(model: nn.Module, folder: Path, sample: Tensor = IMAGE) -> ExportReport:
    """Write both files; the packed one must equal the network exactly. The report of the ONNX file."""
    write(model, folder / "m.lowbit", sample)
    with torch.no_grad():
        assert torch.equal(load(folder / "m.lowbit")(sample), model(sample))
    return write(model, folder / "m.onnx", sample)


def integer_counts(report: ExportReport) -> tuple[int, int, int]:
    assert report.integer is not None
    return report.integer.conv_integer, report.integer.conv_total, report.integer.linear_integer


def nodes_of(path: Path, kind: str) -> list[onnx.NodeProto]:
    return [node for node in onnx.load(path).graph.node if node.op_type == kind]


def content(path: Path, name: str) -> torch.Tensor:
    (tensor,) = [tensor for tensor in onnx.load(path).graph.initializer if tensor.name == name]
    return torch.from_numpy(numpy_helper.to_array(tensor).copy())


@pytest.mark.slow
@pytest.mark.parametrize("offset", ["signed", "never"])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_lsq_runs_in_integers_behind_folded_norms(tmp_path: Path, bits: int, offset: str) -> None:
    report = check_both(trained("lsq", bits, offset=offset), tmp_path)
    assert nodes_of(tmp_path / "m.onnx", "BatchNormalization") == []
    assert report.parity.excess < 0.05
    # one signed bit without an offset is -s and +s: no code of uint8 stands for 0, so what reads such an input is in float
    is_binary = bits == 1 and offset == "never"
    # conv3 ends in a pooling that is not quantized
    assert integer_counts(report) == ((0 if is_binary else 2), 3, (0 if is_binary else 1))
    assert any("zero point 0.5, which is not whole" in note for note in report.notes) == is_binary
    assert any(note.endswith("before GlobalAveragePool: conv3") for note in report.notes)


@pytest.mark.parametrize(("method", "bits"), [("dorefa", 2), ("pact", 4), ("ewgs", 1), ("ewgs", 3)])
def test_zero_midway_between_two_levels_of_a_weight_runs_in_integers(tmp_path: Path, method: str, bits: int) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)
    )
    torch.manual_seed(0)
    policy = BitPolicy.uniform(bits, bits, first_last=8)
    quantized = prepare(settled(model, IMAGE), method=method, policy=policy, sample=IMAGE).eval()
    report = check_both(quantized, tmp_path)
    assert integer_counts(report)[:2] == (2, 3)
    assert report.notes == ("computed in float, because the result is the network's output: 6",)
    codes = content(tmp_path / "m.onnx", "3.weight.codes")
    assert len(codes[0].unique()) <= 2**bits
    assert not bool((codes == 0).any())  # odd multiples of half a step


def test_eight_bits_with_zero_midway_between_two_levels_stay_in_float_and_the_report_says_why(tmp_path: Path) -> None:
    report = check_both(trained("dorefa", 8), tmp_path)
    assert integer_counts(report) == (0, 3, 0)
    assert report.notes[0].startswith(
        "computed in float, because integer kernels cannot hold 8-bit levels with zero midway between two: conv1, conv2"
    )


class Fixed(GridQuantizer):
    """A grid that is given."""

    def __init__(self, bit_width: int, qmin: int, qmax: int, numbers: tuple[float, float, float, float]) -> None:
        super().__init__(bit_width, qmin, qmax)
        self.register_buffer("numbers", torch.tensor(numbers))
        self.numbers: Tensor

    def initialize(self, x: Tensor) -> None:
        """Nothing to set."""

    def grid(self, x: Tensor) -> Grid:
        return Grid(*self.numbers.unbind(0))


class Pair(nn.Module):
    def __init__(self, act: nn.Module, *, has_norm: bool = True) -> None:
        super().__init__()
        self.first, self.norm, self.act = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6) if has_norm else nn.Identity(), act
        self.second = nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.act(self.norm(self.first(x))))


def eight_bit_weights(model: nn.Module, *names: str, granularity: str = "per_channel") -> nn.Module:
    for name in names:
        layer = model.get_submodule(name)
        quantizer = UniformQuantizer(8, signed=True, symmetric=True, granularity=Granularity.parse(granularity))
        quantizer.initialize(layer.weight.detach())  # type: ignore[operator, union-attr]
        set_weight_quantizer(layer, quantizer)
    return model.eval()


def pair(act: nn.Module, between: TableQuantizer, *, granularity: str = "per_channel", has_norm: bool = True) -> nn.Module:
    """Two layers with 8-bit weights, an 8-bit input, and ``between`` at the input of the second."""
    torch.manual_seed(0)
    model = settled(Pair(act, has_norm=has_norm), IMAGE)
    if has_norm:
        nn.init.uniform_(model.norm.weight, -1, 1)  # type: ignore[union-attr, arg-type]
    set_input_quantizer(model.first, Fixed(8, 0, 255, (-2.56, 0.02, 0.02, 128.0)))  # type: ignore[arg-type]
    set_input_quantizer(model.second, between)  # type: ignore[arg-type]
    return eight_bit_weights(model, "first", "second", granularity=granularity)


GRIDS = {  # bits, qmin, qmax, (lower, step, scale, zero point), whether lower becomes a part of the bias, what comes before
    "whole_start": (4, 0, 15, (-0.6, 0.2, 0.07, 3.0), False, nn.Identity()),  # lower / step = -3: the quantizing zero point
    "whole_start_relu": (4, 0, 15, (-0.6, 0.2, 0.07, 3.0), False, nn.ReLU()),
    "start_between_steps": (4, 0, 15, (-0.55, 0.2, 0.07, 3.0), True, nn.Identity()),
    "start_between_steps_relu": (4, 0, 15, (-0.55, 0.2, 0.07, 3.0), True, nn.ReLU()),
    "start_between_steps_clip": (4, 0, 15, (-0.55, 0.5, 0.07, 3.0), True, nn.ReLU6()),
    "start_above_zero": (4, 0, 15, (0.13, 0.1, 0.3, 0.0), True, nn.ReLU()),
    "start_above_zero_whole": (4, 0, 15, (0.2, 0.1, 0.3, 0.0), True, nn.ReLU()),  # its zero point would be negative
    "signed_codes": (4, -8, 7, (0.0, 0.15, 1.0, 0.0), False, nn.Identity()),
    "signed_codes_shifted": (4, -8, 7, (0.05, 0.15, 1.0, -2.0), True, nn.Identity()),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", GRIDS)
def test_levels_may_start_anywhere_and_stand_for_other_values(tmp_path: Path, name: str) -> None:
    bits, qmin, qmax, numbers, is_shifted, act = GRIDS[name]
    report = check_both(pair(act, Fixed(bits, qmin, qmax, numbers)), tmp_path)
    assert report.parity.excess < 0.05
    assert integer_counts(report)[:2] == (1, 2)
    assert report.integer is not None
    assert report.integer.operators["QuantizeLinear"] == 1  # of the network's input
    path = tmp_path / "m.onnx"
    _, quantize = nodes_of(path, "QuantizeLinear")
    _, decode = (node for node in nodes_of(path, "DequantizeLinear") if content(path, node.input[1]).dim() == 0)
    lower, step, scale, zero_point = numbers
    assert content(path, quantize.input[1]).item() == pytest.approx(step)
    assert content(path, quantize.input[2]).item() == (0 if is_shifted else round(-lower / step) - qmin)
    assert content(path, decode.input[1]).item() == pytest.approx(scale)
    assert content(path, decode.input[2]).item() == zero_point - qmin


def test_a_shift_behind_something_that_is_no_layer_is_subtracted(tmp_path: Path) -> None:
    model = pair(nn.Hardswish(), Fixed(4, 0, 15, (-0.55, 0.2, 0.07, 3.0)))
    report = check_both(model, tmp_path)
    assert len(nodes_of(tmp_path / "m.onnx", "Sub")) == 1
    assert report.parity.excess < 0.01


@pytest.mark.parametrize(
    ("numbers", "why"),
    [
        ((-0.6, 0.2, 0.07, 2.5), "the zero point 2.5, which is not whole"),
        ((-0.6, 0.2, 0.07, -4.0), "the zero point -4, which is outside their container"),
        ((-0.6, 0.2, -0.07, 3.0), "16 codes of scale -0.07"),
    ],
)
def test_levels_that_uint8_cannot_decode_are_computed_in_float(
    tmp_path: Path, numbers: tuple[float, float, float, float], why: str
) -> None:
    report = check_both(pair(nn.ReLU(), Fixed(4, 0, 15, numbers)), tmp_path)
    assert integer_counts(report)[:2] == (0, 2)
    assert report.parity.excess < 0.01
    assert f"computed in float, because uint8 codes cannot hold activations with {why}: fake_quantize_grid_1" in report.notes


def test_a_norm_behind_a_layer_goes_into_scales_and_bias(tmp_path: Path) -> None:
    model = pair(nn.ReLU(), Fixed(8, 0, 255, (0.0, 0.02, 0.02, 0.0)), granularity="per_tensor")
    norm, first = model.norm, model.first
    assert isinstance(norm, nn.BatchNorm2d)
    norm.weight.data[:3] = torch.tensor([-0.7, 0.0, 1.3])
    report = check_both(model, tmp_path)
    assert integer_counts(report)[:2] == (1, 2)
    assert norm.running_var is not None
    factor = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach()
    codes, scale = content(tmp_path / "m.onnx", "first.weight.codes"), content(tmp_path / "m.onnx", "first.weight.scale")
    assert scale.shape == (6,)  # it was one for the tensor
    assert not bool(codes[1].any())
    decoded = codes.float() * scale[:, None, None, None]
    torch.testing.assert_close(decoded, (first.weight * factor[:, None, None, None]).detach(), rtol=1e-5, atol=1e-7)  # type: ignore[operator]
    with torch.no_grad():
        before = model.first.parametrizations.weight[0].quantizer.encode(model.first.parametrizations.weight.original).codes  # type: ignore[union-attr, index, operator]
    assert torch.equal(codes[0], -before[0])
    assert torch.equal(codes[2], before[2])


def test_a_norm_that_turns_the_lowest_of_256_codes_round_stays_and_the_report_says_why(tmp_path: Path) -> None:
    model = pair(nn.ReLU(), Fixed(8, 0, 255, (0.0, 0.02, 0.02, 0.0)))
    model.norm.weight.data[:] = torch.tensor([-1.0, 1.0, 1.0, 1.0, 1.0, 1.0])  # type: ignore[union-attr, operator]
    with torch.no_grad():
        model.first.parametrizations.weight.original[0, 0, 0, 0] = -10.0  # type: ignore[union-attr, index] # saturates at -128
    report = check_both(model, tmp_path)
    assert "computed in float, because int8 cannot hold 128, the negative of a code: first" in report.notes
    assert integer_counts(report)[:2] == (0, 2)
    assert len(nodes_of(tmp_path / "m.onnx", "BatchNormalization")) == 1


def test_a_product_and_a_sum_behind_a_layer_are_folded_too(tmp_path: Path) -> None:
    class Scaled(Pair):
        def __init__(self) -> None:
            super().__init__(nn.ReLU(), has_norm=False)
            self.gain = nn.Parameter(torch.tensor([0.5, -2.0, 1.0, 3.0, 0.1, 1.0]).reshape(6, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.act(1 - (self.first(x) * self.gain.abs()) / 0.7))

    model = settled(Scaled(), IMAGE)
    set_input_quantizer(model.first, Fixed(8, 0, 255, (-2.56, 0.02, 0.02, 128.0)))  # type: ignore[arg-type]
    set_input_quantizer(model.second, Fixed(8, 0, 255, (0.0, 0.02, 0.02, 0.0)))  # type: ignore[arg-type]
    report = check_both(eight_bit_weights(model, "first", "second"), tmp_path)
    assert integer_counts(report)[:2] == (1, 2)
    for kind in ("Div", "Sub"):
        assert nodes_of(tmp_path / "m.onnx", kind) == []


def test_a_norm_is_not_folded_where_the_layer_has_another_reader(tmp_path: Path) -> None:
    class Two(Pair):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.first(x)
            return self.second(self.act(self.norm(y))), y.mean((2, 3))

    torch.manual_seed(0)
    model = settled(Two(nn.ReLU()), IMAGE)
    set_input_quantizer(model.first, Fixed(8, 0, 255, (-2.56, 0.02, 0.02, 128.0)))  # type: ignore[arg-type]
    set_input_quantizer(model.second, Fixed(8, 0, 255, (0.0, 0.02, 0.02, 0.0)))  # type: ignore[arg-type]
    report = write(eight_bit_weights(model, "first", "second"), tmp_path / "m.onnx")
    assert report.parity.passed
    assert len(nodes_of(tmp_path / "m.onnx", "BatchNormalization")) == 1
    assert report.notes[0].startswith("computed in float, because the result is not quantized before BatchNormalization")


def test_linear_layers_fold_their_norms(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(432, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 4))
    nn.init.uniform_(model[2].weight, -1, 1)
    quantized = trained("lsq", 4, settled(model, IMAGE))
    report = check_both(quantized, tmp_path)
    assert integer_counts(report) == (0, 0, 2)
    assert nodes_of(tmp_path / "m.onnx", "BatchNormalization") == []


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1, self.relu1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
        self.conv2, self.norm2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv3, self.norm3 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.norm1(self.conv1(x)))
        x = (self.norm3(self.conv3(self.norm2(self.conv2(x)).relu())) + x).relu()
        return self.head(x.mean((2, 3)))


def test_a_layer_that_ends_in_a_residual_sum_is_computed_in_float_without_its_norm(tmp_path: Path) -> None:
    torch.manual_seed(0)
    report = check_both(trained("lsq", 4, settled(Residual(), IMAGE)), tmp_path)
    assert integer_counts(report) == (1, 3, 1)  # conv2; measured, integer products that end in float are slower than float ones
    assert report.notes == (
        "computed in float, because the result is not quantized before Relu: conv1",
        "computed in float, because the result is not quantized before Add: conv3",
    )
    assert nodes_of(tmp_path / "m.onnx", "BatchNormalization") == []


class Uneven(TableQuantizer):
    """Levels with boundaries that are not midway between them."""

    tables = ("boundaries", "levels")

    def __init__(self) -> None:
        super().__init__(2, Granularity.tensor())
        self.boundaries, self.levels = torch.tensor([0.1, 0.2, 1.1]), torch.tensor([0.0, 0.5, 1.0, 3.0])

    def initialize(self, x: Tensor) -> None:
        """Nothing to set."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_exporting():
            marked: Tensor = mark_codebook(x, self.boundaries, self.levels)
            return marked
        return self.encode(x).decode()

    def encode(self, x: Tensor) -> QTensor:
        codes = torch.bucketize(x, self.boundaries).to(torch.uint8)
        return QTensor(codes, CodebookDecoder(self.levels[None], self.granularity), 2)


def test_codebooks_of_activations_may_have_any_boundaries(tmp_path: Path) -> None:
    report = check_both(pair(nn.ReLU(), Uneven()), tmp_path)
    assert report.parity.passed
    assert report.parity.excess < 0.01


@pytest.mark.parametrize("method", ["lsq", "pact", "dorefa", "ewgs"])
def test_a_file_holds_a_grid_and_not_the_way_from_parameters_to_it(tmp_path: Path, method: str) -> None:
    program = export_program(trained(method, 4), IMAGE)
    called = [node for node in program.exported.graph.nodes if node.op == "call_function"]
    for node in called:
        assert any(
            source.op == "call_function" or source.name in program.exported.graph_signature.user_inputs for source in node.all_input_nodes
        )
    quantizers = [node for node in called if "fake_quantize_grid" in str(node.target)]
    assert len(quantizers) == 4
    for node in quantizers:
        assert [argument.op for argument in node.args[1:5]] == ["placeholder"] * 4
