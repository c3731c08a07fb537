from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lowbit.runtime import compiled
from lowbit.runtime.binary_conv import compiled_loops

pytestmark = pytest.mark.skipif(compiled_loops() is None, reason="there are no compiled kernels here")

RUN = """
import torch
from lowbit.runtime.binary_conv import binary_conv2d, binary_conv2d_reference, compiled_loops, pack_conv_weight
assert compiled_loops() is not None
arguments = (torch.randn(1, 40, 6, 6), *pack_conv_weight(torch.ones(8, 40, 3, 3)), torch.ones(8), None, 40, [3, 3], [1, 1], [1, 1], [1, 1], 1)
assert torch.equal(binary_conv2d(*arguments), binary_conv2d_reference(*arguments))
print(compiled_loops().FOLDER)
print(sum(compiled_loops().convolve.stats.cache_hits.values()))
"""


def start(cache: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, compiled.VARIABLE: str(cache)}
    return subprocess.Popen([sys.executable, "-c", RUN], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> tuple[Path, int]:
    """The cache folder, and how often the kernel was read from it."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    folder, hits = out.splitlines()
    return Path(folder), int(hits)


def test_two_processes_fill_the_cache_at_once_and_later_ones_read_it_unless_it_is_damaged(tmp_path: Path) -> None:
    folders = {finish(process)[0] for process in [start(tmp_path), start(tmp_path)]}
    assert len(folders) == 1
    folder = folders.pop()
    assert compiled.is_sound(folder)
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    assert finish(start(tmp_path)) == (folder, 1)
    damaged = next(path for path in folder.rglob("*.nbc"))
    damaged.write_bytes(damaged.read_bytes()[:-100] + b"x" * 100)
    assert not compiled.is_sound(folder)
    assert finish(start(tmp_path)) == (folder, 0)
    assert compiled.is_sound(folder)


def test_without_a_folder_that_can_be_written_the_kernels_work_all_the_same(tmp_path: Path) -> None:
    blocked = tmp_path / "a file"
    blocked.write_text("")
    assert finish(start(blocked / "cache"))[1] == 0


def test_the_folder_depends_on_the_target_and_the_sources(tmp_path: Path) -> None:
    source = tmp_path / "kernel.py"
    source.write_text("a")
    first = compiled.cache_folder("avx2", [source])
    assert first != compiled.cache_folder("avx512", [source])
    source.write_text("b")
    assert first != compiled.cache_folder("avx2", [source])


@pytest.mark.parametrize("content", ["", "{}", "[", '{"a": "0"}'])
def test_a_folder_whose_checksums_do_not_fit_is_not_sound(content: str, tmp_path: Path) -> None:
    (tmp_path / compiled.CHECKSUMS).write_text(content)
    (tmp_path / "code.nbc").write_text("code")
    assert not compiled.is_sound(tmp_path)
