"""The matrix of chat templates, tokenizers and completions: a part of it here, the whole in the bench."""

from __future__ import annotations

from pathlib import Path

import pytest

from benches.text_fidelity import COMPLETIONS, TOKENIZERS, cases, table, templates

NAMES = list(templates())
KINDS = list(TOKENIZERS)


@pytest.mark.parametrize("part", range(6))
def test_no_template_of_trl_alters_a_completion(part: int) -> None:
    found = []
    for i, name in list(enumerate(NAMES))[part::6]:
        found += cases([name], [KINDS[i % len(KINDS)]])
    found += cases(NAMES[part::24], ["byte-level BPE"], ["plain", "reasoning"], atoms=False)
    assert len(found) > 200
    assert [case for case in found if case.verdict == "altered"] == []
    refused = [case for case in found if case.verdict == "refused"]
    assert all("System role not supported" in case.why and case.template.startswith("gemma") for case in refused)


def test_families_that_reason_keep_their_reasoning() -> None:
    names = ["deepseek_r1_distill", "deepseekv3", "nemotron_3_nano", "qwen3", "qwen3_5_think", "glm4moe", "gptoss"]
    assert set(names) <= set(NAMES)
    found = list(cases(names, ["byte-level BPE"]))
    assert {case.verdict for case in found} == {"kept"}
    assert "| qwen3 | " + "4 of 4 | " * len(COMPLETIONS) + "- | 0 |" in table(found)


def test_the_page_is_the_benchs_own() -> None:
    page = Path(__file__).parents[2] / "docs" / "text-fidelity.md"
    text = page.read_text(encoding="utf-8")
    assert text.startswith("# Text fidelity")
    assert " 0 altered" in text
    assert text.count("\n| ") > 70
