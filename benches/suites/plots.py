"""The plots in docs/, drawn from result files, so that they can be drawn anew without measuring.

    python -m benches.suites.plots [--results benches/results] [--output docs]

roofline (SVG and PNG) from roofline-cpu.json; ratios and scaling from suites-cpu.json.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

INK, MUTED, GRID = "#1f2328", "#656d76", "#d8dee4"
OURS, OTHERS = "#0969da", ("#bc4c00", "#8250df", "#1a7f37")
DTYPES = {"fp64": "#8250df", "fp32": "#0969da", "bf16": "#bc4c00", "int8": "#1a7f37"}
AXES = {
    "N": "rows N of a score",
    "Q": "queries Q of a score",
    "T": "tokens T of a gradient",
    "d": "model width d of a gradient",
    "r": "LoRA rank r of a gradient",
    "p": "projection dim p of a gradient",
}
LEAST_RANGE = 8.0  # of a logarithmic axis of seconds: wide enough for two labels
STYLE: Any = {"svg.fonttype": "none", "svg.hashsalt": "influence-fast", "font.size": 9, "font.family": "DejaVu Sans"}


def source_line(result: Mapping[str, Any]) -> str:
    """Command, machine, versions, commit and date of a result file."""
    machine, versions = result["machine"], result["versions"]
    where = machine["gpu"] or f"{machine['cpu']}, {result['threads']} of {machine['cores']} cores, {result['path']}"
    named = ", ".join(f"{name} {versions[name]}" for name in ("influence-fast", "torch", "python"))
    return f"{result['command']}: {where}; {named}; commit {result['commit']}, {result['measured'][:10]}"


@rc_context(STYLE)
def roofline(result: Mapping[str, Any]) -> Figure:
    """Left: rate against intensity under the measured roofs, stages by number. Right: floor over time of each."""
    stages = result["stages"]
    figure, (left, right) = _figure(12, max(4.6, 1.2 + 0.29 * len(stages)), 1, 2, width_ratios=(1.05, 1))
    rates = {name: rate["median"] for name, rate in result["ceilings"].items()}
    bandwidth = max(rates["copy"], rates["read"])
    spots = [(max(s["flops"], 1) / s["bytes"], s["flops"] / s["seconds"]["median"]) for s in stages]
    drawn = [(i, x, y) for i, (x, y) in enumerate(spots, 1) if y > 0]
    used = [d for d in DTYPES if d in rates]
    low = min([x for _, x, _ in drawn], default=0.1) / 3
    high = 3 * max([x for _, x, _ in drawn] + [rates[d] / bandwidth for d in used])
    grid = np.geomspace(low, high, 200)
    for dtype in used:
        left.plot(grid, np.minimum(grid * bandwidth, rates[dtype]) / 1e9, color=DTYPES[dtype], lw=1.4)
    # The roofs of two dtypes may nearly meet: their names are kept a line apart.
    last = math.inf
    for dtype in sorted(used, key=lambda d: -rates[d]):
        last = min(rates[dtype] / 1e9, last / 1.22)
        left.text(high * 1.15, last, f"{dtype} {rates[dtype] / 1e9:,.0f}", color=DTYPES[dtype], va="center")
    left.set_xlim(low, high)
    middle = math.sqrt(low * min(rates[d] for d in used) / bandwidth)
    left.annotate(
        f"{bandwidth / 1e9:.1f} GB/s",
        (middle, middle * bandwidth / 1e9),
        xytext=(-8, 6),
        textcoords="offset points",
        ha="right",
        color=MUTED,
    )
    for number, x, y in drawn:
        colour = DTYPES[stages[number - 1]["dtype"]]
        left.plot(x, y / 1e9, "o", color=colour, ms=12, mec="white")
        left.text(x, y / 1e9, str(number), color="white", ha="center", va="center_baseline", fontsize=7, weight="bold")
    left.set(xscale="log", yscale="log")
    for axis in (left.xaxis, left.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    left.set(xlabel="FLOPs a byte that must move", ylabel="GFLOP/s")
    left.set_title("Under the measured roofs", loc="left")
    places = np.arange(len(stages))[::-1]
    for place, stage in zip(places, stages, strict=True):
        share = stage["share"]
        error = [[share["median"] - share["low"]], [share["high"] - share["median"]]]
        right.barh(place, share["median"], 0.66, color=DTYPES[stage["dtype"]], xerr=error, error_kw=_whisker())
        right.text(share["high"] + 0.015, place, f"{share['median']:.0%} ({stage['bound']})", va="center", color=INK)
    right.set_yticks(places, [f"{s['name']}  {i}" for i, s in enumerate(stages, 1)])
    right.axvline(1, color=INK, lw=0.8)
    right.set_xlim(0, 1.3 * max([1.0] + [s["share"]["high"] for s in stages]))
    right.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
    right.set_title("Floor / time (what bounds it)", loc="left")
    return _finish(figure, result)


@rc_context(STYLE)
def ratios(result: Mapping[str, Any]) -> Figure:
    """One bar a baseline, by stage: how many times as fast ours is. Scaling curves have a plot of their own."""
    entries = [e for e in result["results"] if not e["name"].startswith("ours") and "axis" not in e]
    stages = list(dict.fromkeys(e["stage"] for e in entries))
    lines: list[tuple[str, dict[str, Any] | None]] = []
    for stage in stages:
        lines.append((stage.replace("_", " "), None))
        lines += [(f"{e['group']} / {e['name']}", e) for e in entries if e["stage"] == stage]
    figure, axes = _figure(10, 1.3 + 0.21 * len(lines), 1, 1)
    axis = axes[0]
    places = np.arange(len(lines))[::-1]
    for place, (_, entry) in zip(places, lines, strict=True):
        if entry is None:
            continue
        r = entry["ratio"]
        error = [[r["median"] - r["low"]], [r["high"] - r["median"]]]
        colour = OURS if r["median"] >= 1 else OTHERS[0]
        axis.barh(place, r["median"] - 1, 0.66, left=1, color=colour, xerr=error, error_kw=_whisker())
        axis.text(max(r["high"], 1.0) * 1.06, place, f"{r['median']:.2f}", va="center", color=INK, fontsize=8)
    axis.set_yticks(places, [text for text, _ in lines], fontsize=8)
    for label, (_, entry) in zip(axis.get_yticklabels(), lines, strict=True):
        if entry is None:
            label.set_fontweight("bold")
    axis.axvline(1, color=INK, lw=0.8)
    axis.set_xscale("log")
    low = min(e["ratio"]["low"] for e in entries)
    high = max(e["ratio"]["high"] for e in entries)
    axis.set_xlim(min(0.8, low / 1.15), max(1.25, high * 1.5))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_formatter(FuncFormatter(_minor))
    axis.set_ylim(-0.8, len(lines) - 0.2)
    axis.tick_params(axis="y", length=0)
    axis.grid(visible=False, axis="y")
    axis.grid(color=GRID, lw=0.6, axis="x", which="both")
    axis.set_title("Time of the baseline (after the slash) / time of ours", loc="left")
    return _finish(figure, result)


@rc_context(STYLE)
def scaling(result: Mapping[str, Any]) -> Figure:
    """Seconds against what grows, one panel each, both axes logarithmic."""
    entries = [e for e in result["results"] if "axis" in e]
    names = [axis for axis in AXES if any(e["axis"] == axis for e in entries)]
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure, panels = _figure(11, 0.7 + 2.9 * rows, rows, columns)
    for panel, axis in zip(panels, names, strict=False):
        points = [e for e in entries if e["axis"] == axis]
        others = iter(OTHERS)
        for name in dict.fromkeys(e["name"] for e in points):
            line = sorted((e for e in points if e["name"] == name), key=lambda e: e["at"])
            xs, times = [e["at"] for e in line], [e["seconds"] for e in line]
            middle = [1e3 * t["median"] for t in times]
            error = [
                [1e3 * (t["median"] - t["low"]) for t in times],
                [1e3 * (t["high"] - t["median"]) for t in times],
            ]
            mine = name.startswith("ours")
            panel.errorbar(
                xs,
                middle,
                yerr=error,
                color=OURS if mine else next(others),
                marker="o" if mine else "s",
                ms=4,
                lw=1.5,
                ls="-" if mine else "--",
                capsize=2,
                label=name,
            )
        ticks = sorted({e["at"] for e in points})
        panel.set(xscale="log", yscale="log", xlabel=AXES[axis], ylabel="ms")
        panel.set_xticks(ticks, [f"{t:,}" for t in ticks])
        panel.xaxis.set_minor_locator(NullLocator())
        panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panel.yaxis.set_minor_formatter(FuncFormatter(_minor))
        low, high = panel.get_ylim()
        stretch = max(1.0, math.sqrt(LEAST_RANGE * low / high))  # so that a flat curve looks flat
        panel.set_ylim(low / stretch, high * stretch)
        panel.legend(frameon=False, fontsize=8)
    for panel in panels[len(names) :]:
        panel.set_visible(False)
    return _finish(figure, result)


def save(figure: Figure, stem: Path) -> list[Path]:
    """`stem`.svg and `stem`.png; the same figure gives the same bytes."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = [stem.with_suffix(".svg"), stem.with_suffix(".png")]
    with rc_context(STYLE):
        figure.savefig(paths[0], metadata={"Date": None})
        figure.savefig(paths[1], dpi=130, metadata={"Software": None})
    return paths


def draw(results: Path, output: Path) -> list[Path]:
    """Every plot whose result file is in the folder `results`. Raises FileNotFoundError where there is none."""
    wanted = {"roofline": ("roofline-cpu.json", roofline)}
    wanted |= {"ratios": ("suites-cpu.json", ratios), "scaling": ("suites-cpu.json", scaling)}
    written = []
    for name, (file, plot) in wanted.items():
        if (results / file).exists():
            written += save(plot(json.loads((results / file).read_text())), output / name)
    if not written:
        files = sorted({file for file, _ in wanted.values()})
        raise FileNotFoundError(f"{results} holds none of {', '.join(files)}; run `make bench` first")
    return written


def _figure(width: float, height: float, rows: int, columns: int, **grid: Any) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    axes = figure.subplots(rows, columns, squeeze=False, gridspec_kw=grid).ravel().tolist()
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color=GRID, lw=0.6)
        axis.set_axisbelow(True)
    return figure, axes


def _finish(figure: Figure, result: Mapping[str, Any]) -> Figure:
    figure.supxlabel(source_line(result), fontsize=7, color=MUTED, x=0.01, ha="left")
    return figure


def _whisker() -> dict[str, Any]:
    return {"ecolor": INK, "elinewidth": 0.9, "capsize": 2}


def _minor(value: float, _: int) -> str:
    """Labels at 2 and 5 between the powers of ten."""
    first = round(value / 10 ** math.floor(math.log10(value)), 6)
    return f"{value:g}" if first in (2.0, 5.0) else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=Path("benches/results"))
    parser.add_argument("--output", type=Path, default=Path("docs"))
    args = parser.parse_args()
    for path in draw(args.results, args.output):
        print(path)


if __name__ == "__main__":
    main()
