"""The session for a card, as far as it runs without one: every part at tiny shapes, by PyTorch on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benches import card_steps, gpu_session, tune_kernels
from influence_fast.gradients.engine import GradientEngine
from influence_fast.gradients.rows.projection import Projection
from influence_fast.kernels.runtime import recording
from influence_fast.kernels.segments import Segments

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_every_part_runs_and_has_its_table() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benches.gpu_session", "--smoke"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    tables = done.stdout[done.stdout.rindex("\n# ") :]
    for head in (
        "| kernel | shape |",
        "/ plain LoRA step |",
        "tiny, ours:",
        "| rows to the host |",
        "| streamed queries |",
        "| numbers a row | queries |",
        "| one trace through |",
    ):
        assert head in tables


def test_a_part_that_fails_stops_no_other_and_keeps_what_was_measured(tmp_path: Path) -> None:
    session = gpu_session.Session(tmp_path, deadline=float("inf"), only=[])
    session.part("crossing", lambda: [{"rows": "x", "packs": 1, "tokens": 2, "seconds": {"p50": 0.5}}])
    session.part("streaming", lambda: 1 / 0)
    session.part("tests", lambda: {"passed": 3, "errors": 2})

    def products() -> Iterator[dict[str, Any]]:
        yield {
            "rows": 3,
            "width": 4,
            "queries": 2,
            "seconds": {},
            "card_seconds": {},
            "errors": {"PyTorch, bf16": "RuntimeError: no\nroom"},
        }
        raise RuntimeError("later")

    session.part("products", products)
    (written,) = tmp_path.glob("*.json")
    result = json.loads(written.read_text())
    assert [row["width"] for row in result["products"]] == [4]
    assert "later" in result["failed"]["products"]
    assert "- products: 2, PyTorch, bf16: RuntimeError: no room" in written.with_suffix(".md").read_text()
    assert result["crossing"][0]["seconds"] == {"p50": 0.5}
    assert "ZeroDivisionError" in result["failed"]["streaming"]
    assert "| x | 1 | 2 | 0.5000 |" in written.with_suffix(".md").read_text()


def test_parts_are_left_out_when_the_time_is_used_up_or_others_are_asked_for(tmp_path: Path) -> None:
    late = gpu_session.Session(None, deadline=0.0, only=[])
    assert late.part("kernels", lambda: {"never": "run"}) is None
    assert late.result["left_out"] == ["kernels"]
    some = gpu_session.Session(None, deadline=float("inf"), only=["steps"])
    assert some.part("kernels", lambda: {"never": "run"}) is None
    assert some.part("steps", list) == []


def test_steps_without_a_part_of_the_engine_are_without_it() -> None:
    """Recorded: the ways that only a card runs, at a tiny shape."""
    model = card_steps.model_of(card_steps.SMOKE_SHAPES["tiny"], torch.device("cpu"))
    batch = card_steps.Batch.of(64, 300, torch.device("cpu"))
    norms = {}
    for way in ("triton", card_steps.OWN_LAYERS, card_steps.ANY_ORDER):
        with recording():
            engine = GradientEngine(model, Projection(dim=4), backend="triton")
        with recording(), card_steps.without(way), engine, recording() as launches:
            engine.run(batch.pack)
        norms[way] = sum(launch.kernel.__name__ == "_rms_norm_kernel" for launch in launches)
    assert norms == {"triton": 5, card_steps.OWN_LAYERS: 0, card_steps.ANY_ORDER: 5}


def test_every_candidate_of_the_tuning_can_be_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recorded, with tensors of no memory; each kernel's own configuration is among what is tried."""
    whole = Segments.from_lengths

    def on_meta(lengths: list[int], **options: Any) -> Segments:
        made = whole(lengths)
        return made.with_tables([table.to("meta") for table in made.tables])

    monkeypatch.setattr(tune_kernels, "CUDA", torch.device("meta"))
    monkeypatch.setattr(tune_kernels.Segments, "from_lengths", on_meta)
    chosen: dict[str, bool] = {}
    for candidate in (*tune_kernels.projections(), *tune_kernels.sums()):
        with recording() as launches:
            candidate.run()
        assert launches
        assert f"num_warps={launches[0].num_warps} num_stages={launches[0].num_stages}" in candidate.tiles
        chosen[candidate.shape] = chosen.get(candidate.shape, False) or candidate.chosen
    assert len(chosen) == 11
    assert all(chosen.values())
