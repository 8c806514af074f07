"""Run by test_routed.py with TRITON_INTERPRET=1: routed experts on the triton backend against float64 and torch."""

from __future__ import annotations

import copy
import json

from interpreted_rounding import round_as_cards_do
from routed_cases import fused_model, make_examples, relative

import influence_fast as inf
from influence_fast.gradients.rows.projection import Projection


def main() -> None:
    round_as_cards_do()
    model = fused_model("mixtral", ("q_proj",))
    examples = make_examples((5, 2))
    cast = copy.deepcopy(model).float()
    projection = Projection(dim=8)
    truth = inf.per_example_gradients(model, examples, projection=projection, backend="torch")
    rows = inf.per_example_gradients(cast, examples, projection=projection, backend="triton")
    print(json.dumps(relative(rows.double(), truth)))


if __name__ == "__main__":
    main()
