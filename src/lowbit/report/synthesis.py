"""``report.html`` of samples that were made: how near they come to what norms keep, the loss on the way, and the pictures."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image
from torch import Tensor

from lowbit.data.images import Preprocessing
from lowbit.files import write_text
from lowbit.report import svg
from lowbit.report.formatting import NOTHING
from lowbit.report.pictures import are_pictures
from lowbit.synthesis.samples import NormMatch, SynthesizedData
from lowbit.synthesis.statistics import Match

SHEET = 64  # pictures of a contact sheet
LEAST_SIDE = 48  # pixels; smaller pictures are enlarged by whole factors
MARGIN = 2  # pixels between pictures
POINTS = 120  # of the loss curve
SOURCES = {"samples": "main", "noise": "second", "data": "data"}  # whose statistics there are, with the class of their curve
QUANTITIES: dict[str, tuple[str, Callable[[Match], float | None]]] = {
    "mean": ("Distance of the means from the norm's", lambda match: match.mean_error),
    "deviation": ("Distance of the deviations from the norm's", lambda match: match.std_error),
    "spread": ("How much samples differ: deviation of their means", lambda match: match.spread),
}


def match_heads(data: SynthesizedData) -> tuple[str, ...]:
    """Headings of ``match_rows``."""
    return ("norm", "channels", *(f"{name}, {source}" for name in QUANTITIES for source in _sources(data)))


def match_rows(data: SynthesizedData) -> list[tuple[str, ...]]:
    """For each norm the distances of means and deviations and the spread, of samples, noise and real data, as text."""
    found = []
    for entry in data.statistics:
        values = [_value(entry, source, read) for _, read in QUANTITIES.values() for source in _sources(data)]
        found.append((entry.norm, str(entry.channels), *(NOTHING if value is None else f"{value:.3f}" for value in values)))
    return found


def contact_sheet(data: SynthesizedData, preprocessing: Preprocessing | None) -> Image.Image | None:
    """The first samples side by side, as the network's preprocessing says what a pixel is, else stretched from the smallest to the largest value.

    ``None`` where the inputs are no pictures of one or three channels.
    """
    if not are_pictures(data.inputs):
        return None
    images = data.inputs.tensors[0][:SHEET].float()
    if preprocessing is not None and preprocessing.channels == images.shape[1]:
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (preprocessing.mean, preprocessing.std))
        images = images * std + mean
    else:
        images = (images - images.amin()) / (images.amax() - images.amin()).clamp_min(1e-12)
    return _grid((images.clamp(0, 1) * 255).round().to(torch.uint8))


def _grid(images: Tensor) -> Image.Image:
    """Pictures ``[N, channels, height, width]`` of bytes in rows, as near to a square as they come."""
    enlarged = max(1, math.ceil(LEAST_SIDE / min(images.shape[2:])))
    images = images.repeat_interleave(enlarged, 2).repeat_interleave(enlarged, 3)
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    height, width = (side + MARGIN for side in images.shape[2:])
    sheet = torch.full((images.shape[1], rows * height + MARGIN, columns * width + MARGIN), 255, dtype=torch.uint8)
    for place, image in enumerate(images):
        top, left = place // columns * height + MARGIN, place % columns * width + MARGIN
        sheet[:, top : top + height - MARGIN, left : left + width - MARGIN] = image
    return Image.fromarray(sheet[0].numpy() if len(sheet) == 1 else sheet.permute(1, 2, 0).contiguous().numpy())


def match_plot(data: SynthesizedData, quantity: str) -> Markup:
    """A quantity of ``QUANTITIES`` along the norms, in logarithms, a curve each for samples, noise and real data."""
    title, read = QUANTITIES[quantity]
    series = [
        svg.Series(source, kind, [_log(_value(entry, source, read)) for entry in data.statistics])
        for source, kind in SOURCES.items()
        if source in _sources(data)
    ]
    return _logarithmic(
        series, [entry.norm for entry in data.statistics], title, below=[str(n) for n in range(1, len(data.statistics) + 1)]
    )


def loss_plot(data: SynthesizedData) -> Markup:
    """The loss over iterations, in logarithms."""
    last = len(data.losses) - 1
    places = sorted({round(last * point / (POINTS - 1)) for point in range(POINTS)})
    series = svg.Series("loss", "main", [_log(data.losses[place]) for place in places])
    return _logarithmic([series], [f"iteration {place}" for place in places], "Loss", across=places, across_unit="iterations")


def _logarithmic(series: Sequence[svg.Series], names: Sequence[str], title: str, **axis: object) -> Markup:
    shown = [value for one in series for value in one.values if value is not None]
    if not shown:
        return Markup("")
    low, high = min(shown), max(shown)
    margin = 0.05 * (high - low) + 0.05
    return svg.curves(
        series,
        names,
        None,
        unit="",
        format_value=lambda value: f"{10**value:.3g}",
        tick=lambda value: f"{float(f'{10**value:.2g}'):g}",
        span=(low - margin, high + margin),
        title=title,
        **axis,  # type: ignore[arg-type]
    )


def _sources(data: SynthesizedData) -> list[str]:
    return [name for name in SOURCES if any(getattr(entry, name) is not None for entry in data.statistics)]


def _value(entry: NormMatch, source: str, read: Callable[[Match], float | None]) -> float | None:
    match: Match | None = getattr(entry, source)
    return None if match is None else read(match)


def _log(value: float | None) -> float | None:
    return math.log10(value) if value is not None and value > 0 else None


def png(image: Image.Image) -> bytes:
    """The picture as a PNG file."""
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return file.getvalue()


def write_synthesis_page(data: SynthesizedData, network: str, sheet: bytes | None, run: Mapping[str, object], path: Path) -> None:
    """Write the page; one file that needs no network. Everything that comes from users is escaped.

    Raises:
        OutputError: It cannot be written.
    """
    environment = Environment(
        loader=PackageLoader("lowbit.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template("synthesis.html.jinja").render(
        data=data,
        network=network,
        shapes=[" x ".join(map(str, shape)) for shape in data.shapes],
        heads=match_heads(data),
        rows=match_rows(data),
        sources=_sources(data),
        plots={title: match_plot(data, name) for name, (title, _) in QUANTITIES.items()},
        loss=loss_plot(data),
        sheet=None if sheet is None else f"data:image/png;base64,{base64.b64encode(sheet).decode()}",
        shown=min(len(data), SHEET),
        run=run,
    )
    write_text(path, page)
