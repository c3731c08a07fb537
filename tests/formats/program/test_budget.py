from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.fuzzing import write_file

import lowbit
from lowbit.errors import FileFormatError, SpecError
from lowbit.formats.program.budget import LEAST, Budget

ATEN = torch.ops.aten
X = torch.ones(1, 4, 8, 8)


@pytest.mark.parametrize(
    ("overload", "args"),
    [
        (ATEN.expand.default, (torch.ones(1), [2**30])),
        (ATEN.repeat.default, (X, [2**20, 1, 8, 1])),
        (ATEN.full.default, ([2**30], 1.0)),
        (ATEN.arange.default, (2**40,)),
        (ATEN.constant_pad_nd.default, (X, [2**28, 0])),
        (ATEN.upsample_nearest2d.default, (X, [2**15, 2**15])),
        (ATEN.conv2d.default, (X, torch.ones(1, 4, 1, 1), None, [1, 1], [2**14, 2**14])),
        (ATEN.outer.default, (torch.ones(2**15), torch.ones(2**15))),
        (ATEN.one_hot.default, (torch.zeros(4, dtype=torch.int64), 2**30)),
        (ATEN.repeat_interleave.self_int, (X, 2**28)),
        (ATEN.repeat_interleave.Tensor, (torch.tensor([2**30]),)),
        (ATEN.adaptive_avg_pool2d.default, (X, [2**15, 2**15])),
    ],
    ids=lambda value: str(value) if not isinstance(value, tuple) else "",
)
def test_a_result_that_is_too_large_is_refused_before_it_is_made(overload: Any, args: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match=rf"its result has [\d,]+ elements, at most {LEAST:,} are allowed"):
        Budget(None, [X]).check(overload, args, {})


def test_a_pooling_window_counts_whether_its_places_exist_or_not() -> None:
    with pytest.raises(ValueError, match="operations are needed"):
        Budget(None, [X]).check(ATEN.max_pool2d.default, (X, [2**31, 2], [1, 1], [2**30, 1]), {})


def test_the_limit_of_elements_is_exact_and_grows_with_the_inputs() -> None:
    Budget(256, [X]).check(ATEN.relu.default, (X,), {})
    with pytest.raises(ValueError, match="its result has 256 elements, at most 255 are allowed"):
        Budget(255, [X]).check(ATEN.relu.default, (X,), {})
    assert Budget(None, [torch.empty(2**23, device="meta")]).max_elements == 64 * 2**23
    assert Budget(None, [X]).max_elements == LEAST


def test_results_that_are_held_together_and_work_add_up() -> None:
    budget = Budget(256, [X])
    for index in range(16):
        budget.hold(f"y{index}", X, [])
    with pytest.raises(ValueError, match="4,352 elements are in memory together, at most 4,096"):
        budget.hold("y16", X, [])
    budget = Budget(256, [X])
    with pytest.raises(ValueError, match="operations are needed"):
        for _ in range(1000):
            budget.check(ATEN.relu.default, (X,), {})


def test_masks_are_counted_by_what_they_select() -> None:
    budget, mask = Budget(None, [X]), torch.zeros(1, 4, 8, 8, dtype=torch.bool)
    budget.check(ATEN.index.Tensor, (X, [mask]), {})
    assert budget.is_decided_by_values


def test_load_takes_the_limit_and_names_the_node(tmp_path: Path) -> None:
    node = ["y", "aten.repeat.default", [{"node": "x"}, [4, 1]], {}]
    path = write_file(tmp_path / "m.lowbit", [node], {"t": np.ones(1, np.float32)}, [["x", [None, 8], "float32"]])
    assert lowbit.load(path)(torch.ones(2, 8)).shape == (8, 8)  # type: ignore[attr-defined]
    network = lowbit.load(path, max_elements=64)
    for _ in range(2):  # a batch that passed is not checked again, a larger one is
        assert network(torch.ones(2, 8)).shape == (8, 8)  # type: ignore[attr-defined]
        with pytest.raises(FileFormatError, match=r"graph node 'y' .* its result has 96 elements, at most 64 are allowed"):
            network(torch.ones(3, 8))
    with pytest.raises(SpecError, match="max_elements must be a whole number of at least 1"):
        lowbit.load(path, max_elements=0)
