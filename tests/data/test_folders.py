from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from lowbit.data.folders import load_folder
from lowbit.data.images import Preprocessing
from lowbit.errors import DataError

PLAIN = Preprocessing(size=2, crop_fraction=1.0, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def put(path: Path, grey: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (2, 2), (grey, grey, grey)).save(path)
    return path


def test_sub_folders_are_classes_in_the_order_of_their_names(tmp_path: Path) -> None:
    put(tmp_path / "cat" / "b.png", 255)
    put(tmp_path / "cat" / "a.jpg", 0)
    put(tmp_path / "ant" / "deep" / "c.PNG", 51)
    data = load_folder(tmp_path, "train", PLAIN)
    samples = [data.dataset[i] for i in range(len(data))]
    assert [label for _, label in samples] == [0, 1, 1]
    assert [round(image[0, 0, 0].item(), 2) for image, _ in samples] == [0.2, 0.0, 1.0]
    assert (data.class_names, data.num_classes, data.input_shape) == (("ant", "cat"), 2, (3, 2, 2))


def test_a_flat_folder_has_no_labels_and_counts_what_it_ignores(tmp_path: Path) -> None:
    put(tmp_path / "b.png", 255)
    put(tmp_path / "a.png", 0)
    (tmp_path / "README.txt").write_text("hello")
    (tmp_path / ".hidden.png").write_bytes(b"")
    data = load_folder(tmp_path, "calibration", PLAIN)
    samples = [data.dataset[i] for i in range(2)]
    assert all(isinstance(sample, torch.Tensor) for sample in samples)
    assert [sample.mean().item() for sample in samples] == [0.0, 1.0]
    assert (len(data), data.num_classes, data.ignored) == (2, None, 1)


def test_files_beside_the_classes_are_ignored_and_counted(tmp_path: Path) -> None:
    put(tmp_path / "ant" / "a.png")
    put(tmp_path / "contact-sheet.png")
    (tmp_path / "ant" / "notes.md").write_text("")
    data = load_folder(tmp_path, "test", PLAIN)
    assert (len(data), data.ignored) == (1, 2)


def test_folders_called_train_and_val_divide_the_data(tmp_path: Path) -> None:
    for name, count in (("train", 3), ("val", 2)):
        for index in range(count):
            put(tmp_path / name / "ant" / f"{index}.png")
    assert [len(load_folder(tmp_path, split, PLAIN)) for split in ("train", "test", "calibration")] == [3, 2, 3]


def test_a_split_that_the_folder_lacks_is_an_error(tmp_path: Path) -> None:
    put(tmp_path / "train" / "ant" / "a.png")
    with pytest.raises(DataError, match=r"has train, but for the test samples a sub-folder test or val or validation is needed"):
        load_folder(tmp_path, "test", PLAIN)


def test_a_class_called_train_among_others_is_a_class(tmp_path: Path) -> None:
    put(tmp_path / "train" / "a.png")
    put(tmp_path / "bus" / "a.png")
    assert load_folder(tmp_path, "test", PLAIN).class_names == ("bus", "train")


def test_strict_names_a_corrupt_picture_when_its_turn_comes(tmp_path: Path) -> None:
    put(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(put(tmp_path / "a.png").read_bytes()[:40])
    data = load_folder(tmp_path, "train", PLAIN)
    assert data.dataset[0].shape == (3, 2, 2)
    with pytest.raises(DataError, match=r"b\.png"):
        data.dataset[1]


def test_not_strict_leaves_corrupt_pictures_out_and_lists_them(tmp_path: Path) -> None:
    put(tmp_path / "ant" / "a.png", 255)
    put(tmp_path / "bee" / "c.png", 0)
    (tmp_path / "bee" / "b.png").write_bytes(b"broken")
    data = load_folder(tmp_path, "train", PLAIN, strict=False)
    assert [label for _, label in (data.dataset[i] for i in range(len(data)))] == [0, 1]
    assert data.skipped == (tmp_path / "bee" / "b.png",)


def test_nothing_to_read_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(DataError, match=r"no picture .* in it, 1 other file"):
        load_folder(tmp_path, "train", PLAIN)
    (tmp_path / "a.png").write_bytes(b"broken")
    with pytest.raises(DataError, match="none of the 1 pictures can be decoded"):
        load_folder(tmp_path, "train", PLAIN, strict=False)


def test_an_empty_class_is_an_error_because_labels_would_shift(tmp_path: Path) -> None:
    put(tmp_path / "bee" / "a.png")
    (tmp_path / "ant").mkdir()
    with pytest.raises(DataError, match=r"ant: no picture"):
        load_folder(tmp_path, "train", PLAIN)
