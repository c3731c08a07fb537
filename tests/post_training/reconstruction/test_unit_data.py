"""Caches of what goes into a unit and what should come out: in memory or on disk the same, and bounded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from tests.networks import BranchNet
from torch import Tensor, nn

from lowbit.errors import CalibrationError, LayerError, OutputError
from lowbit.inputs import Inputs
from lowbit.post_training.reconstruction import unit_data
from lowbit.post_training.reconstruction.unit_data import (
    WIDE,
    CacheKind,
    CacheSpace,
    CallCache,
    TensorCache,
    UnitData,
    batches,
    call_of,
    growing,
    resized,
)

KINDS: tuple[CacheKind, ...] = ("ram", "disk")


def filled(x: Tensor, space: CacheSpace, *, samples: int, size: int) -> TensorCache:
    """A cache of ``x``, written in batches of ``size`` samples."""
    rows = len(x) // samples
    cache = TensorCache(x[: size * rows], size, samples, space)
    for start in range(0, samples, size):
        part = x[start * rows : (start + size) * rows]
        cache.write(start, len(part) // rows, part)
    return cache


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(10, 8, 4, 5), (10, 3, 4, 5), (10, 6), (10,), (10, 7, 3), (30, 2, 4, 4), (20, 3, 2)], ids=str)
def test_samples_come_back_bit_for_bit_in_any_order(kind: CacheKind, shape: tuple[int, ...], tmp_path: Path) -> None:
    x = torch.randn(shape)
    cache = filled(x, CacheSpace(kind, tmp_path), samples=10, size=4)
    index = torch.tensor([7, 0, 9, 3])
    rows = shape[0] // 10
    expected = x.view(10, rows, *shape[1:])[index].flatten(0, 1)
    got = cache.read(index)
    assert torch.equal(got, expected)
    assert cache.samples == 10
    if len(shape) == 4:
        assert got.is_contiguous(memory_format=torch.channels_last if shape[1] >= WIDE else torch.contiguous_format)
    got.zero_()
    assert torch.equal(cache.read(index), expected)  # what was read is fresh


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.int64])
def test_types_are_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    x = torch.arange(12).view(4, 3).to(dtype)
    for kind in KINDS:
        got = filled(x, CacheSpace(kind, tmp_path), samples=4, size=4).read(torch.arange(4))
        assert got.dtype == dtype
        assert torch.equal(got, x)


def test_scaling_changes_every_sample(tmp_path: Path) -> None:
    x = torch.randn(6, 2)
    for kind in KINDS:
        cache = filled(x, CacheSpace(kind, tmp_path), samples=6, size=6)
        cache.scale(0.5)
        assert torch.equal(cache.read(torch.arange(6)), x * 0.5)


def test_samples_of_another_size_are_refused() -> None:
    cache = TensorCache(torch.zeros(4, 3, 8, 8), 4, 8, CacheSpace("ram", None))
    for other in (torch.zeros(4, 3, 8, 9), torch.zeros(3, 3, 8, 8), torch.zeros(4, 3, 8)):
        with pytest.raises(CalibrationError, match=r"one size: .*\(3, 8, 8\).*Resize or crop"):
            cache.write(4, 4, other)


@pytest.mark.parametrize("kind", KINDS)
def test_space_counts_what_is_held_and_the_most_that_was(kind: CacheKind, tmp_path: Path) -> None:
    space = CacheSpace(kind, tmp_path)
    first = TensorCache(torch.zeros(2, 3), 2, 10, space)  # 10 * 3 floats
    second = TensorCache(torch.zeros(2, 5, dtype=torch.float64), 2, 10, space)
    assert space.held == space.peak == 120 + 400
    first.release()
    assert (space.held, space.peak) == (400, 520)
    TensorCache(torch.zeros(1), 1, 10, space)
    assert (space.held, space.peak) == (440, 520)
    second.release()
    assert len(list(tmp_path.iterdir())) == (1 if kind == "disk" else 0)
    space.close()
    assert list(tmp_path.iterdir()) == []


def test_files_of_a_killed_run_are_removed_and_others_stay(tmp_path: Path) -> None:
    (tmp_path / "cache-7.bin").write_bytes(b"left behind")
    (tmp_path / "mine.bin").write_bytes(b"")
    CacheSpace("disk", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.bin"]


def test_without_a_folder_files_are_temporary() -> None:
    space = CacheSpace("disk", None)
    _, path = space.allocate((4,), torch.float32)
    assert path is not None
    assert path.stat().st_size == 16
    space.close()
    assert not path.parent.exists()


def test_a_full_disk_is_an_error_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_file: int, _offset: int, _size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(unit_data.os, "posix_fallocate", full, raising=False)
    with pytest.raises(OutputError, match=r"cache of 4000 bytes .*No space left.*cache='ram'"):
        CacheSpace("disk", tmp_path).allocate((1000,), torch.float32)


# Calls


class Pair(NamedTuple):
    left: Tensor
    right: Tensor


def calls(size: int, mask: Tensor) -> tuple[tuple[object, ...], dict[str, object]]:
    generator = torch.Generator().manual_seed(size)
    x, y, z = (torch.randn(size, *shape, generator=generator) for shape in ((3, 4, 4), (5,), (2, 2)))
    return (x, [Pair(y, mask), "text", None]), {"state": {"z": z}, "scale": 3}


def test_nested_arguments_come_back_and_constants_are_kept_once() -> None:
    mask, space = torch.randn(4, 4), CacheSpace("ram", None)
    first, second = calls(4, mask), calls(2, mask)
    cache = CallCache(first, growing(first, second), 4, 6, space)
    cache.write(0, 4, first)
    cache.write(4, 2, second)
    assert cache.samples == 6
    assert cache.has_samples
    assert space.held == 6 * (48 + 5 + 4) * 4  # the mask, whose first dimension happens to be the batch size, is not among them
    (x, (pair, text, nothing)), keywords = cache.read(torch.tensor([5, 1, 4]))
    assert torch.equal(x, torch.stack([second[0][0][1], first[0][0][1], second[0][0][0]]))
    assert isinstance(pair, Pair)
    assert torch.equal(pair.left[1], first[0][1][0].left[1])
    assert torch.equal(pair.right, mask)
    assert (text, nothing, keywords["scale"]) == ("text", None, 3)
    assert torch.equal(keywords["state"]["z"][2], second[1]["state"]["z"][0])
    cache.release()
    assert space.held == 0


def test_constants_that_change_and_tensors_that_come_and_go_are_refused() -> None:
    mask = torch.randn(4, 4)
    first, second = calls(4, mask), calls(2, mask)
    cache = CallCache(first, growing(first, second), 4, 6, CacheSpace("ram", None))
    with pytest.raises(CalibrationError, match="changes from batch to batch"):
        cache.write(4, 2, calls(2, mask + 1))
    with pytest.raises(CalibrationError, match="another number of tensors"):
        cache.write(4, 2, (second[0][:1], {}))


@pytest.mark.parametrize(("size", "other"), [(8, 1), (1, 2)])
def test_another_batch_size_is_one_sample_or_two(size: int, other: int) -> None:
    inputs = Inputs((torch.randn(size, 3), torch.tensor(2.0)), {"mask": torch.randn(5, 5), "y": torch.randn(size)})
    changed = resized(inputs)
    assert [tuple(t.shape) for t in changed.tensors] == [(other, 3), (), (5, 5), (other,)]
    assert torch.equal(changed.args[0][0], inputs.args[0][0])


class Watched(nn.Module):
    """Three layers; counts the runs of the last and hands the second a keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(3, 4), nn.Identity(), nn.Linear(4, 2)
        self.dropout, self.runs = nn.Dropout(0.5), 0

    def forward(self, x: Tensor) -> Tensor:
        try:
            y = self.second(self.dropout(self.first(x)))
        except Exception:  # swallows what it can
            y = self.first(x)
        self.runs += 1
        return self.last(y)


def test_a_pass_ends_at_the_unit_and_restores_training_mode() -> None:
    model, x = Watched().train(), torch.randn(5, 3)
    (got,), keywords = call_of(model, "second", Inputs.of(x))
    assert torch.equal(got, model.first(x))  # no dropout
    assert keywords == {}
    assert model.runs == 0
    assert model.training
    assert not got.requires_grad
    assert not model.second._forward_pre_hooks


def test_a_unit_that_some_batches_do_not_call_is_named() -> None:
    with pytest.raises(LayerError, match="'dark' is not called for every calibration batch"):
        call_of(BranchNet().eval(), "dark", Inputs.of(torch.ones(2, 3, 4, 4)))


def test_batches_cover_all_samples_in_order() -> None:
    assert [index.tolist() for index in batches(7, 3)] == [[0, 1, 2], [3, 4, 5], [6]]


def test_releasing_a_unit_gives_back_everything() -> None:
    space = CacheSpace("ram", None)
    caches = [filled(torch.randn(4, 3), space, samples=4, size=4) for _ in range(3)]
    UnitData(CallCache.of(caches[0]), caches[1], caches[2]).release()
    assert space.held == 0
    assert space.peak == 3 * 48


LIMITED = """
import resource, sys
import torch
from rich.console import Console
from torch import nn
from lowbit.workflows.quantize import quantize
from lowbit.progress import Progress

SAMPLES = 128


class Stream:
    def __iter__(self):
        for seed in range(SAMPLES // 4):
            yield torch.randn(4, 1, 64, 64, generator=torch.Generator().manual_seed(seed))


torch.set_num_threads(1)
torch.manual_seed(0)
unit = nn.Sequential(nn.Conv2d(1, 64, 1), nn.ReLU(), nn.Conv2d(64, 64, 1, groups=64), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 2)).eval()
options = dict(weight_bits=3, activation_bits=None, calibration=Stream(), iterations=3, batch_size=4)
quantize(unit, method="adaround", **{**options, "calibration": torch.randn(4, 1, 64, 64)})  # libraries are loaded now
used = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (used + 64 * 2**20, resource.RLIM_INFINITY))
quantize(unit, method="adaround", cache=sys.argv[1], progress=Progress(console=Console(file=sys.stdout, width=200)), **options)
print("done")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the memory of a process as Linux does")
def test_caches_on_disk_take_no_memory_of_the_process() -> None:
    """128 samples of 64 x 64 x 64 floats are 134 MB for each of inputs and targets; the process may take 64 MiB more than before."""
    disk, ram = (
        subprocess.run([sys.executable, "-c", LIMITED, kind], capture_output=True, text=True, timeout=300) for kind in ("disk", "ram")
    )
    assert disk.returncode == 0, disk.stderr
    assert "reconstruction cached at most" in disk.stdout and disk.stdout.endswith("done\n")
    cached = float(disk.stdout.split("at most ")[1].split()[0])
    assert cached > 2 * 134
    assert ram.returncode != 0
    assert "can't allocate memory" in ram.stderr
