from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.runtime.binary_cases import sign_layer
from torch import Tensor, nn

import lowbit
from lowbit.errors import FileFormatError, LayerError, SpecError
from lowbit.formats.packed.file import Package, package, write_package
from lowbit.formats.program.calls import OperatorCall
from lowbit.formats.program.program import export_program
from lowbit.runtime.arguments import Epilogue
from lowbit.runtime.compile import compile_runtime
from lowbit.runtime.layers.binary import binary_conv2d, binary_conv2d_reference, binary_linear, binary_linear_reference, pack_conv_weight
from lowbit.runtime.layers.checks import check_layer
from lowbit.spec import BitPolicy

CHANNELS, OUT = 40, 8


def layer(**change: object) -> dict[str, object]:
    """The arguments of a ternary convolution with a part of them changed."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(0, 3, (OUT, CHANNELS, 3, 3), generator=generator).float() - 1
    words, mask = pack_conv_weight(weight)
    return {
        "x": torch.randn(2, CHANNELS, 7, 6, generator=generator), "words": words, "mask": mask, "scale": torch.rand(OUT, generator=generator),
        "bias": None, "in_channels": CHANNELS, "kernel_size": [3, 3], "stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], "groups": 1,
    } | change  # fmt: skip


@pytest.mark.parametrize(
    "threshold", [None, torch.linspace(-1, 1, CHANNELS), torch.full((CHANNELS,), math.inf), torch.full((CHANNELS,), -math.inf)]
)
@pytest.mark.parametrize("flip", [None, torch.arange(CHANNELS) % 2 == 0])
def test_numbers_that_are_not_finite_count_as_they_do_in_the_reference(threshold: Tensor | None, flip: Tensor | None) -> None:
    x = torch.randn(2, CHANNELS, 7, 6)
    values = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-45, -1e-45, 3e38])
    x.view(-1)[: 8 * 400 : 2] = values.repeat(200)
    arguments = layer(x=x, threshold=threshold, flip=flip)
    assert torch.equal(binary_conv2d.flat(**arguments), binary_conv2d_reference(*binary_conv2d.rebuild(**arguments)))
    rows = x.permute(0, 2, 3, 1).reshape(-1, CHANNELS)
    linear = sign_layer(torch.ones(OUT, CHANNELS), 1, threshold, flip), Epilogue(torch.ones(OUT))
    assert torch.equal(binary_linear(rows, *linear), binary_linear_reference(rows, *linear))


def test_without_a_threshold_nan_is_negative_and_negative_zero_is_positive() -> None:
    x = torch.tensor([math.nan, -math.nan, 0.0, -0.0, math.inf, -math.inf]).diag().where(torch.eye(6) == 1, torch.ones(6, 6))
    found = binary_linear(x, sign_layer(torch.ones(1, 6)), Epilogue(torch.ones(1))).flatten()
    assert found.tolist() == [4.0, 4.0, 6.0, 6.0, 6.0, 4.0]


def test_nan_in_what_is_added_and_in_scales_stays() -> None:
    residual, scale = torch.zeros(2, OUT, 7, 6), torch.ones(OUT)
    residual[0, 1, 2, 3], scale[5] = math.nan, math.nan
    arguments = layer(residual=residual, scale=scale)
    found = binary_conv2d.flat(**arguments)
    torch.testing.assert_close(found, binary_conv2d_reference(*binary_conv2d.rebuild(**arguments)), rtol=0, atol=0, equal_nan=True)
    assert bool(found[:, 5].isnan().all())
    assert int(found.isnan().sum()) == 2 * 7 * 6 + 1


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: torch.cat([x, x], 1)[:, ::2].contiguous()[:, :].flip(1),
        lambda x: torch.stack([x, -x], -1)[..., 0],
        lambda x: x[:1].expand(3, -1, -1, -1),
        lambda x: x.transpose(2, 3),
    ],
    ids=["channels last", "flipped", "every second", "expanded", "transposed"],
)
def test_any_layout_of_inputs_and_what_is_added_gives_the_same(change: Callable[[Tensor], Tensor]) -> None:
    x = change(torch.randn(2, CHANNELS, 7, 6))
    residual = change(torch.randn(2, OUT, 7, 6))
    found = binary_conv2d.flat(**layer(x=x, residual=residual))
    assert torch.equal(found, binary_conv2d.flat(**layer(x=x.contiguous(), residual=residual.contiguous())))
    torch.testing.assert_close(found, binary_conv2d_reference(*binary_conv2d.rebuild(**layer(x=x, residual=residual))))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"x": torch.randn(1, CHANNELS, 8, 8).bfloat16()}, r"takes float32 inputs, got torch\.bfloat16"),
        ({"x": torch.zeros(1, CHANNELS, 8, 8, dtype=torch.int64)}, r"takes float32 inputs, got torch\.int64"),
        ({"x": torch.randn(CHANNELS, 8, 8)}, r"of 40 input channels got an input of shape \(40, 8, 8\)"),
        ({"words": torch.zeros(OUT, 3, 3, 2, dtype=torch.int64)}, r"packed weights must be int32 \(8, 3, 3, 2\), got int64"),
        ({"mask": torch.zeros(4, 3, 3, 2, dtype=torch.int32)}, r"mask must be int32 \(8, 3, 3, 2\), got int32 \(4, 3, 3, 2\)"),
        ({"mask": torch.zeros(OUT, 3, 3, 2, dtype=torch.int64)}, "mask must be int32"),
        ({"scale": torch.ones(OUT).double()}, "scale must be float32"),
        ({"threshold": torch.zeros(CHANNELS, dtype=torch.int32)}, "threshold must be float32"),
        ({"flip": torch.zeros(CHANNELS)}, "flip must be bool"),
        ({"residual": torch.zeros(2, OUT, 7, 6).double()}, "residual must be float32 on cpu, got float64"),
        ({"groups": 0}, "cannot be divided into 0 groups"),
        ({"groups": 3}, "40 input and 8 output channels cannot be divided into 3 groups"),
        ({"kernel_size": [3]}, "kernel_size must be two whole numbers of at least 1"),
        ({"stride": [0, 1]}, r"stride must be two whole numbers of at least 1, got \[0, 1\]"),
        ({"padding": [-1, 0]}, r"padding must be two whole numbers of at least 0, got \[-1, 0\]"),
        ({"dilation": [1, 0]}, "dilation must be two whole numbers"),
    ],
)
def test_what_compiled_loops_must_not_see_is_refused(change: dict[str, object], told: str) -> None:
    with pytest.raises(SpecError, match=told):
        binary_conv2d.flat(**layer(**change))


def test_parts_of_a_layer_on_several_devices_are_refused() -> None:
    with pytest.raises(SpecError, match="scale must be on cpu with the packed weights, got meta"):
        check_layer(sign_layer(torch.ones(3, 5)), None, Epilogue(torch.ones(3, device="meta")))


def test_a_number_is_no_input_of_a_linear_layer() -> None:
    with pytest.raises(SpecError, match=r"got an input of shape \(\)"):
        binary_linear(torch.tensor(1.0), sign_layer(torch.ones(3, 5)), Epilogue(torch.ones(3)))


def test_a_gradient_that_is_expected_is_refused_and_none_is_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for change in ({"x": layer()["x"]}, {"scale": torch.ones(OUT)}, {"residual": torch.zeros(2, OUT, 7, 6)}):
            ((name, tensor),) = change.items()
            assert isinstance(tensor, Tensor)
            wanting = layer(**{name: tensor.clone().requires_grad_()})
            with pytest.raises(LayerError, match=r"binary_conv2d has no derivative.*torch\.no_grad"):
                binary_conv2d.flat(**wanting)
            with torch.no_grad():
                found = binary_conv2d.flat(**wanting)
            assert not found.requires_grad
            assert torch.equal(found, binary_conv2d.flat(**layer(**{name: tensor})))
        with pytest.raises(LayerError, match="binary_linear has no derivative"):
            binary_linear(torch.ones(2, 5, requires_grad=True), sign_layer(torch.ones(3, 5)), Epilogue(torch.ones(3)))


class Net(nn.Module):
    """Two binary layers and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.norm(self.first(x)))
        return out


@pytest.fixture(scope="module")
def content() -> Package:
    """``Net`` in one bit as a file holds it."""
    torch.manual_seed(0)
    x = torch.randn(2, 4, 5, 5)
    model = lowbit.prepare(Net(), method="xnor_net", policy=BitPolicy.uniform(1, 1, first_last=None), sample=x, input_norm="never").eval()
    return package(export_program(model, x))


def test_a_compiled_network_names_the_layer_that_has_no_gradient_and_refuses_an_empty_batch(content: Package, tmp_path: Path) -> None:
    write_package(content, tmp_path / "m.lowbit")
    fast = compile_runtime(lowbit.load(tmp_path / "m.lowbit"))
    assert [path.kernel for path in fast.report.layers] == ["binary", "binary"]
    with pytest.raises(LayerError, match="has no derivative"):
        fast(torch.randn(2, 4, 5, 5, requires_grad=True))
    with pytest.raises(SpecError, match="batch size must be 1 to any, got 0"):
        fast(torch.empty(0, 4, 5, 5))


def with_setting(content: Package, index: int, value: object) -> Package:
    """The first convolution with another argument, counted as ``aten.conv2d`` does."""

    def changed(node: OperatorCall) -> OperatorCall:
        if node.name != first.name:
            return node
        arguments = [*node.args, *(None, [1, 1], [0, 0], [1, 1], 1)[len(node.args) - 2 :]]
        return replace(node, args=(*arguments[:index], value, *arguments[index + 1 :]))

    first = next(node for node in content.graph.nodes if node.operator == "aten.conv2d.default")
    return replace(content, graph=replace(content.graph, nodes=tuple(map(changed, content.graph.nodes))))


def with_tensor(content: Package, name: str, tensor: Tensor) -> Package:
    return replace(content, tensors={**content.tensors, name: tensor})


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda c: with_setting(c, 6, 4), r"m\.lowbit: graph node 'conv2d': its settings, weight and batch norm do not fit: .* 4 groups"),
        (lambda c: with_setting(c, 6, 0), r"m\.lowbit: graph node 'conv2d': operator 'aten\.conv2d\.default': groups must be at least 1"),
        (lambda c: with_setting(c, 6, 2), "of 8 input channels got an input of shape"),
        (lambda c: with_setting(c, 3, [0, 1]), "stride must be at least 1, got 0"),
        (lambda c: with_setting(c, 4, [-1, 0]), "padding must be at least 0, got -1"),
        (lambda c: with_setting(c, 5, [9, 9]), "smaller than the kernel's reach"),
        (lambda c: with_tensor(c, "first.weight", torch.ones(6, 3, 3, 3)), "of 3 input channels got an input of shape"),
        (lambda c: with_tensor(c, "first.weight", torch.ones(6, 3, 3)), r"needs a shape \[out, in\]"),
        (lambda c: with_tensor(c, "norm.weight", torch.ones(5)), "do not fit"),
        (lambda c: with_tensor(c, "first.bias", torch.ones(5)), "do not fit"),
    ],
)
def test_a_file_whose_tensors_contradict_its_graph_is_refused(
    content: Package, change: Callable[[Package], Package], told: str, tmp_path: Path
) -> None:
    write_package(change(content), tmp_path / "m.lowbit")
    with pytest.raises(FileFormatError, match=told), torch.no_grad():
        lowbit.load(tmp_path / "m.lowbit", kernels=True)(torch.randn(2, 4, 5, 5))
