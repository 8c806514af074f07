"""Run by test_streaming.py with TRITON_INTERPRET=1: stream mode on its kernels against float64 products."""

from __future__ import annotations

import copy
import itertools
import json

import torch
from interpreted_rounding import round_as_cards_do
from interpreted_world import tiny_world

import influence_fast as inf
from influence_fast.gradients import streaming


def main() -> None:
    round_as_cards_do()
    model, examples = tiny_world()

    exact = inf.per_example_gradients(copy.deepcopy(model).double(), examples, backend="torch")
    queries = exact[:3] + 0.1 * exact.norm(dim=1).mean() * torch.randn(3, exact.shape[1]) / exact.shape[1] ** 0.5
    truth = exact @ queries.T
    errors = {}
    for dtype in (torch.float32, torch.bfloat16):
        cast = copy.deepcopy(model).to(dtype)
        # all queries (or examples) in one launch, and one by one; `segment_bilinear`, or `segment_outer` and a product
        ways = list(itertools.product((1 << 24, 1), (256, 0)))
        for chunk, columns in ways if dtype == torch.float32 else ways[1:3]:
            streaming._CHUNK, streaming._KERNEL_COLUMNS = chunk, columns
            found = {}
            for backend in ("triton", "torch"):
                scores = streaming.stream_influence(cast, examples, queries, backend=backend)
                found[backend] = float((scores.double() - truth).norm() / truth.norm())
            errors[f"{str(dtype).removeprefix('torch.')}-{chunk}-{columns}"] = found
    print(json.dumps(errors))


if __name__ == "__main__":
    main()
