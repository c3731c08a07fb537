from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lowbit.runtime.cpu import compiled
from lowbit.runtime.layers.binary import compiled_loops

needs_kernels = pytest.mark.skipif(compiled_loops() is None, reason="there are no compiled kernels here")

# a function that compiles in a moment, kept the way the kernels are; lowbit with torch takes seconds to import, this module does not
SMALL = f"""
import importlib.util
from pathlib import Path
import numba

spec = importlib.util.spec_from_file_location("compiled", {compiled.__file__!r})
compiled = importlib.util.module_from_spec(spec)
spec.loader.exec_module(compiled)
FOLDER = compiled.cache_folder("small", [Path(__file__)])
with compiled.cached_in(FOLDER) as is_cached:
    double = numba.njit(["int64(int64)"], cache=is_cached)(lambda x: 2 * x)
assert double(21) == 42
HITS = sum(double.stats.cache_hits.values())
"""
KERNELS = """
import json
import torch
from lowbit.runtime.arguments import Epilogue, SignLayer, Window
from lowbit.runtime.layers.binary import binary_conv2d, binary_conv2d_reference, compiled_loops, pack_conv_weight
layer, window = SignLayer(pack_conv_weight(torch.ones(8, 40, 3, 3))[0], 40), Window((3, 3), padding=(1, 1))
arguments = torch.randn(1, 40, 6, 6), layer, window, Epilogue(torch.ones(8))
assert torch.equal(binary_conv2d(*arguments), binary_conv2d_reference(*arguments))
loops = compiled_loops()
print(json.dumps([str(loops.FOLDER), sum(loops.layer.stats.cache_hits.values()), sum(loops.pack.stats.cache_hits.values())]))
"""


@pytest.fixture
def use_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """Runs ``SMALL`` anew as its own module, as a new process would, with an empty cache in ``tmp_path / "cache"`` at first."""
    pytest.importorskip("numba")
    source = tmp_path / "small.py"
    source.write_text(SMALL)
    monkeypatch.setenv(compiled.VARIABLE, str(tmp_path / "cache"))

    def run() -> Any:
        spec = importlib.util.spec_from_file_location("small", source)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return run


@needs_kernels
def test_another_process_reads_the_kernels_that_this_one_has_compiled() -> None:
    loops = compiled_loops()
    assert loops is not None
    if not compiled.is_sound(loops.FOLDER):
        pytest.skip("the cache folder cannot be written")
    done = subprocess.run([sys.executable, "-c", KERNELS], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [str(loops.FOLDER), 1, 1]


def test_processes_that_fill_the_cache_at_once_leave_one_whole_folder(use_small: Callable[[], Any], tmp_path: Path) -> None:
    command = [sys.executable, str(tmp_path / "small.py")]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    for process in processes:
        _, told = process.communicate(timeout=300)
        assert process.returncode == 0, told
    folder = use_small().FOLDER
    assert compiled.is_sound(folder)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [folder.name]
    assert use_small().HITS == 1


def test_code_is_read_from_the_cache_unless_it_is_damaged(use_small: Callable[[], Any]) -> None:
    first = use_small()
    assert (first.HITS, compiled.is_sound(first.FOLDER)) == (0, True)
    assert use_small().HITS == 1
    damaged = next(path for path in first.FOLDER.rglob("*.nbc"))
    damaged.write_bytes(damaged.read_bytes()[:-100] + b"x" * 100)
    assert not compiled.is_sound(first.FOLDER)
    assert use_small().HITS == 0
    assert compiled.is_sound(first.FOLDER)
    assert use_small().HITS == 1


def test_without_a_folder_that_can_be_written_the_code_works_all_the_same(
    use_small: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a file").write_text("")
    monkeypatch.setenv(compiled.VARIABLE, str(tmp_path / "a file" / "cache"))
    module = use_small()
    assert (module.is_cached, module.HITS, module.double(4)) == (False, 0, 8)


def test_the_folder_depends_on_the_target_and_the_sources(tmp_path: Path) -> None:
    pytest.importorskip("numba")
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
