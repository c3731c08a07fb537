"""Files that are replaced only by complete ones."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lowbit.errors import OutputError


@contextmanager
def replacing(path: Path | str) -> Iterator[Path]:
    """A temporary path of the same suffix beside ``path``, renamed to ``path`` when the block ends well.

    Until then, and when the block fails, a file that was at ``path`` stays as it is.

    Raises:
        OutputError: The file cannot be written: no such folder, no permission, full disk.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    except OutputError:
        raise
    except OSError as error:
        reason = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror or str(error)
        raise OutputError(
            f"cannot write {path}: {reason}. A file that was there before is unchanged. Name another folder or make room."
        ) from error
    finally:
        _remove(temporary)


def write_text(path: Path | str, text: str) -> None:
    """Replace the file at ``path`` by ``text`` in UTF-8, completely or not at all; see ``replacing``."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return  # the folder is gone or read-only: there is nothing to tidy up in it
