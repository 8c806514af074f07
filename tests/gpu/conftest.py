"""Cutting the tests into shares, so that several processes can compile kernels at the same time on one card.

INFLUENCE_FAST_TEST_SHARE=3/8 python -m pytest tests/gpu      # every eighth test, from the fourth on
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _no_deterministic_mode() -> Iterator[None]:
    """The other tests' mode would choose other operations on a card than users have."""
    torch.use_deterministic_algorithms(False)
    yield
    torch.use_deterministic_algorithms(True, warn_only=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    share, _, shares = os.environ.get("INFLUENCE_FAST_TEST_SHARE", "0/1").partition("/")
    here = [item for item in items if "tests/gpu" in item.path.as_posix()]
    left_out = [item for place, item in enumerate(here) if place % int(shares) != int(share)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]
