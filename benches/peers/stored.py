"""One peer's step from kept gradients to scores, over rows that are given: run by `scoring`, in the peer's environment.

    python benches/peers/stored.py KIND FOLDER --queries 50 [--threads 2]

FOLDER holds `rows.npy` [N, k] and `queries.npy` [Q, k], float32. A first run of a kind puts the rows where the peer
keeps them, under FOLDER/KIND, untimed; then the step runs once to warm up and once timed, each time from that folder.
Printed: a line of JSON with seconds of `load` (from the files to what the peer multiplies) and `scores` (to N x Q
numbers), and the scores of the first rows, for the comparison with exact ones, in FOLDER/KIND.npy.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

MODULES = 32  # blocks of a row, for a peer that keeps gradients by module
CHECKED = 2000  # rows whose scores are handed back


def rows_of(folder: Path) -> torch.Tensor:
    return torch.from_numpy(np.load(folder / "rows.npy", mmap_mode="r+"))


class Step:
    """`prepare` writes the peer's files; `load` reads what stays in memory; `score` gives [N, Q]."""

    def __init__(self, folder: Path, kept: Path) -> None:
        self.folder, self.kept = folder, kept

    def prepare(self) -> None:
        raise NotImplementedError

    def load(self) -> Any:
        return None

    def score(self, loaded: Any, queries: torch.Tensor) -> torch.Tensor | np.ndarray:
        raise NotImplementedError


class Ours(Step):
    """A store, multiplied where it lies mapped; nothing is loaded."""

    dtype = "bf16"

    def prepare(self) -> None:
        from benches.open_r1_scale import write_rows

        rows = rows_of(self.folder)
        write_rows(self.kept, len(rows), rows.shape[1], lambda first, last: rows[first:last], dtype=self.dtype)

    def load(self) -> Any:
        import influence_fast as inf

        return inf.open_store(self.kept)

    def score(self, loaded: Any, queries: torch.Tensor) -> np.ndarray:
        import influence_fast as inf

        return np.asarray(inf.inner_products(loaded, queries))


class OursInt8(Ours):
    dtype = "int8"


class Bergson(Step):
    """An index and its Attributor, which loads it as float32; its search gives every score, sorted."""

    def prepare(self) -> None:
        from bergson.data import create_index
        from bergson.gradients import GradientProcessor

        rows = rows_of(self.folder)
        size = rows.shape[1] // MODULES
        index = create_index(self.kept, len(rows), {f"module{m}": size for m in range(MODULES)}, np.float32)
        index[:] = rows.numpy()
        index.flush()
        GradientProcessor(projection_dim=16).save(self.kept)

    def load(self) -> Any:
        from bergson import Attributor

        return Attributor(self.kept)

    def score(self, loaded: Any, queries: torch.Tensor) -> torch.Tensor:
        size = queries.shape[1] // MODULES
        parts = {f"module{m}": queries[:, m * size : (m + 1) * size] for m in range(MODULES)}
        found, places = loaded.search(parts, k=None)
        return torch.empty_like(found).scatter_(1, places, found).T


class Traker(Step):
    """The saver's map of features, loaded as `finalize_scores` does, and its BasicScoreComputer."""

    def prepare(self) -> None:
        self.kept.mkdir()
        rows = rows_of(self.folder)
        features = np.lib.format.open_memmap(
            self.kept / "features.mmap", mode="w+", shape=tuple(rows.shape), dtype=np.float32
        )
        features[:] = rows.numpy()
        features.flush()

    def load(self) -> Any:
        mapped = np.lib.format.open_memmap(self.kept / "features.mmap", mode="r+", dtype=np.float32)
        return torch.as_tensor(mapped, device="cpu")

    def score(self, loaded: Any, queries: torch.Tensor) -> torch.Tensor:
        from trak.score_computers import BasicScoreComputer

        scores = torch.zeros(len(loaded), len(queries))
        BasicScoreComputer(torch.float32, torch.device("cpu")).get_scores(loaded, queries, accumulator=scores)
        return scores


class LessLike(Step):
    """LESS keeps a tensor with torch.save, loads it and multiplies once."""

    def prepare(self) -> None:
        self.kept.mkdir()
        torch.save(rows_of(self.folder).clone(), self.kept / "all_orig.pt")

    def load(self) -> Any:
        return torch.load(self.kept / "all_orig.pt").float()

    def score(self, loaded: Any, queries: torch.Tensor) -> torch.Tensor:
        return torch.matmul(loaded, queries.T)


class Dattri(LessLike):
    """Rows kept in memory and its attributors' `train_rep @ test_rep.T`, as one product."""

    def load(self) -> Any:
        return rows_of(self.folder).clone()

    def prepare(self) -> None:
        self.kept.mkdir()


KINDS: dict[str, Callable[[Path, Path], Step]] = {
    "ours_bf16": Ours,
    "ours_int8": OursInt8,
    "bergson": Bergson,
    "traker": Traker,
    "less_like": LessLike,
    "dattri": Dattri,
}


def timed(step: Step, queries: torch.Tensor) -> tuple[dict[str, float], np.ndarray]:
    start = time.perf_counter()
    loaded = step.load()
    middle = time.perf_counter()
    scores = np.asarray(step.score(loaded, queries))
    return {"load": middle - start, "scores": time.perf_counter() - middle}, scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=sorted(KINDS))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--queries", type=int, required=True)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    step = KINDS[args.kind](args.folder, args.folder / args.kind)
    if not step.kept.exists():
        step.prepare()
    queries = torch.from_numpy(np.load(args.folder / "queries.npy")[: args.queries])
    timed(step, queries)
    seconds, scores = timed(step, queries)
    np.save(args.folder / f"{args.kind}.npy", scores[:CHECKED].astype(np.float32))
    print(json.dumps({"seconds": seconds, "kept": sum(p.stat().st_size for p in step.kept.rglob("*") if p.is_file())}))


if __name__ == "__main__":
    main()
