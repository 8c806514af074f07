"""How many operations a batch makes the host launch: a count, the same on every machine."""

from __future__ import annotations

import pytest
import torch

from benches import launches
from influence_fast.gradients.rows.projection import Projection


def test_the_kernels_take_fewer_operations_than_a_plain_lora_step() -> None:
    """The loss counts too: its chunks of tokens must not grow into a launch for every few of them."""
    pytest.importorskip("triton", reason="triton is not installed")
    projection = Projection(dim=16)
    plain = launches.per_layer(launches.plain)
    ours = launches.per_layer(lambda layers: launches.ours(layers, "triton", projection))
    assert ours["layer"] < 0.4 * plain["layer"]
    assert ours["rest"] < 4 * plain["rest"]
    assert ours["bytes"] < 0.5 * plain["bytes"]


def test_views_and_allocations_are_not_counted() -> None:
    a = torch.empty(3, 4, device="meta")
    with launches.Operations() as found:
        a.T.reshape(2, 6).unsqueeze(0)[:, :1]
        torch.empty_like(a)
    assert found.count == 1  # the reshape of a transpose copies
    assert found.bytes == 2 * 12 * 4
    with found:
        a @ a.T + 1
    assert found.count == 3
    assert found.bytes == 2 * 12 * 4 + 2 * 9 * 4  # none of the product
    with found:
        a + a[:1].expand(3, 4)
    assert found.bytes == 2 * 12 * 4 + 2 * 9 * 4 + (12 + 4 + 12) * 4
