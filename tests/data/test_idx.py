from __future__ import annotations

import gzip
import struct
from pathlib import Path

import pytest

from lowbit.data.idx import read_idx
from lowbit.errors import DataError

IMAGES = bytes([0, 0, 8, 3]) + struct.pack(">3I", 2, 1, 3) + bytes([0, 128, 255, 1, 2, 3])


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("name", ["images", "images.gz"])
def test_values_come_in_the_order_and_shape_of_the_header(tmp_path: Path, name: str) -> None:
    assert read_idx(write(tmp_path / name, IMAGES), dimensions=3).tolist() == [[[0, 128, 255]], [[1, 2, 3]]]


def test_sizes_are_big_endian(tmp_path: Path) -> None:
    labels = bytes([0, 0, 8, 1, 0, 0, 1, 1]) + bytes(range(256)) + b"\x07"
    values = read_idx(write(tmp_path / "labels", labels), dimensions=1)
    assert values.shape == (257,)
    assert values[-2:].tolist() == [255, 7]


def test_labels_given_as_images_are_refused_by_the_magic_number(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"labels: 10 bytes that start with magic number 0x00000801, expected 0x00000803"):
        read_idx(write(tmp_path / "labels", bytes([0, 0, 8, 1]) + struct.pack(">I", 2) + b"\x01\x02"), dimensions=3)


@pytest.mark.parametrize(("change", "held"), [(-1, 5), (1, 7)])
def test_a_file_shorter_or_longer_than_its_header_says_is_refused(tmp_path: Path, change: int, held: int) -> None:
    content = IMAGES[:-1] if change < 0 else IMAGES + b"\x00"
    with pytest.raises(DataError, match=rf"2 x 1 x 3 = 6 bytes, the file holds {held}"):
        read_idx(write(tmp_path / "images", content), dimensions=3)


@pytest.mark.parametrize("content", [b"", b"\x00\x00\x08\x03\x00\x00"])
def test_a_file_that_ends_in_its_header_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(DataError, match=f"{len(content)} bytes"):
        read_idx(write(tmp_path / "images", content), dimensions=3)


def test_a_truncated_archive_and_one_that_is_none_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "images.gz"
    path.write_bytes(gzip.compress(IMAGES)[:-9])
    with pytest.raises(DataError, match="cannot be read or unpacked"):
        read_idx(path, dimensions=3)
    path.write_bytes(IMAGES)
    with pytest.raises(DataError, match="cannot be read or unpacked"):
        read_idx(path, dimensions=3)


def test_an_archive_that_unpacks_to_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowbit.data.idx.MAX_BYTES", 10)
    with pytest.raises(DataError, match="more than 10 bytes"):
        read_idx(write(tmp_path / "images.gz", IMAGES), dimensions=3)
