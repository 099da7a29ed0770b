"""Colours of every chart: Okabe and Ito's, which colour-blind readers tell apart, each in a light and a dark form.

Charts are drawn with the light colours. In HTML each becomes a CSS variable, so that the page follows the reader's
choice; pictures (PNG) stay light. Lines and marks have a contrast of 3:1 or more to the background in both, text 4.5:1.
"""

from __future__ import annotations

from typing import NamedTuple


class Colour(NamedTuple):
    """One colour: the CSS variable it becomes, and its forms."""

    name: str
    light: str
    dark: str


# Light forms differ from each other: they are how a colour is found again in a drawing.
COLOURS = (
    Colour("surface", "#ffffff", "#17181c"),  # behind charts
    Colour("ink", "#1a1a1e", "#ececf0"),
    Colour("muted", "#5d5d66", "#a6a6b0"),  # axes, notes
    Colour("grid", "#e3e3e8", "#33353c"),
    Colour("vermillion", "#d55e00", "#f0803c"),
    Colour("blue", "#0072b2", "#56b4e9"),
    Colour("green", "#009e73", "#2bbd92"),
    Colour("purple", "#b8588d", "#cc79a7"),
    Colour("grey", "#767679", "#8f8f96"),
    Colour("black", "#08080a", "#ffffff"),  # matplotlib leaves out a fill that is SVG's own default, pure black
    Colour("heat", "#56b4e9", "#0072b3"),  # of heat maps; ink is read on any strength of it
    Colour("page", "#f6f6f8", "#101114"),
    Colour("link", "#00629b", "#7cc4ee"),
)
_BY_NAME = {colour.name: colour.light for colour in COLOURS}
SURFACE, INK, MUTED, GRID = (_BY_NAME[name] for name in ("surface", "ink", "muted", "grid"))
VERMILLION, BLUE, GREEN, PURPLE = (_BY_NAME[name] for name in ("vermillion", "blue", "green", "purple"))
GREY, BLACK, HEAT = (_BY_NAME[name] for name in ("grey", "black", "heat"))


def variables(form: str) -> str:
    """Return the CSS declarations of all colours, ``form`` being ``"light"`` or ``"dark"``.

    >>> variables("light").split(";")[0]
    '--surface:#ffffff'
    """
    return ";".join(f"--{colour.name}:{getattr(colour, form)}" for colour in COLOURS)
