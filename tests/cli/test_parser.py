"""A misspelt verb or option is refused in one line that names the one that was meant."""

from __future__ import annotations

import re

import pytest

from influence_fast.cli import main


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], r"invalid choice: 'trian'.*; did you mean train\?"),
        (["train", "--modle", "m", "--data", "d", "--output", "o"], r"required: --model; did you mean --model\?"),
        (["run", "c.yaml", "--dryrun"], r"unrecognized arguments: --dryrun; did you mean --dry-run\?"),
        (["run", "c.yaml", "--zzz=3"], r"unrecognized arguments: --zzz=3 \(see influence-fast run --help"),
        (["doctor", "extra"], "unrecognized arguments: extra"),
    ],
)
def test_misspelt_words_are_named_in_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert re.search(message, said)
