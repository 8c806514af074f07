"""Inner products of every path on this machine against float64 numpy: ragged shapes, ties, groups, bad values."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import rankdata

from influence_fast.errors import ConfigError, DataError, NumericError
from influence_fast.products import native
from influence_fast.products.inner_products import InnerProducts, ProductOptions, inner_products, quantize_rows, to_bf16

PATHS = native.available()
NATIVE = [name for name in PATHS if name != native.TORCH]
KINDS = ["fp32", "bf16", "int8"]

# Error of the (N, Q) scores relative to |row| |query|, in root mean square.
#   fp32  sums of at most some thousand fp32 products
#   bf16  queries rounded to 8 significant bits (2^-8 at most, a third of that in the mean); high: 16 bits
#   int8  queries off by max / (254 rms) at most, 2 % for normal ones; high: 1/254 of that
TOLERANCES = {
    ("fp32", "fast"): 1e-6,
    ("fp32", "high"): 1e-6,
    ("bf16", "fast"): 4e-3,
    ("bf16", "high"): 2e-5,
    ("int8", "fast"): 2e-2,
    ("int8", "high"): 1e-4,
}

# N, Q, k: ones, primes, around blocks of 48 rows, tiles of 4 and 6 rows, panels of 8, 16 and 64 queries, few queries
# (dots) and many (tiles), vectors of 64 and chunks of 1024, 2048 and 4096 along k.
SHAPES = [
    (1, 1, 1),
    (1, 67, 3),
    (2, 8, 64),
    (5, 9, 63),
    (47, 4, 65),
    (49, 17, 257),
    (96, 63, 1023),
    (193, 65, 1025),
    (31, 129, 2049),
    (211, 5, 1031),
    (7, 11, 4097),
    (3, 23, 8191),
]


def make(kind: str, n: int, k: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """Rows of a kind as stored, their scales, and their values in float64."""
    x = np.random.default_rng(seed).standard_normal((n, k)).astype(np.float32)
    if kind == "fp32":
        return x, None, x.astype(np.float64)
    if kind == "bf16":
        bits = to_bf16(x)
        return bits, None, (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    quantized, scales = quantize_rows(x)
    return quantized, scales, quantized * scales.astype(np.float64)[:, None]


def normal(*shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def assert_scores(got: np.ndarray, values: np.ndarray, queries: np.ndarray, bound: float, normalize: bool) -> None:
    queries = queries.astype(np.float64)
    norms = np.linalg.norm(values, axis=1)[:, None] * np.linalg.norm(queries, axis=1)
    want = values @ queries.T
    if normalize:
        want, norms = want / norms, np.ones_like(norms)
    assert got.dtype == np.float32
    assert got.shape == want.shape
    assert np.linalg.norm(got - want) <= bound * np.linalg.norm(norms)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_scores(path: str, kind: str, shape: tuple[int, int, int]) -> None:
    n, q, k = shape
    rows, scales, values = make(kind, n, k)
    queries = normal(q, k)
    for precision, normalize, threads in itertools.product(("fast", "high"), (False, True), (1, 3)):
        got = inner_products(
            rows,
            queries,
            row_scales=scales,
            normalize=normalize,
            options=ProductOptions(precision=precision, threads=threads, isa=path),
        )
        assert_scores(got, values, queries, TOLERANCES[kind, precision], normalize)


@pytest.mark.parametrize("path", PATHS)
def test_integers_are_exact(path: str) -> None:
    rng = np.random.default_rng(3)
    for n, q, k in [(7, 3, 130), (103, 70, 1500)]:
        rows = rng.integers(-128, 128, (n, k), dtype=np.int8)
        queries = rng.integers(-127, 128, (q, k)).astype(np.float32)
        queries[:, 0] = 127  # so that the scale is one
        got = inner_products(rows, queries, row_scales=np.ones(n, np.float32), options=ProductOptions(isa=path))
        assert np.array_equal(got, (rows.astype(np.int64) @ queries.T.astype(np.int64)).astype(np.float32))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", KINDS)
def test_fused_results_are_those_of_the_scores(path: str, kind: str) -> None:
    rows, scales, _ = make(kind, 157, 321)
    queries = normal(70, 321)
    groups = [[0], [5, 69, 3], list(range(70)), [3, 4]]
    for normalize in (False, True):
        scores = inner_products(rows, queries, row_scales=scales, normalize=normalize, options=ProductOptions(isa=path))
        out = np.full((157, 70), np.nan, np.float32)
        fused = inner_products(
            rows,
            queries,
            row_scales=scales,
            normalize=normalize,
            groups=groups,
            topk=11,
            ranks=True,
            options=ProductOptions(out=out, threads=2, isa=path),
        )
        assert isinstance(fused, InnerProducts)
        assert fused.scores is out
        assert np.array_equal(out, scores)
        ranks = rankdata(scores.astype(np.float64), axis=0)
        for g, group in enumerate(groups):
            mean = scores[:, group].mean(axis=1, dtype=np.float64)
            assert np.allclose(fused.group_means[:, g], mean, rtol=1e-6, atol=1e-7 * np.abs(scores).max())
            assert np.allclose(fused.mean_ranks[:, g], ranks[:, group].mean(axis=1), rtol=1e-12)
        best, places = fused.topk
        order = np.argsort(-scores.T, axis=1, kind="stable")[:, :11]
        assert np.array_equal(places, order)
        assert np.array_equal(best, np.take_along_axis(scores.T, order, axis=1))


@pytest.mark.parametrize("path", PATHS)
def test_ties(path: str) -> None:
    rng = np.random.default_rng(5)
    rows = rng.integers(-2, 3, (400, 3)).astype(np.float32)  # few distinct scores, zeros of both signs
    queries = np.concatenate([rng.integers(-2, 3, (12, 3)), np.zeros((1, 3))]).astype(np.float32)
    queries[3] = [-0.0, 1, 0]
    scores = rows.astype(np.float64) @ queries.T
    got = inner_products(rows, queries, ranks=True, topk=9, options=ProductOptions(isa=path))
    assert got.group_means is None
    assert got.scores is None
    assert got.mean_ranks.shape == (400, 1)
    assert np.allclose(got.mean_ranks[:, 0], rankdata(scores, axis=0).mean(axis=1), rtol=1e-12)
    assert np.array_equal(got.topk[1], np.argsort(-scores.T, axis=1, kind="stable")[:, :9])


@pytest.mark.parametrize("path", PATHS)
def test_columns_chunk_by_chunk(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, queries = normal(230, 40), normal(150, 40, seed=2)
    groups = [[149, 0, 70], list(range(100))]
    whole = inner_products(rows, queries, groups=groups, topk=4, ranks=True, options=ProductOptions(isa=path))
    monkeypatch.setattr("influence_fast.products.inner_products._COLUMN_BYTES", 230 * 4 * 65)
    parts = inner_products(rows, queries, groups=groups, topk=4, ranks=True, options=ProductOptions(isa=path))
    assert np.allclose(parts.group_means, whole.group_means, rtol=1e-5, atol=1e-5)
    assert np.allclose(parts.mean_ranks, whole.mean_ranks, rtol=1e-12)
    assert np.array_equal(parts.topk[1], whole.topk[1])


class Blocks:
    """A store as `inner_products` sees it."""

    def __init__(self, rows: np.ndarray, scales: np.ndarray | None, size: int, ids: list[str] | None = None) -> None:
        self.rows, self.scales, self.size = rows, scales, size
        if ids is not None:
            self.ids = ids

    def __len__(self) -> int:
        return len(self.rows)

    def blocks(self) -> Iterator[tuple[int, np.ndarray, np.ndarray | None]]:
        for start in range(0, len(self.rows), self.size):
            part = slice(start, start + self.size)
            yield start, self.rows[part], None if self.scales is None else self.scales[part]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", KINDS)
def test_store(path: str, kind: str, tmp_path: Path) -> None:
    rows, scales, _ = make(kind, 131, 77)
    rows.tofile(tmp_path / "rows.bin")
    mapped = np.memmap(tmp_path / "rows.bin", rows.dtype, "r", shape=rows.shape)
    queries = torch.from_numpy(normal(21, 77))
    want = inner_products(
        rows, queries, row_scales=scales, groups=[[1, 2]], topk=3, ranks=True, options=ProductOptions(isa=path)
    )
    got = inner_products(
        Blocks(mapped, scales, 50), queries, groups=[[1, 2]], topk=3, ranks=True, options=ProductOptions(isa=path)
    )
    assert isinstance(got.group_means, np.ndarray)
    assert np.allclose(got.group_means, want.group_means, rtol=1e-6)
    assert np.array_equal(got.mean_ranks, want.mean_ranks)
    assert np.array_equal(got.topk[1], want.topk[1])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("n", [0, 1])
def test_no_row_and_one_row(path: str, n: int) -> None:
    rows, queries = normal(n, 9), normal(3, 9)
    assert np.allclose(inner_products(rows, queries, options=ProductOptions(isa=path)), rows @ queries.T, rtol=1e-5)
    for source in (rows, Blocks(rows, None, 4)):
        got = inner_products(source, queries, groups=[[0, 2]], topk=2, ranks=True, options=ProductOptions(isa=path))
        assert got.group_means.shape == (n, 1)
        assert np.array_equal(got.mean_ranks, np.ones((n, 1)))
        assert got.topk[1].shape == (3, n)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", ["fp32", "bf16"])
@pytest.mark.parametrize("q", [2, 40])
def test_non_finite_rows_are_named(path: str, kind: str, q: int) -> None:
    rows, _, _ = make(kind, 120, 70)
    bad = {7: np.nan, 96: np.inf, 119: -np.inf}
    for row, value in bad.items():
        rows[row, 69] = to_bf16(np.array([[value]], np.float32))[0, 0] if kind == "bf16" else value
    for normalize in (False, True):
        with pytest.raises(NumericError, match="rows 7, 96, 119 have NaN"):
            inner_products(rows, normal(q, 70), normalize=normalize, options=ProductOptions(isa=path))
        named = Blocks(rows, None, 50, ids=[f"ex{i}" for i in range(120)])
        with pytest.raises(NumericError, match="rows ex7, ex96, ex119 have NaN"):
            inner_products(named, normal(q, 70), normalize=normalize, ranks=True, options=ProductOptions(isa=path))


@pytest.mark.parametrize("path", PATHS)
def test_non_finite_scales_and_queries_are_named(path: str) -> None:
    rows, scales, _ = make("int8", 20, 33)
    assert scales is not None
    scales[4] = np.nan
    for normalize in (False, True):
        with pytest.raises(NumericError, match="rows 4 have NaN"):
            inner_products(
                rows, normal(3, 33), row_scales=scales, normalize=normalize, options=ProductOptions(isa=path)
            )
    queries = normal(5, 33)
    queries[2, 1] = np.inf
    with pytest.raises(NumericError, match="queries 2 have NaN"):
        inner_products(normal(4, 33), queries, options=ProductOptions(isa=path))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", KINDS)
def test_cosine_of_zero_tiny_and_huge(path: str, kind: str) -> None:
    base = normal(4, 50)
    rows = base * np.array([[0.0], [1e-22], [1.0], [1e21]], np.float32)
    queries = np.concatenate([normal(2, 50, seed=4), np.zeros((1, 50), np.float32)])
    scales = None
    if kind == "bf16":
        rows = to_bf16(rows)
    elif kind == "int8":
        rows, scales = quantize_rows(rows)
    got = inner_products(
        rows, queries, row_scales=scales, normalize=True, options=ProductOptions(precision="high", isa=path)
    )
    one, other = base.astype(np.float64), queries[:2].astype(np.float64)
    want = one @ other.T / np.linalg.norm(one, axis=1)[:, None] / np.linalg.norm(other, axis=1)
    want[0] = 0
    assert np.array_equal(got[:, 2], np.zeros(4))
    assert np.allclose(got[:, :2], want, atol={"fp32": 1e-6, "bf16": 3e-3, "int8": 1e-2}[kind])


def test_torch_tensors_without_a_copy() -> None:
    x = torch.from_numpy(normal(33, 65))
    queries = torch.from_numpy(normal(10, 65))
    for rows in (x, x.bfloat16(), x.requires_grad_()):
        got = inner_products(rows, queries)
        assert isinstance(got, torch.Tensor)
        assert_scores(got.numpy(), rows.detach().double().numpy(), queries.numpy(), 4e-3, False)
    out = torch.full((33, 10), torch.nan)
    assert inner_products(x.detach(), queries, options=ProductOptions(out=out)) is out
    assert torch.equal(out, inner_products(x.detach(), queries))
    quantized, scales = quantize_rows(x.detach())
    assert isinstance(quantized, torch.Tensor)
    assert to_bf16(x).dtype == torch.bfloat16
    fused = inner_products(quantized, queries.double(), row_scales=scales, ranks=True, groups=[[0, 1]], topk=2)
    assert all(isinstance(v, torch.Tensor) for v in (fused.group_means, fused.mean_ranks, *fused.topk))


@pytest.mark.parametrize("path", PATHS)
def test_strided_rows_and_out(path: str) -> None:
    wide = normal(60, 100)
    rows, queries = wide[::-2, 10:83], normal(66, 100)[:, 3:76]
    out = np.full((30, 80), np.nan, np.float32)
    inner_products(rows, queries, options=ProductOptions(out=out[:, 7:73], isa=path))
    assert_scores(out[:, 7:73], rows.astype(np.float64), queries, 1e-6, False)
    assert np.isnan(out[:, :7]).all()
    assert np.isnan(out[:, 73:]).all()


def test_threads_change_nothing() -> None:
    for kind in KINDS:
        rows, scales, _ = make(kind, 500, 300)
        queries = normal(30, 300)
        one, many = (
            inner_products(
                rows, queries, row_scales=scales, options=ProductOptions(threads=t), topk=5, groups=[[0, 3]], ranks=True
            )
            for t in (1, 5)
        )
        assert np.array_equal(one.group_means, many.group_means)
        assert np.array_equal(one.mean_ranks, many.mean_ranks)
        assert np.array_equal(one.topk[1], many.topk[1])


@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
def test_quantized_rows_are_within_the_bound(stochastic: bool) -> None:
    rows = normal(37, 261) * np.geomspace(1e-30, 1e30, 37, dtype=np.float32)[:, None]
    rows[5] = 0
    quantized, scales = quantize_rows(rows, stochastic=stochastic, seed=4)
    assert quantized.dtype == np.int8
    assert np.abs(quantized.astype(int)).max() == 127
    assert scales[5] == 0
    assert np.allclose(scales, np.abs(rows).max(axis=1) / 127, rtol=1e-6)
    error = np.abs(quantized * scales.astype(np.float64)[:, None] - rows)
    assert (error <= (1.0 if stochastic else 0.5) * (1 + 1e-4) * scales[:, None]).all()
    part, _ = quantize_rows(rows[11:], stochastic=stochastic, seed=4, first_row=11)
    assert np.array_equal(part, quantized[11:])


def test_stochastic_rounding_is_unbiased() -> None:
    rows = normal(3, 101)
    draws = [quantize_rows(rows, stochastic=True, seed=seed) for seed in range(400)]
    mean = np.mean([q * s.astype(np.float64)[:, None] for q, s in draws], axis=0)
    scale = draws[0][1][:, None]
    # One draw has a standard deviation of at most scale / 2: 5 of those of the mean for the worst of 303 values.
    assert np.abs(mean - rows).max() <= 5 * 0.5 * scale.max() / np.sqrt(400)
    nearest, _ = quantize_rows(rows)
    assert np.abs(mean - rows).mean() < 0.5 * np.abs(nearest * scale - rows).mean()


def test_quantization_and_bf16_of_both_engines_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = normal(9, 71)
    rows[0, :4] = [3.0e-39, -0.0, 1.00390625, 1.01171875]  # subnormal, signed zero, two exact halves of a bf16 step
    native_results = [*quantize_rows(rows), *quantize_rows(rows, stochastic=True, seed=9), to_bf16(rows)]
    monkeypatch.setenv(native.ISA_VARIABLE, native.TORCH)
    torch_results = [*quantize_rows(rows), *quantize_rows(rows, stochastic=True, seed=9), to_bf16(rows)]
    for one, other in zip(native_results, torch_results, strict=True):
        assert np.array_equal(one, other)


def test_quantizing_bad_rows_names_them() -> None:
    rows = normal(6, 5)
    rows[2, 3] = np.nan
    with pytest.raises(NumericError, match="rows 2 "):
        quantize_rows(rows)
    with pytest.raises(DataError, match="takes fp32 rows, not bfloat16"):
        quantize_rows(to_bf16(normal(2, 2)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": normal(4, 7).astype(np.float64)}, "rows have dtype float64"),
        ({"rows": normal(4, 7).T}, "not contiguous along k"),
        ({"rows": normal(7)}, r"rows have shape \(7,\)"),
        ({"rows": [[1.0]]}, "rows are a list"),
        ({"rows": np.ones((4, 7), np.int8)}, "int8 rows need row_scales"),
        ({"row_scales": np.ones(3, np.float32)}, "row_scales have 3 values for 4 rows"),
        ({"queries": normal(3, 8)}, "queries have 8 numbers and rows 7"),
        ({"groups": []}, "groups is an empty list"),
        ({"groups": [[0], []]}, "group 1 is empty"),
        ({"groups": [[0, 3]]}, "group 0 names query 3"),
        ({"groups": [[-1]]}, "group 0 names query -1"),
        ({"groups": [[0.5]]}, "group 0 names query 0.5"),
        ({"groups": [[1, 2, 1]]}, "group 0 names query 1 twice"),
        ({"topk": 0}, "topk is 0"),
        ({"options": ProductOptions(threads=0)}, "threads is 0"),
        ({"options": ProductOptions(precision="double")}, "unknown precision 'double'"),
        ({"options": ProductOptions(out=np.empty((4, 4), np.float32))}, r"out has shape \(4, 4\)"),
        ({"options": ProductOptions(out=np.empty((4, 3)))}, "out has dtype float64"),
        ({"options": ProductOptions(out=np.empty((3, 4), np.float32).T)}, "out is not contiguous"),
        ({"options": ProductOptions(out=np.broadcast_to(np.float32(0), (4, 3)))}, "out is read-only"),
        ({"options": ProductOptions(out=np.empty((4, 3), np.float32)[::-1])}, "out has its rows in reverse"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_what_does_not_fit_is_named(change: dict, message: str) -> None:
    arguments = {"rows": normal(4, 7), "queries": normal(3, 7), **change}
    with pytest.raises(DataError, match=message):
        inner_products(**arguments)


def test_disordered_blocks_are_named() -> None:
    class Shuffled(Blocks):
        def blocks(self) -> Iterator[tuple[int, np.ndarray, np.ndarray | None]]:
            yield from reversed(list(super().blocks()))

    with pytest.raises(DataError, match="block at row 8 does not follow"):
        inner_products(Shuffled(normal(10, 3), None, 4), normal(2, 3))


def test_unknown_path_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="'avx9' is not available here"):
        inner_products(normal(2, 3), normal(2, 3), options=ProductOptions(isa="avx9"))
    monkeypatch.setenv(native.ISA_VARIABLE, "avx9")
    with pytest.raises(ConfigError, match="'avx9' is not available here"):
        inner_products(normal(2, 3), normal(2, 3))
    assert active_on_the_cpu() == []


def active_on_the_cpu() -> list[str]:
    """The CUDA path is chosen by the rows' device, so on a machine with a card it is active beside one of these."""
    return [path for path, active, _ in native.status() if active and path != "inner products: cuda"]


def test_status_says_what_is_active(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(native.ISA_VARIABLE, raising=False)
    assert active_on_the_cpu() == [f"inner products: {PATHS[0]}"]
    monkeypatch.setenv(native.ISA_VARIABLE, native.TORCH)
    assert active_on_the_cpu() == ["inner products: torch"]


def test_without_the_native_module_there_is_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(native.ISA_VARIABLE, raising=False)
    monkeypatch.setattr(native, "load", lambda: (None, "it was not built"))
    native._warn_once.cache_clear()
    rows, queries = normal(5, 6), normal(2, 6)
    with pytest.warns(UserWarning, match="slower PyTorch code: it was not built"):
        got = inner_products(rows, queries)
    assert_scores(got, rows.astype(np.float64), queries, 1e-6, False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inner_products(rows, queries)
    assert native.available() == [native.TORCH]
    assert ("inner products: native", False, "it was not built") in native.status()
    native._warn_once.cache_clear()


@pytest.mark.skipif(not NATIVE, reason="influence_fast._native was not built")
def test_native_calls_let_other_threads_run() -> None:
    rows, queries = normal(3000, 2048), normal(128, 2048)
    ticks, done = 0, threading.Event()

    def tick() -> None:
        nonlocal ticks
        while not done.is_set():
            ticks += 1
            time.sleep(0.001)

    other = threading.Thread(target=tick)
    other.start()
    inner_products(rows, queries, options=ProductOptions(threads=1, isa="portable"))
    done.set()
    other.join()
    assert ticks > 5


INTERRUPTED = """
import os, signal, threading, time
import numpy as np
from influence_fast import ProductOptions, inner_products
signal.signal(signal.SIGINT, signal.default_int_handler)  # a process of a background job is born ignoring it
rows = np.ones((4000, 4096), np.float32)
queries = np.ones((20000, 4096), np.float32)  # minutes of work
threading.Timer(1.0, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
start = time.monotonic()
try:
    inner_products(rows, queries, groups=[[0]], options=ProductOptions(isa="portable", threads=2))
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.mark.flaky(reruns=1)  # a signal after a second of another process
@pytest.mark.skipif(not NATIVE, reason="influence_fast._native was not built")
@pytest.mark.skipif(not hasattr(signal, "SIGINT") or os.name != "posix", reason="needs POSIX signals")
def test_ctrl_c_stops_a_long_call() -> None:
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip() == "interrupted", done.stderr


@pytest.mark.parametrize("groups", [5, "ab", [0, 1], {"a": [0]}, [5], np.zeros(2, np.int64)], ids=str)
def test_groups_that_are_no_lists_of_lists_are_named(groups: Any) -> None:
    rows = np.ones((3, 4), np.float32)
    with pytest.raises(DataError, match="groups is"):
        inner_products(rows, rows, groups=groups)


@pytest.mark.parametrize("kind", ["numpy", "torch", "one column"])
def test_an_out_whose_rows_share_memory_is_refused(kind: str) -> None:
    rows = np.ones((3, 4), np.float32)
    queries = rows[:1] if kind == "one column" else rows
    row = np.empty((1, len(queries)), np.float32)
    out: Any = np.lib.stride_tricks.as_strided(row, (3, len(queries)), (0, 4))
    if kind == "torch":
        out = torch.from_numpy(row).expand(3, len(queries))
    with pytest.raises(DataError, match="share memory"):
        inner_products(rows, queries, options=ProductOptions(out=out))


def test_an_out_that_requires_a_gradient_is_written() -> None:
    rows = torch.eye(3)
    out = torch.zeros(3, 3, requires_grad=True)
    assert torch.equal(inner_products(rows, rows, options=ProductOptions(out=out)).detach(), rows)


def test_sparse_and_meta_rows_are_refused_by_kind() -> None:
    for rows, kind in ((torch.eye(3).to_sparse(), "sparse_coo"), (torch.eye(3).to("meta"), "meta")):
        with pytest.raises(DataError, match=f"rows are a {kind} tensor"):
            inner_products(rows, torch.eye(3))
