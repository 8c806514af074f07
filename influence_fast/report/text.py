"""The text of the report: numbers, and the sentences at the top."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from influence_fast.report.summary import Row, Setting, best_setting, number

NBSP = "\u00a0"


def percent(value: Any, digits: int = 1) -> str:
    """Format a share as a percentage: 0.612 -> `61.2 %` (no-break space); `n/a` when not finite."""
    x = number(value)
    return f"{100 * x:.{digits}f}{NBSP}%".replace("-", "−") if math.isfinite(x) else "n/a"


def fraction_name(value: Any) -> str:
    """Format a share as a percentage without superfluous digits: 0.1 -> `10 %`."""
    x = number(value)
    return f"{round(100 * x, 4):g}{NBSP}%" if math.isfinite(x) else "n/a"


def between(low: Any, high: Any, digits: int = 1) -> str:
    """Format an interval of shares: `58.0 to 64.3 %`, or `n/a` unless both ends are finite."""
    a, b = number(low), number(high)
    if not (math.isfinite(a) and math.isfinite(b)):
        return "n/a"
    return f"{100 * a:.{digits}f} to {100 * b:.{digits}f}{NBSP}%".replace("-", "−")


def count(value: Any) -> str:
    """Format a count with thousands separated; one decimal only where a mean is not whole; `n/a` when not finite."""
    x = number(value)
    if not math.isfinite(x):
        return "n/a"
    return f"{x:,.0f}" if abs(x - round(x)) < 1e-9 else f"{x:,.1f}"


def decimal(value: Any, digits: int = 3) -> str:
    """Format a number with fixed decimals: `0.831`, or `n/a`."""
    x = number(value)
    return f"{x:.{digits}f}".replace("-", "−") if math.isfinite(x) else "n/a"


def signed(value: Any) -> str:
    """Format a score with its sign and four significant digits: `+0.01234`, `−2.1e-06`, or `n/a`."""
    x = number(value)
    return f"{x:+.4g}".replace("-", "−", 1) if x < 0 else f"{x:+.4g}" if math.isfinite(x) else "n/a"


def duration(value: Any) -> str:
    """Format seconds as a duration: `0.42 s`, `12.3 s`, `3 min 05 s`, `2 h 07 min`, or `n/a`."""
    x = number(value)
    if not math.isfinite(x):
        return "n/a"
    if x < 60:
        return f"{x:.2g} s" if x < 1 else f"{x:.1f} s"
    minutes, seconds = divmod(round(x), 60)
    if minutes < 60:
        return f"{minutes} min {seconds:02d} s"
    return f"{minutes // 60:,} h {minutes % 60:02d} min"


def moment(iso: str) -> str:
    """Format an ISO time: `12 January 2026, 14:03 UTC`; a text that is not ISO is returned unchanged."""
    try:
        when = datetime.fromisoformat(iso)
    except ValueError:
        return iso
    zone = " UTC" if when.tzinfo else ""
    when = when.astimezone(UTC) if when.tzinfo else when
    return f"{when.day} {when:%B %Y, %H:%M}{zone}"


def p_value(value: Any) -> str:
    """Format a p-value: three decimals, `< 0.001` below that, or `n/a`."""
    x = number(value)
    if not math.isfinite(x):
        return "n/a"
    return "< 0.001" if x < 0.001 else f"{x:.3f}"


def verdict(low: float, high: float, other_low: float, other_high: float) -> str:
    """Return how one interval compares with another: "above", "below", "within noise of" or "not comparable with"."""
    if not all(map(math.isfinite, (low, high, other_low, other_high))):
        return "not comparable with"
    if low > other_high:
        return "above"
    return "below" if high < other_low else "within noise of"


@dataclass(frozen=True, slots=True)
class Headline:
    """The question and the finding of a run, and the few figures worth a large type."""

    asked: str
    found: str
    tiles: list[tuple[str, str, str]] = field(default_factory=list)  # (name, figure, note)


def _against(best: Setting, other: Setting, name: str, comparisons: Sequence[Row]) -> str:
    """Compare two settings in words, by a paired comparison where the results hold one.

    Example: `above random at 10 % (54.0 %, 50.1 to 57.9 %)`.
    """
    figures = f"{percent(other.mean)}, {between(other.low, other.high)}"
    for c in comparisons:
        same = c.get("strategy") == best.strategy and c.get("against") == other.strategy
        if same and abs(number(c.get("fraction")) - best.fraction) < 1e-6:
            word = verdict(number(c.get("low")), number(c.get("high")), 0.0, 0.0)
            return f"{word} {name} ({figures}; paired difference)"
    return f"{verdict(best.low, best.high, other.low, other.high)} {name} ({figures})"


def headline(results: Row, settings: Sequence[Setting]) -> Headline:
    """Write two plain sentences and up to five figures from the numbers alone.

    A difference is named only where the two 95 % intervals are apart (or, where `comparisons` holds the pair, where
    the interval of the paired difference leaves out zero); otherwise the sentence says `within noise of`.
    """
    pool = number((results.get("data") or {}).get("pool"))
    traces = f"the {count(pool)} training traces" if math.isfinite(pool) else "the training traces"
    base = results.get("accuracy_before") or {}
    comparisons = results.get("comparisons") or []
    full = next((s for s in settings if s.kind == "full"), None)
    best = best_setting(settings)
    tiles: list[tuple[str, str, str]] = []
    if base:
        tiles.append(
            (str(base.get("name", "before")), percent(base.get("accuracy")), between(base.get("low"), base.get("high")))
        )
    if full is not None:
        tiles.append(("all data", percent(full.mean), between(full.low, full.high)))

    if best is None:
        return Headline(
            f"Which of {traces} help the model's reasoning, and which harm it?",
            _found_without_cells(results, full),
            tiles,
        )

    asked = (
        f"Does dropping some of {traces} by their scores give a more accurate model than dropping as many at random, "
        "or none?"
    )
    random = next((s for s in settings if s.kind == "random" and s.fraction == best.fraction), None)
    tried = sum(s.kind not in ("full", "random") for s in settings)
    found = f"The best of {tried} settings" if tried > 1 else "The setting tried"
    found += f", {best.strategy} at {fraction_name(best.fraction)}, reached {percent(best.mean)} accuracy"
    if math.isfinite(best.low) and math.isfinite(best.high):
        found += f" (95{NBSP}% interval {between(best.low, best.high)})"
    against = []
    if random is not None:
        against.append(_against(best, random, f"random at {fraction_name(best.fraction)}", comparisons))
        tiles.append(
            (
                f"random, {fraction_name(random.fraction)} dropped",
                percent(random.mean),
                between(random.low, random.high),
            )
        )
    if full is not None:
        against.append(_against(best, full, "all data", comparisons))
    if against:
        found += ": " + " and ".join(against)
    tiles.append(
        (f"{best.strategy}, {fraction_name(best.fraction)} dropped", percent(best.mean), between(best.low, best.high))
    )
    if math.isfinite(best.harmful_dropped) and math.isfinite(best.harmful_total):
        chance = f"; chance: {count(best.by_chance)}" if math.isfinite(best.by_chance) else ""
        tiles.append(
            (
                f"harmful traces dropped by {best.strategy}, {fraction_name(best.fraction)}",
                count(best.harmful_dropped),
                f"of {count(best.harmful_total)}{chance}",
            )
        )
    return Headline(asked, found + ".", tiles)


def _found_without_cells(results: Row, full: Setting | None) -> str:
    detection = [d for d in results.get("detection") or [] if math.isfinite(number(d.get("auc")))]
    if detection:
        top = max(detection, key=lambda d: number(d["auc"]))
        low, high = number(top.get("low")), number(top.get("high"))
        span = f" (95{NBSP}% interval {low:.3f} to {high:.3f})" if math.isfinite(low) and math.isfinite(high) else ""
        # Below 0.5 the score ranks the harmful traces last: say what is seen, without a direction that is not there.
        sure = math.isfinite(low) and math.isfinite(high) and (low > 0.5 or high < 0.5)
        ending = "where 0.5 is chance" if sure else "which is within noise of chance (0.5)"
        auc = f"an AUC of {number(top['auc']):.3f}{span}, {ending}"
        return f"Ranking by {top['method']} finds the known harmful traces with {auc}."
    scores = len(results.get("scores") or [])
    if scores:
        return (
            f"{scores:,} traces were scored; nothing was pruned and evaluated in this run, so no accuracy is claimed."
        )
    if full is not None and math.isfinite(full.mean):
        return (
            f"Fine-tuned on all data the model reached {percent(full.mean)} accuracy ({between(full.low, full.high)})."
        )
    return "This run holds no accuracies and no scores, so there is nothing to claim."
