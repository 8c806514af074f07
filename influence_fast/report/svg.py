"""Charts as SVG that belongs to its page: matplotlib draws them, `_inline` turns what it wrote into elements.

Colours are written as stand-ins (`INK`) and become CSS variables, so that one drawing serves the light and the dark
scheme; text stays text in the page's own font; nothing in the SVG points outside the page. Every chart is drawn twice,
for a wide and for a narrow page, because an SVG scaled down to a phone cannot be read.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import matplotlib
from markupsafe import Markup, escape
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

# Stand-in colour -> CSS variable of the template. Categories are told apart by shape or dash as well as by colour.
INK = {
    "ink": "#010101",
    "muted": "#020202",
    "grid": "#030303",
    "surface": "#040404",
    "accent": "#050505",
    "random": "#060606",
    "baseline": "#070707",
    **{f"c{i}": f"#0800{i:02x}" for i in range(7)},
}
CATEGORIES = 7  # c0 (neutral) .. c6

# Marker shapes of radius about 4, drawn around the origin, one a category.
SHAPES = (
    "M-3.2 0a3.2 3.2 0 1 0 6.4 0a3.2 3.2 0 1 0 -6.4 0Z",  # circle
    "M0-4.6L4.4 3.4L-4.4 3.4Z",  # triangle
    "M-3.5-3.5H3.5V3.5H-3.5Z",  # square
    "M0-5L4.4 0L0 5L-4.4 0Z",  # diamond
    "M0 4.6L4.4-3.4L-4.4-3.4Z",  # triangle, tip down
    "M-1.5-4.4H1.5V-1.5H4.4V1.5H1.5V4.4H-1.5V1.5H-4.4V-1.5H-1.5Z",  # plus
    "M0-4.6L4.4-1.4L2.7 3.8H-2.7L-4.4-1.4Z",  # pentagon
)

_RC: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "influence-fast",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 12,
    "axes.labelsize": 12,
    "axes.titlesize": 12.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "xtick.labelsize": 11.5,
    "ytick.labelsize": 12,
    "axes.edgecolor": INK["muted"],
    "axes.labelcolor": INK["muted"],
    "axes.titlecolor": INK["ink"],
    "text.color": INK["ink"],
    "xtick.color": INK["muted"],
    "ytick.color": INK["muted"],
    "ytick.labelcolor": INK["ink"],
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "axes.axisbelow": True,
    "grid.color": INK["grid"],
    "grid.linewidth": 0.8,
    "figure.constrained_layout.w_pad": 0.02,
    "figure.constrained_layout.h_pad": 0.07,
}

Draw = Callable[[Figure, bool], "str | None"]  # (figure, narrow) -> extra SVG laid over the axes


@dataclass(frozen=True, slots=True)
class Key:
    """One entry of a chart's legend: a line, band or marker in a CSS colour variable, and its name."""

    mark: str  # "line" | "dash" | "dot" | "ring" | "open" | "bar" | "tick" | "shape"
    colour: str
    name: str
    shape: int = 0


@dataclass(frozen=True, slots=True)
class Chart:
    """A finished chart: inline SVG for wide and narrow pages, and its legend."""

    svg: Markup
    keys: Sequence[Key] = ()


def plain(text: Any, limit: int = 26) -> str:
    """Return `text` as one short printable line, for a label inside a chart."""
    line = "".join(c if c.isprintable() else " " for c in str(text).encode("utf-8", "replace").decode())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def _inline(svg: str, name: str, alt: str, extra: str, *, scatter: bool = False) -> str:
    """Return matplotlib's SVG document as an inline element without namespaces, metadata or styles.

    Its ids are prefixed by `name`.
    """
    root = ElementTree.fromstring(svg)
    used = set(re.findall(r"#([\w.-]+)", " ".join(v for e in root.iter() for v in e.attrib.values())))
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.rpartition("}")[2] in ("metadata", "style"):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        attributes = {k.rpartition("}")[2]: v for k, v in element.attrib.items()}
        if attributes.get("id") not in used:
            attributes.pop("id", None)
        for key, value in attributes.items():
            if key == "id":
                value = f"{name}-{value}"
            elif key == "href":
                value = value.replace("#", f"#{name}-", 1)
            elif key == "clip-path":
                value = value.replace("url(#", f"url(#{name}-")
            elif key == "d":
                value = re.sub(r"\s+", " ", re.sub(r"(\.\d\d)\d+", r"\1", value)).strip()
            elif key == "style":
                value = re.sub(r"font-family:[^;]*;?\s*", "", value)
                for ink, stand_in in INK.items():
                    value = value.replace(stand_in, f"var(--{ink})")
            attributes[key] = value
        element.attrib.clear()
        element.attrib.update(attributes)
        if element.tag != "text":
            element.text = None
        element.tail = None
    box = root.attrib["viewBox"]
    body = "".join(ElementTree.tostring(child, encoding="unicode") for child in root)
    width = float(box.split()[2])
    focus = ' tabindex="0"' if scatter else ""
    return (
        f'<svg class="chart{" scatter" if scatter else ""}" viewBox="{box}" style="max-width:{width:g}px" role="img"'
        f'{focus} aria-label="{escape(alt)}">{body}{extra}</svg>'
    )


def render_chart(
    name: str, draw: Draw, sizes: tuple[tuple[float, float], tuple[float, float]], alt: str, **how: Any
) -> Markup:
    """Render the wide and the narrow version of a chart; `sizes` are (width, height) in CSS pixels, wide first."""
    parts = []
    for narrow, (width, height) in enumerate(sizes):
        with matplotlib.rc_context(_RC), warnings.catch_warnings():
            # A name in a script that matplotlib's font lacks is still text in the page, in the reader's font.
            warnings.filterwarnings("ignore", message="Glyph .* missing")
            warnings.filterwarnings("ignore", message=".*constrained_layout.*")
            figure = Figure(figsize=(width / 72, height / 72), dpi=72, layout="constrained")
            canvas = FigureCanvasSVG(figure)
            extra = draw(figure, bool(narrow)) or ""
            stream = io.StringIO()
            canvas.print_svg(stream, metadata={"Date": None})
        view = "narrow" if narrow else "wide"
        inline = _inline(stream.getvalue(), f"{name}-{view}", alt, extra, **how)
        parts.append(f'<div class="only-{view}">{inline}</div>')
    return Markup("".join(parts))  # every piece above is escaped


def key_svg(key: Key) -> Markup:
    """Return the small drawing before a legend's name."""
    colour = f"var(--{key.colour})"
    marks = {
        "line": f'<path d="M1 8H19" stroke="{colour}"/>',
        "dash": f'<path d="M1 8H19" stroke="{colour}" stroke-dasharray="4 3"/>',
        "dot": f'<circle cx="10" cy="8" r="4.5" fill="{colour}" stroke="none"/>',
        "open": f'<circle cx="10" cy="8" r="4" fill="none" stroke="{colour}"/>',
        "ring": f'<circle cx="10" cy="8" r="4.5" fill="none" stroke="{colour}" stroke-width="1.6"/>',
        "bar": f'<rect x="2" y="4" width="16" height="8" fill="{colour}" stroke="none"/>',
        "tick": f'<path d="M10 2V14" stroke="{colour}"/>',
        "shape": f'<path d="{SHAPES[key.shape]}" transform="translate(10 8)" fill="{colour}" stroke="none"/>',
    }
    drawing = marks[key.mark]
    # CSS variables work in style and not in presentation attributes.
    drawing = re.sub(r'(fill|stroke)="(var\([^)]*\))"', r'style="\1:\2"', drawing)
    return Markup(f'<svg class="key" viewBox="0 0 20 16" aria-hidden="true">{drawing}</svg>')
