"""Line plots as data, and their drawing: SVG for the page, PNG for papers."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from megatron_rapo.report.theme import LIGHT, as_variables

PIXELS = 72.0  # of the SVG's user units, an inch: matplotlib writes points
_PNG_DPI = 200
_MARK_POINTS = 12  # from one mark's text to the next
# No more points are told apart on a page; drawings keep all.
_TOLD_POINTS = 400


@dataclass(frozen=True)
class Line:
    """One series.

    Attributes:
        label: what it shows.
        colour: a name of the theme.
        x, y: `[points]`; a y that is None is a gap.
        low, high: `[points]`, its band, or nothing.
        dashed: whether its line is.
        faint: whether it is only the background of another line.
    """

    label: str
    colour: str
    x: Sequence[float]
    y: Sequence[float | None]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    dashed: bool = False
    faint: bool = False


@dataclass(frozen=True)
class Mark:
    """A vertical line at x.

    Attributes:
        text: what is there.
        colour: a name of the theme.
    """

    x: float
    text: str
    colour: str = "muted"


@dataclass(frozen=True)
class Plot:
    """What a figure shows.

    Attributes:
        name: of its files, without suffix.
        title: in a few words, with the unit.
        description: what is to be seen, for those who do not see it.
        x_label, y_label: axes.
        lines: in the order of the legend.
        scale: of x; `log2` shows powers of two.
        share: whether y runs from 0 to 1, unless a value lies outside.
        marks: vertical ones.
    """

    name: str
    title: str
    description: str
    x_label: str
    y_label: str
    lines: tuple[Line, ...]
    scale: Literal["linear", "log2"] = "linear"
    share: bool = False
    marks: tuple[Mark, ...] = ()


@dataclass(frozen=True)
class Drawing:
    """A plot in the page: the SVG, and what its pointer tells (`figures.js` reads it)."""

    svg: str
    told: dict[str, Any]


def draw_svg(plot: Plot, width: int, height: int) -> Drawing:
    """Draws for the page: colours are the theme's variables, the legend is left to the page.

    Args:
        plot: what to draw.
        width: of the drawing, in CSS pixels at its natural size.
        height: likewise.
    """
    figure = _figure(plot, width / PIXELS, height / PIXELS, legend=False)
    return Drawing(svg_of(figure, f"{plot.name} {width}"), _told(plot, figure.axes[0], width, height))


def save_png(plot: Plot, path: Path) -> None:
    """Draws for a paper: light colours on white, title and legend inside."""
    write_png(_figure(plot, 6.4, 4.2, legend=True), path)


def svg_of(figure: Figure, salt: str) -> str:
    """A figure for the page. The salt makes ids of two figures differ: they stand in one document."""
    text = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return _for_page(text.getvalue())


def write_png(figure: Figure, path: Path) -> None:
    """A figure for a paper, on white."""
    figure.savefig(path, dpi=_PNG_DPI, facecolor="white", metadata={"Software": None})


def _figure(plot: Plot, width: float, height: float, legend: bool) -> Figure:
    with mpl.rc_context({"text.parse_math": False}):  # names of runs may hold a $
        return _composed(plot, width, height, legend)


def _composed(plot: Plot, width: float, height: float, legend: bool) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="none")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for line in plot.lines:
        _add_line(axes, line)
    _style(axes, plot)
    for place, mark in enumerate(plot.marks):
        _add_mark(axes, mark, place)
    if legend:
        axes.set_title(plot.title, loc="left", fontsize=11, color=LIGHT["ink"])
        if sum(not line.faint for line in plot.lines) > 1:
            axes.legend(frameon=False, fontsize=9, labelcolor=LIGHT["ink"])
    figure.canvas.draw()  # places the axes, which the layout may still move
    return figure


def _add_line(axes: Axes, line: Line) -> None:
    colour = LIGHT[line.colour]
    y = [math.nan if value is None else value for value in line.y]
    if line.low:
        axes.fill_between(line.x, line.low, line.high, color=colour, alpha=0.16, linewidth=0)
    alone = len(line.x) == 1
    axes.plot(
        line.x,
        y,
        color=colour,
        alpha=0.45 if line.faint else 1.0,
        linewidth=1.0 if line.faint else 1.8,
        linestyle=(0, (5, 2)) if line.dashed else "-",
        marker="o" if alone or (line.low and len(line.x) <= 16) else "",
        markersize=4,
        label="_" if line.faint else line.label,
        solid_capstyle="round",
    )


def _add_mark(axes: Axes, mark: Mark, place: int) -> None:
    """The text stands above those of earlier marks, on the side with more room."""
    axes.axvline(mark.x, color=LIGHT[mark.colour], linewidth=1, linestyle=(0, (2, 3)))
    limits = axes.transAxes.inverted().transform(axes.transData.transform((mark.x, 0)))
    left = bool(limits[0] < 0.5)
    axes.annotate(
        mark.text,
        (mark.x, 0.02),
        xycoords=("data", "axes fraction"),
        xytext=(4 if left else -4, _MARK_POINTS * place),
        textcoords="offset points",
        horizontalalignment="left" if left else "right",
        fontsize=9,
        color=LIGHT[mark.colour],
    )


def _style(axes: Axes, plot: Plot) -> None:
    axes.set_facecolor("none")
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(LIGHT["rule"])
    axes.grid(color=LIGHT["rule"], linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=LIGHT["muted"], labelsize=10.5, length=0)
    axes.set_xlabel(plot.x_label, color=LIGHT["muted"], fontsize=10.5)
    axes.set_ylabel(plot.y_label, color=LIGHT["muted"], fontsize=10.5)
    xs = [x for line in plot.lines for x in line.x]
    if plot.scale == "log2":
        axes.set_xscale("log", base=2)
        exponents = range(math.floor(math.log2(min(xs))), math.ceil(math.log2(max(xs))) + 1)
        every = 1 if len(exponents) <= 7 else 2
        axes.set_xticks([2.0**exponent for exponent in exponents[::every]])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}" if x >= 1 else f"{x:.2g}"))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    values = (y for line in plot.lines for y in (*line.y, *line.low, *line.high) if y is not None)
    if plot.share and all(0 <= y <= 1 for y in values):
        axes.set_ylim(-0.02, 1.02)


def _for_page(svg: str) -> str:
    """The `<svg>` element alone, scalable, with ids only where they are referred to."""
    svg = svg[svg.index("<svg") :]
    for element in ("metadata", "style"):  # a style would be the whole document's
        svg = re.sub(rf"\s*<{element}\b.*?</{element}>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font-family: [^;\"]*;?", "", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = svg.replace("<svg ", '<svg aria-hidden="true" focusable="false" ', 1)
    referred = set(re.findall(r"#([\w-]+)", svg))
    svg = re.sub(r' id="([^"]+)"', lambda found: found[0] if found[1] in referred else "", svg)
    return as_variables(svg)


def _told(plot: Plot, axes: Axes, width: int, height: int) -> dict[str, Any]:
    """The axes' box and limits in the SVG's units, and the series' values."""
    box = axes.get_position()
    every = max(1, math.ceil(max((len(line.x) for line in plot.lines), default=1) / _TOLD_POINTS))
    return {
        "x": plot.x_label,
        "scale": plot.scale,
        "box": [
            round(float(value), 2)
            for value in (box.x0 * width, (1 - box.y1) * height, box.x1 * width, (1 - box.y0) * height)
        ],
        "xlim": [float(limit) for limit in axes.get_xlim()],
        "ylim": [float(limit) for limit in axes.get_ylim()],
        "lines": [
            {
                "label": line.label,
                "colour": line.colour,
                "x": list(line.x)[::every],
                "y": [_rounded(value) for value in line.y[::every]],
                "low": [_rounded(value) for value in line.low[::every]],
                "high": [_rounded(value) for value in line.high[::every]],
            }
            for line in plot.lines
            if not line.faint
        ],
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.5g}")
