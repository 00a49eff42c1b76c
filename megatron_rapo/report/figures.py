"""Plots as the page holds them: drawn wide and, where that would be too small to read, narrow too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_rapo.report.drawing import Drawing, Line, Plot, draw_svg

# Width and height in CSS pixels at natural size.
SMALL = ((320, 200),)
LARGE = ((540, 340), (340, 290))


@dataclass(frozen=True)
class PageFigure:
    """A figure of the page.

    Attributes:
        plot: what it shows.
        drawings: of it, widest first.
    """

    plot: Plot
    drawings: tuple[Drawing, ...]

    @property
    def legend(self) -> list[Line]:
        """The lines that have a name of their own."""
        return [line for line in self.plot.lines if not line.faint]

    @property
    def told(self) -> list[dict[str, Any]]:
        """What `figures.js` reads: an entry a drawing."""
        return [drawing.told for drawing in self.drawings]


def figure(plot: Plot, *, large: bool = False) -> PageFigure:
    """Draws a plot for the page."""
    return PageFigure(plot, tuple(draw_svg(plot, *size) for size in (LARGE if large else SMALL)))
