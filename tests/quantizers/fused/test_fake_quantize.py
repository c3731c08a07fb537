from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lowbit.quantizers.fused import are_available, fused_kernels, threads
from lowbit.quantizers.fused.fake_quantize import backward, backward_reference, forward, forward_reference, suits
from lowbit.quantizers.grid import Grid, fake_quantize_grid
from lowbit.surrogates import ElementwiseGradientScaling, Surrogate, bounded_straight_through, straight_through

needs_numba = pytest.mark.skipif(not are_available(), reason="numba is not installed")

LAYOUTS: dict[str, tuple[tuple[int, ...], tuple[int, ...], torch.memory_format]] = {
    "activation": ((4, 6, 5, 7), (), torch.contiguous_format),
    "activation_channels_last": ((4, 6, 5, 7), (), torch.channels_last),
    "weight_per_channel": ((6, 3, 3, 3), (6, 1, 1, 1), torch.contiguous_format),
    "weight_channels_last": ((6, 3, 3, 3), (6, 1, 1, 1), torch.channels_last),
    "groups": ((6, 4, 9), (6, 4, 1), torch.contiguous_format),
    "longer_than_a_block": ((1, 3 * 4096 + 17), (), torch.contiguous_format),
}


def values(shape: tuple[int, ...], layout: torch.memory_format = torch.contiguous_format, seed: int = 0) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return x.contiguous(memory_format=layout)


def table(shape: tuple[int, ...], *, ends: bool = False, seed: int = 1) -> Tensor:
    """Lower, step, scale and zero point, all different; with ends where the codes 0 and 15 end."""
    draw = torch.rand((4, *shape), generator=torch.Generator().manual_seed(seed))
    lower, step = -0.8 - 0.3 * draw[0], 0.1 + 0.1 * draw[1]
    rows = [lower, step, 0.2 + draw[2], 8 * draw[3]]
    return torch.stack([*rows, lower, lower + 15 * step] if ends else rows)


@needs_numba
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_forward_loop_equals_the_reference_bit_for_bit(name: str) -> None:
    shape, tables, layout = LAYOUTS[name]
    x, grid = values(shape, layout), table(tables)
    x[-1, ..., -2:] = torch.tensor([1e9, -1e9])
    y = forward(x, grid, 0, 15)
    assert torch.equal(y, forward_reference(x, grid, 0, 15))
    assert y.stride() == x.stride()


@needs_numba
def test_ties_go_to_the_even_code_and_nan_stays_nan() -> None:
    grid = torch.tensor([0.0, 1.0, 1.0, 0.0])
    y = forward(torch.tensor([0.5, 1.5, 2.5, -0.5, 3.5, float("nan"), float("inf")]), grid, 0, 3)
    assert y[:5].tolist() == [0.0, 2.0, 2.0, 0.0, 3.0]
    assert y[5].isnan()
    assert y[6] == 3


@needs_numba
@pytest.mark.parametrize("ends", [False, True], ids=["codes_end", "ends_given"])
@pytest.mark.parametrize("strength", [0.0, 0.7])
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_backward_loop_agrees_with_the_reference(name: str, strength: float, ends: bool) -> None:
    shape, tables, layout = LAYOUTS[name]
    x, grid, grad = values(shape, layout), table(tables, ends=ends), values(shape, seed=2)
    by_x, by_grid = backward(grad, x, grid, 0, 15, strength)
    wanted_x, wanted_grid = backward_reference(grad, x, grid, 0, 15, strength)
    torch.testing.assert_close(by_x, wanted_x, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(by_grid, wanted_grid, rtol=1e-4, atol=1e-4 * float(wanted_grid.abs().max()))
    assert by_x.stride() == x.stride()


@needs_numba
def test_gradients_by_hand() -> None:
    # positions -1 (cut off), 1.25, 2.5 (a tie), 4 (cut off); codes 0, 1, 2, 3; step 2, scale 3, zero point 1
    x, grad = torch.tensor([-1.0, 3.5, 6.0, 9.0]), torch.tensor([1.0, 2.0, -4.0, 8.0])
    by_x, (lower, step, scale, zero_point) = backward(grad, x, torch.tensor([1.0, 2.0, 3.0, 1.0]), 0, 3)
    assert by_x.tolist() == [0.0, 3.0, -6.0, 0.0]
    assert lower.item() == -(6 - 12) / 2
    assert step.item() == -(6 * 1.25 - 12 * 2.5) / 2
    assert scale.item() == -1 * 1 + 2 * 0 - 4 * 1 + 8 * 2
    assert zero_point.item() == -3 * 7
    scaled, _ = backward(grad, x, torch.tensor([1.0, 2.0, 3.0, 1.0]), 0, 3, 0.6)
    # g (1 + 0.6 sign(g) e), e = (position - code) / 3 of the second and third: 1/12 and 1/6
    torch.testing.assert_close(scaled, torch.tensor([0.0, 3 * 1.05, -6 * 0.9, 0.0]))


@needs_numba
def test_ends_get_the_gradients_at_and_beyond_them_and_values_at_an_end_pass() -> None:
    grid = torch.tensor([0.0, 0.1, 0.1, 0.0, 0.0, 1.5])
    x, grad = torch.tensor([-1.0, 0.0, 0.7, 1.5, 2.0]), torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])
    by_x, by_grid = backward(grad, x, grid, 0, 15)
    torch.testing.assert_close(by_x, torch.tensor([0.0, 2.0, 4.0, 8.0, 0.0]))
    torch.testing.assert_close(by_grid[4:], torch.tensor([3.0, 24.0]))


@pytest.mark.parametrize("clip", [0.37, 1.7, 2.3, 3.1, 5.9, 7.7])
@pytest.mark.parametrize("is_fused", [False, True])
def test_rounding_of_the_position_never_cuts_off_the_gradient_at_an_end(clip: float, is_fused: bool) -> None:
    end = torch.tensor(clip, requires_grad=True)
    step, zero = end.detach() / 15, torch.zeros(())
    x = torch.tensor([clip, clip + 1, clip / 2], requires_grad=True)
    with fused_kernels(is_fused):
        y = fake_quantize_grid(x, Grid(zero, step, step, zero, (zero, end)), 0, 15)
    y.sum().backward()
    assert x.grad is not None and end.grad is not None
    torch.testing.assert_close(x.grad, torch.tensor([1.0, 0.0, 1.0]))
    torch.testing.assert_close(end.grad, torch.tensor(2.0))


@pytest.mark.parametrize(
    ("shape", "strides", "tables", "expected"),
    [
        ((4, 6), (6, 1), (), True),
        ((4, 6), (1, 4), (), True),  # dense in another order
        ((4, 6), (12, 2), (), False),  # holes
        ((4, 6), (0, 1), (), False),  # expanded
        ((4, 6), (6, 1), (4, 1), True),
        ((4, 6), (6, 1), (6,), False),  # the table's axis is the inner one
        ((4, 6), (1, 4), (6,), True),
        ((4, 1, 6), (6, 99, 1), (4, 1, 1), True),  # the stride of a single index means nothing
        ((4, 6), (6, 1), (4, 6), True),
        ((1, 6), (6, 1), (4, 1), False),  # the result would be larger
        ((0, 6), (6, 1), (), False),
    ],
)
def test_which_layouts_suit_the_loops(shape: tuple[int, ...], strides: tuple[int, ...], tables: tuple[int, ...], expected: bool) -> None:
    x = torch.empty(100).as_strided(shape, strides)
    assert suits(x, torch.Size(tables)) == expected


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@needs_numba
def test_two_threads_share_large_tensors_and_give_the_same(two_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "LEAST", 5000)
    x, grad, grid = values((3, 7001)), values((3, 7001), seed=2), table(())
    assert threads.pieces_of(1, x.numel()) == 2
    y, (by_x, by_grid) = forward(x, grid, 0, 15), backward(grad, x, grid, 0, 15)
    torch.set_num_threads(1)
    assert threads.pieces_of(1, x.numel()) == 1
    assert torch.equal(y, forward(x, grid, 0, 15))
    alone = backward(grad, x, grid, 0, 15)
    assert torch.equal(by_x, alone[0])
    torch.testing.assert_close(by_grid, alone[1], rtol=1e-6, atol=0)


def test_weights_with_many_rows_and_small_tensors_stay_in_one_thread(two_threads: None) -> None:
    assert threads.pieces_of(64, 2**20) == 1
    assert threads.pieces_of(1, 2**17) == 1
    assert threads.pieces_of(1, 2**18) == 2


def gradients(surrogate: Surrogate, *, is_fused: bool, ends: bool, layout: str) -> list[Tensor]:
    shape, tables, memory = LAYOUTS[layout]
    inputs = [values(shape, memory).requires_grad_(), *(row.clone().requires_grad_() for row in table(tables, ends=ends))]
    x, lower, step, scale, zero_point, *rest = inputs
    with fused_kernels(is_fused):
        y = fake_quantize_grid(x, Grid(lower, step, scale, zero_point, (rest[0], rest[1]) if ends else None), 0, 15, surrogate)
    y.backward(values(shape, seed=3))
    return [y.detach(), *(t.grad for t in inputs if t.grad is not None)]


@needs_numba
@pytest.mark.parametrize("surrogate", [bounded_straight_through, ElementwiseGradientScaling(0.4)], ids=["ste", "ewgs"])
@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("layout", ["activation_channels_last", "weight_per_channel", "groups"])
def test_fused_and_composed_quantizers_agree(surrogate: Surrogate, ends: bool, layout: str) -> None:
    ours, composed = (gradients(surrogate, is_fused=flag, ends=ends, layout=layout) for flag in (True, False))
    assert torch.equal(ours[0], composed[0])
    assert len(ours) == len(composed) == (8 if ends else 6)
    for mine, theirs in zip(ours[1:], composed[1:], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


def node_of(x: Tensor, surrogate: Surrogate = bounded_straight_through, step: Tensor | None = None) -> str:
    step, zero = torch.tensor(0.1) if step is None else step, torch.zeros(())
    function = fake_quantize_grid(x.requires_grad_(), Grid(zero, step, step, zero), 0, 15, surrogate).grad_fn
    assert function is not None
    return function.name()


@needs_numba
def test_fused_loops_are_taken_only_where_they_apply() -> None:
    fused = "_FakeQuantizeGridBackward"
    assert node_of(torch.randn(4)) == fused
    assert node_of(torch.randn(4), ElementwiseGradientScaling()) == fused
    with fused_kernels(False):
        assert node_of(torch.randn(4)) != fused
    hooked = ElementwiseGradientScaling()
    hooked.register_forward_hook(lambda *_: None)
    assert node_of(torch.randn(4), hooked) != fused
    assert node_of(torch.randn(4), straight_through) != fused
    assert node_of(torch.randn(4).double()) != fused
    assert node_of(torch.randn(4, 4)[:, ::2]) != fused
    assert node_of(torch.randn(3, 4), step=torch.full((4,), 0.1)) != fused


@needs_numba
def test_torch_compile_gets_torch_operators() -> None:
    step = torch.tensor(0.1)
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> object:
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    x = torch.randn(5)
    compiled = torch.compile(lambda x: fake_quantize_grid(x, Grid(step * 0, step, step, step * 0), 0, 15), backend=backend, fullgraph=True)
    got = compiled(x)
    assert any("div" in name for name in seen)
    assert torch.equal(got, fake_quantize_grid(x, Grid(step * 0, step, step, step * 0), 0, 15))


@needs_numba
@pytest.mark.parametrize("surrogate", [bounded_straight_through, ElementwiseGradientScaling(0.4)], ids=["ste", "ewgs"])
@pytest.mark.parametrize("ends", [False, True])
def test_second_derivatives_are_those_of_the_composed_expression(surrogate: Surrogate, ends: bool) -> None:
    found = []
    for is_fused in (True, False):
        # step and scale are one tensor, which must not count twice
        x, step = values((40,)).requires_grad_(), torch.tensor(0.11, requires_grad=True)
        low, high = torch.tensor(0.0), torch.tensor(1.65, requires_grad=True)
        zero = torch.zeros(())
        with fused_kernels(is_fused):
            y = fake_quantize_grid(x, Grid(zero, step, step, zero, (low, high) if ends else None), 0, 15, surrogate)
            first = torch.autograd.grad(y.pow(3).sum(), (x, step), create_graph=True)
            # element-wise scaling is no linear map of gradients, so that paths which meet later add up to something else
            second = torch.autograd.grad(first[0].pow(2).sum() + (first[1] if surrogate is bounded_straight_through else 0), (x, step))
        found.append([*first, *second])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_gradients_come_for_what_asks_for_them_only() -> None:
    x, step, zero = torch.randn(6), torch.tensor(0.1, requires_grad=True), torch.zeros(())
    fake_quantize_grid(x, Grid(zero, step, step.detach(), zero), 0, 15).sum().backward()
    assert step.grad is not None
    assert x.grad is None


def run_python(code: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


QUANTIZE = """
    import warnings; warnings.simplefilter("error")
    import torch
    from lowbit.quantizers.fused import are_available
    from lowbit.quantizers.grid import Grid, fake_quantize_grid
    x, step, zero = torch.tensor([0.26, -1.0, 9.0], requires_grad=True), torch.tensor(0.1), torch.zeros(())
    y = fake_quantize_grid(x, Grid(zero, step, step, zero), 0, 15)
    y.sum().backward()
    print(are_available(), [round(v, 4) for v in y.tolist()], x.grad.tolist())
"""


@needs_numba
def test_a_cache_folder_that_cannot_be_written_costs_only_time(tmp_path: Path) -> None:
    blocked = tmp_path / "a file, not a folder"
    blocked.write_text("")
    assert run_python(QUANTIZE, NUMBA_CACHE_DIR=str(blocked / "cache")) == "True [0.3, 0.0, 1.5] [1.0, 0.0, 0.0]"


@pytest.mark.parametrize("hidden", ["import sys; sys.modules['numba'] = None", "import os; os.environ['NUMBA_DISABLE_JIT'] = '1'"])
def test_without_numba_the_composed_expression_runs(hidden: str) -> None:
    assert run_python(f"\n    {hidden}{QUANTIZE}") == "False [0.3, 0.0, 1.5] [1.0, 0.0, 0.0]"
