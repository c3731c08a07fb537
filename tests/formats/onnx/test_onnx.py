from __future__ import annotations

import sys
from pathlib import Path

import onnx
import pytest
import torch
from tests.formats.networks import quantized
from tests.networks import LoopNet, TinyNet, Torture, TwoInputNet, settled
from torch import Tensor, nn
from torch.nn import functional as F

import lowbit.methods.post_training.round_to_nearest  # noqa: F401 - registers the method
from lowbit.errors import GraphError, MissingExtraError, SpecError
from lowbit.formats.onnx.sessions import load_onnx
from lowbit.inputs import Inputs
from lowbit.network.insert import set_input_quantizer, set_output_quantizer
from lowbit.network.surgery.equalize import ChannelClip
from lowbit.quantizers import CodebookQuantizer, UniformQuantizer
from lowbit.spec import BitPolicy
from lowbit.workflows.export import ExportReport, export
from lowbit.workflows.quantize import quantize

IMAGE = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Same(nn.Module):
    """A convolution that pads as TensorFlow does: more below and to the right."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Block(nn.Module):
    """A residual block whose operations are modules, so that every tensor can be quantized."""

    def __init__(self, channels: int, act: type[nn.Module]) -> None:
        super().__init__()
        self.conv1, self.act1 = nn.Conv2d(channels, channels, 3, padding=1), act()
        self.conv2, self.act2 = nn.Conv2d(channels, channels, 1), act()

    def forward(self, x: Tensor) -> Tensor:
        return self.act2(self.conv2(self.act1(self.conv1(x))) + x)


class Everything(nn.Module):
    """Padding, clips, pooling, concatenation, residual add and a linear layer."""

    def __init__(self, act: type[nn.Module] = nn.ReLU6) -> None:
        super().__init__()
        self.stem, self.act = nn.Conv2d(3, 8, 3, padding=1), act()
        self.same, self.act_same = Same(8), act()
        self.pool = nn.MaxPool2d(2)
        self.left, self.right = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=2, dilation=2)
        self.block = Block(16, act)
        self.mean, self.flatten, self.head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.act_same(self.same(self.act(self.stem(x)))))
        x = self.block(torch.cat([self.left(x), self.right(x)], 1))
        return self.head(self.flatten(self.mean(x)))


def rounded(model: nn.Module, *inputs: Tensor, weight_bits: int = 8, activation_bits: int = 8) -> nn.Module:
    policy = BitPolicy.uniform(weight_bits, activation_bits, first_last=None)
    batch = inputs if len(inputs) > 1 else inputs[0]
    return quantize(settled(model, *inputs), method="round_to_nearest", policy=policy, calibration=[batch])


def write(model: nn.Module, path: Path, sample: object = IMAGE, **options: str) -> ExportReport:
    return export(model, path, sample=sample, measure_speed=False, **options)  # type: ignore[arg-type]


def initializers(path: Path) -> dict[str, onnx.TensorProto]:
    return {tensor.name: tensor for tensor in onnx.load(path).graph.initializer}


@pytest.mark.parametrize("activation", [nn.ReLU, nn.ReLU6])
def test_every_layer_of_a_network_of_modules_runs_in_integers(tmp_path: Path, activation: type[nn.Module]) -> None:
    report = write(rounded(Everything(activation), IMAGE), tmp_path / "m.onnx")
    assert report.integer is not None
    assert (report.integer.conv_integer, report.integer.conv_total) == (6, 6)
    assert (report.integer.linear_integer, report.integer.linear_total) == (1, 1)
    assert report.integer.operators["QLinearAdd"] == 1
    assert report.integer.operators["QLinearConcat"] == 1
    assert report.integer.operators["QuantizeLinear"] == 1  # the input; nothing in between goes through float
    assert report.notes == ()
    assert report.parity.sqnr_db > 30


def test_padding_before_a_convolution_becomes_its_own(tmp_path: Path) -> None:
    write(rounded(Everything(), IMAGE), tmp_path / "m.onnx")
    nodes = onnx.load(tmp_path / "m.onnx").graph.node
    assert [node for node in nodes if node.op_type == "Pad"] == []
    pads = [list(a.ints) for node in nodes if node.op_type == "Conv" for a in node.attribute if a.name == "pads"]
    assert [0, 0, 1, 1] in pads


@pytest.mark.parametrize(("weight_bits", "activation_bits"), [(8, 8), (4, 4), (2, 2), (1, 5)])
def test_fewer_bits_stay_in_integer_kernels_and_in_their_range(tmp_path: Path, weight_bits: int, activation_bits: int) -> None:
    report = write(rounded(Everything(), IMAGE, weight_bits=weight_bits, activation_bits=activation_bits), tmp_path / "m.onnx")
    assert report.integer is not None
    assert report.integer.conv_integer == report.integer.conv_total == 6
    held = initializers(tmp_path / "m.onnx")
    codes = [onnx.numpy_helper.to_array(tensor) for name, tensor in held.items() if name.endswith("weight.codes")]
    assert len(codes) == 7
    for weight in codes:
        assert weight.dtype == "int8"
        assert max(len(set(channel.ravel().tolist())) for channel in weight) <= 2**weight_bits
    clips = [node for node in onnx.load(tmp_path / "m.onnx").graph.node if node.op_type == "Clip"]
    assert bool(clips) == (activation_bits < 8)


class Clipped(nn.Module):
    def __init__(self, lowest: float, highest: float) -> None:
        super().__init__()
        self.first, self.act, self.second = nn.Conv2d(3, 4, 1), nn.Hardtanh(lowest, highest), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.act(self.first(x)))


@pytest.mark.parametrize(
    ("bounds", "qmin", "zero_point"),
    [((0.0, 1.0), 0, 0.0), ((-0.5, 0.5), 0, 100.0), ((0.0, 6.0), -128, -28.0), ((0.2, 0.7), -128, -28.0)],
)
def test_a_clip_narrower_than_the_grid_is_applied_to_the_codes(
    tmp_path: Path, bounds: tuple[float, float], qmin: int, zero_point: float
) -> None:
    model = Clipped(*bounds)
    for module, place in ((model.first, set_input_quantizer), (model.act, set_output_quantizer)):
        quantizer = UniformQuantizer(8, signed=qmin < 0, symmetric=False)
        quantizer.set_parameters(torch.tensor(0.03), torch.tensor(zero_point))
        place(module, quantizer)
    model = quantized_weights(model)
    report = write(model, tmp_path / "m.onnx")
    assert report.parity.passed
    assert report.integer is not None
    assert report.integer.conv_integer == 1  # the second one is the network's output
    clips = [node for node in onnx.load(tmp_path / "m.onnx").graph.node if node.op_type == "Clip"]
    assert all(node.input[0].endswith(".QuantizeLinear") for node in clips)
    assert report.notes == ("computed in float, because the result is the network's output: second",)


def test_a_limit_of_each_channel_is_applied_between_integer_layers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Everything().eval()
    with torch.no_grad():
        model.stem.weight *= torch.exp2(torch.linspace(-3, 3, 8))[:, None, None, None]
    equalized = quantize(model, method="dfq", calibration=IMAGE)
    assert isinstance(equalized.act, ChannelClip)
    report = write(equalized, tmp_path / "m.onnx")
    assert report.integer is not None
    assert (report.integer.conv_integer, report.integer.linear_integer) == (6, 1)
    assert report.integer.operators["Min"] == 2
    assert report.parity.sqnr_db > 30


def quantized_weights(model: nn.Module) -> nn.Module:
    """8-bit weights in every layer, activations as they are."""
    from lowbit.network.insert import set_weight_quantizer
    from lowbit.network.layers import output_channel_axis, quantizable_layers
    from lowbit.spec import Granularity

    for layer in quantizable_layers(model).values():
        quantizer = UniformQuantizer(8, signed=True, symmetric=True, granularity=Granularity.channel(output_channel_axis(layer)))
        quantizer.initialize(layer.weight.detach())  # type: ignore[operator, union-attr]
        set_weight_quantizer(layer, quantizer)
    return model.eval()


def test_four_bit_containers_halve_the_weights_and_compute_the_same(tmp_path: Path) -> None:
    model = rounded(nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3)), IMAGE, weight_bits=4)
    wide, narrow = write(model, tmp_path / "8.onnx"), write(model, tmp_path / "4.onnx", weight_container="int4")
    assert narrow.size_bytes < 0.62 * wide.size_bytes
    assert initializers(tmp_path / "4.onnx")["2.weight.codes"].data_type == onnx.TensorProto.INT4
    assert narrow.parity.passed
    assert narrow.notes == ("computed in float, because runtimes decode 4-bit codes: 0, 2",)


def test_an_unknown_container_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="'int8' or 'int4', got 'int2'"):
        write(quantized(TinyNet(), IMAGE), tmp_path / "m.onnx", weight_container="int2")


@pytest.mark.parametrize("kind", ["codebook", "sum"])
def test_levels_that_are_not_evenly_spaced_stay_in_float_and_the_report_says_so(tmp_path: Path, kind: str) -> None:
    report = write(quantized(TinyNet(), IMAGE, weights=kind), tmp_path / "m.onnx")
    assert report.integer is not None
    assert report.integer.conv_integer == report.integer.linear_integer == 0
    assert report.notes == (
        f"computed in float, because integer kernels cannot hold the levels of a {kind} quantizer: stem, conv1, conv2, head",
    )


def test_a_float_layer_between_quantizers_is_not_quantized_by_the_runtime(tmp_path: Path) -> None:
    model = Clipped(0.0, 6.0)
    for module, place in ((model.first, set_input_quantizer), (model.act, set_output_quantizer)):
        quantizer = UniformQuantizer(8, signed=False, symmetric=False)
        quantizer.set_parameters(torch.tensor(0.02), torch.tensor(90.0))
        place(module, quantizer)
    report = write(model.eval(), tmp_path / "m.onnx")
    assert report.integer is not None
    assert report.integer.conv_integer == 0
    assert report.parity.excess < 0.01


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(3, 6, 3, groups=3),
        nn.Conv2d(3, 5, 3, dilation=2, stride=2),
        nn.ConvTranspose2d(3, 4, 3, stride=2),
        nn.Conv2d(3, 1, 16),
        nn.Sequential(nn.Flatten(2), nn.Conv1d(3, 7, 5)),
        nn.Sequential(nn.Flatten(), nn.Linear(768, 3, bias=False)),
        nn.Linear(16, 3),
    ],
    ids=["depthwise", "dilated", "transposed", "one_output", "conv1d", "no_bias", "linear_on_maps"],
)
def test_every_kind_of_layer_is_exported_and_checked(tmp_path: Path, layer: nn.Module) -> None:
    report = write(quantized(layer, IMAGE), tmp_path / "m.onnx")
    assert report.parity.passed
    assert report.parity.sqnr_db > 45


def test_a_bias_too_large_for_its_accumulator_coarsens_the_next_to_no_weights_of_its_channel(tmp_path: Path) -> None:
    model = Clipped(0.0, 6.0)
    nn.init.constant_(model.first.bias, 3.0)  # type: ignore[arg-type]
    model.first.weight.data[0] *= 1e-12
    for module, place in ((model.first, set_input_quantizer), (model.act, set_output_quantizer)):
        quantizer = UniformQuantizer(8, signed=False, symmetric=False)
        quantizer.set_parameters(torch.tensor(0.03), torch.tensor(0.0))
        place(module, quantizer)
    report = write(quantized_weights(model), tmp_path / "m.onnx")
    assert report.integer is not None and report.integer.conv_integer == 1  # the other ends in the network's output
    assert report.parity.excess < 0.01
    scales = [onnx.numpy_helper.to_array(t) for name, t in initializers(tmp_path / "m.onnx").items() if name.endswith("weight.scale")]
    assert any(abs(scale[0] * 0.03 * 2**30 / 3.0 - 1) < 1e-5 for scale in scales if scale.ndim)


def test_a_codebook_of_activations_is_exported_as_comparisons(tmp_path: Path) -> None:
    model = quantized_weights(nn.Conv2d(3, 4, 3))
    quantizer = CodebookQuantizer(2)
    quantizer.set_levels(torch.tensor([-1.0, -0.1, 0.3, 1.5]))
    set_input_quantizer(model, quantizer)
    report = write(model, tmp_path / "m.onnx")
    assert report.parity.passed
    assert report.parity.changed_codes == 0


def test_the_batch_size_stays_open(tmp_path: Path) -> None:
    model = rounded(Everything(), IMAGE)
    write(model, tmp_path / "m.onnx", sample=IMAGE[:1])
    more = torch.cat([IMAGE, IMAGE + 0.1])
    (got,) = load_onnx(tmp_path / "m.onnx")(Inputs((more,))).values()
    with torch.no_grad():
        assert (got - model(more)).abs().max() < 0.05
    assert onnx.load(tmp_path / "m.onnx").graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"


def test_several_inputs_and_outputs_keep_their_names_and_order(tmp_path: Path) -> None:
    image, vector = torch.randn(2, 3, 8, 8), torch.randn(2, 5)
    model = quantized(Torture(), image, vector)
    report = write(model, tmp_path / "m.onnx", sample=(image, vector))
    graph = onnx.load(tmp_path / "m.onnx").graph
    assert [value.name for value in graph.input] == ["image", "vector"]
    assert [value.type.tensor_type.shape.dim[1].dim_value for value in graph.output] == [4, 2]
    assert report.parity.passed


def test_keyword_inputs_are_exported(tmp_path: Path) -> None:
    image, vector = torch.randn(2, 3, 8, 8), torch.randn(2, 5)
    report = write(quantized(TwoInputNet(), image, vector), tmp_path / "m.onnx", sample={"vector": vector, "image": image})
    assert report.parity.passed


def test_the_file_holds_standard_operators_and_no_trace_of_this_machine(tmp_path: Path) -> None:
    write(rounded(Everything(), IMAGE), tmp_path / "m.onnx")
    model = onnx.load(tmp_path / "m.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert [entry.domain for entry in model.opset_import] == [""]
    content = (tmp_path / "m.onnx").read_bytes()
    assert b"site-packages" not in content
    assert str(Path(__file__).parent).encode() not in content


class NoOnnxForm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(self.conv(x))


def test_an_operation_without_an_onnx_form_is_named(tmp_path: Path) -> None:
    with pytest.raises(GraphError, match=r"bessel_j0.*Export it to \.lowbit"):
        write(quantized(NoOnnxForm(), IMAGE), tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named_with_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=rf"needs {package}, .* pip install .*\[onnx\]"):
        write(nn.Conv2d(3, 4, 3), tmp_path / "m.onnx")


def test_a_float_network_is_exported_as_it_is(tmp_path: Path) -> None:
    report = write(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval(), tmp_path / "m.onnx")
    assert report.integer is not None
    assert (report.integer.conv_integer, report.integer.conv_total) == (0, 1)
    assert report.parity.max_abs_error < 1e-5


class Leaky(nn.Module):
    """A convolution whose result is changed before it is quantized by what runtimes can merge into it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act, self.norm = nn.Conv2d(3, 4, 3), nn.LeakyReLU(0.3), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.act(self.conv(x)))


def test_a_layer_that_runtimes_could_merge_with_its_quantizer_is_not_quantized_again(tmp_path: Path) -> None:
    model = Leaky()
    for module, place in ((model.conv, set_input_quantizer), (model.norm, set_output_quantizer)):
        quantizer = UniformQuantizer(8, signed=False, symmetric=False)
        quantizer.set_parameters(torch.tensor(0.02), torch.tensor(120.0))
        place(module, quantizer)
    report = write(quantized_weights(model), tmp_path / "m.onnx")
    assert report.notes == ("computed in float, because the result is not quantized before LeakyRelu: conv",)
    assert report.integer is not None
    assert report.integer.conv_integer == 0
    assert report.parity.excess < 0.01


def test_weights_of_float_layers_are_codes_in_the_file_and_constants_when_loaded(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.Hardswish(), nn.Conv2d(32, 32, 3)).eval()
    policy = BitPolicy.uniform(8, 8, before_functions="float")
    report = write(quantize(model, method="round_to_nearest", policy=policy, calibration=[IMAGE]), tmp_path / "m.onnx")
    assert report.integer is not None
    assert report.integer.conv_integer == 0
    assert report.integer.operators.get("Cast", 0) == 0  # decoded while loading
    held = initializers(tmp_path / "m.onnx")
    assert held["2.weight.codes"].data_type == onnx.TensorProto.INT8
    assert not any(tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) == 4 and tensor.dims[1] > 1 for tensor in held.values())


class Function(nn.Module):
    """SiLU that is no module."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x)


def test_silu_between_integer_layers_is_a_sigmoid_and_a_product_in_integers(tmp_path: Path) -> None:
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 8, 1), nn.SiLU(), nn.AdaptiveAvgPool2d(1)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 4)).eval()
    report = write(quantize(model, method="round_to_nearest", calibration=[IMAGE]), tmp_path / "m.onnx")
    assert report.parity.passed
    assert report.integer is not None
    counts = report.integer.operators
    assert [counts.get(op, 0) for op in ("QLinearSigmoid", "QLinearMul", "Sigmoid", "Mul", "QuantizeLinear")] == [2, 2, 0, 0, 1]


def test_codes_that_a_function_in_float_reads_several_times_are_decoded_once(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), Function(), nn.Conv2d(8, 4, 1)).eval()
    report = write(quantize(model, method="round_to_nearest", calibration=[IMAGE]), tmp_path / "m.onnx")
    assert report.parity.passed
    assert report.integer is not None
    counts = report.integer.operators
    assert [counts.get(op, 0) for op in ("QuickGelu", "Clip", "DequantizeLinear")] == [1, 1, 2]  # the other one is the last convolution's


def test_a_weight_that_several_layers_share_runs_where_products_would_saturate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = LoopNet(), torch.randn(8, 6)
    report = write(rounded(model, batch), tmp_path / "m.onnx", sample=batch)
    (plain,) = load_onnx(tmp_path / "m.onnx")(Inputs((batch,))).values()
    monkeypatch.setattr(sys.modules[load_onnx.__module__], "saturates", lambda: True)
    (precise,) = load_onnx(tmp_path / "m.onnx")(Inputs((batch,))).values()
    assert report.parity.passed
    torch.testing.assert_close(precise, plain, atol=0.05, rtol=0.02)


@pytest.mark.parametrize("saturates", [True, False])
def test_sums_of_large_8_bit_products_are_exact_and_what_it_takes_is_said(
    saturates: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[export.__module__], "saturates", lambda: saturates)
    model = nn.Sequential(nn.Conv2d(32, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1)).eval()
    model[0].weight.data.fill_(0.01)  # codes of 127 times codes of 255, two of which are more than 16 bits hold
    images = torch.ones(2, 32, 6, 6)
    small = quantize(model, method="round_to_nearest", policy=BitPolicy.uniform(8, 8, first_last=None), calibration=images)
    report = write(small, tmp_path / "m.onnx", sample=images)
    assert report.parity.passed
    assert any("session.x64quantprecision" in note for note in report.notes) == saturates
    (got,) = load_onnx(tmp_path / "m.onnx")(Inputs((images,))).values()
    with torch.no_grad():
        torch.testing.assert_close(got, small(images), atol=0.05, rtol=0.02)
