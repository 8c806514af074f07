"""benches/peers: work folders, how scores are compared, and the table."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benches.peers import compare, install, scoring
from benches.peers.work import write_work
from influence_fast.errors import DataError

ROOT = Path(__file__).parents[2]


def script(name: str) -> Any:
    """A script of benches/peers as it runs: `worker` beside it, no package around it."""
    if name not in sys.modules:
        folder = ROOT / "benches" / "peers"
        spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        if name != "worker":
            script("worker")  # is then found in sys.modules
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


def examples(count: int, seed: int = 0) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for i in range(count):
        length = int(torch.randint(5, 30, (), generator=generator))
        ids = torch.randint(1, 300, (length,), generator=generator)
        labels = ids.clone()
        labels[: length // 3] = -100
        found.append({"id": f"e{seed}-{i}", "input_ids": ids, "labels": labels})
    return found


@pytest.fixture
def work(tmp_path: Path, tiny_lora: Callable[..., Any], tiny_tokenizer: Callable[..., Any]) -> Path:
    model = tiny_lora()
    model.save_pretrained(tmp_path / "adapter")
    model.unload().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return write_work(tmp_path / "work", tmp_path / "model", tmp_path / "adapter", examples(7), examples(3, 1), seed=5)


def test_a_work_folder_reads_back_as_it_was_written(work: Path, tiny_lora: Callable[..., Any]) -> None:
    worker = script("worker")
    read = worker.read_work(work)
    for found, given in ((read.pool, examples(7)), (read.queries, examples(3, 1))):
        assert [e["id"] for e in found] == [e["id"] for e in given]
        for one, other in zip(found, given, strict=True):
            assert torch.equal(one["input_ids"], other["input_ids"])
            assert torch.equal(one["labels"], other["labels"])
    assert (read.seed, read.dtype) == (5, torch.float32)
    factors = worker.trainable(worker.load_model(read))
    expected = {n: p for n, p in tiny_lora().named_parameters() if p.requires_grad}
    assert factors.keys() == expected.keys()
    for name, value in factors.items():
        torch.testing.assert_close(value, expected[name])


def test_bad_work_is_told_by_name(work: Path, tmp_path: Path) -> None:
    parts = (tmp_path / "model", tmp_path / "adapter", examples(2), examples(1, 1))
    with pytest.raises(DataError, match="work exists"):
        write_work(work, *parts)
    with pytest.raises(DataError, match=r"adapter has no config\.json"):
        write_work(tmp_path / "other", tmp_path / "adapter", *parts[1:])
    masked = [{**e, "labels": torch.full_like(e["labels"], -100)} for e in examples(1)]
    with pytest.raises(DataError, match="no completion token to learn from"):
        write_work(tmp_path / "other", parts[0], parts[1], masked, parts[3])
    assert not (tmp_path / "other").exists()
    (work / "queries.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"no queries\.jsonl"):
        script("worker").read_work(work)


@pytest.mark.parametrize("name", ["vmap_peer", "less_like"])
def test_the_scores_of_our_own_peers_are_those_of_exact_gradients(work: Path, tmp_path: Path, name: str) -> None:
    worker = script("worker")
    read = worker.read_work(work)
    run = worker.Run(tmp_path)
    exact = script("ours").METHODS["exact"].prepare(read)(read, run)
    norms, query_norms = (torch.from_numpy(run.arrays[key]) for key in ("norms", "query_norms"))
    cosine = exact / norms[:, None] / query_norms
    for convention, expected in (("dot", exact), ("cosine", cosine)):
        found = script(name).METHODS[convention].prepare(read)(read, worker.Run(tmp_path)).double()
        # 8192 random signs keep a cosine to about 1 / sqrt(8192) = 0.011
        error = (found - expected) / (exact / cosine if convention == "dot" else 1)
        assert error.abs().max() < (1e-5 if name == "vmap_peer" else 0.06)


def test_batches_by_length_hold_every_example_once_and_keep_to_the_budget() -> None:
    worker = script("worker")
    given = examples(40, 3)
    batches = worker.by_length(given, 64)
    assert sorted(i for batch in batches for i in batch) == list(range(40))
    for batch in batches:
        assert len(batch) * max(len(given[i]["input_ids"]) for i in batch) <= 64
    scores = torch.arange(12.0).view(4, 3)
    rows, columns = [2, 0, 3, 1], [1, 2, 0]
    assert torch.equal(worker.unsorted(scores[rows][:, columns], rows, columns), scores)


def test_scores_are_compared_by_rank_with_the_same_convention() -> None:
    rng = np.random.default_rng(0)
    rows, queries = rng.normal(size=(30, 8)) * rng.uniform(0.1, 5, (30, 1)), rng.normal(size=(4, 8))
    norms, query_norms = np.linalg.norm(rows, axis=1), np.linalg.norm(queries, axis=1)
    arrays = {"scores": rows @ queries.T, "norms": norms, "query_norms": query_norms}
    cosine = (rows / norms[:, None]) @ (queries / query_norms[:, None]).T
    assert compare.agreement(cosine[:20, :2], compare.exact_scores(arrays, "cosine")) == {
        "per_query": pytest.approx(1),
        "mean": pytest.approx(1),
    }
    assert compare.agreement(cosine, compare.exact_scores(arrays, "dot"))["per_query"] < 0.999
    assert compare.agreement(-cosine, compare.exact_scores(arrays, "cosine"))["per_query"] == pytest.approx(-1)


def result(peer: str, seconds: float, scoring: float | None = None, **changes: Any) -> dict[str, Any]:
    stages = {"gradients": [seconds]} | ({} if scoring is None else {"scoring": [scoring]})
    return {
        "peer": peer,
        "method": "cosine",
        "what": f"{peer} | way".replace(" | ", ", "),
        "convention": "cosine",
        "examples": 10,
        "queries": 5,
        "tokens": 900,
        "query_tokens": 100,
        "seconds": stages,
        "peak_memory": 3 << 20,
        "bytes_per_example": 4096.0,
        "width": 1024,
        "agreement": {"per_query": 0.5, "mean": 0.25},
        "notes": [],
        "versions": {},
        "seed": 0,
        "dtype": "float32",
        **changes,
    }


def test_the_table_and_the_targets() -> None:
    plain = [result("plain", 2.0), result("plain", 4.0)]
    ours = [result("ours", 1.0, 0.001), result("ours", 3.0, 0.001)]
    theirs = [result("bergson", 2.0, 0.002), result("bergson", 3.3, 0.002)]
    slow = [result("traker", 1.0, 0.5, convention="preconditioned", examples=2, queries=2, tokens=90, query_tokens=10)]
    rows = [
        {**compare.row_of(plain, plain), "full": True, "agreement": None},
        {**compare.row_of(ours, plain), "full": True},
        {**compare.row_of(theirs, plain), "full": True},
        {**compare.row_of(slow, plain), "full": False},
        {"peer": "dattri", "method": "trak", "full": False, "failed": "MemoryError"},
    ]
    table = compare.markdown("a world", rows, {"logix": "not installed"}).splitlines()
    assert table[0] == "### a world"
    widths = {line.count("|") for line in table if line.startswith("|")}
    assert len(widths) == 1
    assert table[5].startswith("| ours | ours, way | 10 x 5 | 500 | 7.50 | 0.63 (0.50-0.75) | 20 | 3 | 4,096 | 0.500")
    # over all tokens against the plain step's median round: 1.5 s for 100 tokens against 3 s for 1000
    assert table[7].split(" | ")[5:7] == ["5.00", "1.25e+05"]
    assert "(dot)" in table[7]
    assert table[-2:] == ["- logix: left out, not installed", "- dattri trak: left out, MemoryError"]

    targets = compare.targets_of(rows)
    assert targets["end_to_end"]["bergson cosine"]["max"] == pytest.approx(2.002 / 1.001)
    assert targets["end_to_end"]["bergson cosine"]["met"]
    assert "less_like cosine" not in targets["end_to_end"]
    assert targets["scoring"]["bergson cosine"] == {"times": pytest.approx(2), "target": 3.0, "met": False}
    assert "traker cosine" not in targets["scoring"]  # ours has no row of that size
    assert "missed" in compare.verdicts(targets)


def test_requirements_pin_everything_and_torch_comes_first() -> None:
    for peer in install.peer_names():
        torch_pin, others, _ = install.requirements_of(peer)
        assert torch_pin == "torch==2.13.0"
        assert all("==" in pin and not pin.startswith(("torchvision", "torchaudio")) for pin in others)
        assert peer in install.IMPORTS
    assert {job.venv for job in compare.JOBS if job.venv} == set(install.peer_names())
    for job in compare.JOBS:
        assert (ROOT / "benches" / "peers" / job.script).is_file()


def test_a_peer_without_its_python_is_skipped_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "REQUIREMENTS", tmp_path)
    (tmp_path / "logix.txt").write_text("# python 2.99\ntorch==2.13.0\nnumpy==2.4.6\n")
    assert install.install("logix", tmp_path / "venvs") == "needs Python 2.99, which is not here"
    assert not install.is_installed("logix", tmp_path / "venvs")
    mark = tmp_path / "venvs" / "logix" / "installed.json"
    mark.parent.mkdir(parents=True)
    mark.write_text(json.dumps({"requirements": install.fingerprint("logix")}))
    assert install.is_installed("logix", tmp_path / "venvs")
    (tmp_path / "logix.txt").write_text("# python 2.99\ntorch==2.13.0\nnumpy==2.4.7\n")
    assert not install.is_installed("logix", tmp_path / "venvs")  # pinned anew since


@pytest.mark.parametrize("kind", ["ours_int8", "ours_bf16", "less_like", "dattri"])
def test_a_scoring_step_over_kept_rows_gives_their_scores(tmp_path: Path, kind: str) -> None:
    scoring.make_rows(tmp_path, 50, 64, 3)
    for queries in (3, 2):  # the second time from the files of the first
        result = scoring.run(kind, tmp_path, sys.executable, queries, threads=1)
        assert result["seconds"].keys() == {"load", "scores"}, result
        assert scoring.agreement(tmp_path, kind, queries) > 0.99
    per_number = {"ours_int8": 1, "ours_bf16": 2, "less_like": 4, "dattri": 0}[kind]
    assert per_number * 50 * 64 <= result["kept"] < per_number * 50 * 64 + 6000


def test_a_scoring_step_that_fails_says_why(tmp_path: Path) -> None:
    scoring.make_rows(tmp_path, 5, 8, 2)
    (tmp_path / "queries.npy").unlink()
    assert "queries.npy" in scoring.run("dattri", tmp_path, sys.executable, 2, threads=1)["failed"]


def test_times_over_ours_are_taken_inside_a_round() -> None:
    assert scoring.over([2.0, 9.0, 8.0], [1.0, 3.0, 2.0]) == {"median": 3.0, "min": 2.0, "max": 4.0}
