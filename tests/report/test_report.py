"""The report: what it says against the numbers it was given, and that it is one safe, complete page."""

from __future__ import annotations

import copy
import itertools
import json
import math
import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from influence_fast.errors import DataError
from influence_fast.report import context, summary
from influence_fast.report import page as report
from influence_fast.report.grid_statistics import grid_statistics
from influence_fast.report.text import headline, p_value
from influence_fast.selection.strategies import STRATEGIES

VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}
HOSTILE = (
    "</script><script>alert(1)</script><img src=x onerror=alert(2)> \"'&amp;<!-- $\\frac{a}{b}$ --> {{ 7*7 }} \u2028"
)
LABELS = ("clean", "wrong_step", "off_topic")


class Page(HTMLParser):
    """Checks nesting while it collects elements, text by element, and attributes."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.stack: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert not self.stack, f"left open: {self.stack}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"attribute twice in <{tag}>: {names}"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        # The short form closes nothing in HTML itself, only inside SVG.
        assert "svg" in self.stack or tag in VOID, tag

    def handle_endtag(self, tag: str) -> None:
        assert self.stack[-1:] == [tag], f"</{tag}> closes {self.stack[-3:]}"
        self.stack.pop()

    def handle_data(self, data: str) -> None:
        self.texts.append((self.stack[-1] if self.stack else "", data))

    def text(self) -> str:
        """What a reader sees: no style, script or chart tooltip; no-break spaces as spaces."""
        return "".join(t for tag, t in self.texts if tag not in ("style", "script", "title")).replace("\u00a0", " ")


def table_rows(html: str) -> list[list[str]]:
    rows = re.findall(r"<tr[^>]*>(.*?)</tr>", html, re.S)
    clean = [[re.sub(r"<[^>]+>", "", c) for c in re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", r, re.S)] for r in rows]
    return [[unescape(c).replace("\u00a0", " ").strip() for c in row] for row in clean]


def make_results(seeds: int = 3, traces: int = 60, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    cells = []
    for s in range(seeds):
        for strategy, fractions in {
            "full": (0.0,),
            "random": (0.1, 0.5),
            "combined": (0.1, 0.5),
            "length": (0.1,),
        }.items():
            for fraction in fractions:
                accuracy = float(rng.uniform(0.4, 0.7))
                harmful = None if strategy == "full" else int(rng.integers(0, 20))
                cells.append(
                    {
                        "strategy": strategy,
                        "fraction": fraction,
                        "seed": s,
                        "kept": round(traces * (1 - fraction)),
                        "dropped": round(traces * fraction),
                        "accuracy": accuracy,
                        "low": accuracy - 0.04,
                        "high": accuracy + 0.05,
                        "n": 321,
                        "harmful_dropped": harmful,
                        "harmful_total": 20,
                        "expected_by_chance": 20 * fraction,
                        "seconds": 12.0 + s,
                    }
                )
    scores = [
        {
            "id": f"row-{i:04d}",
            "s_correct": float(rng.standard_t(3)) * 1e-3,
            "s_incorrect": float(rng.standard_t(3)) * 1e-3,
            "rank_correct": i + 1,
            "rank_incorrect": traces - i,
            "label": LABELS[i % 3],
            "prompt": f"Question {i}?",
            "completion": f"Step one of {i}. Step two. Answer {i}.",
            "loss": 0.5,
            "dropped_by": ["combined"] if i % 5 == 0 else [],
        }
        for i in range(traces)
    ]
    return {
        "title": "A run",
        "summary": "One sentence.",
        "created": "2026-02-03T04:05:06+00:00",
        "config": {"lora": {"r": 16, "target_modules": ["q_proj"]}, "seed": 0},
        "versions": {"torch": "2.13.0"},
        "environment": {"device": "cpu"},
        "data": {
            "pool": traces,
            "validation": 31,
            "test": 321,
            "labels": {"clean": 40, "wrong_step": 13, "off_topic": 7},
            "set_aside": [{"id": "row-9001", "why": "empty completion"}],
        },
        "accuracy_before": {"name": "base model", "accuracy": 0.3217, "low": 0.28, "high": 0.37, "n": 321},
        "cells": cells,
        "comparisons": [
            {"strategy": "combined", "fraction": 0.1, "against": "full", "difference": 0.0312,
             "low": -0.01, "high": 0.07, "p": 0.0004, "p_adjusted": 0.0421},
        ],
        "detection": [
            {"method": "s_incorrect", "auc": 0.8714, "low": 0.8, "high": 0.9, "precision_at": {"10%": 0.789}},
            {"method": "s_correct", "auc": 0.7, "low": None, "high": None, "precision_at": {"5%": 0.456}},
        ],
        "scores": scores,
        "rank_agreement": {"methods": ["dot", "fisher"], "spearman": [[1.0, -0.314], [-0.314, 1.0]]},
        "curves": {"full": [[0, 2.0], [1, 1.5], [2, 1.25]], "combined": [[0, 2.1], [1, float("nan")], [2, 1.2]]},
        "cost": [
            {"stage": "gradients", "seconds": 30.0, "detail": "41k tokens/s"},
            {"stage": "scoring", "seconds": 10.0, "detail": ""},
        ],
        "queries": {"correct": 17, "incorrect": 14},
        "warnings": ["Two examples were set aside."],
    }  # fmt: skip


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return make_results()


@pytest.fixture(scope="module")
def html(results: dict[str, Any]) -> str:
    return report.render(results)


# --- arithmetic --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("degrees", "expected"), [(1, 12.7062), (4, 2.77645), (9, 2.26216), (10, 2.22814), (29, 2.04523), (999, 1.96234)]
)
def test_t_quantile_against_tables(degrees: int, expected: float) -> None:
    assert summary.t_quantile(degrees) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("seeds", [1, 2, 5])
def test_aggregation_over_seeds_against_numpy(seeds: int) -> None:
    cells = make_results(seeds=seeds, seed=seeds)["cells"]
    settings = {(s.strategy, s.fraction): s for s in summary.aggregate(cells)}
    assert set(settings) == {(c["strategy"], c["fraction"]) for c in cells}
    t = {1: math.nan, 2: 12.706205, 5: 2.776445}[seeds]
    for (strategy, fraction), s in settings.items():
        own = [c for c in cells if (c["strategy"], c["fraction"]) == (strategy, fraction)]
        accuracy = np.array([c["accuracy"] for c in own])
        assert s.mean == pytest.approx(np.mean(accuracy), rel=1e-12)
        spread = t * np.std(accuracy, ddof=1) / np.sqrt(seeds) if seeds > 1 else 0.0
        assert s.low == pytest.approx(max(0, np.mean(accuracy) - max(spread, 0.04 / np.sqrt(seeds))), rel=1e-6)
        assert s.high == pytest.approx(min(1, np.mean(accuracy) + max(spread, 0.05 / np.sqrt(seeds))), rel=1e-6)
        if strategy != "full":
            assert s.harmful_dropped == pytest.approx(np.mean([c["harmful_dropped"] for c in own]))
        assert s.seconds == pytest.approx(12 + (seeds - 1) / 2)


def test_seeds_that_agree_do_not_make_an_interval_of_no_width() -> None:
    cells = [{"strategy": "combined", "fraction": 0.1, "accuracy": 0.5, "low": 0.4, "high": 0.6}] * 4
    (setting,) = summary.aggregate(cells)
    assert (setting.low, setting.high) == pytest.approx((0.45, 0.55))


def test_a_failed_seed_is_left_out_and_counted() -> None:
    cells = [
        {"strategy": "combined", "fraction": 0.1, "accuracy": a, "low": a, "high": a} for a in (0.4, float("nan"), 0.6)
    ]
    (setting,) = summary.aggregate(cells)
    assert (setting.mean, setting.seeds, setting.finished) == (pytest.approx(0.5), 3, 2)
    assert "2 of 3" in report.render({"title": "t", "cells": cells})


def test_balance_against_brute_force_ranks() -> None:
    rng = np.random.default_rng(3)
    rows = [{"s_correct": float(a), "s_incorrect": float(b)} for a, b in rng.integers(0, 9, (40, 2))]
    rows += [{"s_correct": None, "s_incorrect": 1.0}]

    def rank(values: list[float], x: float) -> float:  # mid-rank: halfway through the values equal to x
        return (sum(v < x for v in values) + sum(v <= x for v in values)) / 2 / len(values)

    good, bad = [r["s_correct"] for r in rows[:-1]], [r["s_incorrect"] for r in rows]
    expected = [rank(good, r["s_correct"]) - rank(bad, r["s_incorrect"]) for r in rows[:-1]]
    value = summary.balance(rows)
    np.testing.assert_allclose(value[:-1], expected, rtol=1e-12)
    assert np.isnan(value[-1])


def test_extremes_are_ordered_apart_and_skip_what_is_not_finite() -> None:
    rows = [{"s_correct": c, "s_incorrect": i} for c, i in [(1, 9), (9, 1), (5, 5), (float("nan"), 0), (8, 2)]]
    assert summary.extremes(rows, 2) == ([1, 4], [0, 2])
    assert summary.extremes(rows[:1], 3) == ([], [])


# --- what is claimed ---------------------------------------------------------------------------------------


def _cell(strategy: str, accuracy: float, half: float | None = 0.02, fraction: float = 0.1) -> dict[str, Any]:
    low, high = (None, None) if half is None else (accuracy - half, accuracy + half)
    return {"strategy": strategy, "fraction": fraction, "accuracy": accuracy, "low": low, "high": high}


def _found(*cells: dict[str, Any], **more: Any) -> str:
    results = {"title": "t", "cells": list(cells), **more}
    return headline(results, summary.aggregate(results["cells"])).found.replace("\u00a0", " ")


def test_headline_names_a_difference_only_where_intervals_are_apart() -> None:
    full = _cell("full", 0.5, fraction=0.0)
    apart = _found(full, _cell("random", 0.52), _cell("combined", 0.6))
    assert "combined at 10 %, reached 60.0 % accuracy (95 % interval 58.0 to 62.0 %)" in apart
    assert "above random at 10 % (52.0 %, 50.0 to 54.0 %) and above all data (50.0 %" in apart
    assert "within noise of random" in _found(full, _cell("random", 0.57), _cell("combined", 0.6))
    assert "below random" in _found(full, _cell("random", 0.7), _cell("combined", 0.6))
    assert "not comparable with random" in _found(_cell("random", 0.5, None), _cell("combined", 0.6))


def test_headline_takes_random_at_the_same_fraction_and_counts_what_was_tried() -> None:
    text = _found(
        _cell("random", 0.1, fraction=0.5), _cell("random", 0.59), _cell("combined", 0.6), _cell("length", 0.2)
    )
    assert text.startswith("The best of 2 settings, combined")
    assert "within noise of random at 10 % (59.0 %" in text


def test_headline_prefers_a_paired_comparison() -> None:
    cells = [_cell("random", 0.59), _cell("combined", 0.6)]
    pair = {"strategy": "combined", "fraction": 0.1, "against": "random", "difference": 0.01}
    assert "above random" in _found(*cells, comparisons=[{**pair, "low": 0.004, "high": 0.016}])
    assert "within noise of random" in _found(*cells, comparisons=[{**pair, "low": -0.004, "high": 0.016}])


def test_grid_statistics_are_what_the_page_shows() -> None:
    """Two seeds whose intervals come from `statistics`: the chart's table, the comparison and the sentence agree."""
    rng = np.random.default_rng(0)
    cells, correct = [], []
    for seed in (0, 1):
        for strategy, share in (("full", 0.4), ("random", 0.4), ("combined", 0.8)):
            answers = rng.random(90) < share
            fraction = 0.0 if strategy == "full" else 0.1
            cells.append({"strategy": strategy, "fraction": fraction, "seed": seed, "accuracy": float(answers.mean())})
            correct.append({str(i): float(a) for i, a in enumerate(answers)})
    found = grid_statistics(cells, correct)
    results = {"title": "t", "cells": cells, **found}
    html = report.render(results)
    rows = table_rows(html)
    for s in found["settings"]:
        (row,) = [r for r in rows if r[0] == s["strategy"] and r[4] == "2"]
        assert row[2] == f"{100 * s['accuracy']:.1f} %"
        assert row[3] == f"{100 * s['low']:.1f} to {100 * s['high']:.1f} %"
    c = found["comparisons"][0]
    h = [f"{c['effect']:.2f}", f"{c['effect_low']:.2f} to {c['effect_high']:.2f}"]
    p = [p_value(c["p"]), p_value(c["p_adjusted"])]
    interval = f"{100 * c['low']:.1f} to {100 * c['high']:.1f} %"
    assert ["combined", "10 %", "random", f"{100 * c['difference']:.1f} %", interval, *h, *p] in rows
    text = Page(html).text()
    assert "bootstrap over seeds and test questions" in text
    assert "above random at 10 %" in text
    assert "One seed" not in text
    one = {"title": "t", "cells": cells[:3], **grid_statistics(cells[:3], correct[:3])}
    assert "One seed: intervals and p are over the questions only" in Page(report.render(one)).text()


def test_a_strategy_is_drawn_by_what_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    class Algebra:
        needs = ("loss", "mean_rank_algebra")

    monkeypatch.setitem(STRATEGIES, "algebra", Algebra())
    kinds = {
        "influence": ("low_benefit", "high_harm", "combined", "combined_mean_rank", "less", "algebra"),
        "baseline": ("perplexity_mid", "short", "embedding", "difficulty", "registered elsewhere"),
        "random": ("random",),
        "full": ("full",),
    }
    for kind, names in kinds.items():
        for name in names:
            (setting,) = summary.aggregate([{"strategy": name, "fraction": 0.1, "accuracy": 0.5}])
            assert setting.kind == kind, name


def test_headline_without_cells_claims_detection_or_nothing() -> None:
    row = {"method": "s_incorrect", "auc": 0.61, "low": 0.45, "high": 0.77}
    assert "within noise of chance" in headline({"title": "t", "detection": [row]}, []).found
    assert "within noise" not in headline({"title": "t", "detection": [{**row, "low": 0.55}]}, []).found
    assert "nothing to claim" in headline({"title": "t"}, []).found


# --- the page ----------------------------------------------------------------------------------------------


def test_page_is_well_formed_with_headings_in_order_and_named_charts(html: str) -> None:
    page = Page(html)
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels))
    charts = [a for tag, a in page.tags if tag == "svg" and a.get("role") == "img"]
    assert len(charts) == 10  # five charts, wide and narrow
    assert all(len(a["aria-label"] or "") > 20 for a in charts)
    ids = [a["id"] for _, a in page.tags if a.get("id")]
    assert len(ids) == len(set(ids))
    inner = {a.get("href") for tag, a in page.tags if tag in ("a", "use")}
    inner |= {"#" + m for _, a in page.tags for m in re.findall(r"url\(#(.*?)\)", a.get("clip-path") or "")}
    assert {target.removeprefix("#") for target in inner if target} <= set(ids)


def test_page_refers_to_nothing_outside(html: str) -> None:
    assert not re.search(r"https?://|@import|\bsrc\s*=|url\((?!#)|<link|<iframe|<object|<base", html, re.I)
    for tag, attributes in Page(html).tags:
        for name, value in attributes.items():
            if name in ("href", "xlink:href", "src", "srcset", "data", "action"):
                assert (value or "").startswith("#"), (tag, name, value)


def test_numbers_on_the_page_equal_the_input(results: dict[str, Any], html: str) -> None:
    rows = table_rows(html)
    for strategy, fraction in {(c["strategy"], c["fraction"]) for c in results["cells"]}:
        own = [c for c in results["cells"] if (c["strategy"], c["fraction"]) == (strategy, fraction)]
        accuracy = 100 * np.mean([c["accuracy"] for c in own])
        (row,) = [r for r in rows if r[:2] == [strategy, f"{100 * fraction:g} %"] and len(r) == 11]
        assert row[2] == f"{accuracy:.1f} %"
        assert row[4:8] == ["3", "321", str(own[0]["kept"]), str(own[0]["dropped"])]
        if strategy != "full":
            dropped = np.mean([c["harmful_dropped"] for c in own])
            assert row[8] == f"{dropped:.1f}".removesuffix(".0") + " of 20"
            assert row[9] == f"{20 * fraction:g}"
    assert ["base model", "–", "32.2 %", "28.0 to 37.0 %", "–", "321", "–", "–", "–", "–", "–"] in rows
    assert ["s_incorrect", "0.871", "0.800 to 0.900", "78.9 %", "n/a"] in rows
    assert ["s_correct", "0.700", "n/a", "n/a", "45.6 %"] in rows
    assert ["dot", "1.00", "−0.31"] in rows
    assert ["combined", "10 %", "full", "3.1 %", "−1.0 to 7.0 %", "< 0.001", "0.042"] in rows
    assert ["gradients", "30.0 s", "75.0 %", "", "41k tokens/s"] in rows
    assert ["total", "40.0 s", "", "", ""] in rows
    assert ["wrong_step", "13", "21.7 %", ""] in rows
    assert ["row-9001", "empty completion"] in rows
    assert ["lora.r", "16"] in rows
    assert ["lora.target_modules", '["q_proj"]'] in rows
    assert ["torch", "2.13.0"] in rows
    text = Page(html).text()
    for words in ("17 correct and 14 incorrect", "Two examples were set aside.", "3 February 2026, 04:05 UTC"):
        assert words in text


def test_several_answers_a_question_have_columns_of_their_own() -> None:
    """maj@n and pass@k, means over the seeds; a run without them has no column for them."""
    more = {"samples": 8, "majority": 0.75, "pass_at": [{"k": 8, "value": 0.9}, {"k": 2, "value": 0.625}]}
    cells = [_cell("combined", 0.5) | more, _cell("combined", 0.5) | more | {"majority": 0.25}, _cell("full", 0.4)]
    before = {"accuracy": 0.3, "n": 10, "samples": 8, "majority": 0.125, "pass_at": []}
    rows = table_rows(report.render({"title": "t", "cells": cells, "accuracy_before": before}))
    (head,) = [row for row in rows if row[:2] == ["strategy", "dropped"]]
    first = head.index("maj@8")
    assert head[first : first + 3] == ["maj@8", "pass@2", "pass@8"]
    shown = {row[0]: row[first : first + 3] for row in rows if len(row) == len(head)}
    assert shown["combined"] == ["50.0 %", "62.5 %", "90.0 %"]
    assert shown["full"] == ["n/a"] * 3
    assert shown["before"] == ["12.5 %", "n/a", "n/a"]
    assert "maj@" not in report.render({"title": "t", "cells": [_cell("full", 0.4)]})


def _points(html: str) -> list[dict[str, Any]]:
    found = re.search(r'<script type="application/json" id="points">(.*?)</script>', html, re.S)
    assert found
    return json.loads(found.group(1))


def test_scatter_puts_every_trace_where_its_scores_are(results: dict[str, Any], html: str) -> None:
    points = _points(html)
    assert [p["id"] for p in points] == [s["id"] for s in results["scores"]]
    wide = re.search(r'<svg class="chart scatter".*?</svg>', html, re.S)
    assert wide
    marks = re.findall(
        r'<use href="#w\d" x="([\d.]+)" y="([\d.]+)" class="p (k\d)( cut)?" data-i="(\d+)">', wide.group()
    )
    assert len(marks) == len(points)
    s_correct, s_incorrect = summary.score_arrays(results["scores"])
    index = np.array([int(m[4]) for m in marks])
    x, y = (np.array([float(m[k]) for m in marks]) for k in (0, 1))
    # Monotone in the scores up to the tenth of a pixel that is written, whatever the scale of the axis.
    assert (np.diff(x[np.argsort(s_correct[index], kind="stable")]) >= -0.11).all()
    assert (np.diff(y[np.argsort(s_incorrect[index], kind="stable")]) <= 0.11).all()
    for m in marks:
        trace = results["scores"][int(m[4])]
        assert bool(m[3]) == ("combined" in trace["dropped_by"])
        assert (m[2] == "k0") == (trace["label"] == "clean")


def test_extreme_traces_stand_side_by_side_with_their_text(results: dict[str, Any], html: str) -> None:
    helpful, harmful = summary.extremes(results["scores"], context.EXTREME_TRACES)
    left, right = html.split('<div class="help">')[1].split('<div class="harm">')
    right = right.split("</section>")[0]
    for side, indices in ((left, helpful), (right, harmful)):
        assert re.findall(r"<code>(row-\d+)</code>", side) == [results["scores"][i]["id"] for i in indices]
        for i in indices:
            assert results["scores"][i]["completion"] in side
            assert f"{results['scores'][i]['s_correct']:+.4g}".replace("-", "−", 1) in side


def test_shown_ranks_are_of_the_scores_whatever_the_file_says(results: dict[str, Any]) -> None:
    """Earlier versions wrote 1 for the largest score."""
    backwards = copy.deepcopy(results)
    for trace in backwards["scores"]:
        trace["rank_correct"] = len(backwards["scores"]) + 1 - trace["rank_correct"]
    assert report.render(backwards) == report.render(results)
    s_correct = summary.score_arrays(results["scores"])[0]
    assert summary.ranks_of(s_correct)[int(np.argmin(s_correct))] == 1
    assert summary.ranks_of(np.array([2.0, np.nan, -1.0, 2.0])) == [2.5, None, 1.0, 2.5]


def _hostile(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _hostile(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_hostile(v) for v in value]
    return value + HOSTILE if isinstance(value, str) else value


def test_hostile_text_everywhere_stays_text(results: dict[str, Any]) -> None:
    hostile = _hostile(copy.deepcopy(results))
    hostile["versions"][HOSTILE] = HOSTILE
    hostile["data"]["labels"][HOSTILE] = 3
    hostile["curves"][HOSTILE] = [[0, 1.0], [1, 0.5]]
    hostile["detection"][0]["precision_at"][HOSTILE] = 0.5
    hostile["scores"][0]["completion"] = "lone surrogate \ud800, nul \x00, 数学 " + HOSTILE
    html = report.render(hostile).encode("utf-8", "replace").decode()
    page = Page(html)
    plain = Page(report.render(results))
    for tag in ("script", "img"):
        assert [t for t, _ in page.tags].count(tag) == [t for t, _ in plain.tags].count(tag)
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert HOSTILE in page.text()  # what the reader sees is what was given, template braces included
    points = _points(html)
    assert all(HOSTILE in p["p"] for p in points)
    assert points[0]["t"].endswith("数学 " + HOSTILE)


OPTIONAL = sorted(set(make_results(traces=3)) - {"title"})
SECTIONS = {
    "detection": "detection",
    "rank_agreement": "agreement",
    "curves": "curves",
    "cost": "cost",
    "scores": "scores",
    "warnings": "warnings",
}


@pytest.mark.parametrize("part", OPTIONAL)
def test_a_missing_part_is_left_out(part: str) -> None:
    results = make_results(seeds=1, traces=12)
    del results[part]
    html = report.render(results)
    page = Page(html)
    ids = {a.get("id") for _, a in page.tags}
    if part in SECTIONS:
        assert SECTIONS[part] not in ids
        assert f'href="#{SECTIONS[part]}"' not in html
    if part == "scores":
        assert not {"traces", "distributions", "points"} & ids
    if part == "cells":
        assert "harmful" not in ids
        assert "accuracy" in ids  # the model before is still there
    assert "None" not in page.text()
    assert "nan" not in re.findall(r"\w+", page.text().lower())


def test_title_alone_is_a_page() -> None:
    html = report.render({"title": "Only this"})
    assert html == report.render({"title": "Only this", **dict.fromkeys(OPTIONAL)})
    page = Page(html)
    assert {a["id"] for tag, a in page.tags if tag == "section"} == {"terms"}
    assert "Only this" in page.text()


def test_nan_and_missing_numbers_are_shown_as_na() -> None:
    nan = float("nan")
    results = make_results(seeds=1, traces=8)
    results["cells"] = [
        {"strategy": "combined", "fraction": 0.1, "accuracy": nan, "low": nan, "high": nan, "n": None},
        {"strategy": "random", "fraction": 0.1, "accuracy": 0.5},
    ]
    results["accuracy_before"]["accuracy"] = nan
    results["detection"] = [{"method": "m", "auc": nan, "precision_at": {"10%": nan}}]
    results["rank_agreement"]["spearman"] = [[1.0, nan], [None, 1.0]]
    results["cost"] = [{"stage": "s", "seconds": nan}]
    results["scores"][0]["s_correct"] = nan
    results["scores"][1]["s_incorrect"] = float("inf")
    html = report.render(results)
    rows = table_rows(html)
    assert ["combined", "10 %", "n/a", "n/a", "0 of 1", "n/a", "n/a", "n/a", "n/a"] in rows
    assert ["random", "10 %", "50.0 %", "n/a", "1", "n/a", "n/a", "n/a", "n/a"] in rows
    assert ["m", "n/a", "n/a", "n/a"] in rows
    assert ["dot", "1.00", "n/a"] in rows
    assert ["fisher", "n/a", "1.00"] in rows
    assert ["s", "n/a", "n/a", "", ""] in rows
    text = Page(html).text()
    assert "2 without finite scores are not drawn" in text
    assert "nan" not in re.findall(r"\w+", text.lower())


def test_scores_without_one_finite_value_leave_the_chart_out() -> None:
    scores = [{"id": "a", "s_correct": None, "s_incorrect": float("nan")}] * 3
    page = Page(report.render({"title": "t", "scores": scores}))
    assert {a["id"] for tag, a in page.tags if tag == "section"} == {"terms"}


@pytest.mark.parametrize("same", [0.0, 1e-9, -3.0])
def test_scores_all_alike_still_draw(same: float) -> None:
    scores = [{"id": str(i), "s_correct": same, "s_incorrect": same} for i in range(5)]
    assert len(_points(report.render({"title": "t", "scores": scores}))) == 5


def test_many_traces_are_limited_and_keep_the_extremes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context, "MAX_POINTS", 300)
    monkeypatch.setattr(context, "SAMPLED_POINTS", 100)
    results = make_results(seeds=1, traces=3000)
    for s in results["scores"]:
        s["completion"] = "long " * 2000
    html = report.render(results)
    drawn = {p["id"] for p in _points(html)}
    assert 100 <= len(drawn) <= 350
    helpful, harmful = summary.extremes(results["scores"], context.EXTREME_TRACES)
    s_correct, s_incorrect = summary.score_arrays(results["scores"])
    must = [*helpful, *harmful, *np.argsort(s_correct)[[0, -1]], *np.argsort(s_incorrect)[[0, -1]]]
    assert {results["scores"][i]["id"] for i in must} <= drawn
    assert 'class="dens"' in html
    assert "All 3,000 traces as a density" in Page(html).text()
    assert len(html) < 2_500_000


def test_long_text_is_folded_and_then_cut() -> None:
    words = " ".join(f"w{i}" for i in range(9000))
    shown, folded, left_out = context.clipped(words)
    assert words.startswith(shown + folded)
    assert len(shown) <= context.SHOWN_TEXT
    assert len(shown) + len(folded) + left_out == len(words)
    assert context.clipped("short") == ("short", "", 0)
    scores = [{"id": str(i), "s_correct": i, "s_incorrect": -i, "completion": words} for i in range(2)]
    html = report.render({"title": "t", "scores": scores})
    assert html.count("more characters</summary>") == 2
    assert f"{left_out:,} further characters are left out" in html


def test_more_kinds_and_names_than_colours() -> None:
    results = make_results(seeds=1, traces=40)
    for i, s in enumerate(results["scores"]):
        s["label"] = f"kind {i % 11}"
    results["curves"] = {f"run {i}": [[0, 1.0], [5, 0.5 + i / 100]] for i in range(15)}
    text = Page(report.render(results)).text()
    assert "9 further runs" in text
    assert "kind 10" in text


def test_unknown_parts_are_named_and_not_lost_silently() -> None:
    assert "does not show: cels" in Page(report.render({"title": "t", "cels": []})).text()


def test_the_terms_are_those_of_what_was_asked(results: dict[str, Any]) -> None:
    own = Page(report.render(results)).text()
    assert "that the model got right" in own
    assert "high_harm, combined" in own
    asked = {"queries": {"correct": 8, "GSM8K": 8}, "references": ["correct", "GSM8K"], "scores": None}
    text = Page(report.render({**results, **asked})).text()
    assert "Mean influence of a trace on the reference solutions of the validation questions" in text
    terms = text[text.index("Mean influence of a trace") :]
    for absent in ("that the model got right", "s_incorrect", "high_harm", "n/a"):
        assert absent not in terms, absent
    scored = text[text.index("validation answers scored against") :][:80]
    assert scored.split("\n")[0].endswith("against8reference solutions"), scored


# --- files -------------------------------------------------------------------------------------------------


def test_report_is_written_whole_and_the_same_each_time(results: dict[str, Any], tmp_path: Path) -> None:
    first = report.write_report(results, tmp_path / "deep" / "page.html")
    second = report.write_report(results, tmp_path)
    assert second == tmp_path / "report.html"
    assert first.read_bytes() == second.read_bytes() == report.render(results).encode()
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["deep", "page.html", "report.html"]


def test_nothing_is_left_behind_by_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "report.html"
    target.write_text("finished earlier")
    with pytest.raises(DataError):
        report.write_report({"title": "t", "cells": [{"strategy": "combined"}]}, target)

    def broken(source: str, destination: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(report.os, "replace", broken)
    with pytest.raises(OSError, match="disk full"):
        report.write_report({"title": "t"}, target)
    assert target.read_text() == "finished earlier"
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_results_come_back_and_give_the_same_page(results: dict[str, Any], tmp_path: Path) -> None:
    odd = {**results, "queries": {"correct": np.int64(17), "incorrect": 14}}
    odd["cost"] = [{"stage": "s", "seconds": np.float32(1.5), "detail": ""}, {"stage": "n", "seconds": float("inf")}]
    assert report.save_results(odd, tmp_path) == tmp_path / "results.json"
    loaded = report.load_results(tmp_path)
    assert loaded["cells"] == results["cells"]
    assert loaded["queries"] == {"correct": 17, "incorrect": 14}
    assert loaded["cost"][1]["seconds"] is None  # strict JSON: no NaN, no Infinity
    assert report.render(loaded) == report.render(odd)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "results.json: no such file"),
        ("{", "cannot be read as JSON"),
        ("[]", "must be a dictionary"),
        ("{}", "no 'title'"),
        ('{"title": "t", "cells": [{"strategy": "a"}]}', "results['cells'][0] has no 'accuracy'"),
        ('{"title": "t", "cells": 3}', "results['cells'] must be a list"),
        ('{"title": "t", "scores": [4]}', "results['scores'][0] has no 'id'"),
        ('{"title": "t", "rank_agreement": {"methods": ["a", "b"], "spearman": [[1]]}}', "must be 2 x 2"),
    ],
)
def test_unreadable_results_are_named_in_one_line(content: str | None, words: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    with pytest.raises(DataError) as caught:
        report.load_results(tmp_path)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "link",
    ["javascript:alert(1)", "http://x.y/z", "//x.y/z", "/etc/passwd", "../up.html", "a/../../b", "%2e%2e/b", "a\\b",
     "C:x", " javascript:a", "a?b", "a#b", "java\tscript:a", "data:text/html,x", "./a.html", "..", 5, ["a"]],
)  # fmt: skip
def test_links_that_lead_elsewhere_are_left_out(link: Any) -> None:
    scores = [{"id": str(i), "s_correct": i, "s_incorrect": -i} for i in range(4)]
    page = report.render({"title": "t", "scores": scores, "explained": link})
    assert "What stands behind a single answer" not in page
    assert "is left out" in page


@pytest.mark.parametrize("link", ["explained.html", "a folder/scores.csv.explained.html"])
def test_links_beside_the_report_stay(link: str) -> None:
    scores = [{"id": str(i), "s_correct": i, "s_incorrect": -i} for i in range(4)]
    assert f'<a href="{link}">' in report.render({"title": "t", "scores": scores, "explained": link})
