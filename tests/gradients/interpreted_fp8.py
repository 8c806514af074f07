"""Run by test_fp8.py with TRITON_INTERPRET=1: 8-bit base products beside the Triton kernels, against PyTorch alone."""

from __future__ import annotations

import json

from interpreted_rounding import round_as_cards_do
from interpreted_world import tiny_world

import influence_fast as inf
from influence_fast.gradients.rows.projection import Projection


def main() -> None:
    round_as_cards_do()
    model, examples = tiny_world()
    rows = {
        (backend, precision): inf.per_example_gradients(
            model, examples, projection=Projection(dim=8), backend=backend, precision=precision
        ).double()
        for backend, precision in (("triton", "fp8"), ("torch", "fp8"), ("torch", "auto"))
    }
    truth = rows["torch", "auto"]
    errors = {
        "between": float((rows["triton", "fp8"] - rows["torch", "fp8"]).norm() / truth.norm()),
        "of fp8": float((rows["triton", "fp8"] - truth).norm() / truth.norm()),
    }
    print(json.dumps(errors))


if __name__ == "__main__":
    main()
