"""Tokens on disk: the same as those in memory, made once, and without the data ever being in memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from influence_fast.data import spooling
from influence_fast.data.examples import load_examples, tokenize, write_rows
from influence_fast.data.fingerprints import dataset_fingerprint
from influence_fast.data.spooling import Tokens, TokenSource, is_spooled, spool
from influence_fast.distributed.processes import World, once
from influence_fast.errors import DataError


def make_rows(n: int = 150) -> list[dict[str, str]]:
    return [{"id": f"r{i}", "prompt": f"{i}+1?", "completion": f"{i + 1}. " * (1 + i % 5)} for i in range(n)]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "stream", "dataset"])
def test_spooled_tokens_are_those_of_tokenize(tmp_path: Path, tiny_tokenizer: Callable[..., Any], kind: str) -> None:
    rows, tokenizer = make_rows(), tiny_tokenizer()
    source: Any = tmp_path / f"rows.{kind}"
    if kind == "stream":
        source = iter(rows)
    elif kind == "dataset":
        from datasets import Dataset

        source = Dataset.from_list(rows)
    else:
        write_rows(rows, source)
    expected = tokenize(load_examples(rows), tokenizer, max_length=18)
    assert 0 < len(expected.too_long) < 150
    spool(tmp_path / "t", TokenSource(source, max_length=18), tokenizer)
    found = Tokens(tmp_path / "t")
    assert len(found) == len(expected.examples)
    assert found.too_long == expected.too_long
    for place in (0, 63, 64, len(found) - 1, -1):
        assert found[place]["id"] == expected.examples[place]["id"]
        for name in ("input_ids", "labels"):
            assert torch.equal(found[place][name], expected.examples[place][name])
    assert [e["id"] for e in found[5:7]] == [e["id"] for e in expected.examples[5:7]]
    assert dataset_fingerprint(found) == dataset_fingerprint(expected.examples)  # so `score` goes on with the store
    with pytest.raises(IndexError):
        found[len(found)]


def test_spooled_tokens_keep_what_is_learnt_of_several_turns(
    tmp_path: Path, tiny_tokenizer: Callable[..., Any], chatml: str
) -> None:
    tokenizer = tiny_tokenizer(chat_template=chatml)
    turns = [
        ("user", "1+1?"),
        ("assistant", "2"),
        ("user", "and 1?"),
        ("assistant", "3"),
        ("user", "so?"),
        ("assistant", "3!"),
    ]
    rows = [{"messages": [{"role": role, "content": text} for role, text in turns[:n]]} for n in (2, 4, 6)]
    spool(tmp_path, TokenSource(rows, turns="all"), tokenizer)
    expected = tokenize(load_examples(rows, turns="all"), tokenizer).examples
    found = list(Tokens(tmp_path))
    assert [int((e["labels"] != -100).sum()) for e in found] == [2, 4, 7]
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one["input_ids"], other["input_ids"])
        assert torch.equal(one["labels"], other["labels"])


def test_tokens_are_made_anew_when_anything_is_different(tmp_path: Path, tiny_tokenizer: Callable[..., Any]) -> None:
    tokenizer, path, folder = tiny_tokenizer(), tmp_path / "rows.jsonl", tmp_path / "t"
    write_rows(make_rows(), path)
    source = TokenSource(path)
    assert not is_spooled(folder, source, tokenizer)
    spool(folder, source, tokenizer)
    assert is_spooled(folder, source, tokenizer)
    assert not is_spooled(folder, TokenSource(path, max_length=9), tokenizer)
    assert not is_spooled(folder, TokenSource(path, turns="all"), tokenizer)
    assert not is_spooled(folder, source, tiny_tokenizer(eos="<pad>"))
    write_rows(make_rows(151), path)
    assert not is_spooled(folder, source, tokenizer)
    spool(folder, TokenSource(iter(make_rows())), tokenizer)
    assert not is_spooled(folder, TokenSource(iter(make_rows())), tokenizer)  # of a stream nobody knows


def test_a_corrupted_row_is_named_and_leaves_no_half_made_tokens(
    tmp_path: Path, tiny_tokenizer: Callable[..., Any]
) -> None:
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps(row) for row in make_rows(5)]
    path.write_text("\n".join([*lines[:3], lines[3][:-7], lines[4]]))
    with pytest.raises(DataError, match=r"rows.jsonl, line 4: is not valid JSON"):
        spool(tmp_path / "t", TokenSource(path), tiny_tokenizer())
    path.write_text("\n".join([*lines[:3], '{"id": "x", "prompt": "1"}']))
    with pytest.raises(DataError, match=r"line 4"):
        spool(tmp_path / "t", TokenSource(path), tiny_tokenizer())
    with pytest.raises(DataError, match="holds no tokens"):
        Tokens(tmp_path / "t")
    assert not list((tmp_path / "t").glob("*.arrow"))


def test_settings_that_leave_no_example_leave_the_tokens_as_they_were(
    tmp_path: Path, tiny_tokenizer: Callable[..., Any]
) -> None:
    tokenizer, path, folder = tiny_tokenizer(), tmp_path / "rows.jsonl", tmp_path / "t"
    write_rows(make_rows(), path)
    spool(folder, TokenSource(path), tokenizer)
    ids = Tokens(folder)[0]["input_ids"]
    with pytest.raises(DataError, match="no example is left"):
        spool(folder, TokenSource(path, max_length=2), tokenizer)
    assert is_spooled(folder, TokenSource(path), tokenizer)
    assert torch.equal(Tokens(folder)[0]["input_ids"], ids)


def test_a_kill_between_the_two_files_leaves_no_tokens(
    tmp_path: Path, tiny_tokenizer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, path, folder = tiny_tokenizer(), tmp_path / "rows.jsonl", tmp_path / "t"
    write_rows(make_rows(), path)
    spool(folder, TokenSource(path), tokenizer)
    real = spooling.replacing

    def killed(target: Path) -> Any:
        if target.name == "tokens.json":
            raise KeyboardInterrupt
        return real(target)

    monkeypatch.setattr(spooling, "replacing", killed)
    with pytest.raises(KeyboardInterrupt):
        spool(folder, TokenSource(path, max_length=18), tokenizer)
    assert not is_spooled(folder, TokenSource(path), tokenizer)
    with pytest.raises(DataError, match="holds no tokens"):
        Tokens(folder)


def test_rows_without_a_trace_are_counted(tmp_path: Path, tiny_tokenizer: Callable[..., Any]) -> None:
    row = {"uuid": "u", "problem": "1+1?", "answer": "2", "generations": ["2", "3"]}
    rows = [row | {"uuid": f"u{i}", "correctness_math_verify": [i != 1, False]} for i in range(3)]
    spool(tmp_path / "t", TokenSource(iter(rows)), tiny_tokenizer())
    found = Tokens(tmp_path / "t")
    assert [found[i]["id"] for i in range(len(found))] == ["u0#0", "u2#0"]
    assert len(found.without) == 1
    assert "row 1" in found.without[0]


def test_work_for_all_is_done_once(tmp_path: Path) -> None:
    calls: list[int] = []
    for rank in range(3):
        once(tmp_path, World(rank, 3), lambda: bool(calls), lambda heartbeat: calls.append(heartbeat() or 1))  # type: ignore[func-returns-value]
    assert calls == [1]
    assert list(tmp_path.iterdir()) == []


MEMORY = """
import random, sys, threading, time
from pathlib import Path
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config
from influence_fast.influence.building import build_store
from influence_fast.gradients.rows.row_spec import RowSpec
from influence_fast.store.building import BuildOptions
from influence_fast.data.spooling import Tokens, TokenSource, spool

torch.set_num_threads(1)
folder, count = Path(sys.argv[1]), int(sys.argv[2])
tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
config = Qwen2Config(vocab_size=320, hidden_size=32, intermediate_size=56, num_hidden_layers=2,
                     num_attention_heads=4, num_key_value_heads=2)
model = get_peft_model(AutoModelForCausalLM.from_config(config), LoraConfig(r=4, target_modules="all-linear"))

def anonymous():  # MiB; mapped files belong to the page cache
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) / 1024

def rows(n):
    rng = random.Random(0)
    for i in range(n):
        yield dict(id=f"r{i}", prompt=f"{i}?", completion=" ".join(str(rng.randint(0, 99)) for _ in range(300)))

def ones(model, examples, spec):
    for start in range(0, len(examples), 16):
        places = list(range(start, min(start + 16, len(examples))))
        yield places, torch.ones(len(places), 512)

def work(name, n):
    spool(folder / name / "tokens", TokenSource(rows(n)), tokenizer)
    tokens = Tokens(folder / name / "tokens")
    store = build_store(folder / name / "store", model, tokens,
                        RowSpec(dim=4, width=512, sketch="random", dtype="int8"),
                        options=BuildOptions(shard_rows=128, gradients=ones))
    assert len(store) == n
    return sum(len(tokens[i]["input_ids"]) for i in range(0, n, 100)) * 100

work("first", 300)
before, peak, done = anonymous(), 0.0, threading.Event()

def sample():
    global peak
    while not done.wait(0.002):
        peak = max(peak, anonymous())

sampler = threading.Thread(target=sample)
sampler.start()
tokens = work("second", count)
done.set()
sampler.join()
print(peak - before, tokens)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_data(tmp_path: Path, tiny_tokenizer: Callable[..., Any]) -> None:
    """Rows, tokens, gradients and the store pass through; what stays of an example is its id."""
    if not Path("/proc/self/status").exists():
        pytest.skip("the peak is measured on Linux only")

    def peak(n: int) -> tuple[float, int]:
        folder = tmp_path / str(n)
        tiny_tokenizer().save_pretrained(folder / "tokenizer")
        # what malloc keeps of what was freed would be counted, in an arena for each thread
        malloc = {"MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_MMAP_THRESHOLD_": "65536"}
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | malloc
        command = [sys.executable, "-W", "ignore", "-c", MEMORY, str(folder), str(n)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        mebibytes, tokens = done.stdout.split()[-2:]
        return float(mebibytes), int(tokens)

    (small, few), (large, many) = peak(1200), peak(6600)  # both of more than one batch of 1024
    data = ((many - few) * 16 + 5400 * 512 * 4) / 2**20  # int64 ids and labels, fp32 rows
    assert data > 60
    assert large - small < 0.1 * data
