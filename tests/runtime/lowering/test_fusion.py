from __future__ import annotations

import pytest
import torch

from lowbit.formats.program.calls import Graph, GraphInput, OperatorCall, Result, Stored
from lowbit.quantizers import UniformQuantizer
from lowbit.runtime.lowering.editor import GraphEditor
from lowbit.runtime.lowering.fusion import AFFINE, CONV, GRID, INPUT_SCALE, NORM, SIGN, FusionPatterns

TENSORS = {
    "w": torch.tensor([[0.5, -0.5], [0.0, 2.0]]).view(2, 2, 1, 1), "uneven": torch.tensor([[0.5, -0.25]]).view(1, 2, 1, 1), "b": torch.tensor([1.0, 2.0]),
    "below": torch.tensor([-1e-45]), "at": torch.tensor([0.0]), "signs": torch.tensor([-1.0, 1.0]), "shift": torch.tensor([3.0, -1.0]).view(2, 1, 1),
    "gamma": torch.tensor([2.0, -2.0]), "beta": torch.tensor([1.0, 0.0]), "mean": torch.tensor([0.5, 0.5]), "var": torch.tensor([4.0, 4.0]),
    "scale": torch.tensor(0.5), "zero": torch.tensor(3.0), "lower": torch.tensor(-1.0), "half": torch.tensor(0.5),
}  # fmt: skip


def find(*calls: OperatorCall, outputs: tuple[str, ...] = ()) -> tuple[FusionPatterns, GraphEditor]:
    graph = Graph((GraphInput("x", (None, 2, 4, 4), torch.float32),), calls, tuple(Result(name) for name in outputs), None)
    editor = GraphEditor(graph)
    return FusionPatterns(editor, TENSORS, {}), editor


def call(name: str, operator: str, *args: object, **kwargs: object) -> OperatorCall:
    return OperatorCall(name, operator, args, kwargs)


def norm(name: str, source: str) -> tuple[OperatorCall, OperatorCall]:
    tables = [Stored(table) for table in ("gamma", "beta", "mean", "var")]
    return call(name, NORM, Result(source), *tables, 0.1, 0.0), call(f"{name}_0", "getitem", Result(name), 0)


def test_weights_of_one_magnitude_are_signs_and_a_scale_and_others_are_not() -> None:
    patterns, _ = find()
    found = patterns.signs_and_scale("w")
    assert found is not None
    assert found[0].flatten().tolist() == [1.0, -1.0, 0.0, 1.0]
    assert found[1].tolist() == [0.5, 2.0]
    assert patterns.signs_and_scale("uneven") is None
    assert patterns.whole_numbers("uneven") is None  # no codes are known


def test_small_codes_are_whole_numbers_with_a_scale_for_each_channel() -> None:
    quantizer = UniformQuantizer(2, signed=True, symmetric=True)
    quantizer.set_parameters(torch.tensor(0.5), torch.tensor(0.0))
    weight = torch.tensor([[0.5, -1.0], [0.0, 0.5]]).view(2, 2, 1, 1)
    patterns = FusionPatterns(GraphEditor(Graph((), (), (), None)), {"w": weight}, {"w": quantizer.encode(weight)})
    found = patterns.whole_numbers("w")
    assert found is not None
    assert (found[0].flatten().tolist(), found[1].tolist()) == ([1.0, -2.0, 0.0, 1.0], [0.5, 0.5])


def test_a_sign_has_two_levels_and_its_boundary_right_below_zero() -> None:
    patterns, _ = find()
    assert patterns.is_sign(call("s", SIGN, Result("x"), Stored("below"), Stored("signs")))
    assert not patterns.is_sign(call("s", SIGN, Result("x"), Stored("at"), Stored("signs")))  # 0 itself would be negative
    assert not patterns.is_sign(call("s", SIGN, Result("x"), Stored("below"), Stored("shift")))
    assert not patterns.is_sign(call("s", "aten.sign.default", Result("x")))


def test_shifts_and_norms_before_a_sign_become_thresholds_and_flips() -> None:
    sign = call("s", SIGN, Result("n_0"), Stored("below"), Stored("signs"))
    patterns, _ = find(call("a", "aten.add.Tensor", Result("x"), Stored("shift")), *norm("n", "a"), sign, outputs=("s",))
    source, threshold, flip, names = patterns.sign_chain(sign, 2, -3)
    assert source == Result("x")
    assert names == ["batch norm before"]
    assert threshold is not None
    assert flip is not None
    # 2 (x + 3 - 0.5) / 2 + 1 >= 0 from x = -3.5 on; -2 (x - 1 - 0.5) / 2 >= 0 up to x = 1.5, so that flipping begins right above
    torch.testing.assert_close(threshold, torch.tensor([-3.5, 1.5]))
    assert flip.tolist() == [False, True]
    alone = call("t", SIGN, Result("x"), Stored("below"), Stored("signs"))
    assert find(alone, outputs=("t",))[0].sign_chain(alone, 2, -3) == (Result("x"), None, None, [])


def test_norms_sums_and_activations_behind_a_layer_are_found_where_nothing_else_reads_it() -> None:
    conv, total = call("c", CONV, Result("x"), Stored("w"), Stored("b")), call("t", "aten.add.Tensor", Result("n_0"), Result("x"))
    relu, clip = call("r", "aten.relu.default", Result("t")), call("e", "aten.mul.Tensor", Result("r"), Result("r"))
    patterns, editor = find(conv, *norm("n", "c"), total, relu, clip, outputs=("e",))
    found = patterns.norm_behind(conv)
    assert found is not None
    assert [node.name for node in found] == ["n", "n_0"]
    factor, shift = patterns.norm_parameters(found[0])
    assert (factor.tolist(), shift.tolist()) == ([1.0, -1.0], [0.5, 0.5])
    assert patterns.sum_behind(editor.nodes["n_0"]) == (total, Result("x"))
    behind = patterns.activation_behind(total, 2, -3)
    assert behind is not None
    assert [node.name for node in behind[0]] == ["r"]
    assert patterns.bias(conv, 2).tolist() == [1.0, 2.0]
    assert patterns.bias(call("c", CONV, Result("x"), Stored("w")), 2).tolist() == [0.0, 0.0]
    assert find(conv, *norm("n", "c"), outputs=("c", "n_0"))[0].norm_behind(conv) is None


def test_windows_are_read_from_pairs_single_numbers_and_defaults() -> None:
    patterns, _ = find()
    window = patterns.window(call("c", CONV, Result("x"), Stored("w"), None, [2, 1], 3, groups=1))
    assert (window.kernel_size, window.stride, window.padding, window.dilation, window.groups) == ([1, 1], [2, 1], [3, 3], [1, 1], 1)


@pytest.mark.parametrize(("kernel", "is_found"), [([1, 1], True), ([3, 1], False)])
def test_input_scaling_is_a_product_with_the_operator_of_the_same_window(kernel: list[int], is_found: bool) -> None:
    scale = call("k", INPUT_SCALE, Result("x"), kernel, [1, 1], [0, 0], [1, 1], 1)
    conv, product = call("c", CONV, Result("x"), Stored("w")), call("p", "aten.mul.Tensor", Result("c"), Result("k"))
    patterns, _ = find(scale, conv, product, outputs=("p",))
    assert patterns.input_scaling_behind(conv, Result("x")) == ([product] if is_found else None)
    assert patterns.input_scaling_behind(conv, Result("y")) is None


@pytest.mark.parametrize(
    ("node", "expected"),
    [
        (call("q", AFFINE, Result("x"), Stored("scale"), Stored("zero"), 0, 15), [0.0, 0.5, 3.0, 3.0, 0.5, 0.0, 15.0]),
        (
            call("q", GRID, Result("x"), Stored("lower"), Stored("half"), Stored("scale"), Stored("zero"), 0, 7),
            [-1.0, 0.5, 0.0, 3.0, 0.5, 0.0, 7.0],
        ),
        (call("q", AFFINE, Result("x"), Stored("scale"), Stored("half"), 0, 15), None),  # 0 is no level
        (call("q", AFFINE, Result("x"), Stored("scale"), Stored("zero"), 0, 256), None),  # more codes than a byte has
        (call("q", AFFINE, Result("x"), Stored("b"), Stored("zero"), 0, 15), None),  # a scale for each channel
    ],
)
def test_grids_of_inputs_that_fit_a_byte(node: OperatorCall, expected: list[float] | None) -> None:
    assert find()[0].input_grid(node) == expected
