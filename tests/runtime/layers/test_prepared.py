from __future__ import annotations

import threading

import pytest
import torch

from lowbit.runtime.layers.prepared import THREAD_WORK, share


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
