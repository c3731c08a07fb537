from __future__ import annotations

import threading

import pytest
import torch

from lowbit.runtime.arguments import Epilogue, SignLayer, Window
from lowbit.runtime.layers.binary import binary_conv2d, pack_conv_weight
from lowbit.runtime.layers.prepared import THREAD_WORK, known_layer, share


@pytest.fixture
def two_threads() -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield None
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(
    ("rows", "work", "pieces"),
    [(7, 2 * THREAD_WORK, [(0, 3), (3, 7)]), (7, 2 * THREAD_WORK - 1, [(0, 7)]), (1, 9 * THREAD_WORK, [(0, 1)]), (0, 0, [(0, 0)])],
)
def test_rows_are_shared_out_without_gaps_where_the_work_is_worth_a_thread(rows: int, work: int, pieces: list[tuple[int, int]]) -> None:
    ran: list[tuple[int, int]] = []
    lock = threading.Lock()

    def run(first: int, last: int) -> None:
        with lock:
            ran.append((first, last))

    share(run, rows, work)
    assert sorted(ran) == pieces


@pytest.mark.usefixtures("two_threads")
def test_an_error_in_a_thread_reaches_the_caller() -> None:
    def run(first: int, last: int) -> None:
        if first > 0:
            raise ValueError("second piece")

    with pytest.raises(ValueError, match="second piece"):
        share(run, 2, 4 * THREAD_WORK)


def test_a_layer_is_known_whatever_is_added_to_its_sums_until_a_tensor_is_written_to_or_replaced() -> None:
    words, mask = pack_conv_weight(torch.ones(1, 2, 1, 1))
    layer, window, epilogue = SignLayer(words, 2, mask), Window((1, 1)), Epilogue(torch.tensor([2.0]), torch.tensor([0.5]))
    x, residual = torch.ones(1, 2, 1, 1), torch.full((1, 1, 1, 1), 10.0)
    assert binary_conv2d(x, layer, window, epilogue).item() == 4.5
    known = known_layer(layer, window, epilogue)
    if known is None:
        pytest.skip("needs compiled kernels")
    assert known_layer(layer, window, epilogue.with_residual(residual)) is known
    assert known_layer(layer, window, epilogue.with_residual(residual).with_residual(x)) is known
    assert binary_conv2d(x, layer, window, epilogue.with_residual(residual)).item() == 14.5
    assert known_layer(layer, window, Epilogue(epilogue.scale, epilogue.bias, residual)) is known  # other parts of the same tensors
    assert known_layer(layer, window, Epilogue(torch.tensor([2.0]), epilogue.bias)) is None
    assert known_layer(layer, Window((1, 1), padding=(1, 1)), epilogue) is None
    assert epilogue.bias is not None
    epilogue.bias.add_(1)
    assert known_layer(layer, window, epilogue) is None
    assert binary_conv2d(x, layer, window, epilogue.with_residual(residual)).item() == 15.5
