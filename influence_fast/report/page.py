"""One self-contained HTML page from the results of a run, and the same numbers as `results.json`.

`write_report(results, path)` needs nothing but the plain dictionary below; `load_results` reads it back from a run
folder. Every part but `title` is optional (absent or None), and a part that is missing is left out of the page. A
number that is None, NaN or infinite is shown as `n/a`. Accuracies, fractions and AUCs are in 0..1, times in seconds.

    title            str
    summary          str: a sentence of the user's own, shown under the title
    created          ISO time
    config           nested dict, shown flattened; `versions` {name: version}; `environment` {name: value}
    data             {"pool": int, "validation": int, "test": int, "labels": {kind: count},
                      "set_aside": [{"id": str, "why": str}]}
    accuracy_before  {"name": str, "accuracy", "low", "high", "n": int, ...}   the model before fine-tuning, as a cell
    cells            one a run: {"strategy", "fraction" (of the pool that is dropped; "full": 0), "seed", "kept",
                      "dropped", "accuracy", "low", "high" (95 % over test questions), "n", "harmful_dropped",
                      "harmful_total", "expected_by_chance", "seconds", "samples" (answers a question), "majority"
                      (maj@n), "pass_at": [{"k", "value"}]}; needed: strategy, accuracy. Several seeds of one
                      (strategy, fraction) are put together by `report_summary.interval`
    settings         {"strategy", "fraction", "accuracy", "low", "high"}: intervals over seeds and questions from
                      `statistics.grid_statistics`, in place of those of `report_summary.interval`
    comparisons      paired tests: {"strategy", "fraction", "against": other strategy, "difference", "low", "high",
                      "p", "p_adjusted", "effect", "effect_low", "effect_high", "seeds"}; where present, the headline
                      uses their interval
    detection        [{"method", "auc", "low", "high", "precision_at": {"10%": float}}]   known harmful traces
    scores           one a trace: {"id", "s_correct", "s_incorrect", "rank_correct", "rank_incorrect" (1 = largest),
                      "label", "prompt", "completion", "loss", "dropped_by": [strategy]}; needed: id and both scores
    rank_agreement   {"methods": [name], "spearman": [[float]]}
    curves           {run name: [[step, loss], ...]}
    cost             [{"stage", "seconds", "detail"}]
    queries          {"correct": n, "incorrect": n}   validation answers the scores are means over
    explained        str: where the page of single answers is (`explain`), beside the report
    warnings         [str]

Tens of thousands of scores are fine: above `MAX_POINTS` the scatter shows all traces as a density, and only the
extremes and an even sample as points with their text.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from jinja2.utils import htmlsafe_json_dumps

from influence_fast.atomic import replacing
from influence_fast.errors import DataError
from influence_fast.report import plots, summary, svg
from influence_fast.report.summary import between, count, fraction_name, number, percent

REPORT_NAME = "report.html"
RESULTS_NAME = "results.json"

MAX_POINTS = 2000  # traces drawn as points of their own, and so with their text in the page
SAMPLED_POINTS = 600  # ... when there are more than that
POINT_TEXT_BUDGET = 900_000  # characters of text for all points together
EXTREME_TRACES = 5  # pairs shown side by side
SHOWN_TEXT = 700  # characters of a trace before "show more"
MAX_TEXT = 20_000  # ... and with it

_KNOWN = {
    "title", "summary", "created", "config", "versions", "environment", "data", "accuracy_before", "cells",
    "settings", "comparisons", "detection", "scores", "rank_agreement", "curves", "cost", "queries", "explained",
    "warnings",
}  # fmt: skip


# --- files -------------------------------------------------------------------------------------------------


def _jsonable(value: Any) -> Any:
    """`value` as strict JSON has it: numpy and torch values as numbers, NaN and infinities as null."""
    if isinstance(value, Mapping):
        return {str(k): _jsonable(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_jsonable(v) for v in value]
    if hasattr(value, "tolist"):
        return _jsonable(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    return str(value)


def save_results(results: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """Write `results` as strict JSON, atomically; `path` is a file, or a run folder that gets `results.json`."""
    summary.check_results(results)
    target = Path(path)
    target = target / RESULTS_NAME if target.is_dir() else target
    text = json.dumps(_jsonable(results), ensure_ascii=True, allow_nan=False, indent=1)
    with replacing(target) as temporary:
        temporary.write_bytes(text.encode("ascii"))
    return target


def load_results(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read results back from `results.json`, or from the run folder that holds it.

    Raises `DataError` if there is no such file, it is not JSON, or a part does not follow the schema.
    """
    source = Path(path)
    source = source / RESULTS_NAME if source.is_dir() else source
    try:
        results = json.loads(source.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{source}: no such file: name a run folder that holds {RESULTS_NAME}, or the file") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{source} cannot be read as JSON ({error}): run the pipeline again to rewrite it") from None
    summary.check_results(results)
    return dict(results)


def write_report(results: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """Write the HTML report of `results` (schema above) to `path`, atomically, and return where it is.

    `path` is a file, or a folder that gets `report.html`. The same results give the same bytes. Raises `DataError`
    naming the part, row and key that do not follow the schema; nothing is written then.
    """
    target = Path(path)
    target = target / REPORT_NAME if target.is_dir() else target
    with replacing(target) as temporary:
        temporary.write_bytes(render(results).encode("utf-8", "replace"))
    return target


def render(results: Mapping[str, Any]) -> str:
    """The page as a string; see `write_report`."""
    summary.check_results(results)
    environment = templates()
    environment.filters.update(
        percent=percent, fraction=fraction_name, count=count, signed=signed, duration=duration, p_value=p_value,
        decimal=decimal, key=svg.key_svg,
    )  # fmt: skip
    environment.globals.update(between=between)
    return environment.get_template("report.html.j2").render(_view(results))


def templates() -> Environment:
    """The package's templates: everything is escaped, and a name that is not given is an error."""
    return Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


# --- numbers as text ---------------------------------------------------------------------------------------


def decimal(value: Any, digits: int = 3) -> str:
    """`0.831`, or `n/a`."""
    x = number(value)
    return f"{x:.{digits}f}".replace("-", "−") if math.isfinite(x) else "n/a"


def signed(value: Any) -> str:
    """A score with its sign and four significant digits: `+0.01234`, `−2.1e-06`, or `n/a`."""
    x = number(value)
    return f"{x:+.4g}".replace("-", "−", 1) if x < 0 else f"{x:+.4g}" if math.isfinite(x) else "n/a"


def duration(value: Any) -> str:
    """`0.42 s`, `12.3 s`, `3 min 05 s`, `2 h 07 min`, or `n/a`."""
    x = number(value)
    if not math.isfinite(x):
        return "n/a"
    if x < 60:
        return f"{x:.2g} s" if x < 1 else f"{x:.1f} s"
    minutes, seconds = divmod(round(x), 60)
    if minutes < 60:
        return f"{minutes} min {seconds:02d} s"
    return f"{minutes // 60:,} h {minutes % 60:02d} min"


def _moment(iso: str) -> str:
    """`12 January 2026, 14:03 UTC`; a time that is not ISO is left as it is."""
    try:
        moment = datetime.fromisoformat(iso)
    except ValueError:
        return iso
    zone = " UTC" if moment.tzinfo else ""
    moment = moment.astimezone(UTC) if moment.tzinfo else moment
    return f"{moment.day} {moment:%B %Y, %H:%M}{zone}"


def p_value(value: Any) -> str:
    """Three decimals, `< 0.001` below that, or `n/a`."""
    x = number(value)
    if not math.isfinite(x):
        return "n/a"
    return "< 0.001" if x < 0.001 else f"{x:.3f}"


def _flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested configuration as (dotted key, text) pairs in the order given."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value if isinstance(value, str) else json.dumps(_jsonable(value), ensure_ascii=False)


def _pairs(value: Any) -> list[tuple[str, str]]:
    return [pair for pair in _flatten(value or {}) if pair[0]]


# --- what the template shows -------------------------------------------------------------------------------


def _view(results: Mapping[str, Any]) -> dict[str, Any]:
    settings = summary.aggregate(results.get("cells") or [], results.get("settings") or [])
    base = results.get("accuracy_before") or None
    head = summary.headline(results, settings)
    warnings = [str(w) for w in results.get("warnings") or []]
    unknown = sorted(str(k) for k in set(results) - _KNOWN)
    if unknown:
        warnings.append(f"Parts of the results that this report does not know and does not show: {', '.join(unknown)}.")
    scores = results.get("scores") or []
    labels = _label_categories(results)
    cost = _cost(results.get("cost") or [])
    return {
        "title": str(results["title"]),
        "summary": results.get("summary") or "",
        "created": str(results.get("created") or ""),
        "created_text": _moment(str(results.get("created") or "")),
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
        "scatter": _scatter(scores, labels, settings),
        "traces": _traces(scores),
        "explained": str(results.get("explained") or ""),
        "distribution": _distribution(scores, labels),
        "detection": _detection(results.get("detection") or []),
        "agreement": _agreement(results.get("rank_agreement") or {}),
        "curves": plots.curves_chart(results.get("curves") or {}),
        "cost": cost,
        "config": _pairs(results.get("config")),
        "versions": _pairs(results.get("versions")),
        "environment": _pairs(results.get("environment")),
    }


def _further_names(measures: Sequence[Mapping[str, float]]) -> list[str]:
    """The names in all of them, maj@n before pass@k, each by its number."""
    names = {name for found in measures for name in found}
    return sorted(names, key=lambda name: (name.partition("@")[0], int(name.partition("@")[2] or 0)))


def _label_categories(results: Mapping[str, Any]) -> dict[str, int]:
    """Label -> 0..6 (shape and colour): clean and unlabelled are the neutral 0, the others by name order.

    More than six kinds share the last category: that many shapes can no longer be told apart.
    """
    seen = {str(s["label"]) for s in results.get("scores") or [] if s.get("label") is not None}
    seen |= {str(k) for k in (results.get("data") or {}).get("labels") or {}}
    marked = sorted(label for label in seen if label != "clean")
    return {"clean": 0, **{label: min(i + 1, svg.CATEGORIES - 1) for i, label in enumerate(marked)}}


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
    """Indices of the traces that become points: all, or the extremes of each score and an even sample."""
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
    chart = plots.scatter_chart(
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
    """The two columns of extreme traces, most extreme first, with their text in a shown and a folded part."""
    helpful, harmful = summary.extremes(scores, EXTREME_TRACES)
    if not helpful:
        return None

    def card(i: int) -> dict[str, Any]:
        s = scores[i]
        return {
            "id": str(s["id"]),
            "label": None if s.get("label") is None else str(s["label"]),
            "s_correct": s["s_correct"],
            "s_incorrect": s["s_incorrect"],
            "rank_correct": s.get("rank_correct"),
            "rank_incorrect": s.get("rank_incorrect"),
            "loss": s.get("loss"),
            "dropped_by": [str(name) for name in s.get("dropped_by") or []],
            "texts": [(name, *clipped(str(s[name]))) for name in ("prompt", "completion") if s.get(name)],
        }

    return {"helpful": [card(i) for i in helpful], "harmful": [card(i) for i in harmful], "total": len(scores)}


def clipped(text: str, most: int = MAX_TEXT) -> tuple[str, str, int]:
    """(shown, folded, characters left out); the cut falls on a line or word end where one is near."""
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
    return plots.distribution_chart(groups)


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
