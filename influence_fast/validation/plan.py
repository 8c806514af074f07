"""The retrainings that validation needs, and the measures computed from their outcomes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from influence_fast.config import RunConfig
from influence_fast.influence.queries import Queries
from influence_fast.statistics.two_level import two_level_means
from influence_fast.validation.lds import Estimate, ceiling, draw_subsets, linear_datamodeling_scores, seed_agreement
from influence_fast.validation.retraining import Outcome, Retraining, losses_of, subset_work


class Plan:
    """The retrainings that validation needs by `config.validate`: random subsets and removals; `work` lists them all.

    n: number of examples in the pool. scores: [n, Q] of every method.
    """

    def __init__(self, config: RunConfig, n: int, scores: dict[str, np.ndarray], queries: Queries) -> None:
        self.settings, self.scores, self.queries = config.validate, scores, queries
        s = self.settings
        self.subsets: dict[str, np.ndarray] = {}
        self.names: dict[str, list[list[str]]] = {}
        self.work: list[Retraining] = []
        for prefix, count, size in (
            ("half", s.subsets, round(s.share * n)),
            ("out", s.leave_out_sets, n - max(1, round(s.leave_out * n))),
        ):
            if count:
                self.subsets[prefix] = draw_subsets(n, size, count, config.seed)
                work, self.names[prefix] = subset_work(self.subsets[prefix], s.seeds, prefix)
                self.work += work
        self.removals = self._removals(n, config.seed) if s.remove and s.removal_methods else {}
        self.work += [job for jobs in self.removals.values() for job in jobs]

    def _removals(self, n: int, seed: int) -> dict[tuple[str, str, float], list[Retraining]]:
        """Return one retraining a seed for each (method, direction, share); "random" is drawn anew for each seed."""
        found = {}
        target = self._target()
        for share in self.settings.remove:
            k = max(1, round(share * n))
            for method in self.settings.removal_methods:
                order = np.argsort(-self.scores[method][:, target].mean(axis=1), kind="stable")
                for direction, dropped in (("helpful", order[:k]), ("harmful", order[n - k :])):
                    keep = np.setdiff1d(np.arange(n), dropped)
                    found[method, direction, share] = [
                        Retraining(f"without-{direction}-{method}-{round(100 * share)}-seed{s}", keep, s, accuracy=True)
                        for s in self.settings.seeds
                    ]
            found["random", "random", share] = [
                Retraining(
                    f"without-random-{round(100 * share)}-seed{s}",
                    np.sort(np.random.default_rng([seed, round(1000 * share), s]).permutation(n)[k:]),
                    s,
                    accuracy=True,
                )
                for s in self.settings.seeds
            ]
        return found

    def _target(self) -> list[int]:
        """Return the queries whose loss removal is meant to change: those of right answers."""
        return list(self.queries.groups["correct"])

    def lds(self, outcomes: Mapping[str, Outcome], prefix: str) -> dict[str, Any] | None:
        """Compute the LDS of every method by group of queries, for single queries and for the group's mean outcome.

        prefix: "half" or "out", the set of subsets. Returns None where no such subset was drawn.
        """
        if prefix not in self.subsets:
            return None
        subsets, losses = self.subsets[prefix], losses_of(dict(outcomes), self.names[prefix])
        draws, default = self.settings.draws, self.settings.default
        rows = []
        bounds = {}
        for group, members in {"all": list(range(losses.shape[2])), **self.queries.groups}.items():
            if not len(members):
                continue
            part = losses[:, :, members]
            kinds = {"queries": part, "mean": part.mean(axis=2, keepdims=True)}
            for kind, outcome in kinds.items():
                if kind == "mean" and group == "all":
                    # The mean over right and wrong answers together has no meaning.
                    continue
                matrices = {
                    name: matrix[:, members] if kind == "queries" else matrix[:, members].mean(axis=1, keepdims=True)
                    for name, matrix in self.scores.items()
                }
                bounds[f"{group}/{kind}"] = {"agreement": seed_agreement(outcome), "ceiling": ceiling(outcome)}
                found = linear_datamodeling_scores(matrices, subsets, outcome, draws=draws)
                for name, estimate in found.items():
                    ahead = found[default].minus(estimate) if name != default else None
                    rows.append(
                        {"method": name, "group": group, "of": kind, **_plain(estimate)}
                        | {"default_ahead": None if ahead is None else _plain(ahead)}
                    )
        size, (count, seeds, _) = int(subsets[0].sum()), losses.shape
        return {"subsets": count, "seeds": seeds, "size": size, "rows": rows, "noise": bounds}

    def removal(self, outcomes: Mapping[str, Outcome]) -> list[dict[str, Any]] | None:
        """Compare query losses after each removal with those after random removals of the same size and seeds.

        Returns rows with the accuracies too, None where nothing is removed.
        """
        if not self.removals:
            return None
        target = self._target()
        rows = []
        for (method, direction, share), jobs in self.removals.items():
            losses = np.stack([outcomes[job.name].losses[target] for job in jobs])  # [R, q]
            chance = np.stack([outcomes[job.name].losses[target] for job in self.removals["random", "random", share]])
            shift = two_level_means(np.stack([losses - chance]), draws=self.settings.draws)[0]
            low, high = np.percentile(shift, [2.5, 97.5])
            rows.append(
                {
                    "method": method,
                    "direction": direction,
                    "share": share,
                    "loss": float(losses.mean()),
                    "loss_over_random": float((losses - chance).mean()),
                    "low": float(low),
                    "high": float(high),
                    "accuracy": [outcomes[job.name].accuracy for job in jobs],
                }
            )
        return rows


def _plain(estimate: Estimate) -> dict[str, float]:
    return {"value": estimate.value, "low": estimate.low, "high": estimate.high}
