"""Patterns of a tokenizer.json that do not end, or fill the memory, are refused before they split any text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from influence_fast.cli import main
from influence_fast.errors import ModelError
from influence_fast.training.tokenizer_limits import check_tokenizer_file
from influence_fast.training.tokenizers import load_tokenizer

QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def replace(kind: str, pattern: str, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {kind: pattern}, "content": content}


def written(folder: Path, **parts: Any) -> Path:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(parts), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "part",
    [
        {"pre_tokenizer": split(r"(\w+\s?)*$")},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [split(r"([\w-]+\.?)+@")]}},
        {"normalizer": replace("Regex", "(ש|שש)+$", "x")},
        {"decoder": replace("Regex", r"(a|aa)+$", "b")},
        {"normalizer": {"type": "Sequence", "normalizers": [replace("String", "a", "aa")] * 40}},
    ],
    ids=["split", "needs-a-literal", "its-own-letters", "decoder", "doubles"],
)
def test_a_pattern_that_does_not_end_is_refused_by_file(part: dict[str, Any], tmp_path: Path) -> None:
    path = written(tmp_path, **part)
    with pytest.raises(ModelError, match="by its patterns") as error:
        check_tokenizer_file(path)
    assert str(path) in str(error.value)
    assert "use another tokenizer" in str(error.value)


def test_patterns_of_models_in_use_pass(tmp_path: Path) -> None:
    check_tokenizer_file(written(tmp_path, pre_tokenizer=split(QWEN), normalizer=replace("String", " ", "_")))


@pytest.mark.parametrize(
    "body", ["", "[]", '{"pattern": 3}', '{"pre_tokenizer": {"pattern": {"Regex": "("}}}', "{" * 9]
)
def test_what_is_no_tokenizer_is_left_to_the_loader(body: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(body)
    check_tokenizer_file(path)


def test_a_tokenizer_is_not_loaded_with_such_a_pattern(tmp_path: Path, tiny_tokenizer: Callable[..., Any]) -> None:
    tiny_tokenizer().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pre_tokenizer": split(r"(a+)+$")}))
    with pytest.raises(ModelError, match=r"tokenizer\.json: splitting short texts"):
        load_tokenizer(tmp_path)


def test_a_panic_of_a_library_ends_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class PanicException(BaseException):
        """What a library in Rust raises; it is no Exception."""

    def panics() -> dict[str, str]:
        raise PanicException("retry-limit-in-match over")

    monkeypatch.setattr("influence_fast.doctor.versions", panics)
    assert main(["doctor"]) == 2
    assert "retry-limit-in-match over" in capsys.readouterr().err
