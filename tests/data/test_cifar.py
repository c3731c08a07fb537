from __future__ import annotations

from pathlib import Path

import pytest

from lowbit.data.cifar import CIFAR10, CIFAR100, load_cifar
from lowbit.errors import DataError


def record(*labels: int, red: int = 0, green: int = 0, blue: int = 0) -> bytes:
    return bytes(labels) + bytes([red] * 1024) + bytes([green] * 1024) + bytes([blue] * 1024)


def test_train_reads_five_batches_in_order(tmp_path: Path) -> None:
    for index in range(5):
        (tmp_path / f"data_batch_{index + 1}.bin").write_bytes(record(index, red=index) + record(9 - index))
    data = load_cifar(CIFAR10, tmp_path, "train")
    assert [label for _, label in (data.dataset[i] for i in range(len(data)))] == [0, 9, 1, 8, 2, 7, 3, 6, 4, 5]
    assert (data.num_classes, data.input_shape, data.class_names) == (10, (3, 32, 32), ())


def test_planes_are_red_green_blue_and_normalised(tmp_path: Path) -> None:
    (tmp_path / "test_batch.bin").write_bytes(record(3, red=255, green=51, blue=0))
    image, label = load_cifar(CIFAR10, tmp_path, "test").dataset[0]
    assert label == 3
    expected = [(1 - 0.4914) / 0.2470, (0.2 - 0.4822) / 0.2435, -0.4465 / 0.2616]
    assert image[:, 31, 0].tolist() == pytest.approx(expected, rel=1e-5)


def test_cifar100_takes_the_fine_label_and_the_archives_own_folder(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-100-binary"
    folder.mkdir()
    (folder / "test.bin").write_bytes(record(4, 99, red=1) + record(5, 7))
    (folder / "fine_label_names.txt").write_text("\n".join(f"class{i}" for i in range(100)) + "\n")
    data = load_cifar(CIFAR100, tmp_path, "test")
    assert [data.dataset[i][1] for i in range(2)] == [99, 7]
    assert data.class_names[99] == "class99"


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "test_batch.bin").write_bytes(record(3)[:-1])
    with pytest.raises(DataError, match=r"test_batch.bin: 3,072 bytes is no whole number of records of 3073 bytes"):
        load_cifar(CIFAR10, tmp_path, "test")
    (tmp_path / "test_batch.bin").write_bytes(b"")
    with pytest.raises(DataError, match="0 bytes"):
        load_cifar(CIFAR10, tmp_path, "test")


def test_a_label_outside_the_classes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "test_batch.bin").write_bytes(record(10))
    with pytest.raises(DataError, match="label 10, expected 0 to 9"):
        load_cifar(CIFAR10, tmp_path, "test")


def test_a_missing_file_and_no_folder_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no file .*data_batch_1.bin; the folder must hold the binary version"):
        load_cifar(CIFAR10, tmp_path, "train")
    with pytest.raises(DataError, match="cifar100:FOLDER"):
        load_cifar(CIFAR100, None, "train")
