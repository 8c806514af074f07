"""Scores of a tokenized pool and what stands behind each answer: the step that a run and the verb `score` share."""

from __future__ import annotations

from pathlib import Path

from influence_fast.gradients.rows.row_spec import RowSpec
from influence_fast.influence.settings import InfluenceConfig
from influence_fast.report.explain import explanations, save_explanations
from influence_fast.selection.pool_scores import PoolScores, ScoredPool, score_pool


def explained_scores(
    asked: ScoredPool,
    store_path: Path,
    gradients: RowSpec,
    influence: InfluenceConfig,
    explained: str | Path,
    *,
    top: int = 0,
    title: str | None = None,
    progress: bool = True,
) -> tuple[PoolScores, list[Path]]:
    """Score a pool, then, unless top is 0, write the `top` examples for each query and direction to `explained`.jsonl
    and .html; return the scores and the files written. Files of other scores are removed from there."""
    scored = score_pool(asked, store_path, gradients, influence, top=top, progress=progress)
    for old in (Path(f"{explained}{suffix}") for suffix in (".html", ".jsonl")):
        old.unlink(missing_ok=True)
    if scored.top is None:
        return scored, []
    found = explanations(scored.top, scored.table.ids, asked.queries)
    return scored, save_explanations(found, {example.id: example for example in asked.pool}, explained, title=title)
