"""Known layouts of columns: what each gives as prompt, completion and answer, found from the columns and by name."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from influence_fast.data.examples import Example, kept_rows, load_examples, load_rows
from influence_fast.data.schemas import SCHEMAS
from influence_fast.errors import DataError

Row = dict[str, Any]

TRACE = "I need 12*12. That is 144."
ATTEMPT = r"It is \boxed{144}."
THINKING = f"<think>\n{TRACE}\n</think>\n\n{ATTEMPT}"
ASKED = [{"role": "user", "content": "1+1?"}]
CHOSEN = [*ASKED, {"role": "assistant", "content": "2"}]
REJECTED = [*ASKED, {"role": "assistant", "content": "3"}]

S1K = {
    "solution": "144", "question": "12 squared?", "cot_type": "math", "source_type": "x/y", "metadata": "{}",
    "cot": None, "thinking_trajectories": [TRACE], "attempt": ATTEMPT,
}  # fmt: skip
S1K_11 = {
    "solution": r"so \boxed{144}", "question": "12 squared?", "cot_type": "math", "source_type": "x/y",
    "metadata": "{}", "deepseek_thinking_trajectory": TRACE, "deepseek_attempt": ATTEMPT, "deepseek_grade": "Yes",
    "deepseek_grade_reason": "equal",
}  # fmt: skip
GEMINI = {"gemini_thinking_trajectory": "Hm.", "gemini_attempt": "150", "gemini_grade": "No"}
SQUARED = Example("0", "12 squared?", THINKING, "144", reasoning=TRACE)

LAYOUTS: list[tuple[str, Row, Example]] = [
    ("s1k", S1K, SQUARED),
    ("s1k_1.1", S1K_11, SQUARED),
    (
        "s1k_gemini",
        {"question": "12 squared?", "solution": "144", "gemini_thinking_trajectory": TRACE, "gemini_attempt": ATTEMPT},
        SQUARED,
    ),
    (
        "openthoughts",
        {
            "problem": "12 squared?", "deepseek_reasoning": TRACE, "deepseek_solution": ATTEMPT,
            "ground_truth_solution": r"so \boxed{144}", "domain": "math", "source": "x",
        },
        SQUARED,
    ),
    (
        "sharegpt",
        {
            "system": "Think.",
            "conversations": [{"from": "user", "value": "1+1?"}, {"from": "assistant", "value": "<think>a</think>2"}],
        },
        Example("0", "1+1?", "<think>a</think>2", context=(("system", "Think."),)),
    ),
    (
        "sharegpt",
        {
            "problem": "1+1?", "solution": r"\boxed{2}", "messages": CHOSEN, "system": "",
            "conversations": [{"from": "human", "value": "Add: 1+1?"}, {"from": "gpt", "value": "a trace: 2"}],
        },
        Example("0", "Add: 1+1?", "a trace: 2", "2"),
    ),
    ("sharegpt", {"conversations": CHOSEN}, Example("0", "1+1?", "2")),
    (
        "messages",
        {"source": "x", "problem": "1+1?", "solution": r"2, \boxed{2}", "messages": CHOSEN},
        Example("0", "1+1?", "2", "2"),
    ),
    (
        "math",
        {
            "problem": "1+1?", "solution": r"\boxed{2}", "answer": "3", "problem_type": "x", "question_type": "y",
            "problem_is_valid": "Yes", "solution_is_valid": "Yes", "source": "x", "synthetic": False,
        },
        Example("0", "1+1?", r"\boxed{2}", "3"),
    ),
    ("math", {"problem": "p", "solution": r"\boxed{2}", "answer": "proof"}, Example("0", "p", r"\boxed{2}")),
    ("math", {"problem": "p", "solution": "s", "answer": "notfound"}, Example("0", "p", "s")),
    (
        "openmath",
        {
            "problem": "1+1?", "generated_solution": r"<think>a</think>\boxed{2}", "expected_answer": "2",
            "problem_type": "has_answer_extracted", "problem_source": "aops", "generation_model": "m",
            "pass_rate_72b_tir": "0.5", "inference_mode": "cot",
        },
        Example("0", "1+1?", r"<think>a</think>\boxed{2}", "2"),
    ),
    (
        "openmath_1",
        {
            "question": "1+1?", "generated_solution": "code: 2", "expected_answer": "2", "predicted_answer": "2",
            "error_message": "", "is_correct": True, "generation_type": "masked", "dataset": "gsm8k",
        },
        Example("0", "1+1?", "code: 2", "2"),
    ),
    (
        "alpaca",
        {"instruction": "Add.", "input": "3 and 4", "output": "7", "text": "all of it"},
        Example("0", "Add.\n\n3 and 4", "7"),
    ),
    (
        "alpaca",
        {"instruction": "Say hi.", "input": "", "output": "hi", "system": "Be kind."},
        Example("0", "Say hi.", "hi", context=(("system", "Be kind."),)),
    ),
    ("alpaca", {"instruction": "Say hi.", "output": "hi"}, Example("0", "Say hi.", "hi")),
    (
        "metamath",
        {"query": "1+1?", "response": "2.\nThe answer is: 2", "type": "x", "original_question": "1+1?"},
        Example("0", "1+1?", "2.\nThe answer is: 2", "2"),
    ),
    (
        "orca_math",
        {"question": "How many?", "answer": "There are two, and then one more, so 3."},
        Example("0", "How many?", "There are two, and then one more, so 3."),
    ),
    ("gsm8k", {"question": "How many?", "answer": "2 + 1\n#### 3"}, Example("0", "How many?", "2 + 1\n#### 3", "3")),
    ("preference", {"prompt": "1+1?", "chosen": "2", "rejected": "3"}, Example("0", "1+1?", "2")),
    ("preference", {"chosen": CHOSEN, "rejected": REJECTED}, Example("0", "1+1?", "2")),
    (
        "preference",
        {"prompt": "1+1?", "chosen": CHOSEN, "rejected": REJECTED, "messages": CHOSEN, "score_chosen": 9.0},
        Example("0", "1+1?", "2"),
    ),
    ("preference", {"prompt": ASKED, "chosen": CHOSEN[1:], "rejected": REJECTED[1:]}, Example("0", "1+1?", "2")),
    (
        "preference",
        {"prompt": [{"role": "system", "content": "S"}, *ASKED], "chosen": CHOSEN, "rejected": REJECTED},
        Example("0", "1+1?", "2", context=(("system", "S"),)),
    ),
]  # fmt: skip


@pytest.mark.parametrize("by_name", [False, True], ids=["auto", "named"])
@pytest.mark.parametrize(("name", "row", "example"), LAYOUTS, ids=[f"{i}-{case[0]}" for i, case in enumerate(LAYOUTS)])
def test_a_layout_is_read_by_its_columns_and_by_name(name: str, row: Row, example: Example, by_name: bool) -> None:
    assert load_examples([row], format=name if by_name else "auto") == [example]


def test_every_layout_has_a_case_here_or_beside() -> None:
    beside = {"prompt_completion", "openr1", "limo"}  # test_data.py
    assert {case[0] for case in LAYOUTS} | beside == set(SCHEMAS)


def test_preference_rows_say_what_they_give(caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"prompt": "1+1?", "chosen": "2", "rejected": "3"}] * 3
    load_examples(rows)
    (record,) = caplog.records
    assert "'chosen' is taken as the completion, and 'rejected' is not read" in record.getMessage()


def test_preference_rows_that_cannot_be_joined_are_refused() -> None:
    with pytest.raises(DataError, match=r'row 0: column \'chosen\' is text.*columns=\{"prompt": "..."\}'):
        load_examples([{"question": "1+1?", "chosen": "2", "rejected": "3"}])
    row = {"question": "1+1?", "chosen": "2", "rejected": "3", "system": "S"}
    [example] = load_examples([row], columns={"prompt": "question"})
    assert example == Example("0", "1+1?", "2", context=(("system", "S"),))
    with pytest.raises(DataError, match="row 0: column 'chosen' holds a conversation that does not begin with"):
        load_examples([{"prompt": "another?", "chosen": CHOSEN, "rejected": REJECTED}])


@pytest.mark.parametrize(
    ("row", "completion"),
    [
        ({"prompt": "P", "chosen": "P A", "rejected": "P B"}, "A"),
        ({"prompt": "P\n", "chosen": "P\n\nA", "rejected": None}, "A"),
        ({"prompt": [{"role": "user", "content": "P"}], "chosen": "P: A", "rejected": "P: B"}, ": A"),
        (
            {
                "prompt": "P",
                "chosen": [{"role": "assistant", "content": "P A"}],
                "rejected": [{"role": "assistant", "content": "P B"}],
            },
            "A",
        ),
        ({"prompt": "P", "chosen": "Paris", "rejected": "P is it"}, "Paris"),
        ({"prompt": "P", "chosen": "P it is", "rejected": "London"}, "P it is"),
        ({"prompt": "P", "chosen": "P", "rejected": "P B"}, "P"),
    ],
)
def test_a_prompt_that_chosen_repeats_is_taken_once(row: Row, completion: str) -> None:
    assert load_examples([row]) == [Example("0", "P" if isinstance(row["prompt"], list) else row["prompt"], completion)]


def test_completions_that_repeat_their_prompts_are_named(caplog: pytest.LogCaptureFixture) -> None:
    row = {"prompt": "What is one and one?", "completion": "What is one and one? It is two."}
    load_examples([row, row | {"completion": "It is two."}])
    assert not caplog.records
    load_examples([row, row])
    (record,) = caplog.records
    assert "2 completions begin with their own prompt" in record.getMessage()
    assert record.getMessage().endswith("row 0, row 1")


HH = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nWell?\n\nHuman: 1+1?\n\nAssistant:"


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": f"{HH} 2", "rejected": f"{HH} 3"},
        {"prompt": HH, "chosen": " 2", "rejected": " 3"},
        {"prompt": HH, "chosen": f"{HH} 2", "rejected": f"{HH} 3"},
        {"prompt": HH.removesuffix("\n\nAssistant:"), "chosen": "2", "rejected": "3"},
        {"prompt": HH.removesuffix("\n\nAssistant:"), "chosen": "\n\nAssistant: 2", "rejected": "\n\nAssistant: 3"},
        {"prompt": "1+1?", "chosen": f"{HH} 2", "rejected": f"{HH} 3"},
    ],
)
def test_texts_of_hh_rlhf_are_turns(row: Row) -> None:
    turns = (("user", "Hi"), ("assistant", "Hello.\n\nWell?"))
    assert load_examples([row]) == [Example("0", "1+1?", "2", context=turns)]


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        ("144", "144"), ("so it is\n144", None), ("so " * 80, None), ("so\n\\boxed{144}", "144"), ("\n144 \n", "144"),
    ],
)  # fmt: skip
def test_a_worked_reference_solution_is_no_answer(solution: str, answer: str | None) -> None:
    assert load_examples([S1K | {"solution": solution}])[0].answer == answer
    row: Row = {"problem": "p", "deepseek_reasoning": TRACE, "deepseek_solution": ATTEMPT}
    assert load_examples([row | {"ground_truth_solution": solution}])[0].answer == answer


@pytest.mark.parametrize("lost", [None, [], [None], [" \n"], float("nan")])
def test_a_row_whose_trajectory_is_missing_is_left_out_by_name(lost: Any, caplog: pytest.LogCaptureFixture) -> None:
    rows = [S1K | {"thinking_trajectories": lost}, S1K]
    [example] = load_examples(rows)
    assert (example.row, example.completion) == (1, THINKING)
    assert "1 of 2 rows have no trace" in caplog.text
    assert caplog.text.rstrip().endswith("row 0")


def test_several_trajectories_for_one_attempt_are_refused() -> None:
    with pytest.raises(DataError, match=r"row 0: column 'thinking_trajectories' has 2 texts where one is needed"):
        load_examples([S1K | {"thinking_trajectories": [TRACE, "other"]}])


def test_bare_answers_are_no_worded_solutions() -> None:
    with pytest.raises(DataError, match=r'no final answer after .####.*format="orca_math"'):
        load_examples([{"question": "q", "answer": "42"}, {"question": "q", "answer": "x = 3"}])
    rows = [{"question": "q", "answer": "so it is three\n#### 3"}, {"question": "q", "answer": "and this is four, too"}]
    with pytest.raises(DataError, match=r"row 1: .*after '####'"):
        load_examples(rows)
    assert [e.answer for e in load_examples(rows, format="orca_math")] == [None, None]


def test_columns_of_an_unknown_layout_are_proposed() -> None:
    with pytest.raises(DataError, match=r'name yours with columns=\{"prompt": "prompt", "completion": "response"\}'):
        load_examples([{"prompt": "p", "response": "r"}])
    with pytest.raises(DataError, match=r'columns=\{"prompt": "instruction", "completion": "long_cot"\}'):
        load_examples([{"instruction": "p", "long_cot": "r", "answer": "2"}])
    columns = r'columns=\{"prompt": "Question", "completion": "Response", "reasoning": "Complex_CoT"\}'
    with pytest.raises(DataError, match=columns):
        load_examples([{"Question": "p", "Complex_CoT": "t", "Response": "r"}])


# ---- columns that are not read ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "columns", "remedy"),
    [
        (S1K_11 | GEMINI, "gemini_thinking_trajectory, gemini_attempt", 'format="s1k_gemini"'),
        (S1K | {"cot": "a longer way"}, "cot", '"prompt": "question", "completion": "cot"'),
        (
            {"question": "q", "solution": "144", "thinking": "12*12 is 144"},
            "thinking",
            'columns={"prompt": "question", "completion": "solution", "reasoning": "thinking"}',
        ),
        ({"problem": "p", "solution": "s", "r1_solution": "a trace"}, "r1_solution", '"completion": "r1_solution"'),
        ({"problem": "p", "solution": "s", "model_outputs": ["a t"]}, "model_outputs", '"completion": "model_outputs"'),
        (
            {"prompt": "p", "completion": "c", "chain_of_thought": "t"},
            "chain_of_thought",
            'columns={"prompt": "prompt", "completion": "completion", "reasoning": "chain_of_thought"}',
        ),
        ({"messages": CHOSEN, "reasoning": "one and one"}, "reasoning", "into the field 'reasoning' of the assistant"),
        ({"prompt": "p", "completion": "c", "chosen": "t", "rejected": "u"}, "chosen", 'format="preference"'),
        ({"conversations": CHOSEN, "messages": REJECTED}, "messages", 'format="messages"'),
    ],
)
@pytest.mark.parametrize("kind", ["list", "arrow"])
def test_trace_columns_that_are_not_read_are_named(
    row: Row, columns: str, remedy: str, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    source: Any = [row]
    if kind == "arrow":
        from datasets import Dataset

        source = Dataset.from_list(source)
    load_examples(source)
    (record,) = caplog.records
    assert f"by name they hold traces: {columns}; " in record.getMessage()
    assert remedy in record.getMessage()


NAMES = """
r1_solution_1 r1_cot_1 trace_1 traces_r1 cot_solution long_solution predicted_solution distilled_solution
deepseek_v3_solution claude_solution o1_answer llama_answer messages_r1 thought_process thinking_process
reasoning_steps reasoning_text reasoning_chain chain_of_thought_text think steps step_by_step analysis reflection
solutions candidates proof dialogue model_solution_text ReasoningTrace deepseekReasoning chainOfThought
reasoning-content reasoning_content CoT COT cots gpt4o_answer qwen2_5_solution QwenSolution full_text ModelOutputs
"""


@pytest.mark.parametrize("name", [*NAMES.split(), "reasoning content", "R1 Solution"])
def test_names_of_traces_are_known_in_every_spelling(name: str, caplog: pytest.LogCaptureFixture) -> None:
    load_examples([{"prompt": "p", "completion": "a completion", name: "VV"}])
    (record,) = caplog.records
    assert f"by name they hold traces: {name}; " in record.getMessage()


@pytest.mark.parametrize("kind", ["list", "arrow"])
def test_a_longer_text_that_is_not_read_is_named(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    source: Any = [{"prompt": "p", "completion": "so 2", "body": "one and one is two", "note": "by me"}] * 3
    source.append(source[0] | {"completion": "so it is two, as everybody knows"})
    if kind == "arrow":
        from datasets import Dataset

        source = Dataset.from_list(source)
    load_examples(source)
    (record,) = caplog.records
    assert "longer texts than those that are trained on: body; to train on one" in record.getMessage()


@pytest.mark.parametrize(
    "more",
    [
        {"source": "https://example.org/a/long/address"},
        {"text": "Asked: What is one and one? Answered: It is two."},
        {"link": None, "score": 1e30, "tags": ["a", "b"]},
        {"note": "a b c d"},
    ],
)
def test_other_columns_are_no_loss(more: Row, caplog: pytest.LogCaptureFixture) -> None:
    load_examples([{"prompt": "What is one and one?", "completion": "It is two.", **more}] * 2)
    assert not caplog.records


@pytest.mark.parametrize(
    "row",
    [
        S1K,
        S1K_11,
        {"question": "q", "solution": "s", "cot_type": "math", "trace_id": "x", "generation_model": "m"},
        {"question": "q", "solution": "s", "thinking": None, "reasoning": float("nan"), "cot": " ", "attempt": 3},
        {"question": "q", "solution": "all of the trace", "response": "of the trace"},
        {"conversations": CHOSEN, "instruction": "1+1?", "response": "2"},
    ],
)
def test_no_warning_where_no_trace_is_passed_over(row: Row, caplog: pytest.LogCaptureFixture) -> None:
    assert len(load_examples([row])) == 1
    assert not caplog.records


def test_a_trace_column_is_found_in_any_row(caplog: pytest.LogCaptureFixture) -> None:
    row = {"question": "q", "solution": "s"}
    load_examples([row] * 40 + [row | {"thinking": "t"}])
    assert "thinking" in caplog.text


def test_prompt_columns_that_are_not_read_are_named(caplog: pytest.LogCaptureFixture) -> None:
    load_examples([{"messages": CHOSEN, "tools": '[{"name": "add"}]', "system": "S"}])
    (record,) = caplog.records
    assert "belong to the prompt: tools, system" in record.getMessage()
    caplog.clear()
    [example] = load_examples([{"messages": CHOSEN, "system": "S"}], columns={"system": "system"})
    assert example.context == (("system", "S"),)
    assert not caplog.records


def test_a_named_reasoning_column_comes_before_the_completion(caplog: pytest.LogCaptureFixture) -> None:
    columns: dict[str, str | None] = {"prompt": "q", "reasoning": "t", "completion": "a"}
    [example] = load_examples([{"q": "12 squared?", "t": TRACE, "a": ATTEMPT}], columns=columns)
    assert example == Example("0", "12 squared?", THINKING, reasoning=TRACE)
    [plain] = load_examples([{"q": "q", "t": None, "a": ATTEMPT}], columns=columns)
    assert plain == Example("0", "q", ATTEMPT)
    assert not caplog.records


# ---- traces within a row ---------------------------------------------------------------------------------

OPENR1 = {"problem": "1+1?", "answer": "2", "generations": ["so 2", "or 2"], "correctness_math_verify": [True, True]}


@pytest.mark.parametrize("lost", [None, [], ["", None], float("nan")])
@pytest.mark.parametrize("trace", ["first", "first_correct", "all", "all_correct", 0])
def test_a_row_without_generations_is_left_out_by_name(
    lost: Any, trace: str | int, caplog: pytest.LogCaptureFixture
) -> None:
    broken = OPENR1 | {"uuid": "u0", "generations": lost, "correctness_math_verify": None}
    with caplog.at_level(logging.WARNING):
        examples = load_examples([broken, OPENR1 | {"uuid": "u1"}], trace=trace)
    assert {e.id.split("#")[0] for e in examples} == {"u1"}
    assert "1 of 2 rows have no trace" in caplog.text
    assert "left out: row 0" in caplog.text
    with pytest.raises(DataError, match="fill in the traces of row 0"):
        load_examples([broken], trace=trace)


@pytest.mark.parametrize(
    ("trace", "ids"), [("first", ["0#1"]), ("first_correct", ["0#1"]), ("all", ["0#1", "0#3"]), (3, ["0#3"])]
)
def test_a_blank_trace_is_left_out_by_name(trace: str | int, ids: list[str], caplog: pytest.LogCaptureFixture) -> None:
    row = OPENR1 | {"generations": ["", "so 2", None, "2!"], "correctness_math_verify": [True, True, True, False]}
    assert [e.id for e in load_examples([row], trace=trace)] == ids
    assert "2 traces are null or blank and are left out: trace 0 of row 0, trace 2 of row 0" in caplog.text


def test_a_row_whose_verdicts_are_null_is_left_out_by_name(caplog: pytest.LogCaptureFixture) -> None:
    for verdicts in (None, [None, float("nan")]):
        caplog.clear()
        rows = [OPENR1 | {"uuid": "u0", "correctness_math_verify": verdicts}, OPENR1 | {"uuid": "u1"}]
        assert [e.id for e in load_examples(rows)] == ["u1#0"]
        assert "1 of 2 rows have no trace for trace='first_correct' and are left out: row 0" in caplog.text


@pytest.mark.parametrize(("no", "yes"), [("False", "True"), ("false", "TRUE"), (0, 1.0), ("0", "1")])
def test_verdicts_in_other_spellings_are_read(no: Any, yes: Any) -> None:
    row = OPENR1 | {"correctness_math_verify": [no, yes], "correctness_count": 1}
    assert [e.id for e in load_examples([row])] == ["0#1"]
    source = load_rows([row])
    [pruned] = kept_rows(source, load_examples(source, trace=0))
    assert pruned["correctness_count"] == 0


@pytest.mark.parametrize("odd", ["maybe", "", 0.5, [True]])
def test_verdicts_that_say_nothing_are_refused(odd: Any) -> None:
    with pytest.raises(DataError, match=r"row 0: column 'correctness_math_verify' has the verdict .*; write true"):
        load_examples([OPENR1 | {"correctness_math_verify": [odd, True]}])


def test_pruned_rows_of_new_layouts_are_the_source_rows() -> None:
    rows = [S1K_11 | {"id": i} for i in range(3)]
    source = load_rows(rows)
    kept = [e for e in load_examples(source) if e.id != "1"]
    assert list(kept_rows(source, kept)) == [rows[0], rows[2]]


def test_traces_are_pruned_out_of_rows_made_by_pandas() -> None:
    import numpy as np

    row = OPENR1 | {"generations": np.array(["a", "", "c"], object), "correctness_math_verify": np.ones(3, bool)}
    source = load_rows([row])
    examples = load_examples(source, trace="all")
    assert [e.id for e in examples] == ["0#0", "0#2"]
    [pruned] = kept_rows(source, examples[1:])
    assert pruned["generations"] == ["c"]
    assert pruned["correctness_math_verify"] == [True]
