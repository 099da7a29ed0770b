"""A chart drawn by matplotlib as SVG that lies inside an HTML page and follows its colours, and as PNG."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from .palette import COLOURS, GRID, INK, MUTED, SURFACE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Draw = Callable[["Figure"], None]
WIDE, NARROW = 7.6, 4.1  # inches: of a page's column, and of a phone
DPI = 150  # of pictures
SOFTWARE = "alr_kernels"  # in a picture, by which it is known
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",  # text stays text: it is searched, read aloud and takes the page's font
    "font.size": 9.5,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.labelsize": 9,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.linewidth": 0.7,
    "axes.linewidth": 0.8,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
    "savefig.dpi": DPI,
    "figure.facecolor": SURFACE,
    "axes.facecolor": SURFACE,
    "savefig.facecolor": SURFACE,
    "legend.labelcolor": INK,
    "text.color": INK,
    "axes.titlecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "grid.color": GRID,
    "axes.unicode_minus": True,
    "text.parse_math": False,  # a $ in a name is a $
    "axes.formatter.useoffset": False,
}
_VARIABLE = {colour.light: f"var(--{colour.name})" for colour in COLOURS}
_SVG, _XLINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"


@contextmanager
def _styled(key: str) -> Iterator[None]:
    from matplotlib import style

    with style.context(["default", {**_STYLE, "svg.hashsalt": key}]):  # the user's own settings stay out
        yield


def _drawn(draw: Draw, width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    draw(figure)
    return figure


def is_picture(path: Path) -> bool:
    """Whether a file is a picture that :func:`png` left."""
    try:
        with path.open("rb") as file:
            return f"Software\0{SOFTWARE}".encode() in file.read(1000)
    except OSError:
        return False


def png(draw: Draw, height: float, path: Path) -> None:
    """Write the chart as a picture: ``height`` in inches, ``WIDE`` of them wide, in light colours."""
    with _styled("png"):
        _drawn(draw, WIDE, height).savefig(path, format="png", metadata={"Software": SOFTWARE})


def inline(draw: Draw, key: str, size: tuple[float, float], title: str, description: str) -> str:
    """Return the chart as an ``<svg>`` element for an HTML page.

    Args:
        draw: draws into the figure it is given.
        key: begins every id inside: no two charts of a page may share it.
        size: width and height, inches.
        title, description: what screen readers say of it.
    """
    held = io.BytesIO()
    with _styled(key):
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        _drawn(draw, *size).savefig(held, format="svg", metadata=nothing)
    root = ElementTree.fromstring(held.getvalue())
    _clean(root, key)
    _name(root, key, title, description)
    return ElementTree.tostring(root, encoding="unicode")


def _clean(root: ElementTree.Element, key: str) -> None:
    """Make tags plain, ids unique in the page, and colours variables; what nothing refers to loses its id."""
    used = set(re.findall(r"url\(#([^)]+)\)", ElementTree.tostring(root, encoding="unicode")))
    used |= {element.get(f"{_XLINK}href", "")[1:] for element in root.iter()}
    for element in root.iter():
        for child in [child for child in element if child.tag == f"{_SVG}style"]:
            element.remove(child)  # it would hold for the whole page, which says the same
        element.tag = element.tag.removeprefix(_SVG)
        element.text, element.tail = (text if text and text.strip() else None for text in (element.text, element.tail))
        target = element.attrib.pop(f"{_XLINK}href", None)
        if target is not None:
            element.set("href", f"#{key}-{target[1:]}")
        name = element.attrib.pop("id", None)
        if name in used:
            element.set("id", f"{key}-{name}")
        for attribute, value in element.attrib.items():
            value = value.replace("url(#", f"url(#{key}-")
            element.set(attribute, _coloured(value) if attribute == "style" else " ".join(value.split()))


def _coloured(css: str) -> str:
    css = re.sub(r"font-family:[^;]*;?\s*", "", css)  # the page's own font
    return re.sub(r"#[0-9a-f]{6}\b", lambda found: _VARIABLE.get(found[0], found[0]), css).strip()


def _name(root: ElementTree.Element, key: str, title: str, description: str) -> None:
    for attribute in ("width", "height", "version"):
        root.attrib.pop(attribute, None)
    root.attrib |= {"role": "img", "aria-labelledby": f"{key}-title {key}-desc"}
    for place, (tag, text) in enumerate((("title", title), ("desc", description))):
        element = ElementTree.Element(tag, {"id": f"{key}-{tag}"})
        element.text = text
        root.insert(place, element)


def escaped(text: str) -> str:
    """Return text as HTML, quotes included."""
    return escape(text, quote=True)
