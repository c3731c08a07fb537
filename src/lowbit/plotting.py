"""Pictures: what is drawn, as plain numbers, and drawing it with matplotlib."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lowbit.errors import OutputError, missing_extra

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Theme = Literal["light", "dark"]
Form = Literal["line", "step", "points", "bars", "histogram", "image", "identity"]
SUFFIXES = (".svg", ".png")
WIDTH = 5.2  # inches; at 9 points a text stays readable where the picture is shown 400 pixels wide
ROW, IMAGE_ROW = 1.75, 1.0  # inches
_LEFT, _RIGHT, _ABOVE, _BELOW, _BELOW_NAMES = 0.65, 0.1, 0.27, 0.5, 0.95  # inches around axes; measuring every text would take seconds
PNG_DPI = 160
_INK: Mapping[Theme, Mapping[str, str]] = {
    "light": {"text": "#1b1f24", "axes": "#8b949e", "grid": "#e3e6ea", "background": "#ffffff"},
    "dark": {"text": "#e6e8eb", "axes": "#7d8590", "grid": "#30363d", "background": "#131416"},
}
# Okabe and Ito's colours, which people who see fewer colours can tell apart; lighter ones on dark ground.
_COLOURS: Mapping[Theme, Sequence[str]] = {
    "light": ("#0072b2", "#d55e00", "#009e73", "#a8518a", "#8a6d00", "#5b6770"),
    "dark": ("#56b4e9", "#ff8c42", "#2fc99a", "#e08fc0", "#f0e442", "#aab4be"),
}


@dataclass(frozen=True)
class Curve:
    """One set of values in a panel.

    Attributes:
        name: What the legend calls it; empty: it is not in the legend.
        x, y: Coordinates; of an ``image`` ``y`` alone, its rows. Of a ``histogram`` ``x`` alone.
        form: ``line``; ``step``: jumps of the values stay upright; ``points``; ``bars`` at the positions ``x``; ``histogram``; ``image``;
            ``identity``: the thin line of values that pass unchanged.
        colour: Place among the colours; default: the curve's place in the panel. Curves of a kind share one across panels.
        is_dashed: Whether the line is broken.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float] | Sequence[Sequence[float]] = ()
    form: Form = "line"
    colour: int | None = None
    is_dashed: bool = False


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
        title: Its heading.
        curves: What is drawn.
        across, up: What the axes are.
        is_logarithmic: Whether the upright axis is.
        names: Names of the positions 0, 1, 2 ... on the level axis, where it counts things.
        is_wide: Whether it takes a whole row.
        has_zero: Whether the upright axis shows 0 whatever the values are.
    """

    title: str
    curves: tuple[Curve, ...]
    across: str = ""
    up: str = ""
    is_logarithmic: bool = False
    names: tuple[str, ...] = ()
    is_wide: bool = False
    has_zero: bool = False


@dataclass(frozen=True)
class Picture:
    """Panels, two in a row.

    Attributes:
        title: What it shows, for people who do not see it.
        panels: From left to right, and down.
        notes: What a reader should know beside it.

    >>> picture = Picture("a line", (Panel("identity", (Curve("y = x", [0, 1], [0, 1]),)),))
    >>> "<svg" in picture.svg()
    True
    """

    title: str
    panels: tuple[Panel, ...]
    notes: tuple[str, ...] = field(default=())

    def figure(self, theme: Theme = "light") -> Figure:
        """A matplotlib figure; MissingExtraError without matplotlib."""
        return draw(self, theme)

    def svg(self, theme: Theme = "light", *, is_transparent: bool = False) -> str:
        """The picture as SVG; the same text for the same numbers."""
        return _rendered(self, theme, "svg", is_transparent).decode()

    def png(self, theme: Theme = "light", *, is_transparent: bool = False) -> bytes:
        """The picture as PNG."""
        return _rendered(self, theme, "png", is_transparent)

    def save(self, path: Path | str, theme: Theme = "light", *, is_transparent: bool = False) -> Path:
        """Write it as SVG or PNG, as the suffix says.

        Raises:
            OutputError: Another suffix, or the file cannot be written.
            MissingExtraError: matplotlib is not installed.
        """
        from lowbit.files import replacing  # it brings torch, which help of commands does without

        path = check_suffix(path)
        contents = _rendered(self, theme, path.suffix.lower().lstrip("."), is_transparent)
        with replacing(path) as temporary:
            temporary.write_bytes(contents)
        return path


def check_suffix(path: Path | str) -> Path:
    """``path``; OutputError unless it ends as pictures do."""
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise OutputError(
            f"{path}: a picture is written as {' or '.join(SUFFIXES)}, got {path.suffix or 'no suffix'!r}. Name another file."
        )
    return path


def as_html(picture: Picture) -> str | None:
    """What a notebook shows: SVG, or ``None``, so that it shows the text, without matplotlib."""
    try:
        return picture.svg()
    except ImportError:
        return None


def draw(picture: Picture, theme: Theme = "light") -> Figure:
    """The figure of ``picture``.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing_extra("matplotlib", "plot", "drawing") from error
    rows = _in_rows(picture.panels)
    ink = _INK[theme]
    with matplotlib.rc_context(_style(ink)):
        heights = [_height(row) for row in rows]
        figure = Figure(figsize=(WIDTH, sum(heights)))
        top = sum(heights)
        for row, height in zip(rows, heights, strict=True):
            below, top = _below(row), top - height
            for column, panel in enumerate(row):
                left = _LEFT + column * WIDTH / 2
                width = (WIDTH if panel.is_wide else WIDTH / 2 * (column + 1)) - _RIGHT - left
                bottom, inner = top + below, height - below - _ABOVE
                axes = figure.add_axes((left / WIDTH, bottom / sum(heights), width / WIDTH, inner / sum(heights)))
                _draw_panel(axes, panel, _COLOURS[theme], ink)
    return figure


def _height(row: Sequence[Panel]) -> float:
    """Inches; less for images, more for names below the axis."""
    return IMAGE_ROW if _is_image(row) else ROW + _below(row) - _BELOW


def _below(row: Sequence[Panel]) -> float:
    return 0.05 if _is_image(row) else _BELOW_NAMES if any(panel.names for panel in row) else _BELOW


def _is_image(row: Sequence[Panel]) -> bool:
    return any(curve.form == "image" for panel in row for curve in panel.curves)


def _in_rows(panels: Iterable[Panel]) -> list[list[Panel]]:
    rows: list[list[Panel]] = []
    for panel in panels:
        if panel.is_wide or not rows or len(rows[-1]) == 2 or rows[-1][0].is_wide:
            rows.append([panel])
        else:
            rows[-1].append(panel)
    return rows


def _style(ink: Mapping[str, str]) -> Any:  # as matplotlib names them
    return {
        "font.size": 9, "axes.titlesize": 9, "axes.labelsize": 8.5, "xtick.labelsize": 8, "ytick.labelsize": 8, "legend.fontsize": 7.5,
        "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"],
        "text.color": ink["text"], "axes.labelcolor": ink["text"], "axes.titlecolor": ink["text"],
        "xtick.color": ink["axes"], "ytick.color": ink["axes"], "xtick.labelcolor": ink["text"], "ytick.labelcolor": ink["text"],
        "axes.edgecolor": ink["axes"], "axes.facecolor": "none", "figure.facecolor": ink["background"], "grid.color": ink["grid"],
        "axes.grid": True, "axes.axisbelow": True, "grid.linewidth": 0.6, "axes.linewidth": 0.7, "axes.spines.top": False, "axes.spines.right": False,
        "legend.frameon": False, "svg.fonttype": "none", "svg.hashsalt": "lowbit", "lines.linewidth": 1.4, "axes.titlelocation": "left",
    }  # fmt: skip


def _rendered(picture: Picture, theme: Theme, kind: str, is_transparent: bool) -> bytes:
    figure = draw(picture, theme)
    import matplotlib

    buffer = io.BytesIO()
    facts: dict[str, str | None] = {"Date": None, "Title": picture.title} if kind == "svg" else {"Title": picture.title}
    with matplotlib.rc_context(_style(_INK[theme])):
        figure.savefig(buffer, format=kind, dpi=PNG_DPI, metadata=facts, transparent=is_transparent)
    return buffer.getvalue()


def _draw_panel(axes: Axes, panel: Panel, colours: Sequence[str], ink: Mapping[str, str]) -> None:
    from matplotlib.ticker import MaxNLocator

    bars = [curve for curve in panel.curves if curve.form == "bars"]
    histograms = [curve for curve in panel.curves if curve.form == "histogram"]
    for place, curve in enumerate(panel.curves):
        colour = colours[(place if curve.colour is None else curve.colour) % len(colours)]
        label = curve.name or "_"
        match curve.form:
            case "line" | "step":
                axes.plot(curve.x, curve.y, color=colour, label=label, linestyle=(0, (3, 2)) if curve.is_dashed else "-")
            case "identity":
                axes.plot(curve.x, curve.y, color=ink["axes"], label=label, linewidth=0.8, linestyle=(0, (1, 2)))
            case "points":
                axes.plot(
                    curve.x, curve.y, color=colour, label=label, linestyle="", marker="o", markersize=2.2, markeredgewidth=0, alpha=0.8
                )
            case "bars":
                width = 0.8 / len(bars)
                axes.bar([x - 0.4 + width * (bars.index(curve) + 0.5) for x in curve.x], curve.y, width * 0.92, color=colour, label=label)
            case "image":
                axes.imshow(curve.y, cmap="gray", interpolation="nearest", aspect="equal")
                axes.set_axis_off()
    if histograms:
        _draw_histograms(axes, panel, histograms, colours)
    if panel.is_logarithmic:
        axes.set_yscale("log")
    elif not any(curve.form == "image" for curve in panel.curves):
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=bool(bars) and all(value == int(value) for curve in bars for value in curve.y)))  # type: ignore[arg-type]
    if panel.names:
        axes.set_xticks(range(len(panel.names)), panel.names, rotation=30, ha="right", rotation_mode="anchor")
        axes.grid(visible=False, axis="x")
    elif not any(curve.form == "image" for curve in panel.curves):
        axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_title(panel.title)
    axes.set_xlabel(panel.across)
    axes.set_ylabel(panel.up)
    if panel.has_zero:
        low, high = axes.get_ylim()
        axes.set_ylim(min(low, -0.06 * high), max(1.06 * high, -0.06 * low))
    if any(curve.name for curve in panel.curves):
        axes.legend(loc="best", handlelength=1.2, borderpad=0.1, labelspacing=0.15, handletextpad=0.5)


def _draw_histograms(axes: Axes, panel: Panel, histograms: Sequence[Curve], colours: Sequence[str]) -> None:
    """Outlines over common bins, so that several can be told apart."""
    low, high = min(min(curve.x) for curve in histograms), max(max(curve.x) for curve in histograms)
    for curve in histograms:
        place = panel.curves.index(curve)
        axes.hist(
            curve.x, bins=60, range=(low, high if high > low else low + 1), histtype="step", linewidth=1.3,
            color=colours[(place if curve.colour is None else curve.colour) % len(colours)], label=curve.name or "_",
            weights=[100 / len(curve.x)] * len(curve.x),
        )  # fmt: skip
