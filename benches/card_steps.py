"""Whole steps on a card, at the shapes of real models with random weights (a part of `gpu_session`)."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch

from benches.card_kernels import DIM, RANK, failing, matmul_peak, profiled, summary, timed
from influence_fast.data.packing import pack_examples
from influence_fast.gradients import streaming as stream
from influence_fast.gradients.engine import GradientEngine
from influence_fast.gradients.model import packed_attention as attention
from influence_fast.gradients.model.fused_layers import Fused
from influence_fast.gradients.per_example import iter_gradient_rows
from influence_fast.gradients.rows.layout import layout_width
from influence_fast.gradients.rows.precision import FP8
from influence_fast.gradients.rows.projection import Projection
from influence_fast.gradients.rows.row_spec import RowSpec
from influence_fast.gradients.step.memory import BaseWeights, PackSize, gradient_memory
from influence_fast.gradients.targets import gradient_layout
from influence_fast.kernels.fp8_rows import LOWEST_CAPABILITY

# hidden, intermediate, heads, key/value heads, vocabulary, layers run here (the 7B is repeated layers of its shape)
SHAPES = {
    "Qwen2.5-0.5B": (896, 4864, 14, 2, 151_936, 24),
    "Qwen2.5-1.5B": (1536, 8960, 12, 2, 151_936, 14),
    "Qwen2.5-7B": (3584, 18_944, 28, 4, 152_064, 6),
}
LONG = ("Qwen2.5-7B", (3584, 18_944, 28, 4, 152_064, 28))
SMOKE_SHAPES = {"tiny": (64, 128, 2, 1, 300, 2)}
ANY_ORDER = "triton, attention in any order"
OWN_LAYERS = "triton, the model's own norms and MLPs"
NO_GRAPHS = "triton, operation by operation"


def model_of(shape: tuple[int, ...], device: torch.device) -> Any:
    """A Qwen2-shaped peft model with random weights on the device: bf16 on a card, fp32 on a CPU."""
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2Config, Qwen2ForCausalLM

    hidden, intermediate, heads, kv_heads, vocabulary, layers = shape
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=32_768,
        tie_word_embeddings=hidden < 3584,
    )
    with torch.device(device):
        model = Qwen2ForCausalLM(config).to(torch.bfloat16 if device.type == "cuda" else torch.float32)
    lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
    return get_peft_model(model, lora, autocast_adapter_dtype=False).to(device)


def matmul_flops(shape: tuple[int, ...], tokens: int, counted: int) -> float:
    """Forward and activation backward: 4 N T through the frozen linears, and the head for the `counted` tokens."""
    hidden, intermediate, heads, kv_heads, vocabulary, layers = shape
    head_dim = hidden // heads
    attention = hidden * hidden * 2 + 2 * hidden * kv_heads * head_dim
    return 4.0 * (tokens * layers * (attention + 3 * hidden * intermediate) + counted * vocabulary * hidden)


def ways_of(device: torch.device) -> dict[str, dict[str, Any]]:
    """Each way to run a step here, and the engine's options for it."""
    ways: dict[str, dict[str, Any]] = {"torch": {"backend": "torch"}}
    if device.type != "cuda":
        return ways
    ways |= {way: {"backend": "triton"} for way in ("triton", OWN_LAYERS, ANY_ORDER)}
    ways[NO_GRAPHS] = {"backend": "triton", "cuda_graphs": False}
    if torch.cuda.get_device_capability(device) >= LOWEST_CAPABILITY:
        ways["triton fp8"] = {"backend": "triton", "precision": FP8}
    return ways


@contextlib.contextmanager
def without(way: str) -> Iterator[None]:
    """The engine less what this way is there to show the price or the worth of."""
    with contextlib.ExitStack() as stack:
        if way == ANY_ORDER:
            stack.enter_context(mock.patch.object(attention, "_is_fused", return_value=False))
        if way == OWN_LAYERS:
            none = contextlib.nullcontext(Fused())
            stack.enter_context(mock.patch("influence_fast.gradients.model.backends.fused", return_value=none))
        yield


def launching_share(run: Callable[[], Any]) -> float:
    """Share of a batch's time after which the host has launched all of it; near 1, the card waits for the host."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    launched = time.perf_counter() - start
    torch.cuda.synchronize()
    return launched / (time.perf_counter() - start)


def steps(
    device: torch.device, shapes: dict[str, Any], tokens: int, rounds: int, deadline: float
) -> Iterator[dict[str, Any]]:
    """Per-example projected gradients of one packed batch beside a plain LoRA forward+backward of it, interleaved."""
    peak = matmul_peak(device, 8192 if device.type == "cuda" else 256, rounds)
    for name, shape in shapes.items():
        if time.monotonic() > deadline:
            print(f"{name}: left out, the session's time is used up", flush=True)
            continue
        row: dict[str, Any] = {"model": name, "layers": shape[5], "tokens": tokens, "errors": {}}
        with failing(name, row["errors"], "model"):
            _step(row, device, shape, rounds, peak)
        yield row
        if device.type == "cuda":
            torch.cuda.empty_cache()


@dataclass(frozen=True)
class Batch:
    """16 examples of one length, as our packs and as a plain step takes them."""

    pack: Any
    input_ids: torch.Tensor  # [16, length]
    labels: torch.Tensor

    @classmethod
    def of(cls, tokens: int, vocabulary: int, device: torch.device) -> Batch:
        length = tokens // 16
        ids = [torch.randint(0, vocabulary, (length,)) for _ in range(16)]
        prompt = torch.arange(length) < length // 8
        examples = [{"input_ids": i, "labels": torch.where(prompt, -100, i)} for i in ids]
        labels = torch.stack([e["labels"] for e in examples])
        return cls(pack_examples(examples, tokens)[0], torch.stack(ids).to(device), labels.to(device))

    def plain_step(self, model: Any) -> None:
        """Forward and backward of a LoRA training step."""
        model(input_ids=self.input_ids, labels=self.labels, use_cache=False).loss.backward()
        model.zero_grad(set_to_none=True)


def _step(row: dict[str, Any], device: torch.device, shape: tuple[int, ...], rounds: int, peak: float) -> None:
    """Fills in `row`; a way that fails has its error there, and the others their times."""
    name, tokens, errors = row["model"], row["tokens"], row["errors"]
    model = model_of(shape, device)
    batch, projection = Batch.of(tokens, shape[4], device), Projection(dim=DIM)
    pack = batch.pack
    seconds: dict[str, list[float]] = {}
    launching: dict[str, list[float]] = {}
    for _ in range(rounds):
        with failing(f"{name}, plain LoRA step", errors, "plain LoRA step"):
            seconds.setdefault("plain LoRA step", []).extend(timed(device, partial(batch.plain_step, model), 2))
        model.zero_grad(set_to_none=True)
        for way, options in ways_of(device).items():
            if way in errors:
                continue
            with (
                failing(f"{name}, {way}", errors, way),
                without(way),
                GradientEngine(model, projection, **options) as engine,
            ):
                run = partial(engine.run, pack)
                if engine.cuda_graphs:
                    run()  # a shape is recorded when it is seen again, which the warm-up then is
                found = timed(device, run, 2)
                if engine.cuda_graphs and not (engine.runner.graphs and engine.runner.graphs.most_tokens):
                    raise RuntimeError("no step was recorded, so there is no time for graphs")
                if device.type == "cuda":
                    launching.setdefault(way, []).append(launching_share(run))
                seconds.setdefault(f"ours, {way}", []).extend(found)
    row["seconds"] = {variant: summary(found) for variant, found in seconds.items()}
    row["matmul_flops_per_second"] = peak
    row["launching_share"] = {way: statistics.median(shares) for way, shares in launching.items()}
    with failing(f"{name}, memory of a batch", errors, "memory"):
        row["batch_memory_gib"], row["batch_memory_sum_gib"] = batch_memory(device, model, projection, pack)
    ours = seconds.get("ours, torch" if device.type == "cpu" else "ours, triton")
    if ours and seconds.get("plain LoRA step"):
        best, counted = statistics.median(ours), int((pack.targets >= 0).sum())
        row["ratio_to_plain"] = best / statistics.median(seconds["plain LoRA step"])
        row["tokens_per_second"] = tokens / best
        row["model_flop_utilisation"] = matmul_flops(shape, tokens, counted) / best / peak
        print(
            f"{name:<14} {row['ratio_to_plain']:.3f} x plain, {row['tokens_per_second']:.0f} tokens/s, "
            f"{row['model_flop_utilisation']:.0%} of the measured matmul peak",
            flush=True,
        )


def peak_bytes(run: Callable[[], Any]) -> int:
    """The most that the allocator holds on the card while `run` is."""
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def batch_memory(device: torch.device, model: Any, projection: Projection, pack: Any) -> tuple[float | None, float]:
    """GiB that one batch adds at its peak, as the allocator counts it (None on a CPU) and as the sum says."""
    checkpointing, measured = False, None
    with GradientEngine(model, projection) as engine:
        checkpointing = engine.overflows(len(pack.input_ids))
        if device.type == "cuda":
            engine.run(pack)
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            measured = (peak_bytes(partial(engine.run, pack)) - before) / 2**30
        summed = gradient_memory(
            engine.base.config,
            PackSize(len(pack.input_ids), len(pack.indices), int((pack.targets >= 0).sum())),
            BaseWeights(0, engine.linears[0].weight.element_size()),
            RowSpec(dim=DIM),
            rank=RANK,
            checkpointing=checkpointing,
            triton=engine.backend.launches_kernels,
        )
    return measured, summed.batch / 2**30


def profile(device: torch.device, shapes: dict[str, Any], tokens: int, shown: int = 25) -> Iterator[dict[str, Any]]:
    """Where a step's time goes: its kernels by their time on the card (on a CPU: its operations), ours and plain."""
    for name, shape in shapes.items():
        model = model_of(shape, device)
        batch = Batch.of(tokens, shape[4], device)
        with GradientEngine(model, Projection(dim=DIM)) as engine:
            yield {"model": name, "step": "ours", **profiled(partial(engine.run, batch.pack), device, shown)}
        yield {"model": name, "step": "plain", **profiled(partial(batch.plain_step, model), device, shown)}
        del model, batch


def crossing(
    device: torch.device, shape: tuple[int, ...], tokens: int, packs: int, rounds: int
) -> Iterator[dict[str, Any]]:
    """Seconds of some packs with their rows on the host, by how the rows get there; the engine's opening included."""
    model = model_of(shape, device)
    length = tokens // 16
    ids = [torch.randint(0, shape[4], (length,)) for _ in range(packs * 16)]
    examples = [{"input_ids": i, "labels": i} for i in ids]
    projection = Projection(dim=DIM)

    def waiting() -> None:
        with GradientEngine(model, projection) as engine:
            for pack in pack_examples(examples, tokens):
                engine.run(pack)[0].cpu()

    def behind(dtype: str) -> None:
        for _ in iter_gradient_rows(model, examples, RowSpec.of(projection, dtype=dtype, max_tokens=tokens)):
            pass

    ways: dict[str, Callable[[], Any]] = {"waited for": waiting}
    ways |= {f"behind, {dtype}": lambda dtype=dtype: behind(dtype) for dtype in ("fp32", "bf16", "int8")}
    for way, run in ways.items():
        seconds = summary(timed(device, run, rounds))
        print(f"rows {way:<14} {seconds['p50']:.4f} s for {packs} packs", flush=True)
        yield {"rows": way, "packs": packs, "tokens": tokens, "seconds": seconds}


def streaming(device: torch.device, shape: tuple[int, ...], tokens: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Seconds of one pack's scores by the number of queries: the kernel for all of them, and never."""
    model = model_of(shape, device)
    length = tokens // 16
    ids = [torch.randint(0, shape[4], (length,)) for _ in range(16)]
    (pack,) = pack_examples([{"input_ids": i, "labels": i} for i in ids], tokens)
    width = layout_width(gradient_layout(model))
    for count in (1, 4, 16, 64):
        queries = torch.randn(count, width, device=device)
        seconds = {}
        for way, columns in (("kernel", 1 << 30), ("form", 0)):
            with mock.patch.object(stream, "_KERNEL_COLUMNS", columns):
                reducer = partial(stream.StreamReducer, queries=queries)  # by the linears and their layout
                with GradientEngine(model, None, reducer=reducer) as engine:
                    engine.run(pack)  # a shape is recorded when it is seen again, which the warm-up then is
                    seconds[way] = summary(timed(device, lambda engine=engine: engine.run(pack), rounds))
        print(
            f"{count:>3} streamed queries: " + ", ".join(f"{w} {s['p50']:.4f} s" for w, s in seconds.items()),
            flush=True,
        )
        yield {"queries": count, "tokens": tokens, "seconds": seconds}


def long_trace(device: torch.device, name: str, shape: tuple[int, ...], tokens: int, rounds: int) -> dict[str, Any]:
    """One example of so many tokens through a whole model: its time, and the card's memory at the fullest moment."""
    model = model_of(shape, device)
    ids = torch.randint(0, shape[4], (tokens,))
    (pack,) = pack_examples([{"input_ids": ids, "labels": ids}], tokens)
    with GradientEngine(model, Projection(dim=DIM), cuda_graphs=False) as engine:
        if engine.opened.room is not None:  # as on a card of 80 GB that holds nothing else
            room = min(engine.opened.room, 80 * 10**9 - torch.cuda.memory_allocated())
            engine._opened = dataclasses.replace(engine.opened, room=room)
        recomputed = engine.overflows(tokens)
        seconds = summary(timed(device, partial(engine.run, pack), rounds))
        peak = peak_bytes(partial(engine.run, pack)) / 2**30 if device.type == "cuda" else None
        summed = gradient_memory(
            engine.base.config,
            PackSize(tokens),
            BaseWeights(
                sum(p.numel() for n, p in model.named_parameters() if "lora_" not in n),
                engine.linears[0].weight.element_size(),
            ),
            RowSpec(dim=DIM),
            rank=RANK,
            checkpointing=recomputed,
            triton=engine.backend.launches_kernels,
        )
    found = {"model": name, "layers": shape[5], "tokens": tokens, "seconds": seconds, "recomputed": recomputed}
    found |= {"peak_gib": peak, "peak_sum_gib": summed.peak / 2**30, "tokens_per_second": tokens / seconds["p50"]}
    print(f"one trace of {tokens} tokens, {shape[5]} layers: {seconds['p50']:.2f} s, {peak} GiB at most", flush=True)
    return found
