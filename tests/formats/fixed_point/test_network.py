from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.formats.fixed_point.integer_networks import digits, images, network_of, onnx_codes
from tests.formats.networks import activation_quantizer, quantized
from torch import Tensor, nn

import lowbit
from lowbit.errors import CalibrationError, DataError, GraphError, LayerError, SpecError
from lowbit.formats.checks.codes import compare_codes
from lowbit.formats.fixed_point.graph import Convolution, Linear, Sum
from lowbit.formats.fixed_point.network import compile_integer, compile_program, quantize_to
from lowbit.formats.fixed_point.requantize import RequantizerKind
from lowbit.formats.program.program import export_program
from lowbit.inputs import Inputs
from lowbit.network.insert import set_output_quantizer


def test_a_layer_is_the_sum_of_products_worked_out_by_hand() -> None:
    """Input codes -128 + 10 and -128 + 20; weights 127 and -64 of scale 1/127; the accumulator is 10 * 127 - 20 * 64 + bias."""
    layer = nn.Linear(2, 1)
    layer.weight.data, layer.bias.data = torch.tensor([[1.0, -0.5]]), torch.tensor([0.25])
    net = lowbit.quantize(layer, method="round_to_nearest", calibration=torch.tensor([[0.0, 0.0], [2.55, 2.55]]))
    network = compile_integer(net, sample=torch.tensor([[0.1, 0.2], [2.55, 0.0]]))
    (operation,) = network.graph.operations
    assert isinstance(operation, Linear)
    x = torch.tensor([[0.1, 0.2]])
    assert network.quantize(x).tolist() == [[-118, -108]]
    weight = operation.weight
    real = (weight.codes * weight.factor[:, None]).double() * weight.scale.double()[:, None]
    torch.testing.assert_close(real, net.weight.detach().double(), rtol=1e-6, atol=0)
    scale = float(operation.source.grid.scale) * weight.scale.double()
    assert float((weight.bias * scale - 0.25).abs()) <= float(scale) / 2
    acc = float((torch.tensor([10, 20]) * weight.codes[0]).sum() * weight.factor[0] + weight.bias[0]) * float(scale)
    grid = network.graph.output.grid
    assert network.run(network.quantize(x)).item() == round(acc / float(grid.scale)) + grid.zero_point


@pytest.mark.slow
@pytest.mark.parametrize("name", ["digits", "branches", "mobilenet", "resnet20"])
def test_the_codes_are_those_of_the_exported_onnx_file(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    model, x = network_of(name)
    lowbit.export(model, tmp_path / "network.onnx", sample=x, measure_speed=False)
    theirs = onnx_codes(tmp_path / "network.onnx", x)
    network = compile_integer(model, "onnx", sample=x)
    ours = network.all_codes(network.quantize(x))
    compared = [buffer for buffer in ours if buffer in theirs and not theirs[buffer].is_floating_point()]
    assert len(compared) >= 7
    assert {buffer for buffer in compared if not torch.equal(ours[buffer], theirs[buffer])} == set()
    (output,) = (value for value in theirs.values() if value.is_floating_point())
    assert (quantize_to(network.graph.output.grid, output) - ours[network.graph.output.name]).abs().max() <= 1  # it is float there


@pytest.mark.parametrize(
    ("requantizer", "rounding", "share"), [("fixed_point", "single", 0.999), ("dyadic", "single", 0.999), ("fixed_point", "double", 0.999)]
)
@pytest.mark.parametrize("name", ["digits", "branches", "mobilenet", "upward", "volumes", "joined"])
def test_codes_equal_those_of_the_simulation_but_for_a_few_that_are_one_off(
    name: str, requantizer: str, rounding: str, share: float
) -> None:
    model, x = network_of(name)
    program = export_program(model, x)
    found = compare_codes(program, compile_program(program, model, requantizer, rounding=rounding), Inputs.of(x))
    assert found.farthest <= 1 and found.share >= share, str(found)
    assert sum(operation.codes for operation in found.operations) > 4000


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
def test_a_transposed_convolution_by_torch_on_the_integers(rank: int, granularity: str) -> None:
    """Its accumulators are those of torch's operator on the codes, less the zero point, in exact float64."""
    torch.manual_seed(rank)
    layer = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[rank - 1](4, 6, 3, stride=2, padding=2, output_padding=1, groups=2)
    x = torch.randn(3, 4, *[4] * rank)
    net = lowbit.quantize(layer, method="round_to_nearest", calibration=x, weight_granularity=granularity)
    network = compile_integer(net, sample=x)
    (operation,) = network.graph.operations
    assert isinstance(operation, Convolution) and operation.window.spread == (*[1] * (3 - rank), *[2] * rank)
    weight, grid = operation.weight, network.graph.output.grid
    by_group = weight.codes.double().reshape(2, 3, 2, *[3] * rank).transpose(1, 2).reshape(4, 3, *[3] * rank)
    functional = (nn.functional.conv_transpose1d, nn.functional.conv_transpose2d, nn.functional.conv_transpose3d)[rank - 1]
    codes = network.quantize(x)
    kernel = by_group.flip(tuple(range(2, 2 + rank)))
    sums = functional(codes.double() - operation.source.grid.zero_point, kernel, None, 2, 2, 1, 2)
    column = (-1, *[1] * rank)
    real = (sums * weight.factor.reshape(column) + weight.bias.reshape(column)) * weight.scale.double().reshape(column)
    expected = real * float(operation.source.grid.scale) / float(grid.scale) + grid.zero_point
    assert float((expected.clamp(grid.lo, grid.hi) - network.run(codes)).abs().max()) <= 0.5 + 1e-6
    assert float((network(x) - net(x)).abs().max()) <= 1.01 * float(grid.scale)


def test_nothing_between_the_codes_is_floating_point() -> None:
    """Integers in, integers out of every operation; the digits are recognised as well as in float."""
    network, test = compile_integer(digits(), sample=images("train", 64)), images("test", 64)
    codes = network.quantize(test)
    assert codes.dtype == network.run(codes).dtype == torch.int8
    found = network.all_codes(codes)
    assert {value.dtype for value in found.values()} == {torch.int32}
    for operation in network.graph.operations:
        grid, value = operation.target.grid, found[operation.target.name]
        assert grid.lo <= int(value.min()) and int(value.max()) <= grid.hi
    assert (network(test).argmax(1) == digits()(test).argmax(1)).float().mean() >= 0.98


def test_batch_norms_of_a_trained_network_are_folded() -> None:
    net = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 3))
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([1.0, -0.5, 2.0, 0.3, 0.0, 1.5]))  # a negative factor flips codes, 0 leaves the shift
        net[1].running_mean.uniform_(-0.2, 0.2)
    x = torch.rand(16, 1, 6, 6)
    prepared = lowbit.prepare(net, method="lsq", weight_bits=4, activation_bits=8, sample=x).eval()
    prepared(x)
    network = compile_integer(prepared, sample=x)
    assert [type(operation) for operation in network.graph.operations] == [Convolution, Linear]
    program = export_program(prepared, x)
    assert compare_codes(program, network, Inputs.of(x)).farthest <= 1
    assert float((network(x) - prepared(x)).detach().abs().max()) <= 2.5 * float(network.graph.output.grid.scale)


class Difference(nn.Module):
    """A ReLU behind a sum of three tensors, one of them subtracted."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Conv2d(2, 4, 1), nn.Conv2d(2, 4, 1), nn.Conv2d(2, 4, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.d(torch.relu(self.a(x) + self.b(x) - self.c(x)))


@pytest.mark.parametrize("requantizer", ["fixed_point", "dyadic", "onnx"])
def test_a_relu_behind_a_sum_of_three_is_one_operation(requantizer: RequantizerKind) -> None:
    x = torch.randn(8, 2, 5, 5)
    network = quantized(Difference(), x)
    for layer in (network.a, network.b, network.c):
        set_output_quantizer(layer, activation_quantizer())
    program = export_program(network, x)
    integer = compile_program(program, network, requantizer)
    (added,) = (operation for operation in integer.graph.operations if isinstance(operation, Sum))
    assert (added.signs, added.target.grid.lo) == ((1, 1, -1), added.target.grid.zero_point)
    found = compare_codes(program, integer, Inputs.of(x))
    assert found.farthest <= 1 and found.share >= 0.999


def test_a_layer_without_quantized_operands_of_its_sum_is_named() -> None:
    x = torch.randn(8, 2, 5, 5)
    with pytest.raises(LayerError, match=r"layer 'add.*' \(add\): it reads float values, the result of 'conv2d': .*merge_bits=8"):
        compile_integer(quantized(Difference(), x), sample=x)


@pytest.mark.parametrize(
    "moves",
    [
        (nn.ZeroPad2d((1, 0, 2, 1)), nn.Conv2d(4, 3, 2)),
        (nn.ChannelShuffle(2), nn.Conv2d(4, 3, 2)),
        (nn.PixelShuffle(2), nn.Conv2d(1, 3, 2)),
        (nn.PixelUnshuffle(2), nn.Conv2d(16, 3, 2)),
    ],
    ids=["padding", "channel shuffle", "pixel shuffle", "pixel unshuffle"],
)
def test_moves_of_codes_are_those_of_values(moves: tuple[nn.Module, ...]) -> None:
    x = torch.randn(16, 2, 6, 6, generator=torch.Generator().manual_seed(0))
    network = quantized(nn.Sequential(nn.Conv2d(2, 4, 1), nn.ReLU(), *moves), x)
    program = export_program(network, Inputs.of(x))
    found = compare_codes(program, compile_program(program, network), Inputs.of(x))
    assert found.share == 1 and {operation.layer for operation in found.operations} >= {"2", "3"}


class Gelu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.last = nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.act(self.first(x)))


@pytest.mark.parametrize(
    ("settings", "model", "message"),
    [
        ({"method": "round_to_nearest"}, Gelu(), r"layer 'act' \(gelu\): this operation has no integer form|layer 'last' .*gelu"),
        ({"method": "round_to_nearest", "activation_bits": "float"}, nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), "layer '0' .*activation_bits"),
        ({"method": "round_to_nearest"}, nn.Sequential(nn.Linear(6, 8), nn.Softmax(1)), r"layer '1' \(softmax\)"),
        ({"method": "round_to_nearest"}, nn.Sequential(nn.Linear(6, 8), nn.Unflatten(1, (1, 8)), nn.ReflectionPad1d(1), nn.Flatten()), "layer '2' .*'reflect'"),
    ],
    ids=["gelu", "float activations", "softmax", "reflection"],
)  # fmt: skip
def test_what_has_no_integer_form_is_named(settings: dict[str, object], model: nn.Module, message: str) -> None:
    x = torch.randn(16, 6)
    net = lowbit.quantize(model, calibration=x, **settings)  # type: ignore[arg-type]
    with pytest.raises(LayerError, match=message):
        compile_integer(net, sample=x)


def test_a_codebook_is_refused_with_the_layer() -> None:
    x = torch.rand(16, 6)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    prepared = lowbit.prepare(net, method="lq_nets", weight_bits=3, activation_bits=8, sample=x).eval()
    with pytest.raises(LayerError, match=r"layer '2' \(fake_quantize_codebook\): its activations have the levels of a codebook"):
        compile_integer(prepared, sample=x)


def test_several_widths_and_several_tensors_are_refused() -> None:
    x = torch.rand(16, 6)
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    several = lowbit.prepare(net, method="adabits", bits=[8, 4], sample=x).eval()
    with pytest.raises(SpecError, match=r"widths 8/8, 4/4.*bits="):
        compile_integer(several, sample=x)
    network = compile_integer(several, sample=x, bits=4)
    assert {weight.bit_width for weight in network.graph.weights()} >= {4}

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.layer(x)
            return y, y + 1

    with pytest.raises((GraphError, LayerError), match="return"):
        compile_integer(lowbit.quantize(Two(), method="round_to_nearest", calibration=x), sample=x)


def test_unknown_settings_and_inputs_of_another_shape_are_errors() -> None:
    x = images("train", 8)
    with pytest.raises(SpecError, match=r"requantizer must be one of fixed_point, dyadic, onnx; got 'tflite'"):
        compile_integer(digits(), "tflite", sample=x)  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="rounding must be one of double, single"):
        compile_integer(digits(), sample=x, rounding="none")  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"\[batch, 1, 8, 8\], got \[2, 1, 9, 8\]"):
        compile_integer(digits(), sample=x)(torch.zeros(2, 1, 9, 8))


def test_what_is_no_code_and_no_sample_is_refused() -> None:
    x = torch.rand(8, 4, generator=torch.Generator().manual_seed(0))
    model = quantized(nn.Linear(4, 2), x)
    network = compile_integer(model, sample=x)
    assert network(torch.zeros(0, 4)).shape == (0, 2)
    for codes, message in (
        (torch.zeros(1, 5, dtype=torch.int8), r"takes \[batch, 4\], got \[1, 5\]"),
        (torch.zeros(1, 4), "whole numbers, got float32"),
        (torch.full((1, 4), 128), "from -128 to 127, got 128 to 128"),
    ):
        with pytest.raises(DataError, match=message):
            network.run(codes)
    with pytest.raises(DataError, match="NaN"):
        network(torch.tensor([[0.0, float("nan"), 0.0, 0.0]]))
    for sample, message in ((x[:0], "holds no value"), (x / 0 * 0, "NaN or infinite")):
        with pytest.raises(CalibrationError, match=message):
            compile_integer(model, sample=sample)
