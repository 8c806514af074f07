"""Project per-example gradients of a whole factor straight into a sketch of `width` numbers.

    G[e] = s * sum over tokens t of example e of  g[t] h[t]^T     (d x r, flattened: i = row * r + column)
    rows[e] (+)= S G[e]                                            S (width, d r), from the counter function

    sjlt        one ±1 a column of S: rows[e, bucket(i)] += sign(i) G[e, i]                       (`sjlt_scatter`)
    rademacher  dense ±1 / sqrt(width), as TRAK and LESS use: rows[e, j] = sum_i S[j, i] G[e, i]  (`sign_product`)

Neither stores the exact gradient, and neither adds floats with atomics.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from influence_fast.errors import ConfigError
from influence_fast.kernels import segment_outer as outer
from influence_fast.kernels.flat_sketch import FlatSketch
from influence_fast.kernels.runtime import (
    Cost,
    check_device,
    check_dtype,
    check_last_stride,
    check_precision,
    check_shape,
)
from influence_fast.kernels.segments import Segments, as_segments, check_tokens
from influence_fast.kernels.sign_product import project_rademacher
from influence_fast.kernels.sjlt_scatter import project_sjlt
from influence_fast.philox import sign_matrix, sjlt_map

__all__ = ["FlatSketch", "cost", "project_flat", "reference", "sketch_rows"]


def project_flat(
    g: Tensor,
    h: Tensor,
    segments: Segments | Tensor,
    sketch: FlatSketch,
    rows: Tensor,
    *,
    scale: float = 1.0,
    accumulate: bool = False,
    precision: str = "ieee",
) -> Tensor:
    """Writes (or adds) the sketch of s * sum_t g_t h_t^T of each example into `rows` and returns `rows`.

    g: (T, d), h: (T, r), one dtype, rows contiguous (for dA put the long side where `sketch` was told)
    segments: `Segments`, or cu_seqlens (E + 1,) int32 (then read on the host, which waits for a GPU)
    sketch: the map, made for this d, r and width
    rows: (E, width) float32 or bfloat16, rows contiguous (a slice of wider rows serves). accumulate: add to it, in
        float32, as one row shared by many factors needs

    Raises ConfigError for shapes, dtypes or devices that do not fit, DataError for an example of no tokens.
    """
    name = "project_flat"
    segments = as_segments(segments)
    check_shape(name, "g", g, ("T", sketch.d_size))
    check_shape(name, "h", h, (g.shape[0], sketch.r_size))
    check_tokens(name, "g", g, segments)
    check_shape(name, "rows", rows, (segments.examples, sketch.width))
    check_last_stride(name, g=g, h=h, rows=rows)
    check_dtype(name, g=g, h=h)
    check_precision(name, precision)
    if rows.dtype not in outer.ROW_DTYPES:
        raise ConfigError(f"{name}: rows must be float32 or bfloat16, got {rows.dtype}")
    check_device(name, g=g, h=h, rows=rows, segments=segments.cu_seqlens, sketch=sketch.keys)
    project = project_sjlt if sketch.kind == "sjlt" else project_rademacher
    project(g, h, segments, sketch, rows, float(scale), accumulate, precision)
    return rows


def reference(g: Tensor, h: Tensor, segments: Segments | Tensor, sketch: FlatSketch, *, scale: float = 1.0) -> Tensor:
    """The same in PyTorch, in the dtype of g, through the exact gradient: (E, width)."""
    exact = scale * outer.reference(g[:, None, :], h[:, None, :], segments).flatten(1)
    return sketch_rows(exact, sketch)


def sketch_rows(exact: Tensor, sketch: FlatSketch) -> Tensor:
    """S applied to exact gradients (E, d * r) -> (E, width), in their dtype; the dense S is made whole."""
    n, width = exact.shape[1], sketch.width
    options: dict[str, Any] = {"dtype": exact.dtype, "device": exact.device}
    if sketch.kind == "rademacher":
        return exact @ sign_matrix(sketch.seed, sketch.name, n, width, **options) / math.sqrt(width)
    bucket, sign = sjlt_map(sketch.seed, sketch.name, n, width, **options)
    return exact.new_zeros(exact.shape[0], width).index_add_(1, bucket, exact * sign)


def cost(
    kind: str,
    tokens: int,
    examples: int,
    d_size: int,
    r_size: int,
    width: int,
    *,
    itemsize: int = 2,
    row_itemsize: int = 2,
) -> Cost:
    """Floor of one call: 2 T d r FLOPs, and 2 E d r width more where dense; g, h and rows moved once."""
    flops = 2 * tokens * d_size * r_size
    flops += (2 * width if kind == "rademacher" else 2) * examples * d_size * r_size
    moved = tokens * (d_size + r_size) * itemsize + examples * width * row_itemsize
    return Cost(flops, moved)
