"""Recorded steps: padding to a shape, replaying, and nothing in a step that a recording could not have."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any
from unittest import mock

import pytest
import torch
from tape import TapeRecorder
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import influence_fast as inf
from influence_fast.data.packing import Pack, pack_examples
from influence_fast.errors import ConfigError, warn_once
from influence_fast.gradients.engine import GradientEngine
from influence_fast.gradients.model import packed_attention as attention
from influence_fast.gradients.model.backends import TRITON
from influence_fast.gradients.rows.projection import Projection
from influence_fast.gradients.step import cuda_graphs as graphs
from influence_fast.gradients.step import opened
from influence_fast.gradients.step.runner import Runner
from influence_fast.gradients.step.step import hidden_of
from influence_fast.gradients.step.step_inputs import StepInputs, StepShape
from influence_fast.kernels.runtime import recording
from influence_fast.kernels.segments import CHUNK, Segments

CPU = torch.device("cpu")


def packs_of(lengths: list[int], max_tokens: int, seed: int = 0) -> list[Pack]:
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for n in lengths:
        ids = torch.randint(0, 60, (n,), generator=generator)
        examples.append({"input_ids": ids, "labels": torch.where(torch.arange(n) < n // 3, -100, ids)})
    return pack_examples(examples, max_tokens)


def random_packs() -> list[Pack]:
    lengths = torch.randint(2, 1500, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    return packs_of([*lengths, 2, 2, 5000, 4096], 4096)


def test_recorded_steps_give_what_steps_run_by_operations_give(interpreted: Callable[[str], Any]) -> None:
    for way, found in interpreted("interpreted_graphs.py").items():
        assert found["replays"] >= 2, way
        assert found["rows"] < 1e-6, way
        assert found["losses"] < 1e-6, way


def test_a_shape_holds_its_packs_and_wastes_little() -> None:
    for pack in random_packs():
        shape = StepShape.of(pack)
        held, counted = len(pack.input_ids), int((pack.targets >= 0).sum())
        assert held <= shape.tokens < 1.125 * held + 16
        assert counted <= shape.counted < 1.125 * counted + 16
        assert len(pack.indices) < shape.examples
        assert max(pack.lengths) <= shape.longest <= shape.tokens
    (full,) = packs_of([4096], 4096)
    assert StepShape.of(full).tokens == 4096
    assert len({StepShape.of(pack) for pack in packs_of([100] * 405, 4096)}) == 2  # the last pack is not full


def test_padding_comes_after_the_pack_and_weighs_nothing() -> None:
    for pack in random_packs():
        shape, held, examples = StepShape.of(pack), len(pack.input_ids), len(pack.indices)
        plain = StepInputs.of(pack, "mean", torch.float32, backend=TRITON)
        inputs = StepInputs.of(pack, "mean", torch.float32, backend=TRITON, shape=shape)
        assert inputs.tokens.input_ids.shape == inputs.tokens.position_ids.shape == (1, shape.tokens)
        assert torch.equal(inputs.tokens.input_ids[:, :held], plain.tokens.input_ids)
        assert inputs.tokens.bounds.tolist()[: examples + 1] == pack.cu_seqlens
        assert len(inputs.tokens.bounds) == len(inputs.edges) == shape.examples + 1
        assert inputs.tokens.bounds[-1] == shape.tokens
        assert int(inputs.tokens.bounds.diff().max()) <= inputs.tokens.longest
        assert int(inputs.tokens.bounds.diff().min()) >= 0
        assert inputs.tokens.cu_seqlens is None
        n = len(plain.positions)
        assert len(inputs.positions) == len(inputs.targets) == len(inputs.weights) == shape.counted
        assert torch.equal(inputs.weights[:n], plain.weights)
        assert not inputs.weights[n:].any()
        assert torch.equal(inputs.edges[: examples + 1], plain.edges)
        assert not inputs.edges[examples + 1 :].ne(n).any()


def test_tables_with_room_have_one_size_and_sum_what_is_there() -> None:
    sizes = set()
    for lengths in ([CHUNK + 1] * 7, [2 * CHUNK, 1, 3], [1] * 11, [4096], [4095], [513, 3000, 583]):
        segments = Segments.from_lengths(lengths, room=(12, 4096))
        sizes.add((*(len(table) for table in segments.tables), segments.slots))
        plain = Segments.from_lengths(lengths)
        for table, own in zip(segments.tables, plain.tables, strict=True):
            assert table[: len(own)].tolist() == own.tolist()
            assert table.data_ptr() % 16 == 0
        assert plain.slots <= segments.slots
        start, stop, owner = segments.chunk_start, segments.chunk_stop, segments.chunk_example
        surplus = slice(plain.chunks, None)
        assert torch.equal(start[surplus], stop[surplus])
        assert owner[surplus].eq(11).all()
        assert segments.chunk_slot[surplus].eq(-1).all()
        assert segments.split_example[len(plain.split_example) :].eq(11).all()
        assert segments.first_chunk[len(lengths) :].eq(plain.chunks).all()
    assert len(sizes) == 1
    for too_much in ([1] * 12, [4097]):
        with pytest.raises(ConfigError, match="no room for"):
            Segments.from_lengths(too_much, room=(12, 4096))


def test_the_tables_hold_the_worst_case() -> None:
    """As many chunks, split examples and partial sums as so many tokens can have."""
    generator = torch.Generator().manual_seed(0)
    for chunk in (4, 5):
        for _ in range(200):
            lengths = torch.randint(1, 3 * chunk, (6,), generator=generator).tolist()
            plain = Segments.from_lengths(lengths, chunk=chunk)
            segments = Segments.from_lengths(lengths, chunk=chunk, room=(7, sum(lengths)))
            for table, own in zip(segments.tables, plain.tables, strict=True):
                assert len(table) >= len(own)
            assert segments.slots >= plain.slots


def test_inputs_cross_in_one_copy_and_come_out_as_they_were() -> None:
    pack = random_packs()[0]
    inputs = StepInputs.of(pack, "sum", torch.float64, backend=TRITON)
    flat = graphs.joined(inputs.tensors)
    assert flat.dtype == torch.uint8
    crossed = inputs.within(flat)
    for one, other in zip(inputs.tensors, crossed.tensors, strict=True):
        assert torch.equal(one, other)
        assert other.dtype == one.dtype
        assert (other.data_ptr() - flat.data_ptr()) % 16 == 0
        assert other.untyped_storage().data_ptr() == flat.data_ptr()


class OnDeviceOnly(TorchDispatchMode):
    """Raises where an operation has a tensor of the host: a recording would keep its numbers."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, out)):
            assert not isinstance(leaf, torch.Tensor) or leaf.is_meta or leaf.numel() == 0, func
        return out


@pytest.mark.parametrize(
    "projection",
    [None, Projection(dim=8), Projection(dim=8, width=64), Projection("rademacher", width=32)],
    ids=str,
)
@pytest.mark.skipif(attention.varlen_attention() is None, reason="this PyTorch has no varlen_attn with windows")
def test_a_step_has_nothing_of_the_host_in_it(tiny_lora: Callable[..., Any], projection: Projection | None) -> None:
    """On the meta device, where reading a number raises too."""
    pytest.importorskip("triton", reason="triton is not installed")
    model = tiny_lora("qwen2", torch.bfloat16).to("meta")
    (pack,) = packs_of([30, 7, 2, 700], 1000)
    shape = StepShape.of(pack)
    with (
        mock.patch.object(attention, "_has_varlen", return_value=True),
        recording() as launches,
        GradientEngine(model, projection, backend="triton") as engine,
    ):
        inputs = engine.runner.inputs(pack, shape).to(torch.device("meta"))
        engine.runner.step(inputs)  # fills what is kept from step to step
        with OnDeviceOnly():
            rows, losses = engine.runner.step(inputs)
    assert rows.shape == (shape.examples, engine.width)
    assert losses.shape == (shape.examples,)
    assert launches


def step(inputs: StepInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """[E, 2] and [E] from the tensors alone: sums of an example's targets and weights."""
    pairs = torch.stack([inputs.targets * inputs.weights, inputs.weights], dim=1)
    sums = torch.cat([pairs.new_zeros(1, 2), pairs.cumsum(0)])[inputs.edges].diff(dim=0)
    return sums, sums[:, 1].clone()


def run_all(steps: graphs.StepGraphs, packs: list[Pack]) -> None:
    """Runs packs of one shape through `steps`, each compared with what it is by itself."""
    shape = StepShape.of(packs[0])
    results = []
    for pack in packs:
        assert StepShape.of(pack) == shape
        inputs = StepInputs.of(pack, "sum", torch.float32, shape=shape)
        few = len(pack.indices) - 1
        results.append((steps.run(shape, inputs, few), tuple(part[:few] for part in step(inputs))))
    for found, expected in results:  # after all have run: results do not change with the next
        torch.testing.assert_close(found, expected)


def test_a_shape_is_recorded_when_it_is_seen_again() -> None:
    recorder = TapeRecorder()
    steps = graphs.StepGraphs(step, CPU, recorder)
    packs = packs_of([20] * 20, 100)
    run_all(steps, packs[:1])
    assert recorder.replays == 0
    run_all(steps, packs[1:])
    assert recorder.replays == 3
    assert len(steps._graphs) == 1


@pytest.mark.parametrize("limit", ["MOST_GRAPHS", "MOST_BYTES"])
def test_only_so_many_are_recorded(monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    monkeypatch.setattr(graphs, limit, 1)
    recorder = TapeRecorder()
    steps = graphs.StepGraphs(step, CPU, recorder)
    run_all(steps, packs_of([20] * 20, 100))
    run_all(steps, packs_of([40] * 20, 200))
    assert len(steps._graphs) == 1
    assert recorder.replays == 3
    assert steps.most_tokens == 112


def test_what_cannot_be_recorded_is_said_once_and_run_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    class Refusing:
        def record(self, run: Any) -> Any:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):  # an engine opens for every call
            steps = graphs.StepGraphs(step, CPU, Refusing())
            run_all(steps, packs_of([20] * 20, 100))
            run_all(steps, packs_of([40] * 20, 200))
    (record,) = caplog.records
    assert "cannot be recorded as a CUDA graph" in record.message
    assert record.message.endswith("operation not permitted when stream is capturing")


def test_where_they_cannot_be_a_call_that_asks_for_them_fails_and_the_environment_is_told(
    tiny_lora: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_lora()
    with pytest.raises(
        ConfigError, match="cuda_graphs: CUDA graphs cannot be used: the backend is not triton but torch"
    ):
        inf.per_example_gradients(model, [], projection=None, cuda_graphs=True)
    warn_once.cache_clear()
    monkeypatch.setenv(graphs.VARIABLE, "1")
    for _ in range(2):
        assert GradientEngine(model, None).cuda_graphs is False
    (record,) = caplog.records
    assert record.message.startswith("INFLUENCE_FAST_CUDA_GRAPHS: CUDA graphs are not used here: the backend is not")
    assert GradientEngine(model, None, cuda_graphs=False).cuda_graphs is False
    monkeypatch.setenv(graphs.VARIABLE, "yes")
    with pytest.raises(ConfigError, match="unknown value 'yes'"):
        GradientEngine(model, None)


def test_they_are_on_where_they_can_be_and_nothing_is_said_where_not(
    tiny_lora: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    warn_once.cache_clear()
    monkeypatch.delenv(graphs.VARIABLE, raising=False)
    model = tiny_lora()
    with GradientEngine(model, None) as engine:
        assert engine.cuda_graphs is False
    monkeypatch.setattr(opened, "not_recordable", lambda *_: "")
    assert GradientEngine(model, None).cuda_graphs is True
    with GradientEngine(model, None) as engine:  # attention runs an example at a time here
        assert engine.cuda_graphs is False
    monkeypatch.setenv(graphs.VARIABLE, "0")
    assert GradientEngine(model, None).cuda_graphs is False
    assert not caplog.records


def test_models_that_no_recording_can_have_are_named(
    tiny_lora: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_lora()
    model.gradient_checkpointing_enable()
    with pytest.raises(ConfigError, match="gradient checkpointing switched on"):
        GradientEngine(model, None, cuda_graphs=True)
    monkeypatch.setattr(opened, "not_recordable", lambda *_: "")
    model = tiny_lora()
    layers = model.get_base_model().model.layers
    layers[1] = layers[0]
    model.get_base_model().config.use_cache = False  # a layer called twice would keep its keys in one place
    with (
        pytest.raises(ConfigError, match="called more than once"),
        GradientEngine(model, None, backend="torch", cuda_graphs=True),
    ):
        pass


@pytest.mark.parametrize("twice", [True, False])
def test_a_pack_is_padded_whether_it_may_be_recorded_or_not(
    tiny_lora: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, twice: bool
) -> None:
    (pack,) = packs_of([30, 7, 20], 100)
    shape = StepShape.of(pack)
    seen = []

    def step(inputs: StepInputs, recompute: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append((inputs.tokens.input_ids.shape[1], recompute))
        return torch.arange(2.0 * shape.examples).view(-1, 2), torch.arange(float(shape.examples))

    with GradientEngine(tiny_lora(), None, backend="torch") as engine:
        model = replace(engine.opened, recomputable=list(engine.base.model.layers))
        kept = model.kept_bytes(shape.tokens)
        assert kept is not None
        model = replace(model, room=int((2.1 if twice else 1.1) * kept / 0.8))
        runner = Runner(model, engine.reducer, "mean", engine.backend, TapeRecorder())
        monkeypatch.setattr(runner, "step", step)
        runner.graphs = graphs.StepGraphs(step, CPU, TapeRecorder())
        rows, losses = runner.run(pack)
        assert shape in runner.graphs._seen if twice else not runner.graphs._seen
    assert seen == [(shape.tokens, False)]
    assert (rows.shape, losses.shape) == ((3, 2), (3,))


def test_attention_that_runs_an_example_at_a_time_cannot_be_recorded(
    tiny_lora: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opened, "not_recordable", lambda *_: "")
    with (
        pytest.raises(ConfigError, match="attention runs an example at a time"),
        GradientEngine(tiny_lora(), None, backend="torch", cuda_graphs=True),
    ):
        pass


class FakeCuda:
    """What `CudaRecorder` asks of `torch.cuda`: streams are names, and a capture that fails ends as PyTorch's does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stream, self.mode, self.captures, self.fails = "main", 0, 0, False
        cuda = mock.MagicMock()
        cuda.current_stream = lambda device: self.stream
        cuda.set_stream = lambda stream: setattr(self, "stream", stream)
        cuda.get_sync_debug_mode = lambda: self.mode
        cuda.set_sync_debug_mode = lambda mode: setattr(self, "mode", mode)
        cuda.graph = self.graph
        cuda.graph_pool_handle = lambda: "pool"
        self.left_pools: list[str] = []
        monkeypatch.setattr(torch, "cuda", cuda)
        # PyTorch has it where it is built for CUDA
        leave = lambda device, pool: self.left_pools.append(pool)  # noqa: E731
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", leave, raising=False)
        monkeypatch.setattr(graphs, "_stream", lambda device: "capture")

    @contextmanager
    def graph(self, graph: Any, *, stream: str, pool: Any, capture_error_mode: str) -> Iterator[None]:
        self.captures += 1
        self.stream = stream
        try:
            if self.fails:
                raise RuntimeError("operation not permitted when stream is capturing")
            yield
        except RuntimeError:
            raise RuntimeError("operation failed due to a previous error during capture")  # noqa: B904
        self.stream = "main"


def test_a_step_that_waits_for_the_card_is_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCuda(monkeypatch)
    recorder = graphs.CudaRecorder(torch.device("cuda"))
    modes = []

    def waits() -> Any:
        modes.append(fake.mode)
        raise RuntimeError("called a synchronizing CUDA operation")

    with pytest.raises(RuntimeError, match="called a synchronizing"):
        recorder.record(waits)
    assert (modes, fake.mode, fake.captures, fake.stream) == (["error"], 0, 0, "main")


def test_a_capture_that_fails_leaves_the_stream_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCuda(monkeypatch)
    recorder = graphs.CudaRecorder(torch.device("cuda"))
    ran = []
    recorder.record(lambda: ran.append(fake.stream))
    assert ran == ["main", "capture"]
    fake.fails = True
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        recorder.record(lambda: None)
    assert fake.stream == "main"
    assert fake.left_pools == ["pool"]


def test_gradients_that_need_bounds_on_the_host_are_not_recorded(tiny_lora: Callable[..., Any]) -> None:
    model = tiny_lora()
    for projection, recordable in ((Projection(dim=8), True), (Projection("kron", dim=8), False)):
        engine = GradientEngine(model, projection, backend="torch")
        assert not engine.reducer.recordable
        engine.reducer.backend = TRITON
        assert engine.reducer.recordable is recordable
    (pack,) = packs_of([5, 6], 100)
    engine = GradientEngine(model, Projection(dim=8), backend="torch")
    with engine, pytest.raises(ConfigError, match="bounds on the host"):
        engine.runner.step(engine.runner.inputs(pack, StepShape.of(pack)))


def test_a_padded_pack_has_the_hidden_states_of_the_pack(tiny_lora: Callable[..., Any]) -> None:
    """Whether the padding is long, short or an example of no tokens alone."""
    engine = GradientEngine(tiny_lora("qwen2", torch.float32), None, backend="torch")
    for lengths in ([30, 7, 2], [33], [16], [17, 2]):
        (pack,) = packs_of(lengths, 100)
        with engine, torch.no_grad():
            inputs = engine.runner.inputs(pack, StepShape.of(pack))
            bounds = _without_empty(inputs.tokens.bounds.tolist())
            tokens = attention.PackedTokens(*inputs.tokens.tensors, inputs.tokens.longest, bounds)
            padded = hidden_of(engine.opened, StepInputs(tokens, *inputs.tensors[3:7], None))[0]
            plain = hidden_of(engine.opened, engine.runner.inputs(pack))[0]
        torch.testing.assert_close(padded[: len(plain)], plain)


def _without_empty(bounds: list[int]) -> list[int]:
    return [bounds[0], *(end for start, end in pairwise(bounds) if end > start)]
