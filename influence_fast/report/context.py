"""The variables of the report's template, from the plain `results` dictionary that `influence_fast.report.page`
describes.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jinja2.utils import htmlsafe_json_dumps

from influence_fast.report import plots, score_plots, summary, svg
from influence_fast.report.summary import jsonable, number
from influence_fast.report.text import decimal, headline, moment, signed

# Traces up to which each is drawn as a point of its own, with its text in the page.
MAX_POINTS = 2000
# Traces sampled as points when there are more.
SAMPLED_POINTS = 600
# Characters of text for all points together.
POINT_TEXT_BUDGET = 900_000
# Pairs of extreme traces shown side by side.
EXTREME_TRACES = 5
# Characters of a trace before "show more".
SHOWN_TEXT = 700
# Characters of a trace after "show more".
MAX_TEXT = 20_000

_KNOWN = {
    "title", "summary", "created", "config", "versions", "environment", "data", "accuracy_before", "cells",
    "settings", "comparisons", "detection", "scores", "rank_agreement", "curves", "cost", "queries", "references",
    "explained", "warnings",
}  # fmt: skip


def page_context(results: Mapping[str, Any]) -> dict[str, Any]:
    """Return the variables of `report.html.j2`; `results` must have passed `summary.check_results`."""
    settings = summary.aggregate(results.get("cells") or [], results.get("settings") or [])
    base = results.get("accuracy_before") or None
    head = headline(results, settings)
    warnings = [str(w) for w in results.get("warnings") or []]
    unknown = sorted(str(k) for k in set(results) - _KNOWN)
    if unknown:
        warnings.append(f"Parts of the results that this report does not know and does not show: {', '.join(unknown)}.")
    explained = results.get("explained") or ""
    if explained and not is_beside(explained):
        warnings.append("The link to the page of single answers is no path to a file beside this one, and is left out.")
        explained = ""
    scores = results.get("scores") or []
    labels = _label_categories(results)
    cost = _cost(results.get("cost") or [])
    return {
        "title": str(results["title"]),
        "summary": results.get("summary") or "",
        "created": str(results.get("created") or ""),
        "created_text": moment(str(results.get("created") or "")),
        "head": head,
        "warnings": warnings,
        "settings": sorted(settings, key=lambda s: (s.kind != "full", s.fraction, -s.mean if s.finished else math.inf)),
        "base": base,
        "base_further": summary.further_measures(base or {}),
        "further": _further_names([summary.further_measures(base or {}), *(s.further for s in settings)]),
        "tried": sum(s.kind not in ("full", "random") for s in settings),
        "several_seeds": any(s.seeds > 1 for s in settings),
        "bootstrapped": bool(results.get("settings")),
        "accuracy": plots.accuracy_chart(settings, base),
        "harmful": plots.harmful_chart(settings),
        "comparisons": [dict(c) for c in results.get("comparisons") or []],
        "data": _data(results.get("data") or {}),
        "queries": results.get("queries") or {},
        "references": results.get("references") or [],
        # Whether the model's own wrong answers are among the queries.
        "wrong": "incorrect" in (results.get("queries") or {"incorrect": 0}),
        "contrast": any(str(cell.get("strategy", "")).startswith("contrast") for cell in results.get("cells") or []),
        "scatter": _scatter(scores, labels, settings),
        "traces": _traces(scores),
        "explained": explained,
        "distribution": _distribution(scores, labels),
        "detection": _detection(results.get("detection") or []),
        "agreement": _agreement(results.get("rank_agreement") or {}),
        "curves": plots.curves_chart(results.get("curves") or {}),
        "cost": cost,
        "config": _pairs(results.get("config")),
        "versions": _pairs(results.get("versions")),
        "environment": _pairs(results.get("environment")),
    }


# No colon, backslash, per cent sign or query, all of which a browser takes for more than a name.
_BESIDE = re.compile(r"[\w ,+=@()-][\w .,+=@()-]*(/[\w ,+=@()-][\w .,+=@()-]*)*")


def is_beside(link: object) -> bool:
    """Return whether `link` is a plain relative path, which leads only to a file in the page's folder or below."""
    return isinstance(link, str) and len(link) < 1000 and _BESIDE.fullmatch(link) is not None and link.isprintable()


def _further_names(measures: Sequence[Mapping[str, float]]) -> list[str]:
    """Return the names in all of `measures`, maj@n before pass@k, each by its number."""
    names = {name for found in measures for name in found}
    return sorted(names, key=lambda name: (name.partition("@")[0], int(name.partition("@")[2] or 0)))


def _label_categories(results: Mapping[str, Any]) -> dict[str, int]:
    """Return the category 0..6 (shape and colour) of each label: clean is the neutral 0, the others go by name order.

    More than six kinds share the last category: that many shapes can no longer be told apart.
    """
    seen = {str(s["label"]) for s in results.get("scores") or [] if s.get("label") is not None}
    seen |= {str(k) for k in (results.get("data") or {}).get("labels") or {}}
    marked = sorted(label for label in seen if label != "clean")
    return {"clean": 0, **{label: min(i + 1, svg.CATEGORIES - 1) for i, label in enumerate(marked)}}


def _flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield a nested configuration as (dotted key, text) pairs in the order given."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value if isinstance(value, str) else json.dumps(jsonable(value), ensure_ascii=False)


def _pairs(value: Any) -> list[tuple[str, str]]:
    return [pair for pair in _flatten(value or {}) if pair[0]]


def _data(data: Mapping[str, Any]) -> dict[str, Any]:
    labels = {str(k): number(v) for k, v in (data.get("labels") or {}).items()}
    total = sum(v for v in labels.values() if math.isfinite(v))
    aside = [(str(row.get("id", "")), str(row.get("why", ""))) for row in data.get("set_aside") or []]
    names = {"pool": "training pool", "validation": "validation", "test": "test"}
    return {
        "sizes": [(names[k], data[k]) for k in names if data.get(k) is not None],
        "labels": [(k, v, v / total if total else math.nan) for k, v in labels.items()],
        "set_aside": aside[:200],
        "set_aside_total": len(aside),
    }


def _drawn(scores: Sequence[Mapping[str, Any]], value: np.ndarray) -> list[int]:
    """Return the indices of the traces that become points: all, or the extremes of each score and an even sample."""
    finite = [int(i) for i in np.flatnonzero(np.isfinite(value))]
    if len(finite) <= MAX_POINTS:
        return finite
    s_correct, s_incorrect = summary.score_arrays(scores)
    chosen: set[int] = set()
    for order in (value, s_correct, s_incorrect):
        ranked = sorted(finite, key=lambda i: order[i])
        chosen.update(ranked[:40] + ranked[-40:])
    # Evenly along the balance: repeatable, and every part of the range is there.
    ranked = sorted(finite, key=lambda i: value[i])
    chosen.update(ranked[i] for i in np.linspace(0, len(ranked) - 1, SAMPLED_POINTS).astype(int))
    return sorted(chosen)


def _scatter(
    scores: Sequence[Mapping[str, Any]], labels: Mapping[str, int], settings: Sequence[summary.Setting]
) -> dict[str, Any] | None:
    value = summary.balance(scores)
    s_correct, s_incorrect = summary.score_arrays(scores)
    both = np.isfinite(s_correct) & np.isfinite(s_incorrect)
    if not both.any():
        return None
    drawn = _drawn(scores, value)
    strategies = sorted({str(name) for s in scores for name in s.get("dropped_by") or []})
    best = summary.best_setting(settings)
    preferred = [n for n in strategies if best is not None and n.startswith(best.strategy)]
    if best is not None:
        # `dropped_by` may name the fraction or not, in the pipeline's own way of writing it.
        own = [f"{100 * best.fraction:g}", f"{best.fraction:g}"]
        preferred.sort(key=lambda n: not any(re.search(rf"(?<![\d.]){re.escape(f)}(?![\d.])", n) for f in own))
    marked = (preferred or [n for n in strategies if n.startswith("combined")] or strategies or [""])[0]
    clip = int(min(1500, max(200, POINT_TEXT_BUDGET / max(len(drawn), 1) / 2)))
    points, titles, category, dropped = [], [], [], []
    for i in drawn:
        s = scores[i]
        by = sorted(strategies.index(str(name)) for name in s.get("dropped_by") or [])
        category.append(labels.get(str(s.get("label")), 0) if s.get("label") is not None else 0)
        dropped.append(by)
        titles.append(
            f"{svg.plain(s['id'], 60)} · s_correct {signed(s['s_correct'])} · s_incorrect {signed(s['s_incorrect'])}"
        )
        point = {"id": str(s["id"]), "c": signed(s["s_correct"]), "i": signed(s["s_incorrect"]), "d": by}
        if s.get("label") is not None:
            point["l"] = str(s["label"])
        for key, name in (("p", "prompt"), ("t", "completion")):
            text = str(s.get(name) or "")
            if text:
                point[key] = text if len(text) <= clip else text[:clip] + f" … [{len(text) - clip:,} more characters]"
        points.append(point)
    chart = score_plots.scatter_chart(
        s_correct,
        s_incorrect,
        drawn,
        category,
        dropped,
        strategies.index(marked) if strategies else -1,
        titles,
        density=len(drawn) < int(both.sum()),
    )
    used = set(category)
    names: dict[int, list[str]] = {}
    for label, kind in labels.items():
        names.setdefault(kind, []).append(label)
    labelled = any(s.get("label") is not None for s in scores)
    keys = [svg.Key("shape", f"c{k}", ", ".join(names[k]), k) for k in sorted(used)] if labelled else []
    if strategies:
        keys.append(svg.Key("ring", "ink", "dropped by the strategy chosen"))
    return {
        "svg": chart.svg,
        "legend": keys,
        "strategies": strategies,
        "marked": marked,
        "start": int(np.argmin(value[drawn])),
        "json": htmlsafe_json_dumps(points),
        "drawn": len(drawn),
        "total": int(both.sum()),
        "not_finite": len(scores) - int(both.sum()),
    }


def _traces(scores: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return the two columns of extreme traces, most extreme first, with their text in a shown and a folded part."""
    helpful, harmful = summary.extremes(scores, EXTREME_TRACES)
    if not helpful:
        return None
    # By the scores and not as stored: files of earlier versions count ranks from the other end.
    ranks = [summary.ranks_of(column) for column in summary.score_arrays(scores)]

    def card(i: int) -> dict[str, Any]:
        s = scores[i]
        return {
            "id": str(s["id"]),
            "label": None if s.get("label") is None else str(s["label"]),
            "s_correct": s["s_correct"],
            "s_incorrect": s["s_incorrect"],
            "rank_correct": ranks[0][i],
            "rank_incorrect": ranks[1][i],
            "loss": s.get("loss"),
            "dropped_by": [str(name) for name in s.get("dropped_by") or []],
            "texts": [(name, *clipped(str(s[name]))) for name in ("prompt", "completion") if s.get(name)],
        }

    return {"helpful": [card(i) for i in helpful], "harmful": [card(i) for i in harmful], "total": len(scores)}


def clipped(text: str, most: int = MAX_TEXT) -> tuple[str, str, int]:
    """Return (shown, folded, characters left out) of a text; the cut falls on a line or word end where one is near."""
    if len(text) <= SHOWN_TEXT + 80:
        return text, "", 0
    cut = max(text.rfind("\n", SHOWN_TEXT - 120, SHOWN_TEXT), text.rfind(" ", SHOWN_TEXT - 120, SHOWN_TEXT))
    cut = cut + 1 if cut > 0 else SHOWN_TEXT
    return text[:cut], text[cut:most], max(0, len(text) - most)


def _distribution(scores: Sequence[Mapping[str, Any]], labels: Mapping[str, int]) -> svg.Chart | None:
    s_correct, s_incorrect = summary.score_arrays(scores)
    own = [None if s.get("label") is None else str(s["label"]) for s in scores]
    groups = []
    for label in [*labels, None]:
        here = np.array([name == label for name in own], dtype=bool)
        if here.any():
            name = label if label is not None else ("no label" if any(own) else "all traces")
            groups.append((name, labels.get(label or "clean", 0), s_correct[here], s_incorrect[here]))
    return score_plots.distribution_chart(groups)


def _detection(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    if not rows:
        return None
    depths = list(dict.fromkeys(str(k) for row in rows for k in row.get("precision_at") or {}))
    best = max((number(r["auc"]) for r in rows if math.isfinite(number(r["auc"]))), default=math.nan)
    return {
        "depths": depths,
        "rows": [
            {
                "method": str(r["method"]),
                "auc": r["auc"],
                "interval": _span(r.get("low"), r.get("high")),
                "best": number(r["auc"]) == best,
                "precision": [(r.get("precision_at") or {}).get(d) for d in depths],
            }
            for r in sorted(rows, key=lambda r: -np.nan_to_num(number(r["auc"]), nan=-1.0))
        ],
    }


def _span(low: Any, high: Any) -> str:
    both = math.isfinite(number(low)) and math.isfinite(number(high))
    return f"{decimal(low)} to {decimal(high)}" if both else "n/a"


def _agreement(agreement: Mapping[str, Any]) -> dict[str, Any] | None:
    methods = [str(m) for m in agreement.get("methods") or []]
    if not methods:
        return None
    # Colour by sign, strength by size; the figure stands in every cell, so the colour is never alone.
    rows = [
        [
            (
                decimal(v, 2),
                "pos" if number(v) >= 0 else "neg",
                round(100 * min(abs(number(v)), 1.0)) if math.isfinite(number(v)) else 0,
            )
            for v in line
        ]
        for line in agreement["spearman"]
    ]
    return {"methods": methods, "rows": list(zip(methods, rows, strict=True))}


def _cost(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    if not rows:
        return None
    finite = [number(r["seconds"]) for r in rows if math.isfinite(number(r["seconds"]))]
    total = sum(finite)
    return {
        "total": total if finite else math.nan,
        "rows": [
            {
                "stage": str(r["stage"]),
                "seconds": r["seconds"],
                "share": number(r["seconds"]) / total
                if total > 0 and math.isfinite(number(r["seconds"]))
                else math.nan,
                "detail": str(r.get("detail") or ""),
            }
            for r in rows
        ],
    }
