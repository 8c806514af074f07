from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from influence_fast.atomic import replacing, write_text

KILLED = """
import os, signal, sys
from pathlib import Path
from influence_fast.atomic import replacing

with replacing(Path(sys.argv[1])) as temporary:
    if sys.argv[2] == "folder":
        temporary.mkdir()
        (temporary / "part").write_text("half")
    else:
        temporary.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_the_next_writer_removes_what_a_killed_one_left(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "kept [1].jsonl"  # the name is no pattern
    subprocess.run([sys.executable, "-c", KILLED, str(path), kind], check=False)
    assert len(names(tmp_path)) == 1
    write_text(path, "whole")
    assert names(tmp_path) == ["kept [1].jsonl"]
    assert path.read_text() == "whole"


def test_temporary_files_of_living_processes_and_other_hosts_stay(tmp_path: Path) -> None:
    path = tmp_path / "scores.csv"
    with replacing(path) as temporary:
        temporary.write_text("mine")
        write_text(path, "another writer of this process")
        assert temporary.exists()
        elsewhere = tmp_path / re.sub(r"\.[0-9a-f]{8}-\d+-", ".00000000-1-", temporary.name)
        elsewhere.write_text("theirs")
        assert elsewhere != temporary
        write_text(path, "again")
        assert elsewhere.exists()
    assert path.read_text() == "mine"
    assert names(tmp_path) == sorted([elsewhere.name, "scores.csv"])
