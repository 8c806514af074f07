"""Rooms that read files: what is out to break a loader ends soon, with a result or with one line for its reader.

`benches/hostile_files.py` tries the whole corpus, each input in a process of its own; here is a sample of every room.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from benches.hostile.case import LIMIT, Case, tried
from benches.hostile.configs import TEXTS, laughs
from benches.hostile_files import ROOMS

# It depends on a clock or on other processes: a failure is run once more and listed (RERUN).
pytestmark = pytest.mark.flaky(reruns=1)

SAMPLE = {"data": 90, "configurations": 120, "tasks": 45, "models": 45, "importers": 90, "tables": 80}
LEAST = 300  # inputs that a room has
# they fill memory before they are refused, or their processes take seconds: for the bench alone
SLOW = ("bomb", "column/many", "text/big", "text/many", "text/long", "folder/many")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Case]]:
    """The cases of a room, always the same."""
    made: dict[str, list[Case]] = {}

    def of(room: str) -> list[Case]:
        if room not in made:
            made[room] = list(ROOMS[room](random.Random(0), tmp_path_factory.mktemp("shared")))
        return made[room]

    return of


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_has_hundreds_of_inputs(room: str, corpus: Callable[[str], list[Case]]) -> None:
    names = [case.name for case in corpus(room)]
    assert len(names) >= LEAST
    assert len(set(names)) == len(names)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("room", ROOMS)
def test_inputs_end_in_a_result_or_one_line(
    room: str, corpus: Callable[[str], list[Case]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    cases = [case for case in corpus(room) if not case.name.startswith(SLOW)]
    fell = []
    for number, case in enumerate(random.Random(1).sample(cases, SAMPLE[room])):
        folder = tmp_path / str(number)
        folder.mkdir()
        found = tried(case, folder)
        if found.kind not in ("result", "told"):
            fell.append(f"{case.name}: {found.kind} {found.text}")
    assert fell == []


COMMANDS: dict[str, tuple[dict[str, bytes], list[str], str]] = {
    "billion laughs": ({"c.yaml": laughs().encode()}, ["run", "c.yaml"], "c.yaml"),
    "deep yaml": ({"c.yaml": TEXTS["deep flow"]}, ["run", "c.yaml"], "c.yaml"),
    "date in yaml": ({"c.yaml": TEXTS["date"]}, ["run", "c.yaml"], "line 1"),
    "deep json": ({"d.jsonl": b"[" * 100_000}, ["prune", "--data", "d.jsonl"], "d.jsonl, line 1"),
    "digits": ({"d.json": b"[{}]".replace(b"{}", b"9" * 5000)}, ["prune", "--data", "d.json"], "d.json"),
    "repeated column": ({"d.csv": b"prompt,completion,prompt\na,b,c\n"}, ["prune", "--data", "d.csv"], "'prompt'"),
    "root": ({}, ["prune", "--data", "/"], "more than 10,000 files"),
    "device": ({}, ["prune", "--data", "/dev/zero"], "a device"),
    "endless template": (
        {
            "t.yaml": yaml.safe_dump(
                {
                    "source": {"path": "q.jsonl", "split": "train"},
                    "columns": {"question": "q", "answer": "a"},
                    "prompt": "{{ question * 10**11 }}",
                }
            ).encode(),
            "q.jsonl": b'{"q": "a", "a": "b"}\n',
        },
        ["eval", "--task", "t.yaml", "--export-lm-eval", "x"],
        "q.jsonl, line 1: the prompt of task 't' cannot be rendered",
    ),
    "not a results file": ({"results.json": b'{"title": "t", "curves": 5}'}, ["report", "."], "'curves'"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_command_line_tells_it_in_one_line(name: str, tmp_path: Path) -> None:
    files, words, part = COMMANDS[name]
    for file, body in files.items():
        (tmp_path / file).write_bytes(body)
    if words[0] == "prune":
        (tmp_path / "s.csv").write_text("id,s_correct\na,1\n")
        words = [*words, "--scores", "s.csv", "--strategy", "low_benefit", "--count", "1", "--output", "kept.jsonl"]
    done = _run(words, tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert part in done.stderr
    assert "Traceback" not in done.stderr


def test_debug_shows_where_it_happened(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_bytes(b"[" * 100_000)
    words = ["prune", "--data", "d.jsonl", "--scores", "s.csv", "--strategy", "random", "--count", "1", "--output", "k"]
    (tmp_path / "s.csv").write_text("id,s_correct\na,1\n")
    assert "RecursionError" in _run(["--debug", *words], tmp_path).stderr


def _run(words: list[str], folder: Path) -> Any:
    command = [sys.executable, "-m", "influence_fast", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=20 * LIMIT, env=dict(os.environ))
