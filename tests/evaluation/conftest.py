"""What answers are made of: a tokenizer, a model that answers some questions, and these."""

from __future__ import annotations

from typing import Any

import pytest

from influence_fast.data.examples import Example


@pytest.fixture(scope="module")
def tokenizer(demo_tokenizer: Any) -> Any:
    return demo_tokenizer


@pytest.fixture(scope="module")
def model(answering_model: Any) -> Any:
    return answering_model


@pytest.fixture(scope="module")
def examples(demo_examples: list[Example]) -> list[Example]:
    return demo_examples
