"""Folders of pictures: one sub-folder per class, or flat and without labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch.utils.data import Dataset

from lowbit.data.image_data import ImageData, Sample, Split
from lowbit.data.images import SUFFIXES, Preprocessing, read_input
from lowbit.errors import DataError

SPLIT_FOLDERS: dict[Split, tuple[str, ...]] = {
    "train": ("train",),
    "test": ("test", "val", "validation"),
    "calibration": ("calibration", "train"),
}


class PictureFiles(Dataset[Sample]):
    """Pictures decoded when they are asked for; DataError names the one that cannot be."""

    def __init__(self, paths: Sequence[Path], labels: Sequence[int] | None, preprocessing: Preprocessing) -> None:
        self.paths, self.labels, self.preprocessing = list(paths), labels, preprocessing

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Sample:
        image = read_input(self.paths[index], self.preprocessing)
        return image if self.labels is None else (image, self.labels[index])


def load_folder(folder: Path, split: Split, preprocessing: Preprocessing, *, strict: bool = True) -> ImageData:
    """The pictures in ``folder``, labelled by sub-folder where it has sub-folders (in the order of their names).

    A folder whose sub-folders are called train, test, val, validation or calibration is divided by them; any other gives all its
    pictures for every split. Files that are no pictures by their suffix are ignored and counted.

    Args:
        folder: The folder.
        split: Which part.
        preprocessing: From picture to tensor.
        strict: A picture that cannot be decoded raises DataError when its turn comes. False decodes all of them once now, and leaves
            out and lists those that cannot be.

    Raises:
        DataError: No picture, a class without one, or no sub-folder for ``split``.
    """
    folder = split_folder(folder, split)
    classes = folders_in(folder)
    paths, ignored = _picture_files(folder, deep=False)
    labels: list[int] | None = None
    if classes:
        ignored += len(paths)  # what lies beside the classes has none
        paths, labels = [], []
        for label, class_folder in enumerate(classes):
            found, others = _picture_files(class_folder, deep=True)
            if not found:
                raise DataError(
                    f"{class_folder}: no picture ({', '.join(SUFFIXES)}) in it. Each sub-folder is a class; remove it or fill it."
                )
            paths, labels, ignored = paths + found, labels + [label] * len(found), ignored + others
    if not paths:
        raise DataError(f"{folder}: no picture ({', '.join(SUFFIXES)}) in it, {ignored} other file(s)")
    skipped: list[Path] = []
    if not strict:
        skipped = [path for path in paths if not _is_readable(path, preprocessing)]
        kept = [index for index, path in enumerate(paths) if path not in set(skipped)]
        if not kept:
            raise DataError(f"{folder}: none of the {len(paths)} pictures can be decoded, {paths[0]} among them")
        paths, labels = [paths[index] for index in kept], None if labels is None else [labels[index] for index in kept]
    return ImageData(
        str(folder),
        PictureFiles(paths, labels, preprocessing),
        len(classes) or None,
        (preprocessing.channels, preprocessing.size, preprocessing.size),
        preprocessing.mean,
        preprocessing.std,
        tuple(path.name for path in classes),
        ignored,
        tuple(skipped),
        preprocessing,
    )


def pictures_in(folder: Path) -> list[Path]:
    """The pictures in ``folder`` and its sub-folders, in order of their names; DataError where there is none or no such folder."""
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such file or folder")
    found, others = _picture_files(folder, deep=True)
    if not found:
        raise DataError(f"{folder}: no picture ({', '.join(SUFFIXES)}) in it, {others} other file(s)")
    return found


def split_folder(folder: Path, split: Split) -> Path:
    """The sub-folder for ``split``, or ``folder`` itself where it is not divided; DataError where it is, but not for ``split``."""
    names = {path.name for path in folders_in(folder)}
    if not names or not names <= {name for group in SPLIT_FOLDERS.values() for name in group}:
        return folder
    for name in SPLIT_FOLDERS[split]:
        if name in names:
            return folder / name
    wanted = " or ".join(SPLIT_FOLDERS[split])
    raise DataError(f"{folder}: has {', '.join(sorted(names))}, but for the {split} samples a sub-folder {wanted} is needed")


def folders_in(folder: Path) -> list[Path]:
    """Sub-folders in order of their names, without hidden ones; DataError where there is no such folder."""
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error.strerror})") from error


def pictures_beside(folder: Path) -> tuple[list[Path], int]:
    """The pictures directly in ``folder``, in order of their names, and how many other files there are."""
    return _picture_files(folder, deep=False)


def _picture_files(folder: Path, *, deep: bool) -> tuple[list[Path], int]:
    """Picture files in order of their names, and how many other files there are; hidden files count as neither."""
    try:
        files = sorted(
            path for path in (folder.rglob("*") if deep else folder.iterdir()) if path.is_file() and not path.name.startswith(".")
        )
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error.strerror})") from error
    pictures = [path for path in files if path.suffix.lower() in SUFFIXES]
    return pictures, len(files) - len(pictures)


def _is_readable(path: Path, preprocessing: Preprocessing) -> bool:
    try:
        read_input(path, preprocessing)
    except DataError:
        return False
    return True
