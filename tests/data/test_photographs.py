"""The photographs of Debian packages, and the format that some of them are in."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from lowbit.data import load_pairs, photographs
from lowbit.data.photographs import Photograph, read_resource
from lowbit.errors import DataError
from lowbit.qat.task import Meter
from lowbit.qat.tasks import SuperResolution
from lowbit.resize import enlarge


def resource(path: Path, files: dict[str, bytes], *, flags: int = 0) -> Path:
    """A Qt resource file of one folder."""
    tree, names, data = struct.pack(">IHIIQ", 0, 2, len(files), 1, 0), b"", b""
    for name, content in files.items():
        tree += struct.pack(">IHHHIQ", len(names), flags, 0, 0, len(data), 0)
        names += struct.pack(">HI", len(name), 0) + name.encode("utf-16-be")
        data += struct.pack(">I", len(content)) + content
    header = struct.pack(">4s5I", b"qres", 3, 24, 24 + len(tree), 24 + len(tree) + len(data), 0)
    path.write_bytes(header + tree + data + names)
    return path


def test_a_resource_file_gives_its_files_by_path(tmp_path: Path) -> None:
    path = resource(tmp_path / "a.rcc", {"one.webp": b"1", "zwei": b"22"})
    assert read_resource(path) == {"/one.webp": b"1", "/zwei": b"22"}


def test_compressed_files_are_left_out(tmp_path: Path) -> None:
    assert read_resource(resource(tmp_path / "a.rcc", {"one.webp": b"1"}, flags=1)) == {}


@pytest.mark.parametrize("content", [b"", b"qres", b"RIFF" + bytes(40), struct.pack(">4s5I", b"qres", 3, 10**9, 0, 0, 0)])
def test_damaged_resource_files_are_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.rcc"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.rcc"):
        read_resource(path)


def test_what_is_not_installed_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(photographs, "RESOURCES", tmp_path)
    with pytest.raises(DataError, match=r"apt-get install .*gcompris-qt-data"):
        load_pairs("photographs", scale=2)
    resource(tmp_path / "erase.rcc", {"other.webp": b"1"})
    with pytest.raises(DataError, match="of another version"):
        Photograph("erase.rcc : crab.webp").read()


@pytest.mark.slow
@pytest.mark.parametrize(("scale", "decibels", "similarity"), [(2, 28.704, 0.8514), (3, 26.693, 0.7633), (4, 25.540, 0.6988)])
def test_bicubic_enlarging_reaches_the_known_figures_on_the_24_photographs(scale: int, decibels: float, similarity: float) -> None:
    try:
        data = load_pairs("photographs", scale=scale, split="test")
    except DataError as error:
        pytest.skip(str(error))
    meter = Meter(SuperResolution(scale))
    for index in range(len(data)):
        small, original = data.dataset[index]
        meter.add(enlarge(small, scale).float().unsqueeze(0), (small.unsqueeze(0), original.unsqueeze(0)))
    found = meter.scores()
    assert found.samples == 24
    assert found["PSNR"] == pytest.approx(decibels, abs=0.005)
    assert found["SSIM"] == pytest.approx(similarity, abs=0.0001)
    assert found["PSNR"] == found["bicubic PSNR"]
