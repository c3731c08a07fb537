from __future__ import annotations

import threading

import pytest
import torch

from lowbit.runtime.arguments import Epilogue, SignLayer, Window
from lowbit.runtime.layers import prepared
from lowbit.runtime.layers.binary import binary_conv2d, binary_conv2d_reference, pack_conv_weight
from lowbit.runtime.layers.prepared import PLANS, THREAD_WORK, known_layer, share


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


def test_images_of_any_size_and_number_are_computed_again_and_again_with_a_few_plans() -> None:
    words, mask = pack_conv_weight(torch.randn(5, 40, 3, 3).sign())
    layer, window, epilogue = SignLayer(words, 40, mask), Window((3, 3), (2, 1), (1, 2)), Epilogue(torch.ones(5))
    sizes = [(1 + size % 3, 40, 5 + size, 9 - size) for size in range(PLANS + 2)]
    for size in (*sizes, *sizes):
        x = torch.randn(size)
        assert torch.equal(binary_conv2d(x, layer, window, epilogue), binary_conv2d_reference(x, layer, window, epilogue))
    known = known_layer(layer, window, epilogue)
    if known is None:
        pytest.skip("needs compiled kernels")
    assert list(known.plans) == [(n, *size) for n, _, *size in sizes[-PLANS:]]


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("images", [1, 3])
def test_threads_of_the_runtime_and_of_the_caller_do_not_disturb_each_other(images: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared, "THREAD_WORK", 2**12)  # as if little work were worth a thread
    words, mask = pack_conv_weight(torch.randn(70, 40, 3, 3).sign())
    layer, window, epilogue = SignLayer(words, 40, mask), Window((3, 3), padding=(1, 1)), Epilogue(torch.ones(70))
    inputs = [torch.randn(images, 40, 12, 11) for _ in range(3)]
    expected = [binary_conv2d_reference(x, layer, window, epilogue) for x in inputs]
    wrong: list[int] = []

    def call(index: int) -> None:
        for _ in range(50):
            if not torch.equal(binary_conv2d(inputs[index], layer, window, epilogue), expected[index]):
                wrong.append(index)

    callers = [threading.Thread(target=call, args=(index,)) for index in range(len(inputs))]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


def test_a_view_that_torch_has_yet_to_negate_is_negated() -> None:
    words, mask = pack_conv_weight(torch.ones(1, 1, 1, 1))
    x = torch.complex(torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1)).conj().imag
    assert x.is_neg()
    arguments = SignLayer(words, 1, mask), Window((1, 1)), Epilogue(torch.ones(1), residual=x)
    assert binary_conv2d(x, *arguments).item() == binary_conv2d_reference(x, *arguments).item() == -2
