"""Every kernel in Triton's interpreter against float64; collected only with TRITON_INTERPRET=1 (see conftest)."""

from __future__ import annotations

from collections.abc import Iterator

import kernel_checks as checks
import pytest
import torch
from kernel_cases import Case, cases
from tolerances import TOLERANCES, relative_norm

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _memory_starts_as_nan() -> Iterator[None]:
    """torch.empty is filled with NaN, so a place that no program wrote shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.id)
def test_kernel_agrees_with_float64(case: Case) -> None:
    actual, expected = case.run(CPU)
    assert actual.dtype == case.stored
    assert relative_norm(actual, expected) < TOLERANCES[case.stored]


@pytest.mark.parametrize("check", checks.CHECKS, ids=lambda check: check.__name__)
def test_property(check: checks.Check) -> None:
    check(CPU)


@pytest.mark.parametrize("refusal", checks.REFUSALS, ids=lambda refusal: refusal.id)
def test_bad_input_is_refused_by_name(refusal: checks.Refusal) -> None:
    with pytest.raises(refusal.error, match=refusal.message):
        refusal.call(CPU)
