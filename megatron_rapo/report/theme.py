"""Colours of page and figures, light and dark.

Figures are drawn in the light colours. In the page these become CSS variables, so that one drawing serves
both themes; no two names may therefore share a light colour.
"""

from __future__ import annotations

LIGHT = {
    "paper": "#fffefb",
    "panel": "#f6f4ee",
    "ink": "#1d2126",
    "muted": "#5a616b",
    "rule": "#dcd8cd",
    "base": "#596270",
    "series-1": "#1f5fae",
    "series-2": "#b4530f",
    "series-3": "#2c7547",
    "series-4": "#7d4a9e",
    "series-5": "#a8324a",
    "series-6": "#0f7377",
    "good": "#2c7548",
    "bad": "#b3382c",
    "doubt": "#8a6a10",
}
DARK = {
    "paper": "#14171b",
    "panel": "#1d2127",
    "ink": "#e8e6e0",
    "muted": "#a4abb5",
    "rule": "#363c45",
    "base": "#a9b2bf",
    "series-1": "#74aef5",
    "series-2": "#f0a05f",
    "series-3": "#74c793",
    "series-4": "#c59be6",
    "series-5": "#f28b9d",
    "series-6": "#5fc9cc",
    "good": "#75c794",
    "bad": "#f28f83",
    "doubt": "#d9bb5c",
}
SERIES = tuple(name for name in LIGHT if name.startswith("series-"))


def series_colour(index: int) -> str:
    """The name of the colour of the index-th model after the base; they repeat after six."""
    return SERIES[index % len(SERIES)]


def as_variables(svg: str) -> str:
    """The drawing with each of its light colours as the theme's variable of that name."""
    for name, colour in LIGHT.items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg


def declarations(colours: dict[str, str]) -> str:
    """CSS declarations of the variables."""
    return "".join(f"--{name}:{colour};" for name, colour in colours.items())
