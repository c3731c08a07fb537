"""The store of a comparison: a folder with one small JSON file for each cell, named by everything that determines it."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from lowbit.comparison.cells import Result
from lowbit.errors import DataError, FileFormatError, OutputError, SpecError
from lowbit.files import write_text
from lowbit.reading import read_json

CELLS, WORK = "cells", ".work"
LARGEST_CELL = 2**22  # bytes


class Store:
    """Results of cells, kept in a folder.

    Files of two stores merge by copying: equal names hold equal cells. What is written is complete or not there, so a comparison that
    was killed resumes from what is stored.

    Args:
        folder: The folder of the comparison; made when the first result is kept.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)

    def work_folder(self, key: str) -> Path:
        """Where a run keeps the state that it resumes from."""
        return self.folder / WORK / key

    def load(self) -> dict[str, Result]:
        """All results by key.

        Raises:
            FileFormatError: A file is damaged, or its name is not that of its content.
        """
        return {path.stem: _read(path) for path in sorted((self.folder / CELLS).glob("*.json"))}

    def keep(self, result: Result) -> None:
        """Store ``result``.

        Raises:
            OutputError: The file cannot be written; what was stored before is unchanged.
        """
        path = self._path(result.key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot write to {path.parent}: {error.strerror}. Name another folder or make room.") from error
        write_text(path, json.dumps(_to_json(result.to_dict()), indent=1, sort_keys=True) + "\n")

    def forget_work(self, key: str) -> None:
        """Delete the state of a run that has come to its end."""
        shutil.rmtree(self.work_folder(key), ignore_errors=True)

    def merge(self, other: Store) -> int:
        """Take in the results of another store; returns how many are new.

        Raises:
            SpecError: Both have a result of the same cell, and different values.
            FileFormatError: ``other`` is no store, or a file of it is damaged.
        """
        if not (other.folder / CELLS).is_dir():
            raise FileFormatError(f"{other.folder}: there is no folder {CELLS!r} in it. Name a folder that 'lowbit compare' wrote.")
        own, new = self.load(), 0
        found = other.load()
        for key, result in found.items():
            known = own.get(key)
            if known is not None and _disagree(known, result):
                raise SpecError(
                    f"{self._path(key)} and {other._path(key)} disagree about {result.cell.name}: "
                    f"{_outcome(known)} and {_outcome(result)}. Nothing was merged. Delete the one that is wrong, or run the cell again."
                )
        for key, result in found.items():
            known = own.get(key)
            if known is None or (known.status == "failed" and result.status != "failed"):
                self.keep(result)
                new += 1
        return new

    def _path(self, key: str) -> Path:
        return self.folder / CELLS / f"{key}.json"


def _read(path: Path) -> Result:
    try:
        result = Result.from_dict(_from_json(cast("dict[str, object]", read_json(path, max_bytes=LARGEST_CELL))))
        if result.key != path.stem or result.cell.key(result.facts) != path.stem:
            raise ValueError("its name is not that of its content")
    except (DataError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise FileFormatError(f"{path}: no result of a comparison ({error}). Delete it; the cell is run again.") from error
    return result


def _disagree(first: Result, second: Result) -> bool:
    if "failed" in (first.status, second.status):
        return False
    same = first.metrics.keys() == second.metrics.keys() and all(
        first.metrics[name] == second.metrics[name] or (math.isnan(first.metrics[name]) and math.isnan(second.metrics[name]))
        for name in first.metrics
    )
    return first.status != second.status or not same


def _outcome(result: Result) -> str:
    return result.status if result.value is None else f"{result.metric} {result.value!r}"


def _to_json(value: object) -> object:
    """``value`` without numbers that JSON cannot say: NaN and infinity become text."""
    if isinstance(value, Mapping):
        return {str(key): _to_json(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_json(entry) for entry in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _from_json(values: dict[str, object]) -> dict[str, object]:
    for name in ("metrics", "float_metrics"):
        found = values.get(name)
        if isinstance(found, dict):
            values[name] = {key: float(value) for key, value in found.items()}
    return values
