"""Charts of single scores: two against each other, and their distributions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from markupsafe import escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from influence_fast.report.svg import INK, SHAPES, Chart, Key, plain, render_chart


def _heavy_tailed(values: np.ndarray) -> float:
    """Return the linear width for an asinh axis where a few values would squash the rest, else 0."""
    finite = np.abs(values[np.isfinite(values)])
    bulk = float(np.quantile(finite, 0.75)) if finite.size else 0.0
    return bulk if bulk > 0 and finite.max() > 8 * bulk else 0.0


_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def _scaled(axis: Any, largest: float, ticks: int | Sequence[float]) -> str:
    """Set tick labels without exponents, and return the common power of ten for the axis label: ` (×10⁻³)` or "".

    `ticks` is their maximal number, or their positions.
    """
    power = math.floor(math.log10(largest)) if largest > 0 else 0
    power = 0 if -2 <= power <= 3 else power
    steps = MaxNLocator(ticks, steps=[1, 2, 5, 10]) if isinstance(ticks, int) else FixedLocator(ticks)
    axis.set_major_locator(steps)
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{round(v / 10.0**power, 6):g}".replace("-", "−")))
    return f" (×10{str(power).translate(_SUPERSCRIPT)})" if power else ""


def _asinh_ticks(low: float, high: float, width: float) -> list[float]:
    """Return zero and 1, 2, 5 x 10^k on both sides, where they stand apart on an asinh axis of linear width `width`."""
    span = math.asinh(high / width) - math.asinh(low / width)
    sizes = [m * 10.0**e for e in range(-3, 7) for m in (1, 2, 5)]
    unit = 10.0 ** math.floor(math.log10(width))
    ticks = [0.0]
    for sign in (1, -1):
        last = 0.0
        for size in sizes:
            tick = sign * size * unit
            place = math.asinh(tick / width)
            if low <= tick <= high and abs(place - last) > 0.13 * span:
                ticks.append(tick)
                last = place
    return sorted(t for t in ticks if low <= t <= high)


def _score_axis(axis: Any, ax: Axes, name: str, values: np.ndarray, narrow: bool) -> None:
    """Set limits, ticks and label of one score axis over finite `values` (n,); asinh where tails are heavy."""
    low, high = float(values.min()), float(values.max())
    which = axis.axis_name
    if width := _heavy_tailed(values):
        getattr(ax, f"set_{which}scale")("asinh", linear_width=width)
        inner, outer = math.asinh(low / width), math.asinh(high / width)
        pad = 0.05 * (outer - inner)
        limits = width * math.sinh(inner - pad), width * math.sinh(outer + pad)
        name += _scaled(axis, max(map(abs, limits)), _asinh_ticks(*limits, width)) + ", asinh scale"
    else:
        pad = 0.05 * (high - low) or abs(high) * 0.05 or 1.0
        limits = low - pad, high + pad
        name += _scaled(axis, max(map(abs, limits)), 5 if narrow else 8)
    getattr(ax, f"set_{which}lim")(*limits)
    getattr(ax, f"set_{which}label")(name)


def scatter_chart(
    s_correct: np.ndarray,
    s_incorrect: np.ndarray,
    drawn: Sequence[int],
    category: Sequence[int],
    dropped_by: Sequence[Sequence[int]],
    marked: int,
    titles: Sequence[str],
    *,
    density: bool,
) -> Chart:
    """Draw s_correct (N,) against s_incorrect (N,); `drawn` indexes the traces that become points of their own.

    `category` (0..6, shape and colour), `dropped_by` (strategy numbers) and `titles` have one entry a drawn trace;
    points dropped by strategy `marked` are ringed. With `density` all finite traces are shown as hexagons behind.
    """

    def draw(figure: Figure, narrow: bool) -> str:
        ax = figure.subplots()
        for side in ("left", "bottom"):
            ax.spines[side].set_visible(False)
        finite = np.isfinite(s_correct) & np.isfinite(s_incorrect)
        _score_axis(ax.xaxis, ax, "s_correct: benefit →", s_correct[finite], narrow)
        _score_axis(ax.yaxis, ax, "s_incorrect: harm →", s_incorrect[finite], narrow)
        ax.tick_params(axis="both", length=0, labelcolor=INK["muted"])
        ax.grid()
        ax.axhline(0, color=INK["muted"], lw=1, zorder=1)
        ax.axvline(0, color=INK["muted"], lw=1, zorder=1)
        ax.text(0, 1.015, "↖ more harm, less benefit", transform=ax.transAxes, fontsize=11.5, color=INK["muted"])
        ax.text(1, 1.015, "more of both ↗", transform=ax.transAxes, fontsize=11.5, color=INK["muted"], ha="right")
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
        height = figure.bbox.height

        def place(indices: Any) -> np.ndarray:
            spot = ax.transData.transform(np.column_stack([s_correct[indices], s_incorrect[indices]]))
            return np.column_stack([spot[:, 0], height - spot[:, 1]])

        pieces = ['<g class="dens">'] if density else []
        if density:
            pieces += [*_hexagons(place(np.flatnonzero(finite)), 5.5 if narrow else 7.0), "</g>"]
        pieces.append('<g class="pts">')
        prefix = "n" if narrow else "w"
        shapes = "".join(f'<path id="{prefix}{k}" d="{SHAPES[k]}"/>' for k in sorted(set(category)))
        pieces.append(f"<defs>{shapes}</defs>")
        spots = place(np.asarray(drawn, dtype=np.int64))
        # Neutral points first, so that the rarer kinds lie on top.
        for position in sorted(range(len(drawn)), key=lambda p: category[p] != 0):
            (x, y), kind = spots[position], category[position]
            cut = " cut" if marked in dropped_by[position] else ""
            pieces.append(
                f'<use href="#{prefix}{kind}" x="{x:.1f}" y="{y:.1f}" class="p k{kind}{cut}" data-i="{position}">'
                f"<title>{escape(titles[position])}</title></use>"
            )
        pieces.append('</g><circle class="here" r="8"/>')
        return "".join(pieces)

    shown = int(np.isfinite(s_correct + s_incorrect).sum())
    alt = (
        f"Scatter of s_correct (benefit) against s_incorrect (harm) for {shown:,} traces; "
        "the most helpful and most harmful ones are listed with their text below"
    )
    return Chart(render_chart("scatter", draw, ((620, 540), (350, 390)), alt, scatter=True))


def _hexagons(spots: np.ndarray, radius: float) -> list[str]:
    """Return hexagons over points (N, 2) in pixels, with an opacity by the logarithm of their count."""
    w, h = radius * math.sqrt(3), radius * 1.5
    row = np.round(spots[:, 1] / h).astype(np.int64)
    column = np.round(spots[:, 0] / w - 0.5 * (row % 2)).astype(np.int64)
    cells, counts = np.unique(np.column_stack([row, column]), axis=0, return_counts=True)
    top = math.log1p(int(counts.max()))
    x, y = f"{w / 2:.1f}", f"{radius / 2:.1f}"
    outline = f"l{x} {y}v{radius:.1f}l-{x} {y}l-{x} -{y}v-{radius:.1f}Z"
    levels: dict[int, list[str]] = {}
    for (r, c), n in zip(cells, counts, strict=True):
        level = max(1, round(8 * math.log1p(int(n)) / top))
        levels.setdefault(level, []).append(f"M{(c + 0.5 * (r % 2)) * w:.1f} {r * h - radius:.1f}{outline}")
    return [
        f'<path fill-opacity="{0.08 + 0.065 * level:.2f}" d="{"".join(d)}"/>' for level, d in sorted(levels.items())
    ]


def distribution_chart(groups: Sequence[tuple[str, int, np.ndarray, np.ndarray]]) -> Chart | None:
    """Draw histograms of both scores, one row a label: (name, category, s_correct (n,), s_incorrect (n,)).

    Each histogram is scaled to its own height and holds the middle 99 % of all traces; the line is the median.
    """
    groups = [g for g in groups if np.isfinite(g[2]).any() or np.isfinite(g[3]).any()]
    if not groups:
        return None

    def draw(figure: Figure, narrow: bool) -> None:
        axes = np.atleast_1d(figure.subplots(2, 1) if narrow else figure.subplots(1, 2))
        for which, (ax, name) in enumerate(zip(axes, ("s_correct: benefit →", "s_incorrect: harm →"), strict=True)):
            everything = np.concatenate([g[2 + which] for g in groups])
            everything = everything[np.isfinite(everything)]
            ax.set_title(name.partition(": ")[2].capitalize())
            show = which == 0 or narrow
            ax.set_yticks(
                range(len(groups)),
                [plain(f"{g[0]} ({len(g[2]):,})", 24) for g in groups] if show else [""] * len(groups),
            )
            ax.set_ylim(len(groups) - 0.75, -1.0)
            ax.tick_params(axis="y", pad=4)
            if not everything.size:
                continue
            low, high = np.quantile(everything, [0.005, 0.995])
            if low == high:
                low, high = low - 0.5, high + 0.5
            edges = np.linspace(low, high, 49)
            ax.set_xlim(low, high)
            ax.grid(axis="x")
            ax.axvline(0, color=INK["muted"], lw=1, zorder=1)
            for y, group in enumerate(groups):
                scores = group[3] if which else group[2]
                values = scores[np.isfinite(scores)]
                if not values.size:
                    continue
                colour = INK[f"c{group[1]}"]
                height, _ = np.histogram(values, edges)
                # A light smoothing (1 2 1) keeps small groups from looking like combs.
                height = np.convolve(height, [0.25, 0.5, 0.25], mode="same")
                height = 0.85 * height / (height.max() or 1)
                ax.fill_between(
                    (edges[1:] + edges[:-1]) / 2, y + 0.0 * height, y - height, color=colour, alpha=0.45, lw=0, zorder=2
                )
                ax.plot((edges[1:] + edges[:-1]) / 2, y - height, color=colour, lw=1.3, zorder=3)
                middle = float(np.median(values))
                if low <= middle <= high:
                    ax.plot([middle, middle], [y, y - 0.9], color=INK["ink"], lw=1.6, zorder=4)
            ax.set_xlabel(name[: name.index(":")] + _scaled(ax.xaxis, max(abs(low), abs(high)), 4 if narrow else 5))

    n = len(groups)
    medians = "; ".join(
        f"{g[0]}: median s_correct {np.nanmedian(g[2]):.3g}, median s_incorrect {np.nanmedian(g[3]):.3g}"
        for g in groups
        if np.isfinite(g[2]).any() and np.isfinite(g[3]).any()
    )
    size = ((980.0, 48.0 * n + 78), (350.0, 2 * (44.0 * n + 72)))
    return Chart(
        render_chart("distribution", draw, size, f"Score distributions by label. {medians}"),
        [Key("tick", "ink", "median")],
    )
