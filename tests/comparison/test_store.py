from __future__ import annotations

import json
import math
import os
import shutil
from dataclasses import fields, replace
from pathlib import Path

import pytest
from tests.comparison.results import cell, result

from lowbit.comparison.cells import Result, digest_of
from lowbit.comparison.store import Store
from lowbit.errors import FileFormatError, OutputError, SpecError


def test_a_result_comes_back_as_it_was_kept(tmp_path: Path) -> None:
    kept = result(0.875, options={"alpha": 0.5}, settings={"recipe": {"milestones": [0.5]}})
    Store(tmp_path).keep(kept)
    assert [path.name for path in (tmp_path / "cells").iterdir()] == [f"{kept.key}.json"]
    found = Store(tmp_path).load()[kept.key]
    assert found == kept and found.value == 0.875 and found.cell.bits == "4/4"


def test_nan_is_kept_as_json_that_others_can_read(tmp_path: Path) -> None:
    kept = result(math.nan, status="diverged")
    Store(tmp_path).keep(kept)
    text = (tmp_path / "cells" / f"{kept.key}.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert math.isnan(Store(tmp_path).load()[kept.key].metrics["accuracy"])


def test_the_key_follows_from_everything_that_determines_the_result() -> None:
    facts = {"weights": "a"}
    key = cell().key(facts)
    changed = [cell(seed=1), cell("pact"), cell(bits=(4, None)), cell(options={"a": 1}), cell(terms={"epochs": 2}), cell(track="published")]
    keys = {key, cell().key({"weights": "b"}), *(one.key(facts) for one in changed)}
    assert len(keys) == 8
    assert cell(terms={"a": (1, 2)}).key(facts) == cell(terms={"a": [1, 2]}).key(facts)
    assert digest_of({"a": 1, "b": 2}) == digest_of({"b": 2, "a": 1})


@pytest.mark.parametrize("damage", ["", "{}", "[]", '{"key": 1}', "not json", "[" * 100_000])
def test_a_damaged_file_is_named(tmp_path: Path, damage: str) -> None:
    kept = result()
    Store(tmp_path).keep(kept)
    (tmp_path / "cells" / f"{kept.key}.json").write_text(damage)
    with pytest.raises(FileFormatError, match=rf"{kept.key}\.json: no result of a comparison .*Delete it"):
        Store(tmp_path).load()


@pytest.mark.parametrize("entry", [entry.name for entry in fields(Result)])
@pytest.mark.parametrize("value", [[[1e308], "x"], {"a": []}, 10**400])
def test_an_entry_of_another_type_is_refused(tmp_path: Path, entry: str, value: object) -> None:
    kept = result()
    Store(tmp_path).keep(kept)
    path = tmp_path / "cells" / f"{kept.key}.json"
    content = json.loads(path.read_text())
    is_allowed = isinstance(value, dict) and entry in ("terms", "machine")
    path.write_text(json.dumps({**content, entry: value}))
    if is_allowed:
        assert Store(tmp_path).load()[kept.key].to_dict()[entry] == value
        return
    with pytest.raises(FileFormatError, match=rf"{kept.key}\.json: no result of a comparison"):
        Store(tmp_path).load()


def test_a_pipe_is_no_result(tmp_path: Path) -> None:
    (tmp_path / "cells").mkdir()
    os.mkfifo(tmp_path / "cells" / "0.json")
    with pytest.raises(FileFormatError, match=r"0\.json: no result of a comparison .*a pipe or a device"):
        Store(tmp_path).load()


def test_a_file_whose_content_was_changed_is_refused(tmp_path: Path) -> None:
    kept = result()
    Store(tmp_path).keep(kept)
    path = tmp_path / "cells" / f"{kept.key}.json"
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))
    with pytest.raises(FileFormatError, match="its name is not that of its content"):
        Store(tmp_path).load()


def test_stores_merge_by_copying(tmp_path: Path) -> None:
    first, second = result(0.9, seed=0), result(0.8, seed=1)
    Store(tmp_path / "a").keep(first)
    Store(tmp_path / "b").keep(second)
    shutil.copytree(tmp_path / "b" / "cells", tmp_path / "a" / "cells", dirs_exist_ok=True)
    assert Store(tmp_path / "a").load() == {first.key: first, second.key: second}


def test_merging_takes_new_results_and_those_of_cells_that_failed(tmp_path: Path) -> None:
    own, other = Store(tmp_path / "a"), Store(tmp_path / "b")
    failed = result(None, seed=0)
    done = replace(result(0.9, seed=0), key=failed.key)
    own.keep(failed)
    for one in (done, result(0.8, seed=1)):
        other.keep(one)
    assert own.merge(other) == 2 and own.merge(other) == 0
    assert sorted(found.value or 0 for found in own.load().values()) == [0.8, 0.9]


def test_stores_that_disagree_are_named_and_nothing_is_merged(tmp_path: Path) -> None:
    own, other = Store(tmp_path / "a"), Store(tmp_path / "b")
    own.keep(result(0.9, seed=5))
    other.keep(result(0.8, seed=5))
    other.keep(result(0.7, seed=1))
    with pytest.raises(SpecError, match=r"a/cells/.*b/cells/.*disagree about lsq 4/4 on digits, seed 5: accuracy 0.9 and accuracy 0.8"):
        own.merge(other)
    assert [found.value for found in own.load().values()] == [0.9]
    with pytest.raises(FileFormatError, match="no folder 'cells'"):
        own.merge(Store(tmp_path / "c"))


def test_equal_nans_agree(tmp_path: Path) -> None:
    own, other = Store(tmp_path / "a"), Store(tmp_path / "b")
    for store in (own, other):
        store.keep(result(math.nan, status="diverged"))
    assert own.merge(other) == 0


def test_the_state_of_one_run_goes_when_it_has_come_to_its_end(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for key in ("done", "running"):
        (store.work_folder(key) / "state").mkdir(parents=True)
    store.forget_work("done")
    store.forget_work("never there")
    assert [path.name for path in (tmp_path / ".work").iterdir()] == ["running"]


def test_a_folder_that_cannot_be_made_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "cells").write_text("")
    with pytest.raises(OutputError, match="cells"):
        Store(tmp_path).keep(result())


def test_results_without_a_value_have_none() -> None:
    assert result(None).value is None and result(0.5, status="diverged").value is None
    assert isinstance(Result.from_dict(result().to_dict()), Result)
