"""The counter-based random matrices: published vectors, stability of every entry, and unbiasedness."""

from __future__ import annotations

import hashlib
import math
import struct

import pytest
import torch

from influence_fast.errors import ConfigError
from influence_fast.gradients.rows.projection import Projection, random_matrix
from influence_fast.philox import key, philox4x32, sign_matrix, sjlt_map

# philox4x32 10 rounds, from kat_vectors of Random123 (Salmon et al. 2011): counter, key, output.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def _words(text: str) -> tuple[int, ...]:
    return tuple(int(word, 16) for word in text.split())


def _philox_python(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    """Philox4x32-10 in Python integers, written from the paper: the second opinion on the vectorised form."""
    c, (k0, k1) = counter, key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = ((p1 >> 32) ^ c[1] ^ k0, p1 & 0xFFFFFFFF, (p0 >> 32) ^ c[3] ^ k1, p0 & 0xFFFFFFFF)
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c


@pytest.mark.parametrize(("counter", "key_", "expected"), KNOWN_ANSWERS, ids=["zeros", "ones", "pi"])
def test_philox_gives_the_published_vectors(counter: str, key_: str, expected: str) -> None:
    words = philox4x32(tuple(torch.tensor([w]) for w in _words(counter)), _words(key_))
    assert tuple(int(w) for w in words) == _words(expected)
    assert _philox_python(_words(counter), _words(key_)) == _words(expected)


def test_philox_leaves_its_counter_alone() -> None:
    counter = tuple(torch.arange(4) + i for i in range(4))
    before = [c.clone() for c in counter]
    philox4x32(counter, (1, 2))
    assert all(torch.equal(a, b) for a, b in zip(counter, before, strict=True))


def test_key_is_the_head_of_sha256() -> None:
    digest = hashlib.sha256(b"7:model.layers.0.q_proj/in").digest()
    assert key(7, "model.layers.0.q_proj/in") == struct.unpack("<II", digest[:8])


@pytest.mark.parametrize("row_start", [0, 2**32 - 3, 5 * 2**32 + 11], ids=["zero", "word-edge", "high-word"])
def test_signs_follow_the_written_rule(row_start: int) -> None:
    columns = 261
    signs = sign_matrix(3, "m/out", 7, columns, row_start=row_start, dtype=torch.float64)
    for i in range(7):
        row = row_start + i
        for column in range(columns):
            words = _philox_python((row & 0xFFFFFFFF, row >> 32, column // 128, 0), key(3, "m/out"))
            bit = (words[(column % 128) // 32] >> (column % 32)) & 1
            assert signs[i, column] == 1 - 2 * bit


@pytest.mark.parametrize("columns", [1, 5, 16, 31, 32, 33, 64, 100, 128, 129, 300])
def test_signs_are_stable_under_more_rows_and_columns(columns: int) -> None:
    large = sign_matrix(0, "m/in", 53, 512)
    assert torch.equal(sign_matrix(0, "m/in", 29, columns), large[:29, :columns])
    assert torch.equal(sign_matrix(0, "m/in", 20, columns, row_start=17), large[17:37, :columns])


def test_signs_differ_by_seed_and_by_name() -> None:
    base = sign_matrix(0, "m/in", 64, 64)
    for seed, name in [(1, "m/in"), (0, "m/out"), (0, "n/in")]:
        agreement = (sign_matrix(seed, name, 64, 64) == base).double().mean()
        assert abs(float(agreement) - 0.5) < 4 * 0.5 / 64


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_signs_are_exact_in_every_dtype(dtype: torch.dtype) -> None:
    signs = sign_matrix(0, "m/in", 33, 16, dtype=dtype)
    assert signs.dtype == dtype
    assert torch.equal(signs.double(), sign_matrix(0, "m/in", 33, 16, dtype=torch.float64))
    assert torch.equal(signs.abs(), torch.ones_like(signs))


def test_random_matrix_keeps_inner_products_in_the_mean() -> None:
    """E[R R^T] = I: over n matrices of p columns an entry off the diagonal has deviation 1/sqrt(n p)."""
    n, p, d = 400, 16, 12
    total = torch.zeros(d, d, dtype=torch.float64)
    for seed in range(n):
        r = random_matrix(Projection(dim=p, seed=seed), "m/in", d, dtype=torch.float64)
        total += r @ r.T
    mean = total / n
    assert torch.allclose(mean.diagonal(), torch.ones(d, dtype=torch.float64))
    off = mean - torch.eye(d, dtype=torch.float64)
    assert off.abs().max() < 5 / math.sqrt(n * p)
    assert abs(float(off.sum())) < 5 * math.sqrt(d * (d - 1) * 2) / math.sqrt(n * p)


def test_sjlt_follows_the_written_rule() -> None:
    width, start = 1009, 2**32 - 2
    bucket, sign = sjlt_map(9, "m/row", 6, width, start=start)
    for j in range(6):
        i = start + j
        words = _philox_python((i & 0xFFFFFFFF, i >> 32, 0, 1), key(9, "m/row"))
        assert int(bucket[j]) == (words[0] * width) >> 32
        assert float(sign[j]) == 1 - 2 * (words[1] & 1)


@pytest.mark.parametrize("width", [1, 7, 4096, 2**31 - 1])
def test_sjlt_stays_inside_its_width(width: int) -> None:
    bucket, sign = sjlt_map(0, "m/row", 20_000, width)
    assert bucket.dtype == torch.int64
    assert int(bucket.min()) >= 0
    assert int(bucket.max()) < width
    assert torch.equal(sign.abs(), torch.ones_like(sign))


def test_sjlt_is_stable_under_more_coordinates() -> None:
    bucket, sign = sjlt_map(0, "m/row", 1000, 64)
    part = sjlt_map(0, "m/row", 100, 64, start=300)
    assert torch.equal(part[0], bucket[300:400])
    assert torch.equal(part[1], sign[300:400])


def test_sjlt_keeps_inner_products_in_the_mean() -> None:
    """Over seeds, <S a, S b> has mean <a, b> and variance about (|a|^2 |b|^2 + <a, b>^2) / width."""
    n, d, width = 600, 300, 32
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, d, generator=generator, dtype=torch.float64)
    b = b + a
    products = []
    for seed in range(n):
        bucket, sign = sjlt_map(seed, "m/row", d, width, dtype=torch.float64)
        sketch = torch.zeros(2, width, dtype=torch.float64)
        sketch.index_add_(1, bucket, torch.stack([a, b]) * sign)
        products.append(float(sketch[0] @ sketch[1]))
    deviation = math.sqrt(float((a @ a) * (b @ b) + (a @ b) ** 2) / width)
    assert abs(sum(products) / n - float(a @ b)) < 4 * deviation / math.sqrt(n)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "one_side"}, "did you mean 'one_sided'"),
        ({"dim": 0}, "dim must be at least 1"),
        ({"dim": 2.0}, "dim must be an integer"),
        ({"seed": True}, "seed must be an integer"),
        ({"width": -4}, "width must be at least 1"),
        ({"width": 2**31}, "choose a smaller one"),
        ({"kind": "sjlt"}, "needs width"),
        ({"kind": "rademacher"}, "needs width"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_bad_projection_is_refused_by_name(arguments: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Projection(**arguments)


def test_a_projection_is_a_value() -> None:
    assert Projection() == Projection("one_sided", 16, 0, None)
    assert hash(Projection(seed=3)) == hash(Projection(seed=3))
    assert Projection("sjlt", width=8).flat
    assert not Projection("one_sided", width=8).flat
