"""The doors of the loaders: what nobody foresaw is told by our own errors, in one line that names the file."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from influence_fast import cli
from influence_fast.atomic import replacing
from influence_fast.cli.messages import unforeseen
from influence_fast.errors import ConfigError, DataError, InfluenceFastError, ModelError, shown
from influence_fast.guards import check_no_pipe, read_text, reading


@pytest.mark.parametrize(
    ("error", "part"),
    [
        (KeyError("x"), "not foreseen (KeyError: 'x')"),
        (RecursionError(), "nested too deeply"),
        (MemoryError(), "more memory than there is"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), "no Unicode"),
        (PermissionError(errno.EACCES, "Permission denied"), "Permission denied"),
        (ValueError("a\nb\x1b[31m"), "a b\\x1b[31m"),
    ],
    ids=["key", "deep", "memory", "unicode", "system", "lines"],
)
def test_unforeseen_errors_name_the_file_in_one_line(error: Exception, part: str) -> None:
    with pytest.raises(ModelError) as found, reading("a/file", ModelError):
        raise error
    text = str(found.value)
    assert text.startswith("a/file: ")
    assert part in text
    assert text.isprintable()
    assert found.value.__cause__ is error


def test_own_errors_and_a_full_disk_pass_the_door() -> None:
    with pytest.raises(ConfigError, match=r"^as it is$"), reading("a/file"):
        raise ConfigError("as it is")
    with pytest.raises(OSError, match="No space left"), reading("a/file"):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(KeyboardInterrupt), reading("a/file"):
        raise KeyboardInterrupt


def test_messages_are_one_printable_line_of_bounded_length() -> None:
    text = str(InfluenceFastError("begin \u202e\n" + "x" * 100_000 + " end"))
    assert text.isprintable()
    assert len(text) < 3100
    assert text.startswith("begin \\u202e x")
    assert text.endswith(" end")


def test_values_are_shown_in_bounded_size() -> None:
    shared: list[object] = ["x"]
    for _ in range(60):
        shared = [shared, shared]  # repr would write 2^60 of them
    assert len(shown(shared)) < 200
    assert shown("abc") == "'abc'"
    assert "digits" in shown(10**5000)


def test_pipes_and_devices_are_refused_before_they_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, kind in ((tmp_path / "pipe", "a pipe"), (Path("/dev/zero"), "a device")):
        with pytest.raises(DataError, match=kind):
            check_no_pipe(path)
        with pytest.raises(ConfigError, match=kind):
            read_text(path, ConfigError, 100)


def test_small_files_are_read_up_to_their_bound(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"12345")
    assert read_text(path, ConfigError, 5) == "12345"
    with pytest.raises(ConfigError, match="more than 4 bytes"):
        read_text(path, ConfigError, 4)


def test_a_full_disk_names_the_path_and_not_the_temporary(tmp_path: Path) -> None:
    path = tmp_path / "scores.csv"
    with pytest.raises(OSError, match="No space left") as found, replacing(path) as temporary:
        raise OSError(errno.ENOSPC, "No space left on device", str(temporary))
    assert found.value.filename == str(path)
    with pytest.raises(OSError, match="No space left") as found, replacing(path):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert found.value.filename == str(path)


def test_the_command_line_tells_unforeseen_errors_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from influence_fast import doctor

    def broken() -> dict[str, str]:
        raise ZeroDivisionError("of\nsomething")

    monkeypatch.setattr(doctor, "versions", broken)
    assert cli.main(["doctor"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "ZeroDivisionError: of something (at influence_fast/cli/runs.py, line " in said
    assert cli.main(["--debug", "doctor"]) == 2
    assert "Traceback" in capsys.readouterr().err
    assert "an unknown place" in unforeseen(ValueError("x"))


def test_a_nameless_full_disk_names_the_output(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from influence_fast.cli import runs

    def full(args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(runs, "_demo", full)
    assert cli.main(["demo", "--output", "a/folder"]) == 2
    assert capsys.readouterr().err == "error: a/folder: No space left on device; finished work is kept\n"
