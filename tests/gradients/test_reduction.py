"""Rows of the reducers on the Triton kernels (in the interpreter) are those of PyTorch's sums."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from influence_fast.gradients.model.backends import TORCH
from influence_fast.gradients.rows.projection import Projection, random_matrix
from influence_fast.gradients.step import reduction


@pytest.fixture(scope="module")
def found(interpreted: Callable[[str], Any]) -> dict[str, Any]:
    return interpreted("interpreted_reduction.py")


def test_exact_and_flat_rows_on_the_kernels_are_those_of_torch(found: dict[str, Any]) -> None:
    """Several modules, one of them called twice, in packs one after the other; bf16 operands are summed in fp32 too."""
    assert len(found["errors"]) == 12
    for case, error in found["errors"].items():
        assert error < 1e-5, case


def test_modules_of_other_factors_on_the_kernels(found: dict[str, Any]) -> None:
    assert len(found["others"]) == 4
    for case, error in found["others"].items():
        assert error < 1e-5, case


@pytest.mark.parametrize("kind", ["sjlt", "rademacher"])
def test_a_flat_row_on_the_kernels_never_holds_an_exact_factor(found: dict[str, Any], kind: str) -> None:
    triton, torch = found["held"][kind]
    assert triton < found["factor"] <= torch


def test_kept_matrices_are_those_that_are_drawn() -> None:
    """Small ones come from the last engine, and whoever was given one before must not have changed it."""
    projection = Projection(dim=8, seed=3)
    for rows in (40, 5000):  # kept, and too large to be
        for _ in range(2):
            made = reduction._matrix(projection, "m/in", rows, torch.device("cpu"), TORCH)
            assert torch.equal(made, random_matrix(projection, "m/in", rows))
    other = reduction._matrix(Projection(dim=8, seed=4), "m/in", 40, torch.device("cpu"), TORCH)
    assert not torch.equal(other, random_matrix(projection, "m/in", 40))
