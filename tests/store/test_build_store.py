"""Building a store: its rows are the gradients, nothing is dropped in silence, and no interruption changes a bit."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch
from loose import built_by
from trials import stored_bytes, world

from influence_fast.data.examples import Example
from influence_fast.data.fingerprints import dataset_fingerprint, tokenizer_hash, weight_hashes
from influence_fast.errors import ConfigError, DataError, ModelError, NumericError, StoreError
from influence_fast.gradients.engine import GradientEngine
from influence_fast.gradients.per_example import iter_gradient_rows, per_example_gradients, per_example_losses
from influence_fast.gradients.rows.projection import Projection
from influence_fast.gradients.rows.row_spec import RowSpec
from influence_fast.influence.building import build_store
from influence_fast.store import writer as store_writer
from influence_fast.store.building import BuildOptions, build_shards
from influence_fast.store.merge import merge_stores
from influence_fast.store.planning import identity_of
from influence_fast.store.reader import open_store
from influence_fast.store.verification import verify_store

PROJECTION = Projection(dim=4, seed=3, width=64)
SPEC = RowSpec.of(PROJECTION, dtype="fp32")
# fp32 gradients of one example in different packs: rounding only, summed in another order
BATCH_TOLERANCE = 1e-4
ROWS_OF = "influence_fast.gradients.per_example.iter_gradient_rows"


def make_examples(n: int = 11, seed: int = 0) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for i in range(n):
        length = int(torch.randint(3, 40, (), generator=generator))
        ids = torch.randint(5, 300, (length,), generator=generator)
        labels = ids.clone()
        labels[: length // 3] = -100
        examples.append({"id": f"e{i}", "input_ids": ids, "labels": labels})
    return examples


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.fixture(scope="module")
def model(tiny_lora: Callable[..., Any]) -> Any:
    return tiny_lora("qwen2")


def build(path: Path, model: Any, examples: Any, **options: Any) -> Any:
    settings = {"projection": PROJECTION, "dtype": "fp32", "shard_rows": 4, "progress": False} | options
    return build_store(path, model, examples, **built_by(**settings))


# ---- what is stored ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("projection", [None, PROJECTION, Projection("sjlt", width=50)])
def test_losses_are_stored_on_the_way(tmp_path: Path, model: Any, projection: Any, reduction: str) -> None:
    examples = make_examples()
    store = build(tmp_path / "s", model, examples, projection=projection, loss_reduction=reduction, dtype="int8")
    expected = per_example_losses(model, examples, loss_reduction=reduction)
    torch.testing.assert_close(torch.from_numpy(store.losses), expected)


def test_a_source_that_gives_no_losses_leaves_the_store_without(tmp_path: Path, model: Any) -> None:
    def without(model: Any, examples: Any, spec: RowSpec) -> Any:
        return iter_gradient_rows(model, examples, spec)

    def leaving_it(model: Any, examples: Any, spec: RowSpec, losses: torch.Tensor) -> Any:
        return iter_gradient_rows(model, examples, spec)

    assert build(tmp_path / "a", model, make_examples(), gradients=without).losses is None
    assert build(tmp_path / "b", model, make_examples(), gradients=leaving_it).losses is None


def test_an_example_that_was_computed_again_has_its_own_loss(tmp_path: Path, model: Any) -> None:
    """Its neighbour in the pack gave it a NaN, and by itself it has a row and a loss."""
    examples = make_examples(4)

    def poisoned(
        model: Any, given: Any, spec: RowSpec, losses: torch.Tensor
    ) -> Iterator[tuple[list[int], torch.Tensor]]:
        for places, rows in iter_gradient_rows(model, given, spec, losses=losses):
            if len(given) == 4 and 2 in places:
                rows[places.index(2)], losses[2] = torch.nan, torch.nan
            yield places, rows

    store = build(tmp_path / "s", model, examples, gradients=poisoned)
    torch.testing.assert_close(torch.from_numpy(store.losses), per_example_losses(model, examples))


@pytest.mark.parametrize("projection", [None, Projection(dim=3), PROJECTION, Projection("sjlt", width=50)])
def test_rows_are_the_gradients_in_the_order_of_the_data(tmp_path: Path, model: Any, projection: Any) -> None:
    examples = make_examples()
    store = build(tmp_path / "s", model, examples, projection=projection)
    expected = per_example_gradients(model, examples, projection=projection)
    assert store.ids == [example["id"] for example in examples]
    assert relative_error(store.rows(), expected) < BATCH_TOLERANCE
    assert store.projection == projection
    last = store.manifest.modules[-1]
    if projection is None:
        assert store.width == last.offset + last.shape[0] * last.shape[1]
    assert verify_store(tmp_path / "s") == []


@pytest.mark.parametrize(("dtype", "bound"), [("bf16", 2.0**-8), ("int8", 0.02)])
def test_low_precision_keeps_the_rows_within_its_rounding(tmp_path: Path, model: Any, dtype: str, bound: float) -> None:
    exact = build(tmp_path / "exact", model, make_examples()).rows()
    low = build(tmp_path / "low", model, make_examples(), dtype=dtype).rows()
    assert relative_error(low, exact) < bound


def test_sum_is_mean_times_the_tokens(tmp_path: Path, model: Any) -> None:
    examples = make_examples()
    counts = torch.tensor([int((e["labels"][1:] != -100).sum()) for e in examples])
    mean = build(tmp_path / "mean", model, examples).rows()
    total = build(tmp_path / "sum", model, examples, loss_reduction="sum").rows()
    assert relative_error(total, mean * counts[:, None]) < BATCH_TOLERANCE


def test_a_shard_does_not_depend_on_the_others(tmp_path: Path, model: Any) -> None:
    """Bit for bit: the shard is computed alone, whatever was done before."""
    whole = build(tmp_path / "whole", model, make_examples())
    rank = build_shards(
        tmp_path / "part",
        model,
        make_examples(),
        SPEC,
        options=BuildOptions(shard_rows=4, part=(1, 3)),
    )
    assert rank.pending() == [0, 2]
    name = "rows-00001.bin"
    assert (tmp_path / "part" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert len(whole) == 11


def test_wide_rows_make_short_shards(tmp_path: Path, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("influence_fast.store.planning._SHARD_BYTES", 4 * 64 * 5)
    store = build(tmp_path / "s", model, make_examples(), shard_rows=None)
    assert [part.shard_rows for part in store.manifest.parts] == [5]
    assert store.manifest.shard_count == 3
    assert relative_error(store.rows(), per_example_gradients(model, make_examples(), projection=PROJECTION)) < 1e-4


def test_texts_are_tokenized_and_identified(tmp_path: Path, model: Any, tiny_tokenizer: Callable[..., Any]) -> None:
    from influence_fast.data.examples import tokenize

    tokenizer = tiny_tokenizer()
    texts = [Example(f"q{i}", f"What is {i}+{i}?", f"It is {2 * i}. " * (i + 1)) for i in range(6)]
    store = build(tmp_path / "s", model, texts, tokenizer=tokenizer)
    expected = per_example_gradients(model, tokenize(texts, tokenizer).examples, projection=PROJECTION)
    assert relative_error(store.rows(), expected) < BATCH_TOLERANCE
    assert store.identity.tokenizer_hash == tokenizer_hash(tokenizer)
    identity = identity_of(model, tokenizer, projection=PROJECTION)
    assert len(open_store(tmp_path / "s", expect=identity)) == 6
    with pytest.raises(StoreError, match="another tokenizer"):
        open_store(tmp_path / "s", expect=identity_of(model, tiny_tokenizer(eos="<pad>"), projection=PROJECTION))
    with pytest.raises(DataError, match="needs the model's tokenizer"):
        build(tmp_path / "t", model, texts)


def test_a_store_knows_the_tokens_that_it_was_made_from(
    tmp_path: Path, model: Any, tiny_tokenizer: Callable[..., Any]
) -> None:
    from influence_fast.data.examples import tokenize

    tokenizer = tiny_tokenizer()
    texts = [Example(f"q{i}", f"What is {i}+{i}?", f"It is {2 * i}.") for i in range(6)]
    store = build(tmp_path / "texts", model, texts, tokenizer=tokenizer)
    tokens = tokenize(texts, tokenizer).examples
    assert build(tmp_path / "tokens", model, tokens).tokens_hash == store.tokens_hash
    assert store.manifest.parts[0].shard_rows == 4
    hashes = [dataset_fingerprint(tokens[:4]), dataset_fingerprint(tokens[4:])]
    assert store.tokens_hash == hashlib.sha256(json.dumps(hashes).encode()).hexdigest()
    other = [tokens[0] | {"labels": tokens[0]["labels"].roll(1)}, *tokens[1:]]
    assert build(tmp_path / "other", model, other).tokens_hash != store.tokens_hash


def test_a_store_does_not_go_on_with_texts_made_into_other_tokens(
    tmp_path: Path, model: Any, tiny_tokenizer: Callable[..., Any], chatml: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tiny_tokenizer(chat_template="{{ strftime_now('%d %b %Y') }}" + chatml)
    texts = [Example(f"q{i}", f"What is {i}+{i}?", f"It is {2 * i}.") for i in range(6)]
    before = build(tmp_path / "s", model, texts, tokenizer=tokenizer).rows()
    assert torch.equal(build(tmp_path / "s", model, texts, tokenizer=tokenizer).rows(), before)
    monkeypatch.setattr("influence_fast.data.rendering.DAY", date(2025, 1, 1))
    with pytest.raises(StoreError, match=r"another tokenization: .* tokens \w+' in the store and '.* tokens \w+' here"):
        build(tmp_path / "s", model, texts, tokenizer=tokenizer)


@pytest.mark.parametrize("n", [0, 1])
def test_stores_of_no_and_of_one_example(tmp_path: Path, model: Any, n: int) -> None:
    store = build(tmp_path / "s", model, make_examples(n))
    assert (len(store), store.rows().shape) == (n, (n, 64))


# ---- what has no row ----------------------------------------------------------------------------------------------


def test_examples_without_a_gradient_are_reported_by_id(
    tmp_path: Path, model: Any, tiny_tokenizer: Callable[..., Any]
) -> None:
    texts = [Example(f"q{i}", "Why?", "Because.") for i in range(6)]
    texts[1] = Example("empty", "Why?", "  ")
    texts[4] = Example("long", "Why?", "Because " * 100)
    with pytest.warns(UserWarning, match=r"2 of 6 examples were set aside.*empty.*long"):
        store = build(tmp_path / "s", model, texts, tokenizer=tiny_tokenizer(), max_length=40)
    assert store.ids == ["q0", "q2", "q3", "q5"]
    assert dict(store.set_aside).keys() == {"empty", "long"}
    assert "the limit is 40" in dict(store.set_aside)["long"]
    with pytest.raises(StoreError, match="set aside: empty completion"):
        store.positions(["empty"])


@pytest.mark.parametrize("truncate", [False, True])
def test_tokenized_examples_keep_to_max_length(tmp_path: Path, model: Any, truncate: bool) -> None:
    examples = make_examples(8)
    cut = [{**e, "input_ids": e["input_ids"][:20], "labels": e["labels"][:20]} for e in examples]
    long = {e["id"] for e in examples if len(e["input_ids"]) > 20}
    assert 0 < len(long) < 8
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        store = build(tmp_path / "s", model, examples, max_length=20, truncate=truncate)
    kept = [e for e in cut if truncate or e["id"] not in long]
    assert store.ids == [e["id"] for e in kept]
    assert {name for name, _ in store.set_aside} == (set() if truncate else long)
    assert relative_error(store.rows(), per_example_gradients(model, kept, projection=PROJECTION)) < BATCH_TOLERANCE


def test_an_example_whose_completion_is_masked_is_reported(tmp_path: Path, model: Any) -> None:
    examples = make_examples(6)
    examples[2]["labels"] = torch.full_like(examples[2]["labels"], -100)
    with pytest.warns(UserWarning, match="e2"):
        store = build(tmp_path / "s", model, examples)
    assert store.set_aside == [("e2", "no completion token to learn from")]
    assert len(store) == 5


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_set_aside_and_harms_no_neighbour(
    tmp_path: Path, tiny_lora: Callable[..., Any], value: float
) -> None:
    """A real one: the embedding of one token, which only two examples have."""
    model = tiny_lora("llama", seed=1)
    examples = make_examples()
    for i in (3, 7):
        examples[i]["input_ids"][1] = 310
    healthy = [e for i, e in enumerate(examples) if i not in (3, 7)]
    expected = per_example_gradients(model, healthy, projection=PROJECTION)
    with torch.no_grad():
        model.get_input_embeddings().weight[310] = value
    with pytest.warns(UserWarning, match="2 of 11"):
        store = build(tmp_path / "s", model, examples, max_tokens=200)
    assert [name for name, _ in store.set_aside] == ["e3", "e7"]
    assert store.ids == [e["id"] for e in healthy]
    assert relative_error(store.rows(), expected) < BATCH_TOLERANCE
    with pytest.raises(NumericError, match="NaN or infinite for e3"):
        build(tmp_path / "t", model, examples, on_nonfinite="error")


# ---- bad input -----------------------------------------------------------------------------------------------------


def test_bad_input_is_named(tmp_path: Path, model: Any, tiny_model: Callable[..., Any]) -> None:
    examples = make_examples(4)
    with pytest.raises(StoreError, match="more than once: e1"):
        build(tmp_path / "s", model, [*examples, examples[1]])
    with pytest.raises(DataError, match=r"dataset\[0\]: its id must be a string, not 7.5"):
        build(tmp_path / "s", model, [{**examples[0], "id": 7.5}])
    with pytest.raises(DataError, match=r"examples\[1\]: no 'labels'"):
        build(tmp_path / "s", model, [examples[0], {"input_ids": examples[1]["input_ids"]}])
    with pytest.raises(DataError, match=r"examples\[1\] is a Example, not tokens"):
        build(tmp_path / "s", model, [examples[0], Example("a", "b", "c")])
    with pytest.raises(ConfigError, match=r"RowSpec\.dtype: unknown value 'float32'; did you mean"):
        build(tmp_path / "s", model, examples, dtype="float32")
    with pytest.raises(ConfigError, match="on_nonfinite"):
        build(tmp_path / "s", model, examples, on_nonfinite="skip")
    with pytest.raises(ConfigError, match="shard_rows"):
        build(tmp_path / "s", model, examples, shard_rows=0)
    with pytest.raises(ModelError, match="LoRA"):
        build(tmp_path / "s", tiny_model(), examples)
    with pytest.raises(ConfigError, match="part"):
        build_shards(tmp_path / "s", model, examples, RowSpec("none"), options=BuildOptions(part=(2, 2)))
    assert not (tmp_path / "s").exists()


def test_a_source_that_skips_an_example_is_an_error(tmp_path: Path, model: Any) -> None:
    def forgetful(model: Any, examples: Any, spec: RowSpec) -> Iterator[tuple[list[int], torch.Tensor]]:
        for places, rows in iter_gradient_rows(model, examples, spec):
            yield places[1:], rows[1:]

    with pytest.raises(ModelError, match="no row for e"):
        build(tmp_path / "s", model, make_examples(), gradients=forgetful)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"projection": Projection(dim=4, seed=4, width=64)}, "projection_seed is 3 in the store and 4 here"),
        ({"loss_reduction": "sum"}, "another loss reduction"),
        ({"dtype": "bf16"}, "dtype is 'fp32' in the store and 'bf16' here"),
        ({"max_length": 30}, "another tokenization"),
        ({"shard_rows": 5}, "shard_rows is 4"),
        ({"seed": 1}, "another dataset"),
        ({"base": 1}, "another model: model_hash"),
        ({"lora": 1}, "another adapter"),
        ({"scaling": 1}, "another adapter"),
    ],
)
def test_a_store_of_other_work_is_not_gone_on_with(
    tmp_path: Path, tiny_lora: Callable[..., Any], change: dict[str, Any], message: str
) -> None:
    model = tiny_lora("qwen2", seed=5)
    build(tmp_path / "s", model, make_examples())
    before = stored_bytes(tmp_path / "s")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ("base" in change and name.endswith("mlp.up_proj.base_layer.weight")) or (
                "lora" in change and name.endswith("lora_A.default.weight")
            ):
                parameter.view(-1)[-1] += 1e-3
                break
    for module in model.modules():
        if "scaling" in change and isinstance(getattr(module, "scaling", None), dict):
            module.scaling = {name: 2 * value for name, value in module.scaling.items()}
    examples = make_examples(seed=change.get("seed", 0))
    options = {k: v for k, v in change.items() if k not in ("seed", "base", "lora", "scaling")}
    with pytest.raises(StoreError, match=message):
        build(tmp_path / "s", model, examples, **options)
    assert stored_bytes(tmp_path / "s") == before


# ---- fingerprints ----------------------------------------------------------------------------------------------------


def test_the_base_hash_is_that_of_the_model_before_the_adapter(
    tiny_model: Callable[..., Any], tiny_lora: Callable[..., Any]
) -> None:
    base, none = weight_hashes(tiny_model("qwen2", seed=2))
    assert none is None
    with_adapter, adapter = weight_hashes(tiny_lora("qwen2", seed=2))
    assert with_adapter == base
    assert adapter is not None
    assert weight_hashes(tiny_lora("qwen2", seed=3)) != (base, adapter)


def test_only_the_active_adapter_counts_and_not_its_name(tiny_lora: Callable[..., Any]) -> None:
    from peft import LoraConfig

    model = tiny_lora("qwen2")
    before = weight_hashes(model)
    model.add_adapter("other", LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert weight_hashes(model) == before
    model.set_adapter("other")
    assert weight_hashes(model)[0] == before[0]
    assert weight_hashes(model)[1] != before[1]


def test_hashing_in_chunks_is_hashing_at_once(tiny_lora: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_lora("qwen2")
    at_once = weight_hashes(model)
    monkeypatch.setattr("influence_fast.data.fingerprints._CHUNK_BYTES", 100)
    assert weight_hashes(model) == at_once


def test_using_a_tokenizer_does_not_change_its_hash(tiny_tokenizer: Callable[..., Any], chatml: str) -> None:
    tokenizer = tiny_tokenizer()
    before = tokenizer_hash(tokenizer)
    tokenizer(["a", "bc"], padding=True, truncation=True, max_length=3)
    assert tokenizer_hash(tokenizer) == before == tokenizer_hash(tiny_tokenizer())
    assert len({before, tokenizer_hash(tiny_tokenizer(chatml)), tokenizer_hash(tiny_tokenizer(bos=True))}) == 3


def test_the_dataset_fingerprint_sees_order_ids_and_every_field() -> None:
    texts = [Example("a", "p", "c"), Example("b", "p", "d")]
    changed = [
        texts[::-1],
        texts[:1],
        [Example("z", "p", "c"), texts[1]],
        [Example("a", "q", "c"), texts[1]],
        [Example("a", "pc", ""), texts[1]],
        [Example("a", "p", "c", context=(("system", "s"),)), texts[1]],
    ]
    assert len({dataset_fingerprint(d) for d in [texts, *changed]}) == 7
    assert dataset_fingerprint(texts) == dataset_fingerprint([Example("a", "p", "c", row=9), texts[1]])
    tokens = make_examples(3)
    other = make_examples(3)
    other[1]["labels"][-1] = -100
    assert dataset_fingerprint(tokens) == dataset_fingerprint(make_examples(3)) != dataset_fingerprint(other)


# ---- interruption -------------------------------------------------------------------------------------------------


def test_several_processes_share_one_folder_or_have_one_each(tmp_path: Path, model: Any) -> None:
    build(tmp_path / "whole", model, make_examples())

    def share(name: str, rank: int) -> Any:
        options = BuildOptions(shard_rows=4, part=(rank, 2))
        return build_shards(tmp_path / name, model, make_examples(), SPEC, options=options)

    writers = [share("shared", rank) for rank in (0, 1)]
    for writer in writers:  # any of them, more than once
        writer.finalize()
    assert stored_bytes(tmp_path / "shared") == stored_bytes(tmp_path / "whole")
    for r in (0, 1):
        share(str(r), r)
    merge_stores([tmp_path / "0", tmp_path / "1"], tmp_path / "merged")
    assert stored_bytes(tmp_path / "merged") == stored_bytes(tmp_path / "whole")


def test_a_store_joined_of_stores_of_the_datas_pieces_is_one_of_the_data(tmp_path: Path, model: Any) -> None:
    data = make_examples(11)
    for name, piece, rows in (("a", data[:6], 4), ("b", data[6:], 2)):
        build(tmp_path / name, model, piece, shard_rows=rows)
    joined = merge_stores([tmp_path / "a", tmp_path / "b"], tmp_path / "s")
    whole = stored_bytes(tmp_path / "s")
    rows = joined.rows()

    def refuse(model: Any, examples: Any, spec: RowSpec) -> Any:
        raise AssertionError("gradients were computed")

    again = build(tmp_path / "s", model, data, shard_rows=None, gradients=refuse)
    assert again.ids == [example["id"] for example in data]
    rotten = tmp_path / "s" / "rows-00003.bin"  # the second shard of the second piece
    rotten.write_bytes(bytes(rotten.stat().st_size))
    with pytest.warns(UserWarning, match="computed again"):
        again = build(tmp_path / "s", model, data, shard_rows=None)
    assert torch.equal(again.rows(), rows)
    assert stored_bytes(tmp_path / "s") == whole
    for other in (data[6:] + data[:6], data[:10], data[:7] + data[8:] + data[7:8]):
        with pytest.raises(StoreError, match="made with another dataset"):
            build(tmp_path / "s", model, other, shard_rows=None)


def test_ctrl_c_says_what_is_done_and_the_build_goes_on(tmp_path: Path, model: Any) -> None:
    build(tmp_path / "whole", model, make_examples())
    computed: list[str] = []

    def interrupted(model: Any, examples: Any, spec: RowSpec, **more: Any) -> Iterator[tuple[list[int], torch.Tensor]]:
        if examples[0]["id"] == "e4":
            raise KeyboardInterrupt
        yield from iter_gradient_rows(model, examples, spec, **more)

    def counted(model: Any, examples: Any, spec: RowSpec, **more: Any) -> Iterator[tuple[list[int], torch.Tensor]]:
        computed.extend(example["id"] for example in examples)
        yield from iter_gradient_rows(model, examples, spec, **more)

    with pytest.raises(KeyboardInterrupt, match=r"1 of 3 shards of .* are done"):
        build(tmp_path / "s", model, make_examples(), gradients=interrupted)
    with pytest.raises(StoreError, match="already holds a store"):
        build(tmp_path / "s", model, make_examples(), resume=False)
    build(tmp_path / "s", model, make_examples(), gradients=counted)
    assert computed == [f"e{i}" for i in range(4, 11)]
    assert stored_bytes(tmp_path / "s") == stored_bytes(tmp_path / "whole")


def test_the_batches_of_an_interrupted_shard_are_not_computed_again(
    tmp_path: Path, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(tmp_path / "whole", model, make_examples(), max_tokens=30)
    computed: list[list[int]] = []

    def watched(*args: Any, limit: int, **options: Any) -> Iterator[tuple[list[int], torch.Tensor]]:
        for places, rows in iter_gradient_rows(*args, **options):
            if len(computed) == limit:
                raise KeyboardInterrupt
            computed.append(places)
            yield places, rows

    monkeypatch.setattr(ROWS_OF, lambda *a, **o: watched(*a, limit=2, **o))
    with pytest.raises(KeyboardInterrupt, match="0 of 3 shards"):
        build(tmp_path / "s", model, make_examples(), max_tokens=30)
    first = list(computed)
    assert [p.name for p in (tmp_path / "s").glob(".partial*")] == [".partial-00000.safetensors"]
    computed.clear()
    monkeypatch.setattr(ROWS_OF, lambda *a, **o: watched(*a, limit=99, **o))
    build(tmp_path / "s", model, make_examples(), max_tokens=30)
    assert sum(map(len, first + computed)) == 11  # each example once
    assert stored_bytes(tmp_path / "s") == stored_bytes(tmp_path / "whole")
    assert not list((tmp_path / "s").glob(".*"))


@pytest.mark.parametrize("name", ["rows-00001.bin", "losses-00000.bin"])
def test_a_damaged_shard_is_computed_again(tmp_path: Path, model: Any, name: str) -> None:
    """Of the right size: nothing but its checksum tells."""
    build(tmp_path / "s", model, make_examples())
    whole = stored_bytes(tmp_path / "s")
    with (tmp_path / "s" / name).open("r+b") as file:
        file.seek(5)
        file.write(b"\x55\xaa")
    computed = []

    def counted(model: Any, examples: Any, spec: RowSpec, **more: Any) -> Iterator[tuple[list[int], torch.Tensor]]:
        computed.extend(example["id"] for example in examples)
        yield from iter_gradient_rows(model, examples, spec, **more)

    with pytest.warns(UserWarning, match=rf"computed again: .*{name} is not what was written"):
        build(tmp_path / "s", model, make_examples(), gradients=counted)
    first = 4 * int(name[-5])
    assert computed == [f"e{i}" for i in range(first, first + 4)]
    assert verify_store(tmp_path / "s") == []
    if name.startswith("rows"):  # another source's rows have no losses
        assert stored_bytes(tmp_path / "s") == whole


@pytest.mark.parametrize("damage", ["garbage", "another seed", "another place", "without losses"])
def test_a_partial_shard_that_does_not_fit_is_left_aside(tmp_path: Path, model: Any, damage: str) -> None:
    from safetensors.torch import save_file

    build(tmp_path / "whole", model, make_examples())
    part = build_shards(
        tmp_path / "s",
        model,
        make_examples(),
        SPEC,
        options=BuildOptions(shard_rows=4, part=(2, 3)),
    )
    path = tmp_path / "s" / ".partial-00000.safetensors"
    part.keep_partial(0, torch.ones(4, 64), torch.ones(4), {0, 1})
    assert part.partial(0, 4) is not None
    if damage == "garbage":
        path.write_bytes(path.read_bytes()[:-9])
    elif damage == "another seed":
        found = {"rows": torch.ones(1, 64), "losses": torch.ones(1), "places": torch.tensor([0])}
        save_file(found, path, {"fingerprint": "0" * 64, "examples": "4"})
    elif damage == "without losses":
        about = {"fingerprint": part.manifest.fingerprints()[0], "examples": "4"}
        save_file({"rows": torch.ones(1, 64), "places": torch.tensor([0])}, path, about)
    else:
        about = {"fingerprint": part.manifest.fingerprints()[0], "examples": "4"}
        found = {"rows": torch.ones(1, 64), "losses": torch.ones(1), "places": torch.tensor([4])}
        save_file(found, path, about)
    build(tmp_path / "s", model, make_examples())
    assert stored_bytes(tmp_path / "s") == stored_bytes(tmp_path / "whole")


def test_a_finished_store_is_opened_and_nothing_computed(tmp_path: Path, model: Any) -> None:
    def never(model: Any, examples: Any, spec: RowSpec) -> Iterator[tuple[list[int], torch.Tensor]]:
        raise AssertionError("computed again")

    build(tmp_path / "s", model, make_examples())
    assert len(build(tmp_path / "s", model, make_examples(), gradients=never)) == 11


def test_a_full_disk_in_a_build_keeps_what_is_done(tmp_path: Path, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: Any, data: Any) -> None:
        if ".rows-00002" in handle.name:
            raise OSError(28, "No space left on device")
        handle.write(data)

    build(tmp_path / "whole", model, make_examples())
    with monkeypatch.context() as patch:
        patch.setattr(store_writer, "_write", full)
        with pytest.raises(StoreError, match=r"the disk is full while writing .*: the 2 finished shards are kept"):
            build(tmp_path / "s", model, make_examples())
    build(tmp_path / "s", model, make_examples())
    assert stored_bytes(tmp_path / "s") == stored_bytes(tmp_path / "whole")


def test_the_progress_bar_counts_every_example(tmp_path: Path, model: Any, capsys: pytest.CaptureFixture[str]) -> None:
    examples = make_examples(6)
    examples[2]["labels"] = torch.full_like(examples[2]["labels"], -100)
    with pytest.warns(UserWarning, match="e2"):
        build(tmp_path / "s", model, examples, progress=True)
    assert "6/6" in capsys.readouterr().err
    build(tmp_path / "t", model, make_examples(6))
    assert capsys.readouterr().err == ""


def test_one_engine_serves_all_shards_and_none_is_opened_for_a_finished_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Any
) -> None:
    opened = []
    enter = GradientEngine.__enter__

    def counted(self: GradientEngine) -> GradientEngine:
        opened.append(self)
        return enter(self)

    monkeypatch.setattr(GradientEngine, "__enter__", counted)
    for _ in range(2):
        store = build_store(
            tmp_path / "s", model, make_examples(10), RowSpec("none"), options=BuildOptions(shard_rows=2)
        )
        assert len(store) == 10
        assert len(opened) == 1
    assert not any("forward" in vars(module) for module in model.modules())


# The builder imports everything once, then forks a child for each line it reads, so that a trial costs the build alone.
BUILDER = (
    world(longest=40)
    + """
import gc, glob, os, signal, sys, time
from influence_fast.influence.building import build_store
from influence_fast.gradients.per_example import iter_gradient_rows
from influence_fast.gradients.rows.row_spec import RowSpec
from influence_fast.store.building import BuildOptions

gc.collect()
gc.freeze()  # a collection of all that was imported takes as long as a build, and would fall into one and not another
print("ready", flush=True)
for line in sys.stdin:
    path, shards, later = line.rstrip("\\n").split("\\t")
    child = os.fork()
    if child == 0:
        build_store(path, model, examples, RowSpec(dim=4, width=64, sketch="random", dtype="int8"),
                    options=BuildOptions(shard_rows=3, progress=False))
        os._exit(0)
    if shards:
        # The moment is counted in shards and not in seconds: on a busy machine a build takes several times as long.
        while len(glob.glob(path + "/shard-*.json")) < int(shards) and not os.waitid(
            os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT
        ):
            time.sleep(0.0005)
        time.sleep(float(later))
        os.kill(child, signal.SIGKILL)  # its number is its own until waitpid, even when it has ended
    print(os.waitpid(child, 0)[1], flush=True)
"""
)


class Builder:
    """A process that builds the same store wherever it is told, in children that may be killed."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
        self.process: subprocess.Popen[str] = subprocess.Popen([sys.executable, "-c", BUILDER], **pipes)  # type: ignore[call-overload]
        assert self._line() == "ready"

    def run(self, path: Path, kill: tuple[int, float] | None = None) -> bool:
        """Build a store; False where it was killed `kill[1]` seconds after the first `kill[0]` shards were written."""
        assert self.process.stdin is not None
        shards, later = kill or ("", "")
        self.process.stdin.write(f"{path}\t{shards}\t{later}\n")
        self.process.stdin.flush()
        status = int(self._line())
        assert status in (0, signal.SIGKILL)
        return status == 0

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def builder() -> Iterator[Builder]:
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    made = Builder()
    yield made
    made.close()


@pytest.mark.flaky(reruns=1)  # kills at moments of a clock
@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=pytest.mark.exhaustive)])
def test_kill_9_at_any_moment_changes_no_bit(tmp_path: Path, builder: Builder, kills: int) -> None:
    """Each trial is killed again and again, at random moments, until `kills` are spent; then it is left to finish."""
    assert builder.run(tmp_path / "whole")
    expected = stored_bytes(tmp_path / "whole")
    assert len(expected) == 1 + 16 * 5  # the manifest; rows, scales, losses, ids and record of 16 shards
    rng = random.Random(kills)
    killed = in_the_middle = trial = 0
    while killed < kills and trial < 5 * kills:
        trial += 1
        folder = tmp_path / f"trial{trial}"
        for _ in range(3):
            finished = builder.run(folder, kill=(rng.randrange(16), rng.uniform(0, 0.03)))
            killed += not finished
            in_the_middle += not finished and 0 < len(list(folder.glob("shard-*.json"))) < 16
            if finished or killed == kills:
                break
        assert builder.run(folder)
        assert stored_bytes(folder) == expected
        assert verify_store(folder) == []
        assert not list(folder.glob(".rows-*"))
    assert killed == kills
    assert in_the_middle >= kills // 4
