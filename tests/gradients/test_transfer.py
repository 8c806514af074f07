"""What crosses between host and card, and in which order: with a pretended card, for the order needs none."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import influence_fast as inf
from influence_fast import transfer
from influence_fast.gradients import per_example as gradients
from influence_fast.gradients.engine import GradientEngine
from influence_fast.gradients.model.backends import TRITON
from influence_fast.gradients.rows import row_sketch
from influence_fast.gradients.rows.projection import Projection
from influence_fast.gradients.rows.row_sketch import BucketSums
from influence_fast.gradients.step import reduction
from influence_fast.influence.sketch_fitting import fit_projection
from influence_fast.kernels.runtime import recording
from influence_fast.products.inner_products import quantize_rows, to_bf16
from influence_fast.row_codec import decoded, encoded
from influence_fast.transfer import CudaCopier, WriteBehind

CPU = torch.device("cpu")


class LateCopier:
    """A card whose copies arrive when they are waited for, and not before."""

    def __init__(self, log: list[str]) -> None:
        self.log = log
        self.started = 0

    def start(self, tensors: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], Callable[[], None]]:
        number, self.started = self.started, self.started + 1
        self.log.append(f"copy {number}")
        sources = [tensor.clone() for tensor in tensors]
        copies = [torch.full_like(tensor, 99) for tensor in tensors]

        def wait() -> None:
            self.log.append(f"wait {number}")
            for copy, source in zip(copies, sources, strict=True):
                copy.copy_(source)

        return copies, wait


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The gradient path as it is on a card, with the log of what happened."""
    log: list[str] = []
    monkeypatch.setattr(transfer, "copier_for", lambda device: LateCopier(log))
    run = GradientEngine.run

    def launch(self: GradientEngine, pack: Any) -> Any:
        log.append("launch")
        return run(self, pack)

    monkeypatch.setattr(GradientEngine, "run", launch)
    return log


def make_examples(lengths: Sequence[int] = (9, 4, 17, 6, 12, 3)) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    examples = []
    for i, n in enumerate(lengths):
        ids = torch.randint(0, 90, (n,), generator=generator)
        examples.append({"id": f"ex-{i}", "input_ids": ids, "labels": torch.where(torch.arange(n) < n // 3, -100, ids)})
    return examples


def test_rows_are_handed_over_when_the_next_pack_is_launched(card: list[str], tiny_lora: Callable[..., Any]) -> None:
    examples = make_examples()
    seen = {}
    for places, rows in gradients.iter_gradient_rows(tiny_lora(), examples, max_tokens=20):
        card.append(f"rows {len(seen)}")
        seen[tuple(places)] = rows
    assert len(seen) == 3
    expected = ["launch", "copy 0", "launch", "copy 1", "wait 0", "rows 0", "launch", "copy 2", "wait 1", "rows 1"]
    assert card == [*expected, "wait 2", "rows 2"]


def test_rows_that_crossed_are_the_rows(
    monkeypatch: pytest.MonkeyPatch, card: list[str], tiny_lora: Callable[..., Any]
) -> None:
    model, examples = tiny_lora(), make_examples()
    crossed = list(gradients.iter_gradient_rows(model, examples, max_tokens=20))
    monkeypatch.setattr(transfer, "copier_for", lambda device: None)
    straight = list(gradients.iter_gradient_rows(model, examples, max_tokens=20))
    for one, other in zip(crossed, straight, strict=True):
        assert one[0] == other[0]
        assert torch.equal(one[1], other[1])


def test_on_the_cpu_a_push_is_handed_over_at_once() -> None:
    behind = WriteBehind(CPU)
    rows = torch.ones(2, 3)
    assert not behind.crosses
    ((key, (found,)),) = behind.push([4, 5], [rows])
    assert key == [4, 5]
    assert found is rows
    assert behind.flush() == []


def test_the_side_stream_waits_for_the_rows_and_keeps_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    log = MagicMock()
    fake = SimpleNamespace(
        Stream=lambda device: log.side,
        Event=lambda blocking: log.event,
        current_stream=lambda device: "main",
        stream=lambda stream: log.within,
    )
    log.within.__enter__ = log.enter
    log.within.__exit__ = log.leave
    monkeypatch.setattr(torch, "cuda", fake)
    monkeypatch.setattr(torch, "empty", lambda shape, dtype, pin_memory: log.pinned if pin_memory else None)
    copies, wait = CudaCopier(torch.device("cuda")).start([log.rows])
    assert copies == [log.pinned]
    assert not log.event.synchronize.called
    wait()
    names = [name for name, _, _ in log.mock_calls]
    order = ["side.wait_stream", "enter", "pinned.copy_", "rows.record_stream", "event.record", "leave"]
    assert [name for name in names if name in order] == order
    assert names[-1] == "event.synchronize"
    log.side.wait_stream.assert_called_once_with("main")
    log.pinned.copy_.assert_called_once_with(log.rows, non_blocking=True)
    log.rows.record_stream.assert_called_once_with(log.side)
    log.event.record.assert_called_once_with(log.side)


def test_decoded_rows_are_encoded_to_the_same_bits() -> None:
    rows = torch.randn(5000, 23, generator=torch.Generator().manual_seed(0))
    rows *= torch.logspace(-44, 38, 5000)[:, None]
    rows[3] = 0
    rows[10] = torch.finfo(torch.float32).max
    quantized, scales = quantize_rows(rows)
    sent = encoded(rows, "int8")
    assert torch.equal(sent[0], quantized)
    assert torch.equal(sent[1], scales)
    again = quantize_rows(decoded(sent))
    assert torch.equal(again[0], quantized)
    assert torch.equal(again[1], scales)
    assert torch.equal(to_bf16(decoded(encoded(rows, "bf16"))), to_bf16(rows))
    assert decoded(encoded(rows, "fp32")) is rows


def test_rows_that_come_by_columns_are_encoded_too() -> None:
    """As the sketch by bucket sums gives them; the kernel wants each row's numbers side by side."""
    pytest.importorskip("triton", reason="triton is not installed")
    by_columns = torch.randn(7, 5).T
    with recording() as launches:
        encoded(by_columns, "int8", TRITON.int8_rows)
    (launch,) = launches
    assert torch.equal(launch.arguments["rows"], by_columns)
    assert launch.arguments["rows"].stride() == (7, 1)


def test_every_scale_survives_a_second_encoding() -> None:
    """All mantissas that the largest number of a row can have; the exponent changes nothing."""
    peak = torch.arange(1 << 23, 1 << 24, dtype=torch.int32).float()
    scale = peak / torch.full_like(peak, 127.0)
    again = 127.0 * scale / torch.full_like(peak, 127.0)
    assert torch.equal(again, scale)
    assert not torch.equal(127.0 * scale, peak)  # it is the scale that comes back, not the number


def test_rows_that_are_not_finite_stay_so() -> None:
    rows = torch.ones(3, 4)
    rows[1, 2] = float("nan")
    rows[2, 0] = float("inf")
    for dtype in ("fp32", "bf16", "int8"):
        assert decoded(encoded(rows, dtype)).isfinite().all(dim=1).tolist() == [True, False, False]


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_a_store_built_on_a_card_has_the_bits_of_one_whose_rows_came_as_fp32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, card: list[str], tiny_lora: Callable[..., Any], dtype: str
) -> None:
    model, examples = tiny_lora(), make_examples()

    def build(name: str) -> dict[str, bytes]:
        inf.build_store(tmp_path / name, model, examples, inf.RowSpec("none", dtype=dtype, max_tokens=20))
        return {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}

    crossed = build("card")
    assert "wait 2" in card
    monkeypatch.setattr(transfer, "copier_for", lambda device: None)
    assert build("cpu") == crossed


def test_an_interrupted_build_on_a_card_goes_on_to_the_same_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, card: list[str], tiny_lora: Callable[..., Any]
) -> None:
    model, examples = tiny_lora(), make_examples()
    spec = inf.RowSpec("none", dtype="int8", max_tokens=20)
    inf.build_store(tmp_path / "whole", model, examples, spec)
    launch = GradientEngine.run
    launched: list[int] = []

    def stop_at_the_third(self: GradientEngine, pack: Any) -> Any:
        if len(launched) == 2:
            raise KeyboardInterrupt
        launched.extend(pack.indices[:1])
        return launch(self, pack)

    with monkeypatch.context() as patch:
        patch.setattr(GradientEngine, "run", stop_at_the_third)
        with pytest.raises(KeyboardInterrupt, match="0 of 1 shards"):
            inf.build_store(tmp_path / "s", model, examples, spec)
    card.clear()
    inf.build_store(tmp_path / "s", model, examples, spec)
    assert card.count("launch") == 2  # the first pack was kept
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "s" / path.name).read_bytes() == path.read_bytes()


class HostCopies(TorchDispatchMode):
    """Lists the operations that take a tensor of the host to the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        devices = {leaf.device.type for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        results = {leaf.device.type for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)}
        if "cpu" in devices and "meta" in results:
            self.found.append(str(func))
        return out


@pytest.fixture
def no_waiting_copies(monkeypatch: pytest.MonkeyPatch) -> Iterator[HostCopies]:
    """What goes through `to_device` does not wait; anything else that goes to the device is listed."""

    def without_waiting(tensor: torch.Tensor, device: torch.device, dtype: Any = None) -> torch.Tensor:
        if device.type != "meta":  # where a projection is fitted first
            return tensor.to(device, dtype or tensor.dtype)
        return torch.empty(tensor.shape, dtype=dtype or tensor.dtype, device=device)

    for module in (transfer, reduction, row_sketch, gradients):
        monkeypatch.setattr(module, "to_device", without_waiting)
    with HostCopies() as copies:
        yield copies


@pytest.mark.parametrize(
    ("projection", "fitted"),
    [
        (None, False),
        (Projection(dim=4), False),
        (Projection(dim=4, width=64), False),
        (Projection(dim=4, width=64), True),
        (Projection("kron", dim=4), False),
        (Projection("sjlt", width=64), False),
    ],
    ids=str,
)
def test_no_batch_after_the_first_waits_for_the_device(
    no_waiting_copies: HostCopies, tiny_lora: Callable[..., Any], projection: Projection | None, fitted: bool
) -> None:
    """On the meta device, which has no numbers: a host that asks for one fails, and its other copies are listed."""
    model = tiny_lora()
    if fitted and projection:
        projection = fit_projection(model, make_examples(), inf.RowSpec.of(projection))
    model = model.to("meta")
    with GradientEngine(model, projection) as engine:
        first, *others = gradients.packs_for(engine, make_examples(), 20)
        engine.run(first)  # brings the maps and factors over
        no_waiting_copies.found.clear()
        for pack in others:
            rows, _ = engine.run(pack)
            assert rows.device.type == "meta"
            encoded(rows, "int8")
    assert no_waiting_copies.found == []


def test_the_list_of_waiting_copies_sees_one(no_waiting_copies: HostCopies) -> None:
    torch.ones(3).to("meta")
    assert no_waiting_copies.found == ["aten._to_copy.default"]
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.ones(3, device="meta").sum().item()


@pytest.mark.parametrize(("n", "width"), [(1, 1), (50, 7), (300, 1000), (4000, 61)])
def test_sums_by_bucket_in_order_are_those_of_index_add(n: int, width: int) -> None:
    generator = torch.Generator().manual_seed(n)
    bucket = torch.randint(0, width, (n,), generator=generator)
    sign = torch.randint(0, 2, (n,), generator=generator) * 2 - 1
    values = torch.randn(3, n, generator=generator)
    made = BucketSums.of(bucket, sign, width)(values)
    expected = torch.zeros(3, width, dtype=torch.float64).index_add_(1, bucket, values.double() * sign)
    torch.testing.assert_close(made.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(made, torch.zeros(3, width).index_add_(1, bucket, values * sign))
