"""The result of a model check: a verdict on each question, with the number and the bound it was judged by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from influence_fast.errors import truncated_list

AGREES, DIFFERS, REFUSED, UNJUDGED = "agrees", "differs", "refused", "cannot be judged"

# Beyond this relative error a bound tells nothing: a row without a half of itself would pass.
MOST = 0.5


@dataclass(frozen=True, slots=True)
class Check:
    """The verdict on one question.

    Attributes:
        name: "engine", "losses", "rows", "random", "packs" or "rounding".
        verdict: "agrees", "differs", "refused" or "cannot be judged".
        value: the relative error found, of the worst example; None where nothing is measured.
        bound: what it may be.
        note: what was compared, or why there is no other verdict.
    """

    name: str
    verdict: str
    value: float | None
    bound: float | None
    note: str

    @classmethod
    def of(cls, name: str, value: float, bound: float, note: str) -> Check:
        """Judge a relative error by its bound; a bound above one half cannot judge, and NaN cannot be judged."""
        if not (math.isfinite(value) and math.isfinite(bound)):
            return cls(name, UNJUDGED, value, bound, f"{note}; not finite")
        if bound > MOST and value <= bound:
            return cls(name, UNJUDGED, value, bound, f"{note}; rounding alone may be as large")
        return cls(name, AGREES if value <= bound else DIFFERS, value, bound, note)


@dataclass(frozen=True, slots=True)
class ModelCheck:
    """The result of `check_model`.

    Attributes:
        model: its type; dtype, device: of its weights.
        examples: names of those that were taken; tokens: of each.
        checks: the verdicts, in the order of the table.
        not_scored: what is trained but in no gradient row (modules_to_save, biases, ...).
        seconds: that the check took.
    """

    model: str
    dtype: str
    device: str
    examples: tuple[str, ...]
    tokens: tuple[int, ...]
    checks: tuple[Check, ...]
    not_scored: tuple[str, ...]
    seconds: float

    @property
    def ok(self) -> bool:
        """Return whether nothing differs or is refused, and losses and rows are shown to agree."""
        verdicts = {check.name: check.verdict for check in self.checks}
        shown = all(verdicts.get(name) == AGREES for name in ("losses", "rows"))
        return shown and not {DIFFERS, REFUSED} & set(verdicts.values())

    def __getitem__(self, name: str) -> Check:
        """Return a check by its name; raises KeyError where it was not made."""
        for check in self.checks:
            if check.name == name:
                return check
        raise KeyError(name)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON-compatible values, `ok` included; numbers that are not finite become None."""
        return {"ok": self.ok, **_plain(asdict(self))}

    def __str__(self) -> str:
        longest = f"{min(self.tokens)} to {max(self.tokens)} tokens" if self.tokens else "no tokens"
        lines = [f"{self.model}, {self.dtype} on {self.device}; {len(self.tokens)} examples of {longest}"]
        lines.append(f"{'check':<9} {'verdict':<16} {'value':>8} {'bound':>8}  compared")
        for one in self.checks:
            lines.append(f"{one.name:<9} {one.verdict:<16} {_short(one.value):>8} {_short(one.bound):>8}  {one.note}")
        if self.not_scored:
            lines.append(f"not scored: {truncated_list(self.not_scored)}")
        return "\n".join(lines)


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
