"""Tokenized examples in every form that people hold: each gives the rows of the plain list, or names what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from torch.utils.data import DataLoader
from transformers import BatchEncoding, DataCollatorForSeq2Seq, DataCollatorWithFlattening

import influence_fast as inf
from influence_fast.data.held import as_examples
from influence_fast.errors import ConfigError, DataError
from influence_fast.gradients.per_example import per_example_losses

LENGTHS = (5, 3, 7, 2, 4)


def made() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for n in LENGTHS:
        ids = torch.randint(3, 60, (n,), generator=generator)
        rows.append({"input_ids": ids, "labels": torch.where(torch.arange(n) < n // 2, -100, ids)})
    return rows


def lists() -> list[dict[str, list[int]]]:
    return [{name: value.tolist() for name, value in row.items()} for row in made()]


def padded(side: str) -> dict[str, torch.Tensor]:
    most = max(LENGTHS)
    batch = {
        "input_ids": torch.full((len(LENGTHS), most), 1),
        "labels": torch.full((len(LENGTHS), most), -100),
        "attention_mask": torch.zeros(len(LENGTHS), most, dtype=torch.int64),
    }
    for i, row in enumerate(made()):
        n = LENGTHS[i]
        at = slice(0, n) if side == "right" else slice(most - n, most)
        batch["attention_mask"][i, at] = 1
        for name, values in row.items():
            batch[name][i, at] = values
    return batch


def collated(rows: list[Any]) -> dict[str, torch.Tensor]:
    columns = {"input_ids": 1, "labels": -100}
    tensors = {name: [torch.as_tensor(row[name]) for row in rows] for name in columns}
    batch = {
        name: torch.nn.utils.rnn.pad_sequence(tensors[name], batch_first=True, padding_value=pad)
        for name, pad in columns.items()
    }
    lengths = torch.tensor([len(ids) for ids in tensors["input_ids"]])
    return {**batch, "attention_mask": (torch.arange(batch["labels"].shape[1]) < lengths[:, None]).long()}


def as_columns(rows: list[dict[str, list[int]]]) -> dict[str, list[Any]]:
    return {name: [row[name] for row in rows] for name in rows[0]}


FORMS: dict[str, Callable[[], Any]] = {
    "tensors": made,
    "lists": lists,
    "tuple": lambda: tuple(lists()),
    "arrays": lambda: [{name: np.array(value, np.int32) for name, value in row.items()} for row in lists()],
    "batch padded right": lambda: padded("right"),
    "batch padded left": lambda: padded("left"),
    "batch of lists": lambda: {name: value.tolist() for name, value in padded("left").items()},
    "batch encoding": lambda: BatchEncoding(padded("right")),
    "ragged batch": lambda: as_columns(lists()),
    "boolean mask": lambda: {**padded("right"), "attention_mask": padded("right")["attention_mask"].bool()},
    "two batches": lambda: [
        {k: v[:2] for k, v in padded("left").items()},
        {k: v[2:] for k, v in padded("left").items()},
    ],
    "dataset": lambda: Dataset.from_list(lists()),
    "dataset of tensors": lambda: Dataset.from_list(lists()).with_format("torch"),
    "dataset of arrays": lambda: Dataset.from_list(lists()).with_format("numpy"),
    "iterable dataset": lambda: Dataset.from_list(lists()).to_iterable_dataset(),
    "dataset of frames": lambda: Dataset.from_list(lists()).with_format("pandas"),
    "dataset of tables": lambda: Dataset.from_list(lists()).with_format("arrow"),
    "iterable dataset of tables": lambda: Dataset.from_list(lists()).to_iterable_dataset().with_format("arrow"),
    "frame": lambda: Dataset.from_list(lists()).to_pandas(),
    "table": lambda: Dataset.from_list(lists()).data.table,
    "arrays of any order": lambda: [{k: np.array(v[::-1], ">i4")[::-1] for k, v in row.items()} for row in lists()],
    "arrays of objects": lambda: [{k: np.array(v, object) for k, v in row.items()} for row in lists()],
    "small numbers": lambda: [{**row, "input_ids": np.array(row["input_ids"], np.uint16)} for row in lists()],
    "small masked numbers": lambda: [
        {"input_ids": row["input_ids"].to(torch.uint8), "completion_mask": row["labels"] != -100} for row in made()
    ],
    "loader of lists of rows": lambda: DataLoader(lists(), batch_size=2, collate_fn=list),
    "loader": lambda: DataLoader(Dataset.from_list(lists()), batch_size=2, collate_fn=collated),
    "loader of rows": lambda: DataLoader(lists(), batch_size=None),
    "generator": lambda: (row for row in lists()),
    "generator of batches": lambda: (collated(lists()[i : i + 3]) for i in (0, 3)),
    "masked dataset": lambda: Dataset.from_list(
        [{"input_ids": row["input_ids"], "completion_mask": [int(x != -100) for x in row["labels"]]} for row in lists()]
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_examples(form: str) -> None:
    found = as_examples(FORMS[form](), numbered=True)
    assert len(found) == len(LENGTHS)
    for place, (row, wanted) in enumerate(zip(found, made(), strict=True)):
        assert row["id"] == str(place)
        assert row["input_ids"].tolist() == wanted["input_ids"].tolist()
        assert row["labels"].tolist() == wanted["labels"].tolist()
        assert "attention_mask" not in row


def test_batches_of_a_collator_of_transformers(tiny_tokenizer: Callable[..., Any]) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    loader = DataLoader(lists(), batch_size=2, collate_fn=DataCollatorForSeq2Seq(tokenizer))
    found = as_examples(loader)
    assert [row["labels"].tolist() for row in found] == [row["labels"] for row in lists()]


def test_ids_are_kept_and_whole_numbers_become_texts() -> None:
    assert [row["id"] for row in as_examples([{"id": f"a{i}", **row} for i, row in enumerate(lists())])][:2] == [
        "a0",
        "a1",
    ]
    numbers = Dataset.from_list([{"id": 10 + i, **row} for i, row in enumerate(lists())])
    assert as_examples(numbers, numbered=True)[1]["id"] == "11"
    batch = {**padded("right"), "id": torch.arange(5) + 10}
    assert [row["id"] for row in as_examples(batch)] == ["10", "11", "12", "13", "14"]


@pytest.mark.parametrize("form", ["torch", "numpy"])
def test_whole_numbers_of_any_library_are_ids(form: str) -> None:
    data = Dataset.from_list([{"id": 10 + i, **row} for i, row in enumerate(lists())]).with_format(form)
    assert [row["id"] for row in as_examples(data, numbered=True)] == ["10", "11", "12", "13", "14"]
    assert as_examples([{"id": np.int64(4), **lists()[0]}])[0]["id"] == "4"
    batch = {**padded("left"), "id": [None] * 5}
    assert as_examples(batch, numbered=True)[0]["id"] == "0"


def test_weights_of_python_are_doubles_and_none_are_no_weights() -> None:
    row = {"input_ids": [1, 2], "labels": [1, 2]}
    (found,) = as_examples([{**row, "weights": [0.1, 0.2]}])
    assert found["weights"].tolist() == [0.1, 0.2]
    assert "weights" not in as_examples([{**row, "weights": None}])[0]


ROW = {"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 7, 8]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (7, r"examples\[0\] is a int, not tokens"),
        (ROW | {"labels": np.array([65436, 6, 7, 8], np.uint16)}, "labels of torch.uint16 cannot hold -100"),
        (ROW | {"pixel_values": torch.zeros(3, 2, 2)}, "'pixel_values' beside its tokens"),
        (ROW | {"cu_seq_lens_q": [0, 2, 4]}, "packed in one row"),
        (ROW | {"seq_idx": torch.tensor([[0, 0, 1, 1]])}, "packed in one row"),
        ({"input_ids": [1, 2], "completion_mask": [-100, 1]}, "other numbers than 0 and 1"),
        ({"input_ids": [1, 2], "completion_mask": "no"}, "no list of zeros and ones"),
        ({"prompt": "a", "completion": "b"}, r"row of text \(prompt, completion\) is read by inf.load_examples"),
        (DatasetDict(train=Dataset.from_list([ROW])), "the splits 'train': give one"),
        ("text", r"examples\[0\] is a str, not tokens"),
        ({"labels": [1, 2]}, "no 'input_ids'"),
        ({"input_ids": [1, 2]}, "no 'labels'"),
        ({**ROW, "labels": [1, 2]}, "of one length"),
        ({**ROW, "input_ids": [5.5, 6, 7, 8]}, "whole numbers"),
        ({**ROW, "input_ids": [5, "x", 7, 8]}, "no list of whole numbers"),
        ({**ROW, "input_ids": torch.zeros(1, 2, 2)}, "1-D"),
        ({**ROW, "attention_mask": [1, 0, 1, 1]}, "one run of ones"),
        ({**ROW, "attention_mask": [1, 1, 2, 2]}, "one run of ones"),
        ({**ROW, "attention_mask": [0, 0, 0, 0]}, "no token"),
        ({**ROW, "attention_mask": [1, 1, 1]}, "3 numbers for 4"),
        ({**ROW, "attention_mask": [1, 1, 1, 0]}, "have labels"),
        ({**ROW, "position_ids": [0, 1, 0, 1]}, "position_ids do not count up"),
        ({**ROW, "seq_lengths": [2, 2]}, "2 examples are in this row"),
        ({**ROW, "weights": [1.0, 2.0]}, r"shape \(2,\) for 4"),
        ({**ROW, "weights": [1.0, float("nan"), 1.0, 1.0]}, "NaN or infinite"),
        ({**ROW, "weights": "heavy"}, "no numbers"),
        ({"input_ids": [1, 2], "completion_mask": [1]}, r"completion_mask has shape \(1,\)"),
    ],
)
def test_what_is_no_example_is_named(row: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        as_examples([row])


def test_batches_of_unequal_columns_are_named() -> None:
    with pytest.raises(DataError, match="a batch of 5 rows has 4 of 'labels'"):
        as_examples({**padded("right"), "labels": padded("right")["labels"][:4]})
    with pytest.raises(DataError, match="examples are a int"):
        as_examples(3)  # type: ignore[arg-type]


def test_ids_that_not_every_row_of_a_batch_has_are_named() -> None:
    with pytest.raises(DataError, match="a batch of 5 rows has 2 of 'id'"):
        as_examples({**padded("right"), "id": [1, 2]})
    assert all(row["weights"].eq(2).all() for row in as_examples({**padded("right"), "weights": 2.0}))


def test_rows_that_hold_several_texts_are_refused_in_batches_too() -> None:
    columns = as_columns([{**row, "seq_lengths": [2, len(row["labels"]) - 2]} for row in lists()])
    with pytest.raises(DataError, match="2 examples are in this row"):
        as_examples(columns)
    flat = DataCollatorWithFlattening(return_position_ids=False, return_flash_attn_kwargs=True)
    with pytest.raises(DataError, match="packed in one row"):
        as_examples(DataLoader(lists(), batch_size=2, collate_fn=flat))


def test_lists_that_the_default_collation_transposes_are_refused() -> None:
    even = [{"input_ids": [4, 5, 6], "labels": [4, 5, 6]}] * 4
    with pytest.raises(DataError, match="transposes lists of tokens"):
        as_examples(DataLoader(even, batch_size=2))
    tensors = [{name: torch.tensor(value) for name, value in row.items()} for row in even]
    assert [row["input_ids"].tolist() for row in as_examples(DataLoader(tensors, batch_size=2))] == [[4, 5, 6]] * 4


def test_results_in_the_order_of_a_loader_that_shuffles_are_said() -> None:
    loader = DataLoader(lists(), batch_size=2, shuffle=True, collate_fn=list)
    with pytest.warns(UserWarning, match="in the order of this pass, not of its data set: give it shuffle=False"):
        as_examples(loader)
    with pytest.raises(DataError, match="numbers would not be places"):
        as_examples(loader, numbered=True)
    named = [{"id": f"a{i}", **row} for i, row in enumerate(lists())]
    found = as_examples(DataLoader(named, batch_size=2, shuffle=True, collate_fn=list), numbered=True)
    assert sorted(row["id"] for row in found) == ["a0", "a1", "a2", "a3", "a4"]


def test_paths_and_texts_are_told_from_tokens() -> None:
    with pytest.raises(DataError, match=r"path 'train.jsonl': read a file by inf.load_examples"):
        as_examples("train.jsonl")


def test_positions_of_left_padding_count_from_the_first_token() -> None:
    batch = padded("left")
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    assert as_examples({**batch, "position_ids": positions})[1]["input_ids"].tolist() == lists()[1]["input_ids"]


# ---- weights -------------------------------------------------------------------------------------------------


def weighted() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    rows: list[dict[str, Any]] = [dict(row) for row in made()]
    for i in (0, 2, 3):  # weights of both signs in some, none in others
        rows[i]["weights"] = torch.randn(LENGTHS[i], generator=generator, dtype=torch.float64)
    rows[1]["weights"] = -0.5
    return rows


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_rows_of_weighted_tokens_are_autograds(tiny_lora: Callable[..., Any], reduction: str) -> None:
    model = tiny_lora(dtype=torch.float64)
    rows = inf.per_example_gradients(model, weighted(), loss_reduction=reduction)
    losses = per_example_losses(model, weighted(), loss_reduction=reduction)
    factors = [p for name, p in model.named_parameters() if "lora_" in name]
    for place, row in enumerate(weighted()):
        logits = model(input_ids=row["input_ids"][None]).logits[0, :-1]
        counted = row["labels"][1:] != -100
        token = torch.nn.functional.cross_entropy(logits[counted], row["labels"][1:][counted], reduction="none")
        given = torch.as_tensor(row.get("weights", 1.0), dtype=torch.float64).expand(LENGTHS[place])
        loss = (given[1:][counted] * token).sum() / (counted.sum() if reduction == "mean" else 1)
        wanted = torch.cat([g.flatten() for g in torch.autograd.grad(loss, factors)])
        assert (rows[place] - wanted).norm() < 1e-10 * wanted.norm()
        assert abs(losses[place] - loss) < 1e-10


def test_a_padded_batch_has_the_rows_of_its_examples(tiny_lora: Callable[..., Any]) -> None:
    model = tiny_lora(dtype=torch.float64)
    assert torch.equal(inf.per_example_gradients(model, padded("left")), inf.per_example_gradients(model, made()))


def test_streamed_scores_see_the_weights(tiny_lora: Callable[..., Any]) -> None:
    model = tiny_lora(dtype=torch.float64)
    queries = inf.per_example_gradients(model, made()[:2])
    scores = inf.stream_influence(model, weighted(), queries)
    assert torch.allclose(scores, inf.per_example_gradients(model, weighted()) @ queries.T, rtol=1e-9, atol=1e-12)


def test_weights_of_nothing_but_zeros_are_named(tiny_lora: Callable[..., Any]) -> None:
    with pytest.raises(DataError, match="weights of all its learned tokens are 0"):
        inf.per_example_gradients(tiny_lora(), [{**made()[0], "weights": 0}])


def test_a_store_of_a_dataset_numbers_its_rows_and_knows_weights(tmp_path: Any, tiny_lora: Callable[..., Any]) -> None:
    model = tiny_lora()
    data = Dataset.from_list(lists())
    store = inf.build_store(tmp_path / "plain", model, data, inf.RowSpec("none", dtype="fp32"))
    assert store.ids == ["0", "1", "2", "3", "4"]
    assert torch.allclose(store.rows(), inf.per_example_gradients(model, made()))
    heavy = inf.build_store(tmp_path / "heavy", model, weighted(), inf.RowSpec("none", dtype="fp32"))
    assert torch.allclose(heavy.rows(), inf.per_example_gradients(model, weighted()))
    assert heavy.tokens_hash != store.tokens_hash
    assert heavy.identity.dataset_fingerprint != store.identity.dataset_fingerprint


def test_rows_are_the_same_inside_no_grad_and_refused_in_inference_mode(tiny_lora: Callable[..., Any]) -> None:
    model = tiny_lora(num_hidden_layers=1)
    wanted = inf.per_example_gradients(model, made())
    with torch.no_grad():
        assert torch.equal(inf.per_example_gradients(model, made()), wanted)
    with torch.inference_mode(), pytest.raises(ConfigError, match=r"inside torch\.inference_mode\(\)"):
        inf.per_example_gradients(model, made())
