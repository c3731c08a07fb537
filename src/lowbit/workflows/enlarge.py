"""Enlarging pictures with a network for super-resolution, in tiles where they are large."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from lowbit.data.images import SUFFIXES, colour_planes, read_picture
from lowbit.errors import DataError, SpecError
from lowbit.files import replacing
from lowbit.formats.packed.network import PackedNetwork
from lowbit.formats.program.reach import reach_of
from lowbit.progress import Progress
from lowbit.qat.tasks import SuperResolution
from lowbit.resize import enlarge, round_pixels
from lowbit.workflows.domain import scale_of
from lowbit.workflows.output import prepare_folder

GREY = ("1", "L", "LA", "La", "I", "I;16", "F")
LARGEST_RESULT = 400_000_000  # pixels
UNKNOWN_REACH = 32  # pixels around a tile where there is no telling how far a network looks


@dataclass(frozen=True)
class Tiling:
    """How a large picture is cut.

    Attributes:
        tile: Side of a tile of the small picture, in pixels.
        overlap: Pixels around a tile that the network sees as well, so that tiles do not show. Where a network looks no farther than that,
            the result is that of the whole picture: to the bit where layers run in integers; in float a value at the edge between two codes
            can fall on the other side, which moves single pixels by a few levels (4 at most in noise, 1 in photographs, where it was measured).
    """

    tile: int = 256
    overlap: int = 16

    @staticmethod
    def of(network: PackedNetwork, tile: int, overlap: int | None = None) -> tuple[Tiling, str]:
        """Tiles that overlap as far as the network looks, where ``overlap`` does not say how far; and a note where that is farther."""
        reach = reach_of(network.packed_graph, network.stored_tensors())
        chosen = Tiling(tile, overlap if overlap is not None else UNKNOWN_REACH if reach is None else reach)
        if reach is None:
            return (
                chosen,
                "the network looks at the whole picture, or there is no telling how far: pictures larger than a tile may come out otherwise than in one piece",
            )
        if chosen.overlap < reach:
            return chosen, f"the network looks {reach} pixels far: with an overlap of {chosen.overlap} tiles may show"
        return chosen, ""

    def windows(self, height: int, width: int) -> Iterator[tuple[slice, slice, slice, slice]]:
        """For each tile the rows and columns that the network sees, and those of them that are kept."""
        for top in range(0, height, self.tile):
            for left in range(0, width, self.tile):
                rows, kept_rows = self._seen(top, height)
                columns, kept_columns = self._seen(left, width)
                yield rows, columns, kept_rows, kept_columns

    def _seen(self, start: int, length: int) -> tuple[slice, slice]:
        stop = min(start + self.tile, length)
        first, last = max(start - self.overlap, 0), min(stop + self.overlap, length)
        return slice(first, last), slice(start - first, stop - first)


@torch.no_grad()
def enlarge_tensor(network: nn.Module, picture: Tensor, scale: int, tiling: Tiling) -> Tensor:
    """What the network makes of a picture, clipped and rounded.

    Args:
        network: Takes and gives pixels in 0 to 255, ``[1, 3, H, W]``.
        picture: uint8 ``[3, H, W]``.
        scale: How many times larger the network makes it.
        tiling: Memory grows with a tile, not with the picture.

    Returns:
        uint8 ``[3, scale * H, scale * W]``.
    """
    out = torch.empty(3, scale * picture.shape[1], scale * picture.shape[2], dtype=torch.uint8)
    for rows, columns, kept_rows, kept_columns in tiling.windows(*picture.shape[1:]):
        found = SuperResolution().output_in(network(picture[:, rows, columns].float().unsqueeze(0)))[0]
        place = [
            slice(scale * (seen.start + kept.start), scale * (seen.start + kept.stop))
            for seen, kept in ((rows, kept_rows), (columns, kept_columns))
        ]
        inner = [slice(scale * kept.start, scale * kept.stop) for kept in (kept_rows, kept_columns)]
        out[:, place[0], place[1]] = round_pixels(found[:, inner[0], inner[1]]).to(torch.uint8)
    return out


def enlarge_picture(network: nn.Module, picture: Image.Image, scale: int, tiling: Tiling) -> Image.Image:
    """A picture ``scale`` times larger: grey stays grey, transparency is enlarged bicubically, all else becomes RGB."""
    pixels = enlarge_tensor(network, colour_planes(picture), scale, tiling)
    found = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    if picture.mode in GREY:
        found = found.convert("L")
    if picture.has_transparency_data:
        alpha = colour_planes(picture.convert("RGBA").getchannel("A"))[0]
        found.putalpha(Image.fromarray(enlarge(alpha, scale).to(torch.uint8).numpy()))
    return found


def enlarging_scale(network: PackedNetwork, place: str) -> int:
    """How many times larger a network in a file makes pictures.

    Raises:
        SpecError: It does not, or takes pictures of one size only.
    """
    shape = network.packed_graph.inputs[0].shape
    if len(shape) == 4 and None not in shape[2:]:
        raise SpecError(
            f"{place}: its network takes pictures of {shape[3]} x {shape[2]} pixels only. Export it with heights and widths left open: dynamic=('H', 'W')."
        )
    return scale_of(network)


def result_paths(pictures: Path, found: Sequence[Path], out: Path) -> list[Path]:
    """Where the enlarged pictures go: the file ``out`` for one picture, else files of the same names in the folder ``out``.

    Raises:
        SpecError: A suffix that is no picture's, or a picture would be written over.
    """
    if pictures.is_file():
        paths = [out / f"{pictures.stem}.png" if out.is_dir() else out]
    else:
        paths = [out / path.relative_to(pictures).with_suffix(".png") for path in found]
    wrong = [path for path in paths if path.suffix.lower() not in SUFFIXES]
    if wrong:
        raise SpecError(f"out={str(wrong[0])!r}: cannot tell the format of the picture. Allowed suffixes: {', '.join(SUFFIXES)}.")
    same = {path.resolve() for path in paths} & {path.resolve() for path in found}
    if same or len(set(paths)) < len(paths):
        raise SpecError(f"out={str(out)!r}: {sorted(same or paths)[0]} would be written over. Name another file or folder.")
    return paths


def enlarge_files(
    network: nn.Module, scale: int, found: Sequence[Path], results: Sequence[Path], tiling: Tiling, progress: Progress
) -> list[tuple[int, int]]:
    """Enlarge pictures from files to files; each is written whole or not at all. The sizes of the results, width and height.

    Raises:
        DataError: A picture cannot be decoded, is animated, or too large; those before it are written.
    """
    sizes = []
    with progress.stage("pictures", len(found)) as stage:
        for path, result in zip(found, results, strict=True):
            picture = read_picture(path, one_frame=True)
            if picture.width * picture.height * scale**2 > LARGEST_RESULT:
                raise DataError(f"{path}: {picture.width} x {picture.height} pixels, at most {LARGEST_RESULT // scale**2:,} are enlarged")
            large = enlarge_picture(network, picture, scale, tiling)
            if large.mode in ("RGBA", "LA") and result.suffix.lower() in (".jpg", ".jpeg", ".bmp", ".ppm", ".pgm"):
                raise DataError(f"{result}: {result.suffix} holds no transparency, which {path} has. Write a .png or .webp file.")
            prepare_folder(result.parent, needed_bytes=4 * large.width * large.height)
            with replacing(result) as temporary:
                large.save(temporary, Image.registered_extensions()[result.suffix.lower()])
            sizes.append(large.size)
            stage.advance()
    return sizes
