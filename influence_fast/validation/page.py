"""The results of `validate` as text tables for a terminal, and as one self-contained HTML page with plots."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from influence_fast.atomic import replacing
from influence_fast.report.page import templates
from influence_fast.report.svg import INK, Chart, Key, key_svg, plain, render_chart

Row = Mapping[str, Any]

# With fewer training sets a bootstrap's resamples are too alike.
FEW_SUBSETS = 16


def write_page(results: Row, path: str | os.PathLike[str]) -> Path:
    """Write the HTML page of `validate`'s results atomically to `path`, and return where it is."""
    environment = templates()
    environment.filters["key"] = key_svg
    target = Path(path)
    page = environment.get_template("proof.html.j2").render(
        title=results["config"]["title"],
        results=results,
        sections=sections(results),
        removal=_removal_rows(results),
        cost=cost_rows(results),
        tradeoff=_tradeoff_chart(results),
    )
    with replacing(target) as partial:
        partial.write_text(page, encoding="utf-8")
    return target


def sections(results: Row) -> list[dict[str, Any]]:
    """Return title, note, rows and chart of each set of intervals."""
    found = []
    for key, name in (("lds", "Linear datamodeling score"), ("leave_out", "Leave-k-out")):
        part = results[key]
        if part is None:
            continue
        for group, kind in _groups(part["rows"]):
            rows = [row for row in part["rows"] if (row["group"], row["of"]) == (group, kind)]
            rows.sort(key=lambda row: -row["value"])
            noise = part["noise"][f"{group}/{kind}"]
            found.append(
                {
                    "title": f"{name}: {_group_name(group, kind, results.get('references', ()))}",
                    "note": f"{part['subsets']} training sets of {part['size']} of {results['pool']} examples, "
                    f"{part['seeds']} seed{'s' * (part['seeds'] > 1)} each."
                    + _few(part["subsets"])
                    + _noise(part["seeds"], noise),
                    "rows": rows,
                    "ahead": True,
                    "chart": _chart(f"{key}-{group}-{kind}", rows, results["default"], "rank correlation", 0.0),
                }
            )
    if results["detection"]:
        rows = [row | {"value": row["auc"], "default_ahead": None} for row in results["detection"]]
        found.append(
            {
                "title": "Corrupted traces found",
                "note": "AUC of the dropping order against the labels; 0.5 is chance. Intervals are over examples.",
                "rows": rows,
                "ahead": False,
                "chart": _chart("detection", rows, results["default"], "AUC", 0.5),
            }
        )
    return found


def text_tables(results: Row) -> str:
    """Return the tables of the page as plain text."""
    lines = []
    for section in sections(results):
        lines += [section["title"], f"  {section['note']}"]
        for row in section["rows"]:
            ahead = row["default_ahead"]
            tail = "" if ahead is None else f"   {results['default']} ahead by {_span(ahead)}"
            lines.append(f"  {row['method']:<22} {_span(row)}{tail}")
        lines.append("")
    for row in _removal_rows(results):
        lines.append(f"  {row['name']:<42} query loss over random {_span(row)}   accuracy {row['accuracy']}")
    cost = results["cost"]
    epoch = "" if cost["epoch_seconds"] is None else f" (one fine-tuning epoch: {cost['epoch_seconds']:.1f} s)"
    exact = any(row["spearman_to_exact"] for row in cost["rows"])
    lines += ["", f"Cost{epoch}{', and Spearman to the same scores from exact gradients' if exact else ''}"]
    for row in cost["rows"]:
        epochs = "" if row["epochs"] is None else f"{row['epochs']:.2f} epochs"
        agrees = "".join(f"   {name} {value:.4f}" for name, value in (row["spearman_to_exact"] or {}).items())
        lines.append(f"  {row['method']:<22} {epochs:<14} {row['bytes_per_example']:>9} bytes an example{agrees}")
    return "\n".join(lines)


def cost_rows(results: Row) -> list[dict[str, Any]]:
    """Return the cost and the fidelity of every method: epochs, seconds, bytes, LDS, agreement with exact scores."""
    lds = {}
    if results["lds"] is not None:
        rows = results["lds"]["rows"]
        lds = {row["method"]: row for row in rows if (row["group"], row["of"]) == ("all", "queries")}
    return [
        {
            **row,
            "total": sum(row["seconds"].values()),
            "lds": lds.get(row["method"]),
            "exact": row["spearman_to_exact"] or {},
        }
        for row in results["cost"]["rows"]
    ]


def _tradeoff_chart(results: Row) -> Chart | None:
    """Draw LDS against cost, naming the methods that no cheaper one beats; None where either is unknown."""
    rows = [row for row in cost_rows(results) if row["lds"] is not None and row["epochs"] is not None]
    if not rows:
        return None
    rows.sort(key=lambda row: (row["epochs"], -row["lds"]["value"]))
    best = float("-inf")
    for row in rows:
        row["front"] = row["lds"]["value"] > best
        best = max(best, row["lds"]["value"])

    def draw(figure: Figure, narrow: bool) -> None:
        ax: Axes = figure.subplots()
        for row in rows:
            x, y = row["epochs"], row["lds"]["value"]
            colour = INK["accent"] if row["front"] else INK["baseline"]
            ax.plot([x], [y], ls="", marker="o", ms=7, color=colour)
            if row["front"]:
                ax.annotate(plain(row["method"], 30), (x, y), (5, -13), textcoords="offset points", fontsize=10.5)
        front = [row for row in rows if row["front"]]
        ax.plot([r["epochs"] for r in front], [r["lds"]["value"] for r in front], color=INK["accent"], lw=1.2, zorder=0)
        ax.set_xscale("log")
        ax.set_xlabel("cost, fine-tuning epochs")
        ax.set_ylabel("LDS")
        ax.grid()

    alt = "LDS against cost: " + "; ".join(f"{r['method']} {r['lds']['value']:.3f} at {r['epochs']:.2f}" for r in rows)
    keys = [Key("dot", "accent", "nothing cheaper is better"), Key("dot", "baseline", "other methods")]
    return Chart(render_chart("tradeoff", draw, ((700.0, 420.0), (350.0, 330.0)), alt), keys)


def _few(subsets: int) -> str:
    """Return a warning where the bootstrap has too few training sets to draw from, else ""."""
    if subsets >= FEW_SUBSETS:
        return ""
    return (
        f" {subsets} training sets are too few to tell methods apart, and intervals drawn from them are too narrow: "
        "take more (validate.subsets, validate.leave_out_sets)."
    )


def _noise(seeds: int, noise: Row) -> str:
    if seeds < 2:
        return " One seed does not tell how much of the outcomes is noise."
    return (
        f" Two seeds' outcomes agree at {noise['agreement']:.2f} (Spearman); with their mean as outcome no method can "
        f"be expected above {noise['ceiling']:.2f}."
    )


def _groups(rows: Sequence[Row]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((row["group"], row["of"]) for row in rows))


def _group_name(group: str, kind: str, references: Sequence[str]) -> str:
    whose = {"all": "all queries", "correct": "right answers", "incorrect": "wrong answers"}.get(group, group)
    if group in references:
        whose = "reference solutions" if group == "correct" else f"reference solutions of {group}"
    return f"{whose}, one by one" if kind == "queries" else f"mean loss of {whose}"


def _span(row: Row) -> str:
    return f"{row['value']:+.3f} ({row['low']:+.3f} to {row['high']:+.3f})"


def _removal_rows(results: Row) -> list[dict[str, Any]]:
    rows = []
    for row in results["removal"] or ():
        share = f"{100 * row['share']:.0f} %"
        name = (
            f"{share} at random" if row["method"] == "random" else f"most {row['direction']} {share} by {row['method']}"
        )
        accuracy = " ".join(f"{value:.3f}" for value in row["accuracy"])
        rows.append({"name": name, "value": row["loss_over_random"], "low": row["low"], "high": row["high"]})
        rows[-1] |= {"loss": row["loss"], "accuracy": accuracy}
    return rows


def _chart(name: str, rows: Sequence[Row], default: str, what: str, nothing: float) -> Chart:
    """Draw one line a method with its value and interval, and chance as a vertical line."""

    def draw(figure: Figure, narrow: bool) -> None:
        ax: Axes = figure.subplots()
        for y, row in enumerate(rows):
            colour = INK["accent"] if row["method"] == default else INK["baseline"]
            ax.plot([row["low"], row["high"]], [y, y], color=colour, lw=2.2, solid_capstyle="round")
            ax.plot([row["value"]], [y], ls="", marker="o", ms=8, color=colour)
            ax.text(1.015, y, f"{row['value']:.3f}", transform=ax.get_yaxis_transform(), va="center", fontsize=11.5)
        ax.axvline(nothing, color=INK["ink"], lw=1.3, ls=(0, (4, 3)), zorder=0)
        ax.set_yticks(range(len(rows)), [plain(row["method"], 18 if narrow else 36) for row in rows])
        ax.set_ylim(len(rows) - 0.45, -0.55)
        ax.grid(axis="x")
        ax.set_xlabel(what)

    height = 29.0 * len(rows) + 50
    alt = f"{what} of each method: " + "; ".join(f"{row['method']} {row['value']:.3f}" for row in rows)
    keys = [
        Key("dot", "accent", f"{default} (the default)"),
        Key("dot", "baseline", "other methods"),
        Key("dash", "ink", "chance"),
    ]
    return Chart(render_chart(name, draw, ((700.0, height), (350.0, height)), alt), keys)
