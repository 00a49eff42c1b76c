"""Who did what when, as bars: a lane for each rank and engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from megatron_rapo.report.drawing import PIXELS, svg_of, write_png
from megatron_rapo.report.theme import LIGHT

_LANE, _AXIS = 22, 52  # CSS pixels of a lane, and of what is below the last


@dataclass(frozen=True)
class Bar:
    """From when to when a lane did something; seconds after the picture's start."""

    begun: float
    ended: float
    what: str


@dataclass(frozen=True)
class Lane:
    """A rank or an engine."""

    label: str
    bars: tuple[Bar, ...]


@dataclass(frozen=True)
class Schedule:
    """What a picture shows.

    Attributes:
        name: of its files, without suffix.
        title: in a few words, with the unit.
        description: what is to be seen, for those who do not see it.
        lanes: from the top.
        marks: seconds at which something begins, and what: a step.
        colours: of what is done, by name: names of the theme, in the order of the legend.
    """

    name: str
    title: str
    description: str
    lanes: tuple[Lane, ...]
    marks: tuple[tuple[float, str], ...]
    colours: Mapping[str, str]


def draw_schedule(schedule: Schedule, width: int) -> str:
    """An SVG for the page, `width` CSS pixels wide; the legend is left to the page."""
    return svg_of(_composed(schedule, width, legend=False), f"{schedule.name} {width}")


def save_schedule(schedule: Schedule, path: Path) -> None:
    """A PNG for a paper, with title and legend."""
    write_png(_composed(schedule, 640, legend=True), path)


def _composed(schedule: Schedule, width: int, *, legend: bool) -> Figure:
    height = _LANE * len(schedule.lanes) + _AXIS + (60 if legend else 0)
    figure = Figure(figsize=(width / PIXELS, height / PIXELS), layout="constrained", facecolor="none")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for row, lane in enumerate(schedule.lanes):
        for bar in lane.bars:
            colour = LIGHT[schedule.colours[bar.what]]
            axes.broken_barh([(bar.begun, bar.ended - bar.begun)], (row - 0.36, 0.72), facecolor=colour)
    _style(axes, schedule)
    if legend:
        figure.suptitle(schedule.title, x=0.01, horizontalalignment="left", fontsize=11, color=LIGHT["ink"])
        keys = [Patch(color=LIGHT[colour], label=what) for what, colour in schedule.colours.items()]
        figure.legend(handles=keys, loc="outside lower left", ncols=4, frameon=False, fontsize=9)
    figure.canvas.draw()
    return figure


def _style(axes: Axes, schedule: Schedule) -> None:
    axes.set_facecolor("none")
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(LIGHT["rule"])
    axes.tick_params(colors=LIGHT["muted"], labelsize=10.5, length=0)
    axes.set_yticks(range(len(schedule.lanes)), [lane.label for lane in schedule.lanes])
    axes.set_ylim(len(schedule.lanes) - 0.4, -0.6)
    axes.set_xlim(0.0, max(bar.ended for lane in schedule.lanes for bar in lane.bars))
    axes.set_xlabel("seconds", color=LIGHT["muted"], fontsize=10.5)
    for at, text in schedule.marks:
        axes.axvline(at, color=LIGHT["ink"], linewidth=0.8, linestyle=(0, (2, 3)))
        axes.annotate(
            text,
            (at, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(2, 2),
            textcoords="offset points",
            fontsize=9,
            color=LIGHT["muted"],
        )
