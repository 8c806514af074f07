"""Inner products on a CUDA device, by our kernels and by PyTorch, against float64 on the CPU."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import rankdata

from influence_fast.errors import DataError, NumericError
from influence_fast.kernels.runtime import WHY_NO_TRITON
from influence_fast.products import cuda as inner_products_cuda
from influence_fast.products import engines, gpu, native
from influence_fast.products.inner_products import ProductOptions, inner_products, quantize_rows

pytestmark = [
    pytest.mark.requires_gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
needs_kernels = pytest.mark.skipif(bool(native.cuda_why()), reason=f"no CUDA kernels: {native.cuda_why()}")

needs_triton = pytest.mark.skipif(bool(WHY_NO_TRITON), reason=WHY_NO_TRITON)
PATHS = [pytest.param("cuda", marks=needs_triton), pytest.param("mma", marks=needs_kernels), "torch"]
SHAPES = [  # rows, queries, k: one, primes, tile and granule ± 1, several launches
    (1, 1, 1),
    (127, 15, 63),
    (128, 16, 64),
    (129, 17, 65),
    (301, 37, 517),
    (257, 129, 1031),
    (131, 300, 2048),
    (65, 20, 9000),  # bf16 sums of several launches
]


def make(kind: str, n: int, q: int, k: int, seed: int = 0) -> tuple[Any, Any, torch.Tensor]:
    """(rows, scales or None, queries) on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, k, generator=generator)
    queries = torch.randn(q, k, generator=generator)
    if kind == "int8":
        return *quantize_rows(rows), queries
    return rows.bfloat16() if kind == "bf16" else rows, None, queries


def reference(rows: Any, scales: Any, queries: Any, precision: str, normalize: bool) -> np.ndarray:
    """float64 scores of the rounded rows and of the queries rounded as `precision` says.  [N, Q]"""
    x = rows.double().numpy() * (1.0 if scales is None else scales.double().numpy()[:, None])
    y = queries.clone()
    if precision == "fast" and rows.dtype == torch.bfloat16:
        y = y.bfloat16().float()
    y = y.double().numpy()
    if precision == "fast" and rows.dtype == torch.int8:
        step = np.abs(y).max(1, keepdims=True) / 127
        y = np.round((queries.numpy() / step.astype(np.float32)).clip(-127, 127)) * step
    scores = x @ y.T
    if normalize:
        scores /= np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(y, axis=1)[None]
    return np.asarray(scores)


def relative(got: Any, want: np.ndarray) -> float:
    got = got.double().cpu().numpy() if isinstance(got, torch.Tensor) else np.asarray(got, np.float64)
    return float(np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-300))


class Blocks:
    """A store of host rows in ragged blocks."""

    def __init__(self, rows: Any, scales: Any, sizes: list[int]) -> None:
        self.rows = rows.view(torch.int16).numpy().view(np.uint16) if rows.dtype == torch.bfloat16 else rows.numpy()
        self.scales, self.sizes = None if scales is None else scales.numpy(), sizes
        self.ids = [f"row-{i}" for i in range(len(self.rows))]

    def __len__(self) -> int:
        return len(self.rows)

    def blocks(self) -> Iterator[tuple[int, np.ndarray, np.ndarray | None]]:
        first, turn = 0, 0
        while first < len(self.rows):
            last = min(len(self.rows), first + self.sizes[turn % len(self.sizes)])
            yield first, self.rows[first:last], None if self.scales is None else self.scales[first:last]
            first, turn = last, turn + 1


def test_the_path_that_is_meant_runs() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    if torch.cuda.get_device_capability(device)[0] >= 8 and shutil.which("nvcc"):
        assert native.cuda_why() == "", "there is an nvcc here, and the CUDA part was not built"
        assert engines.device_engine(device, "int8", "mma")[0] is inner_products_cuda
    if not gpu.why_not(device):
        assert engines.device_engine(device, "int8") == (gpu, native.CUDA)
    assert engines.device_engine(device, "int8", "torch")[1] == native.TORCH
    assert engines.device_engine(device, "float32")[1] == native.TORCH


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("normalize", [False, True], ids=["dot", "cosine"])
@pytest.mark.parametrize("precision", ["fast", "high"])
@pytest.mark.parametrize("place", ["device", "host"])
def test_scores(path: str, kind: str, shape: tuple[int, ...], normalize: bool, precision: str, place: str) -> None:
    rows, scales, queries = make(kind, *shape)
    want = reference(rows, scales, queries, precision, normalize)
    if place == "device":
        rows, scales = rows.cuda(), None if scales is None else scales.cuda()
    got = inner_products(
        rows,
        queries,
        row_scales=scales,
        normalize=normalize,
        options=ProductOptions(precision=precision, isa=path, device="cuda"),
    )
    assert got.device.type == ("cuda" if place == "device" else "cpu")
    bound = 2e-6
    if kind == "bf16" and path != "torch":  # tensor cores cut sums off: by simulation 2.5e-6 over 2048 columns
        bound *= max(1, shape[2] / 512)
    elif (
        kind != "int8" and path == "torch"
    ):  # cuBLAS may add one after the other: by simulation 1.7e-6 over 9000 columns
        bound *= max(1, shape[2] / 4096)
    # high keeps 16 significant bits of a query (int8: of its largest number).
    assert relative(got, want) < (1e-4 if precision == "high" and kind != "fp32" else bound)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", ["bf16", "int8"])
@pytest.mark.parametrize("place", ["device", "host", "store"])
@pytest.mark.parametrize("q", [5, 150])
def test_fused_results(path: str, kind: str, place: str, q: int) -> None:
    rows, scales, queries = make(kind, 1000, q, 203)
    want = reference(rows, scales, queries, "fast", True)
    groups = [[0, q - 1], list(range(q // 2)), [3]]
    source, by_row = rows, scales
    if place == "device":
        source, by_row = rows.cuda(), None if scales is None else scales.cuda()
    elif place == "store":
        source, by_row = Blocks(rows, scales, [1, 300, 129]), None
    asked: dict[str, Any] = {"normalize": True, "groups": groups, "topk": 7, "ranks": True}
    asked["options"] = ProductOptions(isa=path, device="cuda")
    got = inner_products(source, queries, row_scales=by_row, **asked)
    assert relative(got.group_means, np.stack([want[:, g].mean(1) for g in groups], 1)) < 2e-6
    ranks = rankdata(want, axis=0)
    # Neighbours closer than fp32 rounding may change places.
    assert relative(got.mean_ranks, np.stack([ranks[:, g].mean(1) for g in groups], 1)) < 1e-3
    values, places = (np.asarray(a.cpu() if isinstance(a, torch.Tensor) else a) for a in got.topk)
    assert relative(values, -np.sort(-want, axis=0)[:7].T) < 2e-6
    assert relative(np.take_along_axis(want.T, places, 1), -np.sort(-want, axis=0)[:7].T) < 2e-6
    again = inner_products(source, queries, row_scales=by_row, **asked)
    as_numpy = [np.asarray(r.group_means.cpu() if place == "device" else r.group_means) for r in (got, again)]
    np.testing.assert_array_equal(*as_numpy)  # the order of the sums is fixed


@needs_kernels
@pytest.mark.parametrize("kind", ["bf16", "int8"])
def test_many_chunks_come_in_order(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inner_products_cuda, "_PINNED_BYTES", 1)  # chunks of one tile
    monkeypatch.setattr(inner_products_cuda, "_SCRATCH_BYTES", 1 << 15)
    rows, scales, queries = make(kind, 5000, 30, 77)
    want = reference(rows, scales, queries, "fast", False)
    out = np.empty(want.shape, np.float32)
    got = inner_products(
        Blocks(rows, scales, [777, 1500]),
        queries,
        groups=[[0, 29]],
        topk=3,
        ranks=True,
        options=ProductOptions(out=out, device="cuda"),
    )
    assert relative(out, want) < 2e-6
    assert relative(got.group_means[:, 0], want[:, [0, 29]].mean(1)) < 2e-6
    assert relative(got.topk[0], -np.sort(-want, axis=0)[:3].T) < 2e-6


@needs_kernels
def test_more_columns_than_an_int32_sum_holds() -> None:
    k = 140_001
    rows = torch.full((3, k), -128, dtype=torch.int8, device="cuda")
    queries = torch.ones(2, k, device="cuda")
    got = inner_products(rows, queries, row_scales=torch.ones(3, device="cuda"))
    assert relative(got, np.full((3, 2), -128.0 * k)) < 2e-6


@needs_kernels
@pytest.mark.parametrize(("offset", "stride"), [(0, 107), (1, 107), (3, 107), (0, 112), (16, 128)])
def test_rows_at_any_address(offset: int, stride: int) -> None:
    """The last two are aligned, with a last granule of 16 bytes that is not full."""
    rows, scales, queries = make("int8", 200, 20, 100)
    wide = torch.full((200, stride), 99, dtype=torch.int8, device="cuda")
    view = wide[:, offset : offset + 100]
    view.copy_(rows)
    got = inner_products(view, queries, row_scales=scales)
    assert relative(got, reference(rows, scales, queries, "fast", False)) < 2e-6


@needs_kernels
@pytest.mark.parametrize("kind", ["bf16", "int8"])
@pytest.mark.parametrize("place", ["device", "host"])
def test_work_is_on_the_callers_stream(kind: str, place: str) -> None:
    """Rows and queries that a stream of the caller's is still about to write."""
    rows, scales, queries = make(kind, 3000, 40, 512)
    want = reference(rows, scales, queries, "fast", False)
    late_rows, late_queries = torch.zeros_like(rows, device="cuda"), torch.zeros_like(queries, device="cuda")
    given, asked = rows.cuda(), queries.cuda()
    scales = None if scales is None else scales.cuda() if place == "device" else scales
    busy = torch.randn(4096, 4096, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(20):
            busy = busy @ busy * 1e-3
        late_rows.copy_(given)
        late_queries.copy_(asked)
        source = late_rows if place == "device" else rows
        got = inner_products(source, late_queries, row_scales=scales, options=ProductOptions(device="cuda"))
        assert relative(got, want) < 2e-6


@needs_kernels
@pytest.mark.parametrize("kind", ["bf16", "int8"])
def test_terms_of_high_precision_add_up_in_every_result(kind: str) -> None:
    rows, scales, queries = make(kind, 700, 12, 5000)
    want = reference(rows, scales, queries, "high", False)
    out = torch.full((700, 12), 9.0, device="cuda")
    by_row = None if scales is None else scales.cuda()
    got = inner_products(
        rows.cuda(),
        queries,
        row_scales=by_row,
        options=ProductOptions(precision="high", out=out),
        groups=[[0, 11]],
        topk=3,
        ranks=True,
    )
    assert relative(out, want) < 1e-4
    assert relative(got.group_means[:, 0], want[:, [0, 11]].mean(1)) < 1e-4
    assert relative(got.topk[0], -np.sort(-want, axis=0)[:3].T) < 1e-4
    ranks = rankdata(want, axis=0)[:, [0, 11]].mean(1)
    assert relative(got.mean_ranks[:, 0], ranks) < 1e-2


@needs_kernels
def test_out_on_the_device() -> None:
    rows, scales, queries = make("int8", 140, 18, 50)
    out = torch.full((140, 20), 9.0, device="cuda")
    inner_products(rows.cuda(), queries, row_scales=scales, options=ProductOptions(out=out[:, :18]))
    assert relative(out[:, :18], reference(rows, scales, queries, "fast", False)) < 2e-6
    assert bool((out[:, 18:] == 9.0).all())
    with pytest.raises(DataError, match="device"):
        inner_products(rows.cuda(), queries, row_scales=scales, options=ProductOptions(device="cpu"))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("normalize", [False, True], ids=["dot", "cosine"])
@pytest.mark.parametrize("store", [False, True], ids=["device", "store"])
def test_non_finite_rows_are_named(path: str, kind: str, normalize: bool, store: bool) -> None:
    rows, scales, queries = make(kind, 400, 9, 40)
    for i in (3, 399):
        if scales is not None:
            scales[i] = torch.nan
        else:
            rows[i, 2] = torch.inf
    asked: dict[str, Any] = {"normalize": normalize, "groups": [[0, 1]]}
    asked["options"] = ProductOptions(isa=path, device="cuda")
    if store:
        with pytest.raises(NumericError, match="rows row-3, row-399 "):
            inner_products(Blocks(rows, scales, [100]), queries, **asked)
    else:
        by_row = None if scales is None else scales.cuda()
        with pytest.raises(NumericError, match="rows 3, 399 "):
            inner_products(rows.cuda(), queries, row_scales=by_row, **asked)


@pytest.mark.parametrize("path", PATHS)
def test_rows_and_queries_of_zeros_have_cosine_zero(path: str) -> None:
    rows = torch.ones(4, 10, dtype=torch.bfloat16, device="cuda")
    rows[2] = 0
    queries = torch.ones(3, 10)
    queries[1] = 0
    got = inner_products(rows, queries, normalize=True, options=ProductOptions(isa=path))
    want = np.ones((4, 3))
    want[2], want[:, 1] = 0, 0
    assert relative(got, want) < 1e-6
    assert bool((got[2] == 0).all())
    assert bool((got[:, 1] == 0).all())
