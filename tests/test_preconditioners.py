"""The damped Fisher against a dense float64 inverse, and the small interface around it."""

from __future__ import annotations

import pytest
import torch

from influence_fast import preconditioners
from influence_fast.errors import ConfigError, NumericError

BLOCKS = [(0, 5), (5, 6), (6, 17)]


def rows(n: int = 40, k: int = 17, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(-6, 2, k)
    return torch.randn(n, k, generator=generator) * scales


@pytest.mark.parametrize("damping", [1e-3, 0.1, 10.0])
def test_fisher_is_the_damped_inverse_of_each_block(damping: float) -> None:
    data = rows()
    fitted = preconditioners.fit("fisher", lambda: data.split(7), BLOCKS, damping=damping)
    queries = rows(3, seed=1)
    got = fitted.apply(queries).double()
    for start, end in BLOCKS:
        block = data[:, start:end].double()
        fisher = block.T @ block / len(data)
        inverse = torch.linalg.inv(fisher + damping * fisher.diagonal().mean() * torch.eye(end - start))
        expected = queries[:, start:end].double() @ inverse
        assert (got[:, start:end] - expected).norm() < 1e-5 * expected.norm()


def test_fisher_does_not_depend_on_scale() -> None:
    """Scaling every gradient by c scales the scores by 1, whatever the damping: g^T F^-1 g is scale-free."""
    data, queries = rows(), rows(2, seed=1)
    small = preconditioners.fit("fisher", lambda: [data], BLOCKS).apply(queries) @ data.T
    scaled = preconditioners.fit("fisher", lambda: [data * 1e3], BLOCKS).apply(queries * 1e3) @ (data * 1e3).T
    torch.testing.assert_close(small, scaled, rtol=1e-4, atol=1e-6 * float(small.abs().max()))


def test_an_all_zero_block_scores_zero() -> None:
    data = rows()
    data[:, 5:6] = 0
    got = preconditioners.fit("fisher", lambda: [data], BLOCKS).apply(rows(2))
    assert torch.isfinite(got).all()


def test_none_and_cosine_leave_queries_as_they_are() -> None:
    queries = rows(2)
    for name, normalize in (("none", False), ("cosine", True)):
        fitted = preconditioners.fit(name, lambda: [], BLOCKS)
        assert torch.equal(fitted.apply(queries), queries)
        assert fitted.normalize is normalize


def test_mistakes_are_named() -> None:
    with pytest.raises(ConfigError, match="did you mean 'cosine'"):
        preconditioners.fit("cosin", lambda: [], BLOCKS)
    with pytest.raises(ConfigError, match="above 0"):
        preconditioners.fit("fisher", lambda: [rows()], BLOCKS, damping=0)
    with pytest.raises(ConfigError, match="at least one training row"):
        preconditioners.fit("fisher", lambda: [], BLOCKS)
    with pytest.raises(ConfigError, match="too wide"):
        preconditioners.fit("fisher", lambda: [], [(0, preconditioners.MAX_DENSE + 1)])
    with pytest.raises(NumericError, match="NaN or infinite"):
        preconditioners.fit("fisher", lambda: [rows() * float("nan")], BLOCKS)
