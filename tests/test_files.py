from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from threading import Thread

import pytest
import torch

from lowbit.errors import DataError, FileFormatError, OutputError
from lowbit.files import read_tensors, replacing, write_tensors, write_text
from lowbit.reading import check_readable


def test_a_file_is_replaced_when_the_block_ends_well(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_text("old")
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
        assert temporary.suffix == ".onnx"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_in_the_block_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), replacing(path) as temporary:
        temporary.write_text("half of the n")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_in_the_place_of_the_file_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "a.json").mkdir()
    with pytest.raises(OutputError, match=r"a\.json"):
        write_text(tmp_path / "a.json", "x")


def test_text_is_written_as_utf8(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "Größe ×")
    assert (tmp_path / "a.txt").read_bytes().decode() == "Größe ×"


def test_what_is_no_ordinary_file_is_refused_before_it_is_opened(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    (tmp_path / "large").write_bytes(b"12345")
    for path, words in (
        (pipe, "a pipe or a device, expected a file"),
        (tmp_path, "a folder, expected a file"),
        (tmp_path / "none", "there is no such file"),
        (tmp_path / ("n" * 5000), "File name too long"),
        (tmp_path / "large", "5 bytes, at most 4 are read"),
    ):
        with pytest.raises(DataError, match=words) as caught:
            check_readable(path, max_bytes=4)
        assert len(str(caught.value)) < 400
    assert check_readable(tmp_path / "large", max_bytes=5) == tmp_path / "large"
    with pytest.raises(FileFormatError, match="no such file"):
        check_readable(tmp_path / "none", error=FileFormatError)


def test_what_processes_that_are_gone_have_left_is_swept(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    left = [tmp_path / f".report.{gone.pid}.json", tmp_path / f".report.{os.getppid()}.json", tmp_path / f".other.{gone.pid}.json"]
    for path in left:
        path.write_text("half")
    write_text(tmp_path / "report.json", "whole")
    assert [path.exists() for path in left] == [False, True, True]
    assert (tmp_path / "report.json").read_text() == "whole"


def test_a_file_of_tensors_is_read_whole_while_it_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "last.safetensors"
    write_tensors(path, {"w": torch.zeros(5)}, 5)

    def replace() -> None:
        for turn in range(1000):
            size = 1 + turn % 2 * 1000
            write_tensors(path.with_stem("next"), {"w": torch.zeros(size)}, size)
            path.with_stem("next").replace(path)

    writer = Thread(target=replace)
    writer.start()
    while writer.is_alive():
        tensors, size = read_tensors(path)
        assert tensors["w"].shape == (size,)


def test_tensors_and_facts_are_read_as_they_were_written(tmp_path: Path) -> None:
    tensors = {"w": torch.randn(3, 2, dtype=torch.bfloat16), "none": torch.zeros(0, 3), "flag": torch.tensor(True)}
    write_tensors(tmp_path / "a.safetensors", tensors, {"step": [1, None]})
    read, facts = read_tensors(tmp_path / "a.safetensors")
    assert facts == {"step": [1, None]} and read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) and read[name].dtype == tensors[name].dtype for name in tensors)
