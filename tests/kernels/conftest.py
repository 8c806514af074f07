"""Triton picks its interpreter when it is imported, so the kernels are run in a process of their own.

`test_interpreter.py` starts pytest once more over the `interpreted_*` files with TRITON_INTERPRET=1; only there are
they collected.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from interpreted_rounding import round_as_cards_do

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    round_as_cards_do()


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    if INTERPRETED and file_path.name.startswith("interpreted_") and file_path.suffix == ".py":
        return pytest.Module.from_parent(parent, path=file_path)
    return None
