from __future__ import annotations

import os
from pathlib import Path

import pytest

from lowbit.errors import OutputError
from lowbit.workflows.output import prepare_folder


def test_a_missing_folder_is_made_and_left_empty(tmp_path: Path) -> None:
    folder = prepare_folder(tmp_path / "a" / "b", needed_bytes=10)
    assert list(folder.iterdir()) == []


def test_a_file_of_that_name_is_an_error_and_stays(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(OutputError, match="there is a file of this name"):
        prepare_folder(tmp_path / "out", needed_bytes=0)
    assert (tmp_path / "out").read_text() == "mine"


def test_a_path_below_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="cannot write there"):
        prepare_folder(tmp_path / "file" / "out", needed_bytes=0)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_an_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="cannot write there"):
        prepare_folder(tmp_path / "out", needed_bytes=0)


def test_a_disk_without_room_is_an_error_that_says_how_much_is_needed(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"about 1000000000000\.0 MB are needed"):
        prepare_folder(tmp_path / "out", needed_bytes=10**18)
