"""The passes over tiles of inner products in Triton's interpreter; collected only with TRITON_INTERPRET=1."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from kernel_cases import normal
from scipy.stats import rankdata
from tolerances import TOLERANCES, relative_norm

from influence_fast.errors import ConfigError, NumericError
from influence_fast.kernels import column_ranks, row_factors, score_tile
from influence_fast.products import engines, gpu, inner_products, native
from influence_fast.products.blocks import Block, Wanted
from influence_fast.products.inner_products import ProductOptions, quantize_rows

CPU = torch.device("cpu")
FP32 = TOLERANCES[torch.float32]
GROUPS = [[0], [], [2, 0, 1], [1]]  # one is empty, two overlap


@pytest.fixture(autouse=True)
def _memory_starts_as_nan() -> Iterator[None]:
    """torch.empty is filled with NaN, so a place that no program wrote shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def lists_of(groups: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    begin = np.cumsum([0, *map(len, groups)], dtype=np.int64)
    return begin, np.array([q for group in groups for q in group], dtype=np.int64)


def tile_of(planes: int, rows: int, queries: int, dtype: torch.dtype, start: int = 0) -> score_tile.Tile:
    made = (normal(planes, rows, queries + 5, dtype=torch.float64, device=CPU) * 40).to(dtype)
    factor = normal(planes, queries, dtype=torch.float32, device=CPU, seed=1)
    by_row = normal(rows, dtype=torch.float32, device=CPU, seed=2)
    return score_tile.Tile(made, factor, torch.zeros(rows, dtype=torch.int32), start, by_row)


@pytest.mark.parametrize(
    ("planes", "rows", "queries", "dtype"),
    [
        (1, 1, 1, torch.int32),
        (1, 1, 3, torch.float32),
        (2, 257, 8, torch.int32),
        (4, 37, 19, torch.float32),
        (1, 17, 131, torch.int32),
        (2, 17, 128, torch.float32),
    ],
)
def test_every_result_of_a_tile_agrees_with_float64(planes: int, rows: int, queries: int, dtype: torch.dtype) -> None:
    tile, wide = tile_of(planes, rows, queries, dtype, start=4), torch.full((rows, queries + 3), torch.nan)
    scores, columns = wide[:, 2 : 2 + queries], torch.full((queries, rows + 9), torch.nan)
    groups = [[q % queries for q in group] for group in (GROUPS if queries > 2 else [[0], []])]
    sums = torch.ones(rows, len(groups), dtype=torch.float64)
    tables = score_tile.GroupTables.of(*lists_of(groups), queries, CPU)
    score_tile.score_tile(tile, score_tile.TileResults(scores, columns, sums, tables))
    expected = score_tile.reference(tile)
    assert relative_norm(scores, expected) < FP32
    assert relative_norm(columns[:, 4 : 4 + rows].T, expected) < FP32
    assert int(columns.isnan().sum()) == 9 * queries
    assert int(wide.isnan().sum()) == 3 * rows
    by_group = torch.stack([1 + expected[:, group].sum(1) for group in groups], 1)
    assert relative_norm(sums, by_group) < FP32
    assert not tile.bad.any()


def test_members_of_a_group_in_several_blocks_are_summed() -> None:
    groups = [[300, 5, 127, 128], list(range(301))]
    tile = tile_of(1, 3, 301, torch.float32)
    sums = torch.zeros(3, 2, dtype=torch.float64)
    tables = score_tile.GroupTables.of(*lists_of(groups), 301, CPU)
    score_tile.score_tile(tile, score_tile.TileResults(group_sums=sums, groups=tables))
    expected = score_tile.reference(tile)
    assert relative_norm(sums, torch.stack([expected[:, group].sum(1) for group in groups], 1)) < FP32


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_rows_with_a_score_that_is_not_finite_are_marked(value: float) -> None:
    tile = tile_of(1, 9, 140, torch.float32)
    tile.planes[0, 4, 139] = value
    tile.planes[0, 5, 140] = value  # beside the queries
    score_tile.score_tile(tile, score_tile.TileResults())
    assert tile.bad.nonzero().flatten().tolist() == [4]


@pytest.mark.parametrize("keep", [1, 40])
@pytest.mark.parametrize("kind", ["random", "ties", "ascending"])
def test_the_top_k_over_tiles_is_that_of_a_stable_sort(keep: int, kind: str) -> None:
    scores = normal(63, 3, dtype=torch.float32, device=CPU)
    if kind == "ties":
        scores = scores.round()
        scores[::2] *= -1  # zeros of both signs
    elif kind == "ascending":
        scores = scores.sort(dim=0).values
    top = score_tile.RunningTop.of(3, keep, 40, CPU)
    for first in range(0, 63, 40):
        part = scores[first : first + 40]
        tile = score_tile.Tile(part[None], torch.ones(1, 3), torch.zeros(len(part), dtype=torch.int32), first)
        score_tile.score_tile(tile, score_tile.TileResults(top=top))
    ordered = scores.T.contiguous().sort(dim=1, descending=True, stable=True)
    values, rows = top.result()
    assert torch.equal(values, ordered.values[:, :keep])
    assert torch.equal(rows, ordered.indices[:, :keep])


def test_places_that_no_row_took_are_named_so() -> None:
    top = score_tile.RunningTop.of(1, 5, 2, CPU)
    tile = score_tile.Tile(torch.tensor([[[2.0], [-3.0]]]), torch.ones(1, 1), torch.zeros(2, dtype=torch.int32), 7)
    score_tile.score_tile(tile, score_tile.TileResults(top=top))
    values, rows = top.result()
    assert values.tolist() == [[2.0, -3.0, -torch.inf, -torch.inf, -torch.inf]]
    assert rows.tolist() == [[7, 8, -1, -1, -1]]


def test_ranks_of_columns_share_ties_in_every_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(column_ranks, "_SORT_BYTES", 1)  # a column at a time
    columns = normal(4, 630, dtype=torch.float32, device=CPU)
    columns[1] = columns[1].round()
    columns[2] = 3.0
    columns[3, ::2] = 0.0
    columns[3, 1::4] = -0.0
    ranks = rankdata(columns.numpy(), axis=1)
    sums = torch.ones(630, 4, dtype=torch.float64)
    lists = [torch.from_numpy(part).int() for part in lists_of([[3], [], [0, 1, 2, 3], [2, 0]])]
    column_ranks.add_column_ranks(columns, *lists, sums)
    expected = 1 + np.stack([ranks[group].sum(0) for group in ([3], [], [0, 1, 2, 3], [2, 0])], 1)
    np.testing.assert_array_equal(sums.numpy(), expected)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16])
def test_row_factors_are_signs_over_norms(dtype: torch.dtype) -> None:
    rows = (normal(6, 2051, dtype=torch.float64, device=CPU) * 40).to(dtype)[:, 1:]
    rows[2] = 0
    scales = torch.tensor([2.0, -1.0, 3.0, torch.nan, torch.inf, 0.0])
    for by_row in (None, scales):
        made, expected = row_factors.row_factors(rows, by_row), row_factors.reference(rows, by_row)
        torch.testing.assert_close(made, expected, rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": torch.empty(3, 4)}, r"scores must have shape \(3, 2\)"),
        ({"columns": torch.empty(2, 2)}, "rows 0 to 3 lie beyond the columns"),
        ({"group_sums": torch.empty(3, 1)}, "group_sums need the `GroupTables` of 2 queries"),
        ({"scores": torch.empty(2, 3).T}, "last dimension of scores must be contiguous"),
    ],
)
def test_results_that_do_not_fit_a_tile_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        score_tile.score_tile(tile_of(1, 3, 2, torch.float32), score_tile.TileResults(**change))


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, *args: Any, **asked: Any) -> Any:
    """`inner_products` by the engine of GPUs, on the CPU's memory."""
    monkeypatch.setattr(inner_products, "scoring_device", lambda source, device: CPU)
    monkeypatch.setattr(engines, "device_engine", lambda *_: (gpu, native.CUDA))
    return inner_products.inner_products(*args, **asked)


def made(kind: str, n: int, q: int, k: int) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    rows = normal(n, k, dtype=torch.float32, device=CPU)
    queries = normal(q, k, dtype=torch.float32, device=CPU, seed=1)
    return (*quantize_rows(rows), queries) if kind == "int8" else (rows.bfloat16(), None, queries)


@pytest.mark.parametrize("kind", ["int8", "bf16"])
@pytest.mark.parametrize(
    ("shape", "precision"), [((1, 1, 1), "high"), ((33, 3, 64), "fast"), ((35, 11, 77), "high")], ids=str
)
def test_fused_calls_agree_with_pytorch(
    kind: str, shape: tuple[int, int, int], precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "_TILE_BYTES", 1)
    monkeypatch.setattr(gpu, "_ROW_MULTIPLE", 32)  # and so the rows of a tile
    monkeypatch.setattr(gpu, "_INT8_COLUMNS", 48)
    monkeypatch.setattr(gpu, "_BF16_COLUMNS", {1: 40, 2: 32})
    rows, scales, queries = made(kind, *shape)
    n, q = rows.shape[0], queries.shape[0]
    groups, keep = [[0], list(range(q)), [q - 1]], min(5, n)
    out, expected_out = np.empty((n, q), np.float32), np.empty((n, q), np.float32)
    asked: dict[str, Any] = {"row_scales": scales, "groups": groups, "topk": keep, "normalize": q == 3, "ranks": True}
    by_torch = ProductOptions(out=expected_out, isa="torch", precision=precision)
    expected = inner_products.inner_products(rows, queries, **asked, options=by_torch)
    ours = ProductOptions(out=out, precision=precision)
    found = on_a_gpu(monkeypatch, rows, queries, **asked, options=ours)
    near = {"rtol": 1e-4, "atol": 2e-5 * float(np.abs(expected_out).max())}
    np.testing.assert_allclose(out, expected_out, **near)
    np.testing.assert_allclose(found.group_means, expected.group_means, **near)
    np.testing.assert_array_equal(found.mean_ranks, np.stack([rankdata(out, axis=0)[:, g].mean(1) for g in groups], 1))
    best = torch.from_numpy(out.T.copy()).sort(dim=1, descending=True, stable=True)
    np.testing.assert_array_equal(found.topk[1], best.indices[:, :keep])
    np.testing.assert_array_equal(found.topk[0], best.values[:, :keep])


def test_a_top_k_beyond_what_a_pass_keeps_is_sorted_by_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score_tile, "MOST_KEPT", 3)
    monkeypatch.setattr(gpu, "_TILE_BYTES", 1)
    monkeypatch.setattr(gpu, "_ROW_MULTIPLE", 32)
    rows, scales, queries = made("int8", 70, 2, 16)
    found = on_a_gpu(monkeypatch, rows, queries, row_scales=scales, topk=9)
    scores = on_a_gpu(monkeypatch, rows, queries, row_scales=scales)
    best = scores.T.contiguous().sort(dim=1, descending=True, stable=True)
    assert torch.equal(found.topk[1], best.indices[:, :9])


@pytest.mark.parametrize("kind", ["int8", "bf16"])
def test_rows_that_are_not_finite_are_named_after_all_blocks(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, scales, queries = made(kind, 40, 2, 16)
    for i in (3, 39):
        if scales is None:
            rows[i, 1] = torch.inf
        else:
            scales[i] = torch.nan
    with pytest.raises(NumericError, match="rows 3, 39 have NaN"):
        on_a_gpu(monkeypatch, rows, queries, row_scales=scales, topk=2, normalize=True)


def test_rows_on_the_device_are_read_where_they_lie() -> None:
    rows, scales, queries = made("int8", 50, 4, 32)
    packed, out = gpu.Queries(queries, "int8"), torch.empty(50, 4)
    gpu.score(packed, Block(0, rows, scales), Wanted(scores=out))
    assert gpu.finish(packed) == []
    assert scales is not None
    exact = (rows.double() * scales[:, None]) @ (packed.terms.terms[0, :4].double() * packed.terms.factor.T).T
    assert relative_norm(out, exact) < FP32


def test_odd_rows_with_few_queries_alone_are_for_the_mma_kernel() -> None:
    whole = torch.zeros(40, 64, dtype=torch.int8)
    assert not gpu.by_hand(whole, 2)
    for odd in (whole[:, 1:33], whole[:, :63], torch.zeros(40, 65, dtype=torch.int8)[:, :64], whole.T):
        assert gpu.by_hand(odd, 64)
        assert not gpu.by_hand(odd, 65)
