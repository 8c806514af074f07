"""The zoo's choice of targets, and its page."""

from __future__ import annotations

from typing import Any

import pytest

from benches import model_zoo
from benches.model_zoo import Outcome, best_of
from benches.zoo_table import page

REFUSAL = (
    "layers.0.mlp.gate: LoRA over Router is not supported; leave it out, as by target_modules=['k_proj', 'v_proj']"
)


def test_best_tries_the_targets_that_a_refusal_names_first(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Any] = []

    def rows(kind: str, targets: Any) -> Outcome:
        tried.append(targets)
        return Outcome(kind, str(targets), "exact", 1e-15)

    monkeypatch.setattr(model_zoo, "rows_against_autograd", rows)
    refused, attention = (Outcome("llama", *rest) for rest in (("all-linear", "refused"), ("attention", "exact")))
    best = best_of("llama", [model_zoo.replace(refused, message=REFUSAL), attention])
    assert (tried, best.verdict, best.chosen) == ([["k_proj", "v_proj"]], "exact", "as the refusal says")
    assert best_of("llama", [refused, attention]).chosen == "attention"
    assert best_of("llama", [attention, Outcome("llama", "all-linear", "wrong")]).verdict == "wrong"
    assert tried == [["k_proj", "v_proj"]]


def test_the_page_counts_types_and_says_why_not() -> None:
    outcomes = [
        Outcome("llama", "all-linear", "exact", 1e-15, True, False),
        Outcome("llama", "best", "exact", 1e-15, True, False, chosen="all-linear"),
        Outcome("mixtral", "all-linear", "refused", message="base_model.model.model.gate: a | router"),
        Outcome("mixtral", "best", "exact", 1e-15, False, False, chosen="attention"),
        Outcome("timm", "all-linear", "unbuilt", message="ImportError: timm"),
        Outcome("timm", "best", "unbuilt", message="ImportError: timm"),
    ]
    versions = {"transformers": "5.1", "peft": "0.2", "torch": "2.3"}
    text = page(outcomes, {"commit": "abc", "versions": versions, "machine": {"cores": 2}}, 3.4)
    assert "| of 3 types | exact | refused | no adapter | unbuilt | wrong | crash |" in text
    assert "| all-linear | 1 | 1 | 0 | 1 | 0 | 0 |" in text
    assert "| some targets | 2 | 0 | 0 | 1 | 0 | 0 |" in text
    assert "| llama | exact | exact (all-linear) | packs |  |" in text
    assert "| mixtral | refused | exact (attention) | alone | model.gate: a \\| router |" in text
    assert "| timm | unbuilt | unbuilt |  | ImportError: timm |" in text
    assert "at commit abc, with transformers 5.1, peft 0.2 and torch 2.3" in text
