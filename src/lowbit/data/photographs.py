"""128 photographs of the Debian packages gcompris-qt-data and palapeli-data, for super-resolution: 24 to measure on, 104 to train on.

They stay where the packages put them; ``photographs.txt`` beside this file lists them. Each is averaged over 2 x 2 pixels, which removes what
its compression left.
"""

from __future__ import annotations

import functools
import io
import struct
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lowbit.data.image_data import Split
from lowbit.data.images import colour_planes, decode_picture, read_picture
from lowbit.errors import DataError
from lowbit.reading import check_readable

LIST = Path(__file__).with_name("photographs.txt")
RESOURCES = Path("/usr/share/gcompris-qt/rcc")
LARGEST_RESOURCE = 2**28  # bytes
REDUCE = 2
INSTALL = "apt-get install --no-install-recommends gcompris-qt-data palapeli-data"


@dataclass(frozen=True)
class Photograph:
    """One of the list: ``RESOURCE : PATH`` in a resource file of gcompris, or the path of a file."""

    name: str

    def read(self) -> Tensor:
        """uint8 ``[3, H, W]``; DataError when its package is not installed or is of another version."""
        container, _, inner = self.name.partition(" : ")
        if not inner:
            _check_installed(Path(self.name))
            picture = read_picture(Path(self.name))
        else:
            place = RESOURCES / container
            _check_installed(place)
            found = [data for path, data in read_resource(place).items() if path.endswith(f"/resource/{inner}")]
            if not found:
                raise DataError(f"photographs: {place} holds no {inner}; it is of another version of gcompris-qt-data")
            picture = decode_picture(io.BytesIO(found[0]), self.name)
        return colour_planes(picture.convert("RGB").reduce(REDUCE))


def photographs(split: Split) -> list[Photograph]:
    """Those to measure on, or those to train on and calibrate with; DataError when the packages are not installed."""
    wanted = "test" if split == "test" else "train"
    pairs = (line.split(": ", 1) for line in LIST.read_text(encoding="utf-8").splitlines() if not line.startswith("#"))
    found = [Photograph(name) for part, name in pairs if part == wanted]
    for name in {photograph.name.partition(" : ")[0] for photograph in found}:
        _check_installed(RESOURCES / name)  # an absolute path stays as it is
    return found


@functools.lru_cache(maxsize=8)
def read_resource(path: Path) -> dict[str, bytes]:
    """Files of an uncompressed Qt resource file by path: a tree of 22-byte nodes, UTF-16 names, length-prefixed data.

    Raises:
        DataError: It is no such file, damaged, or of another version of the format.
    """
    raw = check_readable(path, max_bytes=LARGEST_RESOURCE).read_bytes()
    try:
        magic, version, tree, data, names, _ = struct.unpack_from(">4s5I", raw)
        if magic != b"qres" or version != 3:
            raise DataError(f"{path}: {magic!r} of version {version}, expected a Qt resource file of version 3")
        return dict(_walk(raw, (tree, data, names), 0, ""))
    except (struct.error, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{path}: damaged ({error})") from error


def _walk(raw: bytes, offsets: tuple[int, int, int], node: int, prefix: str) -> list[tuple[str, bytes]]:
    """The files below a node of the tree: paths and contents; compressed ones are left out."""
    tree, data, names = offsets
    name, flags = struct.unpack_from(">IH", raw, tree + 22 * node)
    (length,) = struct.unpack_from(">H", raw, names + name) if node else (0,)
    path = f"{prefix}/{raw[names + name + 6 : names + name + 6 + 2 * length].decode('utf-16-be')}" if node else ""
    if flags & 2:  # a folder
        count, first = struct.unpack_from(">II", raw, tree + 22 * node + 6)
        return [entry for child in range(first, first + count) for entry in _walk(raw, offsets, child, path)]
    if flags & 5:  # compressed
        return []
    (start,) = struct.unpack_from(">I", raw, tree + 22 * node + 10)
    (size,) = struct.unpack_from(">I", raw, data + start)
    return [(path, raw[data + start + 4 : data + start + 4 + size])]


def _check_installed(path: Path) -> None:
    if not path.is_file():
        raise DataError(f"photographs: there is no {path}. Install the packages: {INSTALL}")
