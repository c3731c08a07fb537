from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.fuzzing import operator_names
from torch import Tensor, nn

from lowbit.errors import FileFormatError
from lowbit.formats.program.arguments import check_tensors
from lowbit.formats.program.operators import _ATEN, check_arguments, find_operator, find_overload, operator_name

ATEN = torch.ops.aten
X = torch.randn(2, 6, 4, 4, generator=torch.Generator().manual_seed(0))


def checked(name: str) -> Callable[..., object]:
    """The operator of that name behind the checks that a loaded network makes before each call."""

    def call(*args: object, **kwargs: object) -> object:
        check_tensors(find_overload(name), args, kwargs)
        return find_operator(name)(*args, **kwargs)

    return call


def schema_of(name: str) -> torch._C.FunctionSchema:
    namespace, packet, overload = name.split(".")
    return getattr(getattr(getattr(torch.ops, namespace), packet), overload)._schema


def test_no_allowed_operator_writes_into_an_argument_or_takes_code_or_files() -> None:
    names = operator_names()
    assert len(names) > 350
    assert [name for name in names if schema_of(name).is_mutable] == []
    kinds = {str(argument.type) for name in names for argument in schema_of(name).arguments}
    assert {kind for kind in kinds if "Future" in kind or "Any" in kind or "Storage" in kind or "Generator" in kind} == set()
    assert {packet for packet in _ATEN if not any(name.split(".")[1] == packet for name in names)} == set()


@pytest.mark.parametrize(
    "name",
    [
        "aten.relu_.default", "aten.add.out", "aten.set_.source_Tensor", "aten.as_strided.default", "aten.rand.default", "aten.bernoulli.p",
        "aten.from_file.default", "aten.sort.values", "aten.max.dim_max", "aten.topk.values", "aten._native_batch_norm_legit.default",
        "aten.lstm.data", "aten.to.prim_dtype", "aten.mul.left_t", "aten.remainder.int", "aten.add.t", "aten.sym_size.default",
        "aten.relu.overloads", "aten.relu.__class__", "aten.relu.default.extra", "aten.relu", "aten..", "", "prim.Print.default",
        "os.system.default", "lowbit.load.default", "builtins.eval.x", "getattr", "eval", "torch.load",
    ],
)  # fmt: skip
def test_whatever_is_not_listed_is_refused(name: str) -> None:
    with pytest.raises(FileFormatError, match=r"is not one that a packed file may use|is unknown to torch"):
        find_operator(name)


def test_an_overload_of_another_torch_is_named() -> None:
    with pytest.raises(FileFormatError, match=r"operator 'aten\.relu\.future' is unknown to torch 2\..*; the file needs another version"):
        find_operator("aten.relu.future")


def test_names_lead_back_to_their_operators() -> None:
    for target in (ATEN.conv2d.default, ATEN.add.Tensor, torch.ops.lowbit.fake_quantize_affine.default, ATEN.sym_size.int):
        name = operator_name(target)
        assert name is not None
        assert find_operator(name) is target
    assert operator_name(torch.sym_max) == "sym_max"
    for target in (ATEN.relu_.default, ATEN.add.out, ATEN.sort.values, torch.relu, print, "aten.relu.default"):
        assert operator_name(target) is None


def test_numbers_are_computed_within_bounds_only() -> None:
    assert find_operator("mul")(6, 7) == 42
    assert find_operator("floordiv")(7, 2) == 3
    assert find_operator("getitem")([5, 6], 1) == 6
    wrong = (("mul", ([0], 10**9)), ("mul", ("a", 9)), ("add", ([1], [2])), ("getitem", ({"a": 1}, "a")), ("getitem", ([1], "0")))
    for name, args in wrong:
        with pytest.raises(TypeError, match="needs"):
            find_operator(name)(*args)
    with pytest.raises(OverflowError, match="too large"):
        find_operator("mul")(2**40, 2**40)


@pytest.mark.parametrize("name", ["aten._native_batch_norm_legit_no_training.default", "aten._native_batch_norm_legit.no_stats"])
def test_a_batch_norm_does_not_read_past_its_tables(name: str) -> None:
    norm, ones, short = checked(name), torch.ones(6), torch.ones(5)
    statistics = [torch.zeros(6), ones] if name.endswith("default") else [True]
    rest = [0.1, 1e-5]
    expected = getattr(ATEN, name.split(".")[1])
    good = norm(X, ones, None, *statistics, *rest)
    assert torch.equal(good[0], getattr(expected, name.split(".")[2])(X, ones, None, *statistics, *rest)[0])
    for x, weight, bias in ((X, short, None), (X, ones, short), (X[0, 0, 0], None, None)):
        with pytest.raises(ValueError, match="needs tables of one element for each channel"):
            norm(x, weight, bias, *statistics, *rest)
    bad = [torch.zeros(1), torch.ones(1)] if name.endswith("default") else [False]
    with pytest.raises(ValueError, match=r"needs tables of one element|needs running statistics"):
        norm(X, None, None, *bad, *rest)


def lstm_arguments(**changes: object) -> list[object]:
    """A bidirectional LSTM of 3 inputs and 4 outputs on 2 sequences of 5 steps."""
    torch.manual_seed(0)
    module = nn.LSTM(3, 4, num_layers=2, bidirectional=True)
    states = [torch.zeros(4, 2, 4), torch.zeros(4, 2, 4)]
    given = {"x": torch.randn(5, 2, 3), "states": states, "parameters": [p.detach() for p in module.parameters()]} | changes
    return [given["x"], given["states"], given["parameters"], True, 2, 0.0, False, True, False]


def test_an_lstm_does_not_reach_past_its_states_and_parameters() -> None:
    lstm = checked("aten.lstm.input")
    good = lstm_arguments()
    assert torch.equal(lstm(*good)[0], ATEN.lstm.input(*good)[0])  # type: ignore[index]
    states, parameters = good[1], good[2]
    assert isinstance(states, list)
    assert isinstance(parameters, list)
    for index in range(len(parameters)):
        shorter = [p[:-1] if place == index else p for place, p in enumerate(parameters)]
        with pytest.raises(ValueError, match="do not fit an input"):
            lstm(*lstm_arguments(parameters=shorter))
    for changes in (
        {"parameters": parameters[:-1]},
        {"states": [states[0][:, :1], states[1]]},
        {"states": [states[0][:1], states[1]]},
        {"states": [states[0], states[1][..., :1]]},
        {"x": torch.randn(5, 2, 1)},
        {"x": torch.randn(5, 3, 3)},
    ):
        with pytest.raises(ValueError, match="do not fit an input"):
            lstm(*lstm_arguments(**changes))
    with pytest.raises(ValueError, match="all its tensors of one dtype"):
        lstm(*lstm_arguments(states=[s.double() for s in states]))


@pytest.mark.parametrize(
    ("name", "args", "reason"),
    [
        ("aten.native_group_norm.default", (X, None, None, 2, 6, 99, 2, 1e-5), "is not 2 x 6 x 99"),
        ("aten.native_group_norm.default", (X[:0], None, None, 4, -(2**63), 3, 2, 1e-5), "C must be at most"),
        ("aten._upsample_bilinear2d_aa.default", (X, [8, 8], False, 1e-5, 1e-5), "a scale of 1e-05 does not resize 4 to 8"),
        ("aten._upsample_bicubic2d_aa.default", (X, [8, 8], False, 2.0, float("nan")), "a scale of nan does not resize 4 to 8"),
    ],
)
def test_sizes_that_torch_would_believe_are_compared_with_the_input(name: str, args: tuple[object, ...], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        checked(name)(*args)


def test_guarded_operators_compute_what_torch_computes() -> None:
    expected: Tensor = ATEN.native_group_norm.default(X, None, None, 2, 6, 16, 2, 1e-5)[0]
    assert torch.equal(checked("aten.native_group_norm.default")(X, None, None, 2, 6, 16, 2, 1e-5)[0], expected)  # type: ignore[index]
    resized = checked("aten._upsample_bilinear2d_aa.default")(X, [8, 6], False, 2.0, None)
    assert torch.equal(resized, ATEN._upsample_bilinear2d_aa.default(X, [8, 6], False, 2.0, None))  # type: ignore[arg-type]
    attention = checked("aten.scaled_dot_product_attention.default")
    assert torch.equal(attention(X, X, X), ATEN.scaled_dot_product_attention.default(X, X, X))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one head"):
        attention(X, X[:, :0], X[:, :0], enable_gqa=True)


@pytest.mark.parametrize(
    ("name", "args", "kwargs"),
    [
        ("aten.cumsum.default", (X, 1), {"dtype": 1000}),
        ("aten._to_copy.default", (X,), {"memory_format": -7}),
        ("aten.softmax.int", (X, 1, 99), {}),
        ("aten.to.dtype", (X, 2**31), {}),
        ("aten.zeros.default", ([2],), {"layout": 5}),
    ],
)
def test_a_number_in_the_place_of_a_dtype_is_refused(name: str, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
    with pytest.raises(FileFormatError, match="must be a dtype or memory format, got"):
        check_arguments(name, args, kwargs)


def test_dtypes_and_memory_formats_are_accepted() -> None:
    check_arguments("aten.cumsum.default", (X, 1), {"dtype": torch.float64})
    check_arguments("aten.clone.default", (X,), {"memory_format": torch.channels_last})
    check_arguments("aten.softmax.int", (X, 1, None), {})
    check_arguments("mul", (2, 3), {})
