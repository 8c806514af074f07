"""The charts of a run: accuracies, harmful traces dropped, scores, training losses."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from influence_fast.report.summary import Setting, number
from influence_fast.report.svg import INK, Chart, Key, plain, render_chart
from influence_fast.report.text import fraction_name

# --- one row a strategy, one panel a fraction ----------------------------------------------------------------


def _panels(settings: Sequence[Setting]) -> tuple[list[str], list[float]]:
    """Return the strategies from best to worst mean, and the fractions ascending; `full` is a line and not a row."""
    rows = [s for s in settings if s.kind != "full"]
    score: dict[str, list[float]] = {}
    for s in rows:
        score.setdefault(s.strategy, []).append(s.mean if math.isfinite(s.mean) else -1.0)
    return sorted(score, key=lambda k: -float(np.mean(score[k]))), sorted({s.fraction for s in rows})


def _colour(setting: Setting) -> str:
    return {"influence": INK["accent"], "random": INK["random"]}.get(setting.kind, INK["baseline"])


def _rows_figure(
    figure: Figure,
    narrow: bool,
    strategies: Sequence[str],
    fractions: Sequence[float],
    what: str,
    row: Callable[[Axes, float, Setting, bool], None],
    at: Mapping[tuple[str, float], Setting],
) -> list[Axes]:
    columns = 1 if narrow else min(len(fractions), 3)
    grid = figure.subplots(math.ceil(len(fractions) / columns), columns, sharex=True, squeeze=False)
    axes = list(grid.flat)
    for spare in axes[len(fractions) :]:
        spare.set_visible(False)
    for panel, fraction in enumerate(fractions):
        ax = axes[panel]
        ax.set_title(f"{fraction_name(fraction)} dropped")
        ax.set_ylim(len(strategies) - 0.45, -0.55)
        first = panel % columns == 0
        ax.set_yticks(range(len(strategies)), [plain(s, 20) for s in strategies] if first else [""] * len(strategies))
        ax.grid(axis="x")
        for y, strategy in enumerate(strategies):
            if (strategy, fraction) in at:
                row(ax, y, at[strategy, fraction], narrow)
        if panel + columns >= len(fractions):
            ax.set_xlabel(what)
            ax.tick_params(labelbottom=True)
    return axes[: len(fractions)]


def _rows_size(strategies: int, fractions: int) -> tuple[tuple[float, float], tuple[float, float]]:
    panel = 29 * strategies + 36
    columns = min(fractions, 3)
    width = {1: 640.0}.get(columns, 980.0)
    return (width, math.ceil(fractions / columns) * panel + 34), (350.0, fractions * panel + 34)


def accuracy_chart(settings: Sequence[Setting], base: Mapping[str, Any] | None) -> Chart | None:
    """Draw mean accuracy and 95 % interval of every setting; all data and the model before are vertical lines.

    Returns None when nothing but `full` was run.
    """
    strategies, fractions = _panels(settings)
    if not strategies:
        return None
    at = {(s.strategy, s.fraction): s for s in settings}
    full = next((s for s in settings if s.kind == "full"), None)
    before, name_before = number((base or {}).get("accuracy")), str((base or {}).get("name", "before"))
    seen = [v for s in settings for v in (s.mean, s.low, s.high, *s.accuracies) if math.isfinite(v)]
    seen += [before] if math.isfinite(before) else []
    low, high = (min(seen), max(seen)) if seen else (0.0, 1.0)
    pad = max(0.06 * (high - low), 0.005)

    def row(ax: Axes, y: float, s: Setting, narrow: bool) -> None:
        colour = _colour(s)
        if math.isfinite(s.low) and math.isfinite(s.high):
            ax.plot([s.low, s.high], [y, y], color=colour, lw=2.2, solid_capstyle="round", zorder=3)
        if s.seeds > 1:
            finite = [a for a in s.accuracies if math.isfinite(a)]
            ax.plot(finite, [y] * len(finite), ls="", marker="|", ms=7, mew=1.1, color=colour, alpha=0.55, zorder=2)
        fill = INK["surface"] if s.kind == "random" else colour
        ax.plot([s.mean], [y], ls="", marker="o", ms=8, mfc=fill, mec=colour, mew=1.8, zorder=4)
        figure_text = f"{100 * s.mean:.1f}" if math.isfinite(s.mean) else "n/a"
        ax.text(1.015, y, figure_text, transform=ax.get_yaxis_transform(), va="center", fontsize=11.5)

    def draw(figure: Figure, narrow: bool) -> None:
        for ax in _rows_figure(figure, narrow, strategies, fractions, "accuracy (%)", row, at):
            if full is not None and math.isfinite(full.mean):
                if math.isfinite(full.low) and math.isfinite(full.high):
                    ax.axvspan(full.low, full.high, color=INK["muted"], alpha=0.13, lw=0, zorder=0)
                ax.axvline(full.mean, color=INK["ink"], lw=1.3, zorder=1)
            if math.isfinite(before):
                ax.axvline(before, color=INK["ink"], lw=1.3, ls=(0, (4, 3)), zorder=1)
            ax.set_xlim(max(0.0, low - pad), min(1.0, high + pad))
            ax.xaxis.set_major_locator(MaxNLocator(4 if narrow else 5, steps=[1, 2, 5, 10]))
            ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:g}" if abs(v) < 1e3 else ""))

    alt = "Accuracy with 95 % interval by strategy and dropped fraction. " + "; ".join(
        f"{s.strategy} at {fraction_name(s.fraction)}: {100 * s.mean:.1f} %" for s in settings if math.isfinite(s.mean)
    )
    kinds = {s.kind for s in settings}
    keys = [
        *([Key("dot", "accent", "influence scores")] if "influence" in kinds else []),
        *([Key("open", "random", "random")] if "random" in kinds else []),
        *([Key("dot", "baseline", "other baselines")] if "baseline" in kinds else []),
        *([Key("line", "ink", "all data, with its interval")] if full is not None else []),
        *([Key("dash", "ink", name_before)] if math.isfinite(before) else []),
        *([Key("tick", "muted", "single seeds")] if any(s.seeds > 1 for s in settings) else []),
    ]
    return Chart(render_chart("accuracy", draw, _rows_size(len(strategies), len(fractions)), alt), keys)


def harmful_chart(settings: Sequence[Setting]) -> Chart | None:
    """Draw the share of known harmful traces that each setting dropped, and that by chance; None where unknown."""
    known = [s for s in settings if s.kind != "full" and math.isfinite(s.harmful_dropped) and s.harmful_total > 0]
    if not known:
        return None
    at = {(s.strategy, s.fraction): s for s in known}
    order = {s.strategy: 0.0 for s in known}
    for s in known:
        order[s.strategy] += s.harmful_dropped / s.harmful_total
    strategies, fractions = sorted(order, key=lambda k: -order[k]), sorted({s.fraction for s in known})
    digits = 0 if all(float(s.harmful_dropped).is_integer() for s in known) else 1
    top = max(max(s.harmful_dropped, s.by_chance if math.isfinite(s.by_chance) else 0) / s.harmful_total for s in known)

    def row(ax: Axes, y: float, s: Setting, narrow: bool) -> None:
        share = s.harmful_dropped / s.harmful_total
        ax.barh([y], [share], height=0.5, color=_colour(s), lw=0, zorder=2)
        if math.isfinite(s.by_chance):
            chance = s.by_chance / s.harmful_total
            ax.plot([chance, chance], [y - 0.38, y + 0.38], color=INK["ink"], lw=2.2, solid_capstyle="butt", zorder=3)
        ax.text(
            1.015, y, f"{s.harmful_dropped:,.{digits}f}", transform=ax.get_yaxis_transform(), va="center", fontsize=11.5
        )

    def draw(figure: Figure, narrow: bool) -> None:
        for ax in _rows_figure(figure, narrow, strategies, fractions, "harmful traces dropped (%)", row, at):
            ax.set_xlim(0, min(1.0, 1.06 * top) or 1)
            ax.xaxis.set_major_locator(MaxNLocator(4 if narrow else 5, steps=[1, 2, 5, 10]))
            ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:g}"))

    alt = "Known harmful traces dropped by each strategy, against chance. " + "; ".join(
        f"{s.strategy} at {fraction_name(s.fraction)}: {s.harmful_dropped:g} of {s.harmful_total:g}" for s in known
    )
    kinds = {s.kind for s in known}
    keys = [
        *([Key("bar", "accent", "influence scores")] if "influence" in kinds else []),
        *([Key("bar", "random", "random")] if "random" in kinds else []),
        *([Key("bar", "baseline", "other baselines")] if "baseline" in kinds else []),
        Key("tick", "ink", "expected from dropping as many at random"),
    ]
    return Chart(render_chart("harmful", draw, _rows_size(len(strategies), len(fractions)), alt), keys)


# --- curves ----------------------------------------------------------------------------------------------------

_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)), "-", (0, (5, 2)))


def thin(points: Sequence[Sequence[Any]], most: int = 60) -> tuple[list[float], list[float]]:
    """Return steps and losses of a curve, finite points only, averaged over equal stretches above `most` points."""
    rows = [(number(p[0]), number(p[1])) for p in points]
    kept = np.array([r for r in rows if math.isfinite(r[0]) and math.isfinite(r[1])], dtype=np.float64).reshape(-1, 2)
    if len(kept) > most:
        kept = np.stack([piece.mean(axis=0) for piece in np.array_split(kept, most)])
    return kept[:, 0].tolist(), kept[:, 1].tolist()


def curves_chart(curves: Mapping[str, Sequence[Sequence[Any]]]) -> Chart | None:
    """Draw training loss by step, six runs in colour and dash and further runs in grey; None without a finite point."""
    lines = {name: thin(points) for name, points in curves.items()}
    lines = {name: line for name, line in lines.items() if line[0]}
    if not lines:
        return None
    # All data and random first: what the other runs are read against.
    order = sorted(lines, key=lambda k: (not k.startswith("full"), not k.startswith("random")))
    named, rest = order[:6], order[6:]

    def draw(figure: Figure, narrow: bool) -> None:
        ax = figure.subplots()
        for name in rest:
            ax.plot(*lines[name], color=INK["muted"], lw=0.8, alpha=0.35)
        for i, name in enumerate(named):
            point: dict[str, Any] = {"marker": "o", "ms": 4} if len(lines[name][0]) == 1 else {}
            ax.plot(*lines[name], color=INK[f"c{i + 1}"], lw=1.7, ls=_DASHES[i], **point)
        ax.set_xlabel("optimizer step")
        ax.set_ylabel("training loss")
        ax.grid(axis="y")
        ax.margins(x=0.01)
        ax.tick_params(axis="y", labelcolor=INK["muted"])
        ax.xaxis.set_major_locator(MaxNLocator(4 if narrow else 8, integer=True))
        ax.yaxis.set_major_locator(MaxNLocator(5))

    ends = "; ".join(f"{n}: {lines[n][1][0]:.3f} to {lines[n][1][-1]:.3f}" for n in named)
    keys = [Key("dash" if i % 4 else "line", f"c{i + 1}", name) for i, name in enumerate(named)]
    if rest:
        keys.append(Key("line", "muted", f"{len(rest)} further runs"))
    return Chart(render_chart("curves", draw, ((980, 320), (350, 250)), f"Training loss by step. {ends}"), keys)
