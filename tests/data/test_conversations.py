"""Turns of conversations: which is the completion, which are trained on, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from influence_fast.data.examples import Example, load_examples, save_examples
from influence_fast.errors import ConfigError, DataError

Message = dict[str, Any]


def user(text: str = "1+1?", **more: Any) -> Message:
    return {"role": "user", "content": text, **more}


def assistant(text: str | None, **more: Any) -> Message:
    return {"role": "assistant", "content": text, **more}


def read(*messages: Message, **options: Any) -> Example:
    [example] = load_examples([{"messages": list(messages)}], **options)
    return example


# ---- reasoning -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["reasoning", "reasoning_content", "thinking"])
def test_reasoning_beside_content_is_part_of_the_completion(field: str) -> None:
    example = read(user(), assistant("2", **{field: "one and one"}))
    assert example == Example("0", "1+1?", "<think>\none and one\n</think>\n\n2", reasoning="one and one")
    assert read(user(), assistant(None, **{field: "t"})).completion == "<think>\nt\n</think>\n\n"
    assert read(user(), assistant("2", **{field: None})) == Example("0", "1+1?", "2")
    assert read(user(), assistant("2", **{field: float("nan")})) == Example("0", "1+1?", "2")


def test_reasoning_of_an_earlier_turn_is_in_its_content() -> None:
    example = read(user(), assistant("2", reasoning="t"), user("and 2+2?"), assistant("4"))
    assert example.context == (("user", "1+1?"), ("assistant", "<think>\nt\n</think>\n\n2"))
    assert example.reasoning is None


def test_reasoning_that_content_repeats_is_taken_once() -> None:
    assert read(user(), assistant("<think>\nt\n</think>\n2", reasoning="t")).completion == "<think>\nt\n</think>\n2"
    with pytest.raises(DataError, match=r"row 0: message 1 .* another in its content; remove one"):
        read(user(), assistant("<think>\nt\n</think>\n2", reasoning="else"))


def test_fields_of_reasoning_that_agree_are_one() -> None:
    assert read(user(), assistant("2", reasoning="t", thinking="t", reasoning_content=None)).reasoning == "t"


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        (assistant("2", reasoning="a", thinking="b"), "'reasoning' and 'thinking' with different texts"),
        (user("and?", thinking="b"), "a 'user' turn with 'thinking'"),
        (assistant("2", reasoning=["a"]), "'reasoning' of message 1 .* is a list, not text"),
        (assistant(None), "the content of message 1 .* is null"),
        ({"role": "assistant"}, "the content of message 1 .* is missing"),
        (assistant(None, tool_calls=[{"function": {"name": "f"}}]), "'tool_calls', which is not supported"),
        (assistant("2", function_call={"name": "f"}), "'function_call', which is not supported"),
        (assistant("2", weight=2), "the weight 2; write 0"),
        (assistant("2", weight=0.5), "the weight 0.5; write 0"),
        (assistant("2", weight="1"), "the weight '1'; write 0"),
        (assistant("2", weight=True), "the weight True; write 0"),
        (user("and?", weight=1), "a 'user' turn with a weight; .* remove the weight"),
        (user("and?", weight=0), "a 'user' turn with a weight"),
        (assistant("2", mask=1), "'mask', of which 1 may mean loss or none; write 'weight'"),
        (assistant("2", loss_mask=False), "'loss_mask', of which 1"),
        (assistant("2", train="maybe"), "'train' 'maybe'; write false"),
        (assistant("2", train=False, weight=1), "'weight' and 'train' that contradict"),
        (user("and?", train=True), "a 'user' turn with a train; .* remove the train"),
        ({"role": "narrator", "content": "x"}, "the role 'narrator'; known: human, user, gpt"),
        (assistant("2", value="3"), "'content' and 'value' with different texts"),
    ],
)
def test_messages_that_cannot_be_used_are_named(message: Message, problem: str) -> None:
    with pytest.raises(DataError, match=problem) as error:
        read(user(), message, assistant("end"))
    assert "the list given, row 0" in str(error.value)
    assert "message 1" in str(error.value)
    assert "\n" not in str(error.value)


LONG = "one and one are two, as everybody knows"


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("2", f"<think>\n{LONG}\n</think>\n\n2"),
        ([assistant("2")], f"<think>\n{LONG}\n</think>\n\n2"),
        (f"<think>\n{LONG}\n</think>\n2", f"<think>\n{LONG}\n</think>\n2"),
        (f"{LONG}\n</think>\n2", f"{LONG}\n</think>\n2"),
        (f"<thinking>{LONG}</thinking> 2", f"<thinking>{LONG}</thinking> 2"),
        (f"{LONG}\nSo 2", f"{LONG}\nSo 2"),
        ([assistant("2", reasoning=LONG)], f"<think>\n{LONG}\n</think>\n\n2"),
    ],
)
def test_a_reasoning_column_is_taken_once(completion: Any, expected: str) -> None:
    row = {"prompt": "p", "completion": completion, "why": LONG}
    [example] = load_examples([row], columns={"reasoning": "why"})
    assert example.completion == expected


@pytest.mark.parametrize("completion", ["<think>\nelse\n</think>\n2", "else</think>2", [assistant("2", reasoning="b")]])
def test_a_reasoning_column_beside_another_is_refused(completion: Any) -> None:
    row = {"prompt": "p", "completion": completion, "why": LONG}
    with pytest.raises(DataError, match=r"row 0: column 'completion' has reasoning in a field of its own and another"):
        load_examples([row], columns={"reasoning": "why"})


@pytest.mark.parametrize(
    ("more", "name"),
    [
        ({"thought": "RR"}, "thought"),
        ({"cot": "RR"}, "cot"),
        ({"chain_of_thought": "RR"}, "chain_of_thought"),
        ({"reasoning_details": [{"type": "reasoning.text", "text": "R"}]}, "reasoning_details"),
        ({"info": {"think_content": "R", "id": "x"}}, "info.think_content"),
        ({"critique": "some words"}, "critique"),
    ],
)
def test_fields_of_messages_not_read_are_named_once(more: Message, name: str, caplog: pytest.LogCaptureFixture) -> None:
    load_examples([{"messages": [user(), assistant("2", **more)]}] * 3)
    (record,) = caplog.records
    assert f"messages have fields with text that is not read: {name}; " in record.getMessage()


def test_fields_of_messages_beside_the_text_are_no_loss(caplog: pytest.LogCaptureFixture) -> None:
    more = {"id": "a b", "language": "English", "thought": None, "source": "a web page", "score": 1, "summary": "so 2"}
    assert read(user(), assistant("and so 2", **more)).completion == "and so 2"
    assert not caplog.records


# ---- turns and weights -----------------------------------------------------------------------------------

TWO = (user(), assistant("3"), user("sure?"), assistant("2"))


def test_turns_last_and_all() -> None:
    context = (("user", "1+1?"), ("assistant", "3"))
    assert read(*TWO) == Example("0", "sure?", "2", context=context)
    assert read(*TWO, turns="all") == Example("0", "sure?", "2", context=context, learnt=(1,))
    with pytest.raises(ConfigError, match="turns 'al' is not known; did you mean 'all'"):
        read(*TWO, turns="al")


def test_weight_zero_gets_no_loss() -> None:
    turns = [user(), assistant("3", weight=0), user("sure?"), assistant("2", weight=1), user("ok"), assistant("yes")]
    example = read(*turns, turns="all")
    assert example.completion == "yes"
    assert [example.turns[i] for i in example.learnt] == [("assistant", "2")]
    assert read(*turns[:4], turns="all").learnt == ()
    assert read(user(), assistant("2", weight=1.0)).completion == "2"  # as pandas and Arrow may hold it


def test_a_last_turn_of_weight_zero_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    example = read(user(), assistant("2"), user("and?"), assistant("no", weight=0))
    assert example == Example("0", "1+1?", "2")
    assert "1 conversations do not end with an assistant turn that is trained on" in caplog.text
    with pytest.raises(DataError, match="row 0: every 'assistant' message has weight 0; give one weight 1"):
        read(user(), assistant("2", weight=0))


@pytest.mark.parametrize("field", ["train", "trainable", "training", "loss"])
@pytest.mark.parametrize("no", [False, 0, 0.0, "false"])
def test_flags_of_training_are_weights(field: str, no: Any) -> None:
    turns = [user(**{field: no}), assistant("3", **{field: no}), user(), assistant("2", **{field: None})]
    assert read(*turns, turns="all").learnt == ()
    yes = [user(), assistant("3", **{field: True}), user(), assistant("2"), user(), assistant("x", **{field: no})]
    assert read(*yes).completion == "2"
    assert read(*yes, turns="all").learnt == (1,)


@pytest.mark.parametrize("nothing", [None, [], {}, "", float("nan")])
def test_no_tool_call_is_none(nothing: Any) -> None:
    assert read(user(), assistant("2", tool_calls=nothing, function_call=nothing)).completion == "2"


@pytest.mark.parametrize(("asker", "teller"), [("User", "Assistant"), ("human", "model"), ("HUMAN", "GPT")])
@pytest.mark.parametrize("keys", [("role", "content"), ("from", "value"), ("from", "content"), ("role", "value")])
def test_roles_and_keys_are_read_in_every_form(asker: str, teller: str, keys: tuple[str, str]) -> None:
    role, content = keys
    assert read({role: asker, content: "q"}, {role: teller, content: "a"}) == Example("0", "q", "a")


def test_weight_one_that_turns_last_passes_over_is_said(caplog: pytest.LogCaptureFixture) -> None:
    turns = [user(), assistant("3", weight=1), user("sure?"), assistant("2", weight=1)]
    read(*turns)
    assert "1 conversations have earlier assistant turns with weight 1" in caplog.text
    caplog.clear()
    assert read(*turns, turns="all").learnt == (1,)
    assert not caplog.records


def test_turns_after_the_question_are_kept_in_order() -> None:
    turns = [user(), assistant("call"), {"role": "tool", "content": "2"}, assistant("so 2")]
    between = (("assistant", "call"), ("tool", "2"))
    assert read(*turns) == Example("0", "1+1?", "so 2", between=between)
    example = read({"role": "system", "content": "S"}, *turns, turns="all")
    assert example.between == between
    assert [example.turns[i] for i in example.learnt] == [("assistant", "call")]
    assert read(user(), assistant("a"), assistant("b"), turns="all").learnt == (1,)


def test_a_conversation_without_a_user_is_refused() -> None:
    with pytest.raises(DataError, match="row 0: a 'system' turn comes before the completion where a 'user' turn"):
        read({"role": "system", "content": "S"}, assistant("a"))


def test_prompt_messages_may_be_trained_on_too() -> None:
    row = {"prompt": list(TWO[:3]), "completion": [TWO[3]]}
    assert load_examples([row])[0].learnt == ()
    assert load_examples([row], turns="all")[0].learnt == (1,)
    with pytest.raises(DataError, match="row 0: column 'completion' holds a message with weight 0"):
        load_examples([row | {"completion": [assistant("2", weight=0)]}])


# ---- ShareGPT --------------------------------------------------------------------------------------------


def said(speaker: str, text: str, **more: Any) -> Message:
    return {"from": speaker, "value": text, **more}


def test_sharegpt_speakers_and_weights() -> None:
    turns = [
        said("system", "S", weight=None), said("human", "1+1?", weight=0), said("gpt", "3", weight=0.0),
        said("human", "sure?", weight=0.0), said("gpt", "call", weight=1.0), said("observation", "2"), said("gpt", "2"),
    ]  # fmt: skip
    [example] = load_examples([{"conversations": turns}], turns="all")
    assert example.prompt == "sure?"
    assert example.context == (("system", "S"), ("user", "1+1?"), ("assistant", "3"))
    assert example.between == (("assistant", "call"), ("tool", "2"))
    assert [example.turns[i] for i in example.learnt] == [("assistant", "call")]


@pytest.mark.parametrize(
    ("turn", "problem"),
    [
        (said("function_call", "{}"), "'function_call', which is not supported"),
        (said("narrator", "x"), "is from 'narrator'; known: human, user, gpt"),
        (said("human", "x", weight=1), "a 'user' turn with a weight"),
        ({"value": "x"}, "is not of the form"),
    ],
)
def test_sharegpt_turns_that_cannot_be_used_are_named(turn: Message, problem: str) -> None:
    with pytest.raises(DataError, match=rf"row 0: message 1 of column 'conversations' {problem}|{problem}"):
        load_examples([{"conversations": [said("human", "q"), turn, said("gpt", "a")]}])


def test_a_system_column_that_contradicts_the_conversation_is_refused() -> None:
    row = {"system": "T", "conversations": [said("system", "S"), said("human", "q"), said("gpt", "a")]}
    with pytest.raises(DataError, match=r'row 0: column \'system\' differs .*columns=\{"system": None\}'):
        load_examples([row])
    assert load_examples([row], columns={"system": None})[0].context == (("system", "S"),)
    assert load_examples([row | {"system": "S"}])[0].context == (("system", "S"),)


# ---- writing ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_saved_conversations_are_read_again_as_they_were(suffix: str, tmp_path: Path) -> None:
    examples = [
        Example("plain", "p", "c", "1"),
        Example("thought", "p", "<think>\nt\n</think>\n\nc", row=1, reasoning="t"),
        Example(
            "turns", "p", "c", row=2, context=(("system", "s"), ("user", "q"), ("assistant", "a")),
            between=(("assistant", "call"), ("tool", "2")), learnt=(4,),
        ),
    ]  # fmt: skip
    save_examples(examples, tmp_path / f"x.{suffix}")
    assert load_examples(tmp_path / f"x.{suffix}", turns="all") == examples
