"""Run by test_backends.py with TRITON_INTERPRET=1: the triton backend against the torch one in float64."""

from __future__ import annotations

import copy
import json

import torch
from interpreted_rounding import round_as_cards_do
from interpreted_world import tiny_world

import influence_fast as inf
from influence_fast.gradients.rows.projection import Projection
from influence_fast.influence.sketch_fitting import fit_projection

BF16 = ("width", "exact", "rademacher")


def main() -> None:
    round_as_cards_do()
    model, examples = tiny_world()

    errors = {}
    fitted = fit_projection(model, examples, inf.RowSpec.of(Projection(dim=8, width=60)))
    for name, projection in (
        ("one_sided", Projection(dim=8)),
        ("width", Projection(dim=8, width=64)),
        ("eigen", fitted),
        ("kron", Projection("kron", dim=8)),
        ("exact", None),
        ("sjlt", Projection("sjlt", width=64)),
        ("rademacher", Projection("rademacher", width=64)),
    ):
        exact = copy.deepcopy(model).double()
        truth = inf.per_example_gradients(exact, examples, projection=projection, backend="torch")
        # Each interpreted way takes seconds, so bf16 is tried in three: two stages, exact and flat rows.
        dtypes = (torch.float32, torch.bfloat16) if name in BF16 else (torch.float32,)
        for dtype in dtypes:
            cast = copy.deepcopy(model).to(dtype)
            found = {}
            for backend in ("triton", "torch"):
                rows = inf.per_example_gradients(cast, examples, projection=projection, backend=backend)
                found[backend] = float((rows.double() - truth).norm() / truth.norm())
            errors[f"{name}-{str(dtype).removeprefix('torch.')}"] = found
    print(json.dumps(errors))


if __name__ == "__main__":
    main()
