from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.formats.networks import quantized
from tests.networks import settled
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

import lowbit
from lowbit.errors import LayerError, SpecError
from lowbit.formats.packed.file import package
from lowbit.formats.packed.network import PackedNetwork
from lowbit.formats.packed.tensor import PackedTensor
from lowbit.formats.program.program import export_program
from lowbit.methods.quantization_aware.xnor_net import InputScale
from lowbit.models import load_model
from lowbit.network.record import record_of
from lowbit.runtime.compile import RuntimeNetwork, _has_nan
from lowbit.runtime.layers import int8 as int8_layers
from lowbit.runtime.lowering import convert
from lowbit.spec import BitPolicy

needs_int8 = pytest.mark.skipif(not int8_layers.has_exact_kernels(), reason="torch has no exact 8-bit kernels for this processor")
METHODS = ["bi_real_net", "react_net", "ir_net", "recu", "xnor_net"]


def images(count: int = 4) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def trained(method: str, bits: int = 1, activation_bits: int | None = None, **options: object) -> nn.Module:
    """A network of few bits whose norms are not those of a new one; first and last layer in float, so that nothing rounds differences away."""
    torch.manual_seed(0)
    policy = BitPolicy.uniform(bits, activation_bits or bits).keep_float("conv").keep_float("fc")
    model = lowbit.prepare(load_model("resnet8", num_classes=5), method=method, policy=policy, sample=images(), **options).train()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
        for _ in range(3):
            model(images())
    return model.eval()


def settled_resnet() -> nn.Module:
    torch.manual_seed(0)
    return settled(load_model("resnet8", num_classes=5), images())


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_the_compiled_network_computes_what_the_network_computes(method: str) -> None:
    model = trained(method)
    fast = lowbit.compile_runtime(model, sample=images())
    for batch in (images(), images(7)):
        torch.testing.assert_close(fast(batch), model(batch), rtol=1e-4, atol=1e-4)
    binary = [layer for layer in fast.report.layers if layer.kernel == "binary"]
    assert len(binary) == (8 if method == "xnor_net" else 6)
    assert all("batch norm" in layer.fused for layer in binary)
    activations = {"bi_real_net": 0, "react_net": 6, "ir_net": 6, "recu": 6, "xnor_net": 6}  # the shortcuts of xnor_net's have none
    assert sum("activation" in layer.fused for layer in binary) == activations[method]
    assert {layer.name for layer in fast.report.layers} - {layer.name for layer in binary} >= {"conv", "fc"}
    assert "fc: float (its input is neither a sign nor on an affine grid)" in str(fast.report)


@torch.no_grad()
def test_sums_are_computed_along_with_layers_and_each_by_one_of_them() -> None:
    report = lowbit.compile_runtime(trained("bi_real_net"), sample=images()).report
    assert all(layer.fused == ("batch norm", "sum") for layer in report.layers if layer.kernel == "binary")
    plain = lowbit.compile_runtime(trained("xnor_net"), sample=images()).report
    assert sum("sum" in layer.fused for layer in plain.layers) == 3


@torch.no_grad()
def test_between_layers_without_a_shortcut_signs_are_packed_and_sums_compared_with_whole_numbers() -> None:
    model = trained("xnor_net")
    fast = lowbit.compile_runtime(model, sample=images())
    packed = [layer.name for layer in fast.report.layers if "packed input" in layer.fused]
    assert packed == ["layer1.0.conv2", "layer2.0.conv2", "layer3.0.conv2"]
    state = fast.state_dict()
    for name in packed:
        assert f"{name}.in_threshold" in state
        assert bool((state[f"{name}.in_scale"] == 1).all())
        assert f"{name.replace('conv2', 'conv1')}.activation" not in state
    torch.testing.assert_close(fast(images(7)), model(images(7)), rtol=1e-4, atol=1e-4)


class Row(nn.Module):
    """Convolutions in a row, with slopes that can be negative between them, and a last one in two groups."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(3, 64, 3), nn.Conv2d(64, 64, 3), nn.Conv2d(64, 32, 3, groups=groups)])
        self.acts, self.last = nn.ModuleList([nn.PReLU(64), nn.PReLU(64)]), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.acts[0](self.convs[0](x))
        y = self.acts[1](self.convs[1](y))
        out: Tensor = self.last(self.convs[2](y).mean((2, 3)))
        return out


@pytest.mark.parametrize(("groups", "slope", "is_packed"), [(1, 0.2, True), (1, -0.5, True), (2, 0.2, True), (4, 0.2, False)])
@torch.no_grad()
def test_packed_signs_behind_any_slope_and_into_groups(groups: int, slope: float, is_packed: bool) -> None:
    torch.manual_seed(0)
    network = Row(groups)
    for act in network.acts:
        nn.init.constant_(act.weight, slope)  # type: ignore[arg-type]
    policy = BitPolicy.uniform(1, 1).keep_float("convs.0").keep_float("last")
    model = lowbit.prepare(network, method="xnor_net", policy=policy, sample=images(), input_norm="never").eval()
    fast = lowbit.compile_runtime(model, sample=images())
    assert ("packed input" in fast.report.layers[2].fused) is is_packed
    torch.testing.assert_close(fast(images(3)), model(images(3)), rtol=1e-4, atol=1e-4)


class Grouped(nn.Module):
    """Convolutions with groups, with a bias, and with holes in their kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.grouped, self.norm = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 3, 2, 1, groups=2, bias=False), nn.BatchNorm2d(12)
        self.dilated, self.last = nn.Conv2d(12, 8, (3, 1), dilation=2), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.dilated(self.norm(self.grouped(self.first(x))).relu()).mean((2, 3)))
        return y


@torch.no_grad()
def test_input_scaling_is_computed_along() -> None:
    torch.manual_seed(0)
    for network, in_float, binary in ((load_model("resnet8", num_classes=5), ("conv", "fc"), 8), (Grouped(), ("first", "last"), 2)):
        policy = BitPolicy.uniform(1, 1).keep_float(in_float[0]).keep_float(in_float[1])
        model = lowbit.prepare(network, method="xnor_net", policy=policy, sample=images(), input_scaling=True).train()
        for _ in range(3):
            model(images())
        fast = lowbit.compile_runtime(model.eval(), sample=images())
        assert sum("input scaling" in layer.fused for layer in fast.report.layers) == binary == len(fast.report.layers) - 2
        torch.testing.assert_close(fast(images(3)), model(images(3)), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_what_looks_like_input_scaling_of_another_window_is_computed_as_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = InputScale.scale_map
    monkeypatch.setattr(InputScale, "scale_map", lambda self, x, size: plain(self, x.flip(2), size))
    model = trained("xnor_net", input_scaling=True)
    fast = lowbit.compile_runtime(model, sample=images())
    assert not any("input scaling" in layer.fused for layer in fast.report.layers)
    torch.testing.assert_close(fast(images(3)), model(images(3)), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_network_whose_views_need_another_order_of_memory_runs() -> None:
    torch.manual_seed(0)
    sample = torch.randn(2, 3, 32, 32)
    model = lowbit.prepare(load_model("vgg_small", width=32), method="xnor_net", weight_bits=1, activation_bits=1, sample=sample).eval()
    fast = lowbit.compile_runtime(model, sample=sample)
    torch.testing.assert_close(fast(sample), model(sample), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_loaded_network_is_the_same_to_it_and_the_result_is_an_ordinary_module(tmp_path: Path) -> None:
    model = trained("bi_real_net")
    lowbit.export(model, tmp_path / "m.lowbit", sample=images())
    fast = lowbit.compile_runtime(lowbit.load(tmp_path / "m.lowbit"))
    expected = lowbit.compile_runtime(model, sample=images())(images())
    assert torch.equal(fast(images()), expected)
    again = copy.deepcopy(fast)
    again.load_state_dict(fast.state_dict())
    assert torch.equal(again(images()), expected)


@torch.no_grad()
def test_a_compiled_network_is_saved_in_the_bits_of_its_codes_and_loads_onto_the_kernels(tmp_path: Path) -> None:
    model = trained("bi_real_net")
    plain = lowbit.export(model, tmp_path / "plain.lowbit", sample=images())
    fast = lowbit.compile_runtime(model, sample=images())
    saved = [
        lowbit.export(fast, tmp_path / "fast.lowbit", sample=images()),
        lowbit.export(model, tmp_path / "flag.lowbit", sample=images(), kernels=True),
    ]
    for report in saved:
        assert report.size_bytes - plain.size_bytes < 64  # one entry in the manifest
        assert report.notes[-1] == fast.report.head
        loaded = lowbit.load(report.path)
        assert isinstance(loaded, RuntimeNetwork)
        assert loaded.report == fast.report
        assert torch.equal(loaded(images(7)), fast(images(7)))
        in_float = lowbit.load(report.path, kernels=False)
        assert not isinstance(in_float, RuntimeNetwork)
        assert torch.equal(in_float(images()), lowbit.load(plain.path)(images()))
    assert isinstance(lowbit.load(plain.path, kernels=True), RuntimeNetwork)
    assert not isinstance(lowbit.load(plain.path), RuntimeNetwork)
    again = lowbit.export(lowbit.load(saved[0].path), tmp_path / "again.lowbit", sample=images())
    assert again.path.read_bytes() == saved[0].path.read_bytes()
    assert record_of(fast) is not None


def test_a_file_for_the_kernels_is_not_written_where_nothing_runs_on_them_or_another_runtime_reads_it(tmp_path: Path) -> None:
    model = lowbit.prepare(load_model("resnet8", num_classes=5), method="lsq", weight_bits=4, activation_bits=None, sample=images())
    with pytest.raises(LayerError, match="no layer can run on low-bit kernels: conv: float"):
        lowbit.export(model, tmp_path / "m.lowbit", sample=images(), kernels=True)
    with pytest.raises(SpecError, match=r"Low-bit kernels need a \.lowbit file"):
        lowbit.export(model, tmp_path / "m.onnx", sample=images(), kernels=True)
    assert not list(tmp_path.iterdir())


@torch.no_grad()
def test_exported_and_compiled_programs_carry_the_operators() -> None:
    fast = lowbit.compile_runtime(trained("bi_real_net"), sample=images())
    program = torch.export.export(fast, (images(),))
    assert sum(node.target is torch.ops.lowbit.binary_conv2d.default for node in program.graph.nodes) == 6
    assert torch.equal(program.module()(images()), fast(images()))
    assert torch.equal(torch.compile(fast, backend="eager")(images()), fast(images()))


class Signs(nn.Module):
    """Two linear layers, one of which is read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(40, 24), nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        out: Tensor = self.second(y) + y
        return out


@torch.no_grad()
def test_linear_layers_run_on_the_kernels_with_their_bias_and_a_sum() -> None:
    x = torch.randn(8, 40)
    model = lowbit.prepare(Signs(), method="xnor_net", policy=BitPolicy.uniform(1, 1, first_last=None), sample=x).eval()
    fast = lowbit.compile_runtime(model, sample=x)
    torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-4)
    assert [(layer.kernel, layer.fused) for layer in fast.report.layers] == [("binary", ()), ("binary", ("sum",))]


class Twice(nn.Module):
    """One convolution that is called twice, with a norm of its own each time."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norms = nn.Conv2d(8, 8, 3, padding=1), nn.ModuleList(nn.BatchNorm2d(8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for norm in self.norms:
            nn.init.normal_(norm.weight) if self.training else None
            x = norm(self.conv(x))
        return x


@torch.no_grad()
def test_a_layer_that_is_called_twice_keeps_both_its_norms() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 8, 6, 6)
    model = lowbit.prepare(Twice(), method="xnor_net", policy=BitPolicy.uniform(1, 1, first_last=None), sample=x).train()
    model(x)
    model.eval()
    fast = lowbit.compile_runtime(model, sample=x)
    assert [layer.kernel for layer in fast.report.layers] == ["binary", "binary"]
    torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_weights_with_zeros_are_ternary() -> None:
    model = trained("bi_real_net")
    network = lowbit.compile_runtime(model, sample=images())
    content = package(export_program(model, images()), None)
    name = "layer1.0.conv1.weight"
    packed = content.tensors[name]
    assert isinstance(packed, PackedTensor)
    values = packed.unpack().decode().clone()
    values[:, ::2] = 0
    sparse = RuntimeNetwork(replace(content, tensors={**content.tensors, name: values})).eval()
    assert {layer.name: layer.kernel for layer in sparse.report.layers}["layer1.0.conv1"] == "ternary"
    expected = PackedNetwork(replace(content, tensors={**content.tensors, name: values})).eval()
    torch.testing.assert_close(sparse(images()), expected(images()), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(sparse(images()), network(images()))


@torch.no_grad()
@pytest.mark.parametrize("bits", [2, 4, pytest.param(8, marks=needs_int8)])
def test_layers_on_affine_grids_are_computed_in_integers_with_their_norms(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "choose_kernel", lambda *_: ("int8", ""))
    model = trained("lsq", bits)
    fast = lowbit.compile_runtime(model, sample=images())
    torch.testing.assert_close(fast(images(7)), model(images(7)), rtol=1e-4, atol=1e-4)
    paths = {layer.name: layer for layer in fast.report.layers}
    assert paths["layer1.0.conv1"].kernel == "int8"
    assert paths["layer1.0.conv1"].fused == ("batch norm",)
    assert paths["conv"].kernel == "float"
    assert paths["conv"].fused == ("batch norm",)
    assert "batch_norm" not in " ".join(node.operator for node in fast.packed_graph.nodes)
    assert not any(
        name.startswith("layer1.0.conv1") and tensor.dtype == torch.float32 and tensor.dim() == 4
        for name, tensor in fast.state_dict().items()
    )


@needs_int8
@torch.no_grad()
def test_first_and_last_layers_of_8_bits_and_their_reference_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lowbit.quantize(settled_resnet(), method="round_to_nearest", weight_bits=8, activation_bits=8, calibration=images())
    fast = lowbit.compile_runtime(model, sample=images())
    assert {layer.name for layer in fast.report.layers if layer.kernel != "int8"} == {"fc"}  # what is quantized is pooled first
    y, expected = fast(images(3)), model(images(3))
    monkeypatch.setattr(int8_layers, "has_exact_kernels", lambda *_: False)
    monkeypatch.setattr(int8_layers, "_prepacked", WeakTensorKeyDictionary())
    for got in (y, fast(images(3))):  # a value next to a step is rounded the other way now and then
        assert float((got - expected).norm() / expected.norm()) < 0.02


@torch.no_grad()
def test_norms_and_shifts_before_signs_become_thresholds() -> None:
    model = trained("react_net")
    fast = lowbit.compile_runtime(model, sample=images())
    before = [layer for layer in fast.report.layers if any("before" in what for what in layer.fused)]
    assert before
    assert any(node.kwargs.get("threshold") for node in fast.packed_graph.nodes)
    assert all(node.kwargs.get("flip") or "flip" not in node.kwargs for node in fast.packed_graph.nodes)


def test_a_network_without_such_layers_is_refused_with_the_reason_for_each() -> None:
    model = lowbit.prepare(load_model("resnet8", num_classes=5), method="lsq", weight_bits=4, activation_bits=None, sample=images())
    with pytest.raises(LayerError, match=r"layer1\.0\.conv1: float with batch norm \(its input is neither a sign"):
        lowbit.compile_runtime(model, sample=images())


def test_a_network_in_memory_needs_a_sample() -> None:
    with pytest.raises(SpecError, match="needs a sample"):
        lowbit.compile_runtime(nn.Linear(3, 4))


@torch.no_grad()
@pytest.mark.parametrize("bits", [1, 3, 4, 8])
def test_linear_layers_of_packed_weights_keep_no_float_weight(bits: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(200, 64), nn.ReLU(), nn.Linear(64, 10)).eval()
    x = torch.randn(5, 200)
    small = lowbit.quantize(model, method="round_to_nearest", policy=BitPolicy.uniform(bits, None, first_last=None), calibration=x)
    with pytest.raises(LayerError, match="weight_only"):
        lowbit.compile_runtime(small, sample=x)
    exact, fast = (lowbit.compile_runtime(small, sample=x, weight_only=kind) for kind in ("float", "int8"))
    assert [layer.kernel for layer in fast.report.layers] == ["packed", "packed"]
    torch.testing.assert_close(exact(x), small(x), rtol=1e-4, atol=1e-5)
    error = float((fast(x) - small(x)).norm() / small(x).norm())
    assert 0 < error < 0.02
    held = sum(tensor.numel() * tensor.element_size() for tensor in fast.state_dict().values())
    assert held < 0.5 * 4 * sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("method", ["round_to_nearest", "lq_nets", "binary_connect"])
def test_convolutions_of_packed_weights_keep_no_float_weight(method: str) -> None:
    torch.manual_seed(0)
    bits = 1 if method == "binary_connect" else 3
    policy = BitPolicy.uniform(bits, None, first_last=None)
    network = load_model("resnet8", num_classes=5)
    if method == "round_to_nearest":
        small = lowbit.quantize(network, method=method, policy=policy, calibration=images())
    else:
        small = lowbit.prepare(network, method=method, policy=policy, sample=images()).eval()
    with torch.no_grad():
        fast = lowbit.compile_runtime(small, sample=images(), weight_only="float")
        expected = small(images(5))
        torch.testing.assert_close(fast(images(5)), expected, rtol=1e-4, atol=1e-5)
    packed = [layer.name for layer in fast.report.layers if layer.kernel == "packed"]
    assert len(packed) == 10
    held = sum(tensor.numel() * tensor.element_size() for name, tensor in fast.state_dict().items() if name.endswith(".words"))
    weights = sum(module.weight.numel() for module in network.modules() if isinstance(module, (nn.Conv2d, nn.Linear)))
    assert held < 4 * weights / (8 if bits == 1 else 4)  # rows of small layers are filled up
    text = torch.export.export(fast, (images(),)).graph_module.code
    assert "packed_conv2d" in text


def test_an_unknown_kind_of_weight_only_is_refused() -> None:
    with pytest.raises(SpecError, match="none, float, int8"):
        lowbit.compile_runtime(nn.Linear(3, 4), sample=torch.randn(1, 3), weight_only="int4")  # type: ignore[arg-type]


@torch.no_grad()
def test_without_exact_8_bit_kernels_such_layers_stay_in_float_and_the_reason_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "are_multiplied_exactly", lambda *_: False)
    model = lowbit.quantize(settled_resnet(), method="round_to_nearest", weight_bits=8, activation_bits=8, calibration=images())
    with pytest.warns(UserWarning, match="no layer runs on low-bit kernels of this processor: .*no exact 8-bit kernels"):
        fast = lowbit.compile_runtime(model, sample=images())
    paths = {layer.name: layer for layer in fast.report.layers}
    assert (paths["layer1.0.conv1"].kernel, paths["layer1.0.conv1"].elsewhere) == ("float", True)
    assert not paths["fc"].elsewhere  # it stays in float on any processor
    y, expected = fast(images(7)), model(images(7))
    assert float((y - expected).norm() / expected.norm()) < 0.02  # a value next to a step is rounded the other way now and then


@torch.no_grad()
def test_where_8_bit_products_saturate_7_bits_on_one_side_run_on_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8_layers, "saturates", lambda: True)
    int8_layers.has_exact_kernels.cache_clear()
    try:
        model = lowbit.quantize(settled_resnet(), method="round_to_nearest", weight_bits=7, activation_bits=8, calibration=images())
        fast = lowbit.compile_runtime(model, sample=images())
    finally:
        int8_layers.has_exact_kernels.cache_clear()
    paths = {layer.name: layer for layer in fast.report.layers}
    assert paths["layer1.0.conv1"].kernel == "int8"
    assert (paths["conv"].kernel, paths["conv"].elsewhere) == ("float", True)  # the first layer has 8 bits
    assert "it has for 7 bits of weights or inputs" in paths["conv"].reason
    y, expected = fast(images(7)), model(images(7))
    assert float((y - expected).norm() / expected.norm()) < 0.02  # a value next to a step is rounded the other way now and then


@torch.no_grad()
def test_packed_layers_of_uneven_levels_are_said_to_be_decoded() -> None:
    x = torch.randn(5, 6)
    small = quantized(nn.Sequential(nn.Linear(6, 4)), x, weights="codebook")
    report = lowbit.compile_runtime(small, sample=x, weight_only="int8").report
    assert "unevenly spaced: decoded in float" in str(report)
    assert "1 with weights that stay packed" in report.head


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0, -2.0], False),
        ([torch.inf, -torch.inf], False),
        ([3e38, 3e38], False),
        ([1.0, torch.nan], True),
        ([torch.inf, torch.nan], True),
    ],
)
def test_nan_is_told_from_infinity_and_from_sums_that_are_too_large(values: list[float], expected: bool) -> None:
    assert _has_nan(torch.tensor(values)) is expected
    assert not _has_nan(torch.tensor([1, 2]))
