from __future__ import annotations

import pytest
import torch

from lowbit.errors import FileFormatError
from lowbit.formats.program.calls import Graph, GraphInput, OperatorCall, Result, Stored
from lowbit.quantizers import UniformQuantizer
from lowbit.runtime.lowering.convert import Conversion, LayerPath
from lowbit.runtime.lowering.fusion import CONV, LINEAR, RESHAPE, SIGN

TENSORS = {
    "sign.weight": torch.tensor([1.0, -1.0, -1.0, 1.0]).view(2, 2, 1, 1) * 0.5, "ternary.weight": torch.tensor([[2.0, 0.0], [-2.0, 2.0]]).view(2, 2, 1, 1),
    "float.weight": torch.tensor([0.5, -0.25, 1.0, 2.0]).view(2, 2, 1, 1),
    "below": torch.tensor([-1e-45]), "signs": torch.tensor([-1.0, 1.0]), "square": torch.eye(2),
}  # fmt: skip
SIGNS = OperatorCall("s", SIGN, (Result("x"), Stored("below"), Stored("signs")), {})


def convert(*calls: OperatorCall, weight_only: str = "none", codes: dict[str, object] | None = None) -> Conversion:
    graph = Graph((GraphInput("x", (None, 2, 4, 4), torch.float32),), calls, (Result(calls[-1].name),), None)
    return Conversion(graph, TENSORS, codes or {}, weight_only)  # type: ignore[arg-type]


def layer(weight: str, source: str = "s", name: str = "y", **options: object) -> OperatorCall:
    return OperatorCall(name, CONV, (Result(source), Stored(f"{weight}.weight"), None), options)


@pytest.mark.parametrize(("weight", "kernel"), [("sign", "binary"), ("ternary", "ternary")])
def test_signs_and_weights_of_one_magnitude_run_on_sign_kernels(weight: str, kernel: str) -> None:
    found = convert(SIGNS, layer(weight))
    assert [(path.name, path.kernel) for path in found.paths] == [(weight, kernel)]
    assert [call.operator for call in found.graph.nodes] == ["lowbit.binary_conv2d.default"]
    scales = [tensor.tolist() for tensor in found.tensors.values() if tensor.shape == (2,) and tensor.is_floating_point()]
    assert [abs(float(TENSORS[f"{weight}.weight"].abs().max()))] * 2 in scales


@pytest.mark.parametrize(
    ("calls", "reason"),
    [
        ((layer("sign", "x"),), "input"),
        ((SIGNS, layer("float")), "weight"),
        ((SIGNS, layer("sign", padding="same")), "padding"),
    ],
)
def test_what_fits_no_kernel_stays_in_float_with_the_reason(calls: tuple[OperatorCall, ...], reason: str) -> None:
    found = convert(*calls)
    assert [path.kernel for path in found.paths] == ["float"]
    assert reason in found.paths[0].reason
    assert [call.operator for call in found.graph.nodes] == [call.operator for call in calls]


def test_a_weight_that_is_used_twice_has_two_entries() -> None:
    found = convert(
        SIGNS,
        layer("sign", name="first"),
        layer("sign", name="second"),
        OperatorCall("z", "aten.add.Tensor", (Result("first"), Result("second")), {}),
    )
    assert [path.name for path in found.paths] == ["sign", "sign.second"]
    assert {path.kernel for path in found.paths} == {"binary"}


def test_quantized_weights_alone_stay_packed_if_asked_and_in_float_if_not() -> None:
    quantizer = UniformQuantizer(4, signed=True, symmetric=True)
    quantizer.initialize(TENSORS["square"])
    codes = {"square": quantizer.encode(TENSORS["square"])}
    linear = OperatorCall("y", LINEAR, (Result("x"), Stored("square"), None), {})
    assert convert(linear, codes=dict(codes)).paths[0].kernel == "float"
    found = convert(linear, weight_only="float", codes=dict(codes))
    assert (found.paths[0].kernel, found.graph.nodes[0].operator) == ("packed", "lowbit.packed_linear.default")


def test_views_become_reshapes_which_any_order_of_memory_allows() -> None:
    found = convert(OperatorCall("flat", "aten.view.default", (Result("x"), [-1, 32]), {}))
    assert [call.operator for call in found.graph.nodes] == [RESHAPE]


def test_a_layer_whose_tensors_do_not_fit_is_an_error_of_the_file() -> None:
    with pytest.raises(FileFormatError, match="graph node 'y': its settings, weight and batch norm do not fit"):
        convert(SIGNS, layer("sign", groups=3))


def test_an_entry_reads_as_a_line() -> None:
    assert str(LayerPath("conv1", "binary", ("batch norm", "sum"))) == "conv1: binary with batch norm, sum"
    assert str(LayerPath("fc", "float", reason="its weight is computed")) == "fc: float (its weight is computed)"
