"""Files that are replaced only by complete ones."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from lowbit.errors import FileFormatError, OutputError
from lowbit.reading import check_readable

_FACTS = "facts"  # the entry of a safetensors header that holds JSON


_may_download: ContextVar[bool] = ContextVar("may_download", default=True)


@contextmanager
def without_downloads() -> Iterator[None]:
    """Within the context ``may_download`` is False: what would be fetched is an error, or is left out where it does not matter."""
    before = _may_download.set(False)
    try:
        yield
    finally:
        _may_download.reset(before)


def may_download() -> bool:
    """Whether files may be fetched."""
    return _may_download.get()


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
        _sweep(path)
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


def write_tensors(path: Path | str, tensors: Mapping[str, Tensor], facts: object) -> None:
    """Replace the file at ``path`` by tensors (safetensors) and ``facts``, anything that JSON can say, in its header.

    Raises:
        OutputError: The file cannot be written; see ``replacing``.
    """
    contents = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        try:
            save_file(contents, temporary, metadata={_FACTS: json.dumps(facts)})
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
        except SafetensorError as error:
            is_full = "No space left" in str(error) or "quota" in str(error).lower()
            raise OSError(errno.ENOSPC if is_full else errno.EIO, str(error)) from error


def read_tensors(path: Path | str) -> tuple[dict[str, Tensor], object]:
    """The tensors and facts that ``write_tensors`` wrote; nothing is unpickled.

    Raises:
        FileFormatError: The file is damaged or no such file.
    """
    try:
        contents = check_readable(path).read_bytes()  # opened once: another process may replace the file meanwhile
        tensors = load(contents)
        header = json.loads(contents[8 : 8 + int.from_bytes(contents[:8], "little")])
        facts: object = json.loads(header["__metadata__"][_FACTS])
        return tensors, facts
    except (SafetensorError, KeyError, TypeError, ValueError, RecursionError, OSError) as error:
        raise FileFormatError(f"{path} is damaged: {error}. Remove it; what it holds is computed again.") from error


def _sweep(path: Path) -> None:
    """Delete what processes that are gone have left of ``path``."""
    pattern = re.compile(rf"\.{re.escape(path.stem)}\.(\d{{1,10}}){re.escape(path.suffix)}")
    with suppress(OSError):
        for entry in os.scandir(path.parent):
            found = pattern.fullmatch(entry.name)
            if found is not None and not _is_alive(int(found[1])):
                _remove(Path(entry.path))


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True  # it is somebody else's
    return True


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return  # the folder is gone or read-only: there is nothing to tidy up in it
