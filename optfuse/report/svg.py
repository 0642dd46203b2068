"""Figures as SVG that stands inside an HTML page and takes its colors from the page's style.

matplotlib draws with placeholders instead of colors; here they become the page's CSS variables, so
that one drawing is right in a light page, in a dark one and on paper.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK = "#010203"
MUTED = "#020304"
RULE = "#030405"
BAND = "#040506"
PAPER = "#050607"
OURS = "#060708"
THEIRS = "#08090a"
ALARM = "#090a0b"
SECOND = "#0a0b0c"
THIRD = "#0b0c0d"

VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    RULE: "--rule",
    BAND: "--band",
    PAPER: "--paper",
    OURS: "--ours",
    THEIRS: "--theirs",
    ALARM: "--alarm",
    SECOND: "--second",
    THIRD: "--third",
}
"""A placeholder -> the CSS variable of the page that holds its color."""

FONT_SIZE = 12.5
"""Of the text in a drawing, in its own units; one unit is one CSS pixel where nothing is scaled."""

_UNITS_PER_INCH = 72
_XLINK = "{http://www.w3.org/1999/xlink}"
_REFERENCE = re.compile(r"url\(#([^)]+)\)")
_LONG_NUMBER = re.compile(r"-?\d+\.\d{3,}")


@contextmanager
def drawing() -> Iterator[None]:
    """matplotlib's settings while a figure is made: no formulas, no glyphs, nothing at random."""
    import matplotlib

    settings: dict[Any, Any] = {
        # A name like `$x_1$` is text, and text stays text, in the page's own font.
        "text.parse_math": False,
        "svg.fonttype": "none",
        "svg.hashsalt": "optfuse",
        "font.family": ["DejaVu Sans"],
        "font.size": FONT_SIZE,
        "text.color": INK,
        "axes.facecolor": "none",
        "axes.edgecolor": RULE,
        "axes.labelcolor": MUTED,
        "axes.labelsize": FONT_SIZE,
        "xtick.color": RULE,
        "ytick.color": RULE,
        "xtick.labelcolor": MUTED,
        "ytick.labelcolor": INK,
        "xtick.labelsize": FONT_SIZE,
        "ytick.labelsize": FONT_SIZE,
        "legend.fontsize": FONT_SIZE,
        "path.simplify": False,
    }
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        # matplotlib's own font is only measured; the reader's browser has the glyphs.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def figure(width: float, height: float) -> Figure:
    """An empty figure, its size in CSS pixels."""
    from matplotlib.figure import Figure

    made = Figure(figsize=(width / _UNITS_PER_INCH, height / _UNITS_PER_INCH))
    made.patch.set_visible(False)
    return made


def inline(drawn: Figure, ident: str, title: str, description: str) -> str:
    """A figure as an `<svg>` element for an HTML page.

    Args:
        drawn: made by `figure`, while `drawing`.
        ident: what every id in it begins with; several drawings stand on one page.
        title: what it is, in a few words.
        description: what it shows, for who cannot see it.
    """
    root = ElementTree.fromstring(_svg(drawn))
    for parent in list(root.iter()):
        for child in list(parent):
            # Metadata says when and by whom; the style would hold for everything on the page.
            if _local(child.tag) in ("metadata", "style"):
                parent.remove(child)
    referenced = {name for element in root.iter() for name in _references(element)}
    for element in root.iter():
        element.tag = _local(element.tag)
        element.attrib = dict(_attributes(element, ident, referenced))
        if element.tag != "text":
            element.text = None
        element.tail = None
    width, height = (float(size) for size in root.attrib["viewBox"].split()[2:])
    root.attrib = {
        "viewBox": root.attrib["viewBox"],
        "width": f"{width:g}",
        "height": f"{height:g}",
        "role": "img",
        "aria-labelledby": f"{ident}-title {ident}-description",
    }
    for place, (tag, text) in enumerate((("title", title), ("desc", description))):
        ending = "title" if tag == "title" else "description"
        element = ElementTree.Element(tag, {"id": f"{ident}-{ending}"})
        element.text = text
        root.insert(place, element)
    return ElementTree.tostring(root, encoding="unicode")


def _svg(drawn: Figure) -> str:
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    written = io.StringIO()
    FigureCanvasSVG(drawn).print_svg(written, metadata={"Date": None})  # type: ignore[no-untyped-call]
    return written.getvalue()


def _local(tag: str) -> str:
    return tag.rpartition("}")[2]


def _references(element: ElementTree.Element) -> Iterator[str]:
    """The ids an element refers to."""
    for name, value in element.attrib.items():
        yield from _REFERENCE.findall(value)
        if name == f"{_XLINK}href":
            yield value.removeprefix("#")


def _attributes(
    element: ElementTree.Element, ident: str, referenced: set[str]
) -> Iterator[tuple[str, str]]:
    """An element's attributes as they stand in the page."""
    for name, value in element.attrib.items():
        if name == "id":
            if value in referenced:
                yield "id", f"{ident}-{value}"
        elif name == f"{_XLINK}href":
            yield "href", f"#{ident}-{value.removeprefix('#')}"
        elif name == "style":
            yield "style", _painted(value)
        else:
            # Names stand in text alone; attributes hold geometry.
            value = _REFERENCE.sub(rf"url(#{ident}-\1)", value)
            yield _local(name), _LONG_NUMBER.sub(_rounded, " ".join(value.split()))


def _painted(style: str) -> str:
    for placeholder, variable in VARIABLES.items():
        style = style.replace(placeholder, f"var({variable})")
    return style


def _rounded(number: re.Match[str]) -> str:
    return f"{float(number[0]):.2f}".rstrip("0").rstrip(".")
