"""Texts and tokens of examples: what a chat template writes around a completion, and which tokens are learnt."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import influence_fast as inf
from benches.text_fidelity import TOKENIZERS, tokenizer_for
from influence_fast.data.examples import Example, render_prompt, tokenize
from influence_fast.data.rendering import end_of_turn
from influence_fast.data.tokens import tokenization_hash
from influence_fast.data.turn_ends import EndOfTurn
from influence_fast.errors import DataError, ModelError

Factory = Callable[..., Any]

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def random_examples(n: int, seed: int = 0) -> list[Example]:
    """Ragged texts over an alphabet in which a token may straddle the prompt's end (line breaks, spaces)."""
    rng = random.Random(seed)
    alphabet = ["answer", " ", "\n", "\n\n", "42", "é", "你", "$\\frac{1}{2}$", "apples ", "1. ", ".", " is"]

    def text() -> str:
        return "".join(rng.choices(alphabet, k=rng.randint(1, 40)))

    return [Example(f"r{i}", text(), text() + "!") for i in range(n)]


@pytest.mark.parametrize("bos", [False, True], ids=["no-bos", "bos"])
def test_plain_tokens_are_the_text_and_only_the_completion_has_labels(tiny_tokenizer: Factory, bos: bool) -> None:
    tokenizer = tiny_tokenizer(bos=bos)
    examples = random_examples(60)
    result = tokenize(examples, tokenizer)
    assert [e["id"] for e in result.examples] == [e.id for e in examples]
    for example, tokens in zip(examples, result.examples, strict=True):
        ids, labels = tokens["input_ids"], tokens["labels"]
        assert ids.dtype == labels.dtype == torch.int64
        learnt = labels != -100
        assert torch.equal(labels[learnt], ids[learnt])
        assert int(learnt.to(torch.int8).diff().abs().sum()) == 1  # one border: prompt, then completion
        assert tokenizer.decode(ids[learnt]) == example.completion + "<eos>"
        prompt = ("<bos>" if bos else "") + example.prompt + "\n"
        assert tokenizer.decode(ids[~learnt]) == prompt == render_prompt(example.prompt, tokenizer)
        generated_from = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        assert ids[~learnt].tolist() == generated_from  # what the model meets when it generates


def test_chat_tokens_are_the_template(tiny_tokenizer: Factory, chatml: str) -> None:
    tokenizer = tiny_tokenizer(chat_template=chatml)
    context = (("system", "Think first."), ("user", "1+1?"), ("assistant", "2"))
    examples = [*random_examples(40), Example("turns", "and 2+2?", "4", context=context)]
    result = tokenize(examples, tokenizer)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for example, tokens in zip(examples, result.examples, strict=True):
        turns = [*example.context, ("user", example.prompt), ("assistant", example.completion)]
        whole = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)
        ids, learnt = tokens["input_ids"], tokens["labels"] != -100
        assert tokenizer.decode(ids[learnt]).rstrip("\n") == example.completion + "<|im_end|>"
        assert end in ids[learnt].tolist()[-2:]
        assert tokenizer.decode(ids).rstrip("\n") == whole.rstrip("\n")
        assert tokenizer.decode(ids[~learnt]) == render_prompt(example, tokenizer)


def test_nothing_is_learnt_after_the_end_of_turn(tiny_tokenizer: Factory, chatml: str) -> None:
    tokenizer = tiny_tokenizer(chat_template=chatml, eos="<|im_end|>")
    [tokens] = tokenize([Example("x", "p", "c")], tokenizer).examples
    assert tokens["input_ids"][-1] == tokenizer.eos_token_id == tokens["labels"][-1]
    bare = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}"
    tokenizer = tiny_tokenizer(chat_template=bare + "{% if add_generation_prompt %}assistant: {% endif %}")
    [tokens] = tokenize([Example("x", "p", "c")], tokenizer).examples
    assert tokenizer.decode(tokens["input_ids"]) == "user: passistant: c<eos>"


@pytest.mark.parametrize("templated", [True, False])
def test_an_answer_that_was_cut_has_no_end(tiny_tokenizer: Factory, chatml: str, templated: bool) -> None:
    tokenizer = tiny_tokenizer(chat_template=chatml if templated else None)
    cut = Example("cut", "1+1?", "The answer is ", ended=False)
    [tokens] = tokenize([cut], tokenizer).examples
    learnt = tokens["labels"] != -100
    assert tokenizer.decode(tokens["input_ids"][learnt]) == "The answer is "
    assert tokenizer.decode(tokens["input_ids"][~learnt]) == render_prompt(cut, tokenizer)


QWEN3 = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if '</think>' in m['content'] %}"
    "<think>\n{{ m['content'].split('</think>')[0].split('<think>')[-1].strip('\n') }}\n</think>\n\n"
    "{{ m['content'].split('</think>')[-1].lstrip('\n') }}"
    "{% elif m['role'] == 'assistant' %}<think>\n\n</think>\n\n{{ m['content'] }}"
    "{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
R1 = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<|im_start|>{{ m['content'].split('</think>')[-1] }}"
    "<|im_end|>{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|><think>\n{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "completion", "learnt"),
    [
        (QWEN3, "It is 2.", "<think>\n\n</think>\n\nIt is 2."),
        (QWEN3, "<think>1+1=2</think>It is 2.", "<think>1+1=2</think>It is 2."),
        (QWEN3, "1+1=2</think>It is 2.", "<think>\n1+1=2</think>It is 2."),
        (R1, "<think>\n1+1=2\n</think>\n\nIt is 2.", "1+1=2\n</think>\n\nIt is 2."),
        (R1, "<think>1+1=2</think>It is 2.", "1+1=2</think>It is 2."),
        (R1, "1+1=2</think>It is 2.", "1+1=2</think>It is 2."),
        (R1, "It is 2.", "\n</think>\n\nIt is 2."),
        (CHATML.replace("message['content']", "message['content'] | trim"), " It is 2. \n", " It is 2. \n"),
    ],
    ids=["empty-before", "rewrapped", "opens-itself", "dropped", "dropped-tight", "own-answer", "plain", "trims"],
)
def test_completions_stand_verbatim_whatever_the_template_does(
    tiny_tokenizer: Factory, template: str, completion: str, learnt: str
) -> None:
    tokenizer = tiny_tokenizer(chat_template=template)
    example = Example("x", "1+1?", completion)
    [tokens] = tokenize([example], tokenizer).examples
    given = tokens["labels"] != -100
    assert tokenizer.decode(tokens["input_ids"][given]) == learnt + "<|im_end|>"
    assert tokenizer.decode(tokens["input_ids"][~given]) == render_prompt(example, tokenizer)


COHERE = (
    "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>{{ m.content }}<|im_end|>{% else %}"
    "<|BOT|><|START_RESPONSE|>{{ m.content }}<|END_RESPONSE|><|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|BOT|><|START_THINKING|>CLOSE{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}"
    "{% if loop.last and m.role == 'user' %} /no_think{% endif %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"
)
TURN_ADDED = CHATML.replace(
    "{% if add_generation_prompt %}", "{% if add_generation_prompt %}{{ '<|im_start|>system\nBe brief.<|im_end|>\n' }}"
)
INST = (
    "{% for m in messages %}{% if m.role == 'user' %}{% if loop.last %}[INST] SYS {{ m.content | replace('\n', ' ') }}"
    "[/INST]{% else %}[INST] {{ m.content | replace('\n', ' ') }}[/INST]{% endif %}{% else %} {{ m.content }}"
    "{{ eos_token }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "completion", "answer"),
    [
        (
            COHERE.replace("CLOSE", "<|END_THINKING|>"),
            "It is 2.",
            "<|START_RESPONSE|>It is 2.<|END_RESPONSE|><|im_end|>",
        ),
        (
            COHERE.replace("CLOSE", "") + "{# <|END_THINKING|> #}",
            "It is 2.",
            "<|END_THINKING|><|START_RESPONSE|>It is 2.<|END_RESPONSE|><|im_end|>",
        ),
        (MARKED, "It is 2.", "It is 2.<|im_end|>"),
        (TURN_ADDED, "It is 2.", "It is 2.<|im_end|>"),
        (INST, "It is 2.", " It is 2.<eos>"),
        (R1, "\n<think>\n1+1=2\n</think>\n\n2", "1+1=2\n</think>\n\n2<|im_end|>"),
        (R1, " <think>1+1=2</think>2", "1+1=2</think>2<|im_end|>"),
    ],
    ids=["closed-before", "opened-before", "last-turn-marked", "turn-added", "system-inside", "blank-tag", "space-tag"],
)
@pytest.mark.parametrize("question", ["1+1?\nNow", "k", "think"])
def test_where_prompt_and_conversation_part_the_completion_is_found(
    tiny_tokenizer: Factory, template: str, completion: str, answer: str, question: str
) -> None:
    tokenizer = tiny_tokenizer(chat_template=template)
    example = Example("x", question, completion)
    [tokens] = tokenize([example], tokenizer).examples
    given = tokens["labels"] != -100
    assert tokenizer.decode(tokens["input_ids"][given]) == answer
    assert tokenizer.decode(tokens["input_ids"][~given]) == render_prompt(example, tokenizer)


def test_a_template_that_wants_a_system_turn_has_its_end_too(tiny_tokenizer: Factory) -> None:
    wants = "{% if messages[0].role != 'system' %}{{ raise_exception('system first') }}{% endif %}" + CHATML
    tokenizer = tiny_tokenizer(chat_template=wants)
    assert end_of_turn(tokenizer) == end_of_turn(tiny_tokenizer(chat_template=CHATML))
    [tokens] = tokenize([Example("x", "p", "c", context=(("system", "s"),))], tokenizer).examples
    assert tokenizer.decode(tokens["input_ids"][tokens["labels"] != -100]) == "c<|im_end|>"


def test_earlier_turns_are_learnt_with_the_end_that_they_have(tiny_tokenizer: Factory) -> None:
    template = CHATML.replace(
        "'<|im_end|>\n'", "('<eos>' if loop.last and message['role'] == 'assistant' else '<|im_end|>')"
    )
    tokenizer = tiny_tokenizer(chat_template=template)
    example = Example("x", "so?", "3", context=(("user", "1+1?"), ("assistant", "2")), learnt=(1,))
    [tokens] = tokenize([example], tokenizer).examples
    given = tokens["labels"] != -100
    runs = ["".join(tokenizer.decode(tokens["input_ids"][i]) for i in run) for run in _runs(given)]
    assert runs == ["2<|im_end|>", "3<eos>"]


@pytest.mark.parametrize("kind", list(TOKENIZERS))
def test_plain_texts_begin_as_the_tokenizer_begins_them(kind: str) -> None:
    from tokenizers import processors

    tokenizer = tokenizer_for(kind, "")
    bos = ("<s>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[bos])
    [tokens] = tokenize([Example("x", "What is 12?", "12 is 12.")], tokenizer).examples
    assert tokens["input_ids"].tolist() == tokenizer("What is 12?\n12 is 12.</s>")["input_ids"]
    given = tokens["labels"] != -100
    assert tokenizer.decode(tokens["input_ids"][given], clean_up_tokenization_spaces=False).strip() == "12 is 12.</s>"


def test_an_end_that_is_not_read_as_its_token_is_refused(tiny_tokenizer: Factory) -> None:
    tokenizer = tiny_tokenizer(chat_template=CHATML)
    tokenizer.split_special_tokens = True
    with pytest.raises(ModelError, match=r"x: .* does not read the end of turn '<\|im_end\|>' as the token"):
        tokenize([Example("x", "p", "c")], tokenizer)


def test_texts_that_are_none_are_named(tiny_tokenizer: Factory) -> None:
    with pytest.raises(DataError, match="half a surrogate pair"):
        tokenize([Example("x", "p", "a\ud800b")], tiny_tokenizer())


def test_a_template_by_chance_is_refused(tiny_tokenizer: Factory) -> None:
    chance = "{{ range(10 ** 5) | random }}" + CHATML
    with pytest.raises(ModelError, match="writes another text each time"):
        tokenize([Example("x", "p", "c")], tiny_tokenizer(chat_template=chance))


@pytest.mark.parametrize("when", ["messages | length == 3", "messages[0].role == 'system'"])
def test_a_template_that_loops_on_some_conversations_is_ended(
    tiny_tokenizer: Factory, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    monkeypatch.setattr("influence_fast.data.template_limits.SECONDS", 1)
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% set x = i + j %}{% endfor %}{% endfor %}"
    template = "{% if " + when + " %}" + loop + "{% endif %}" + CHATML
    with pytest.raises(ModelError, match="does not end within 1 s"):
        tokenize([Example("x", "p", "c")], tiny_tokenizer(chat_template=template))


def test_reasoning_of_its_own_goes_where_the_template_puts_it(tiny_tokenizer: Factory) -> None:
    channels = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}"
        "{% if m['thinking'] is defined %} to=self {{ m['thinking'] }}<|im_end|><|im_start|>assistant{% endif %}"
        " to=all {{ m['content'] }}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
    )
    example = Example("x", "1+1?", "<think>\none and one\n</think>\n\n2", reasoning="one and one")
    wanted = {
        channels: " to=self one and one<|im_end|><|im_start|>assistant to=all 2",
        CHATML: "<think>\none and one\n</think>\n\n2",
        R1: "one and one\n</think>\n\n2",
    }
    for template, learnt in wanted.items():
        tokenizer = tiny_tokenizer(chat_template=template)
        [tokens] = tokenize([example], tokenizer).examples
        assert tokenizer.decode(tokens["input_ids"][tokens["labels"] != -100]) == learnt + "<|im_end|>"


def test_templates_that_read_parts_get_parts(tiny_tokenizer: Factory) -> None:
    template = (
        "{% for m in messages %}{{ m['role'] }}:{% for part in m['content'] %}{{ part['text'] }}{% endfor %}"
        "<|im_end|>{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    tokenizer = tiny_tokenizer(chat_template=template)
    [tokens] = tokenize([Example("x", "1+1?", "2")], tokenizer).examples
    assert tokenizer.decode(tokens["input_ids"]) == "user:1+1?<|im_end|>assistant:2<|im_end|>"


def test_earlier_turns_are_learnt_where_the_example_says(tiny_tokenizer: Factory) -> None:
    tokenizer = tiny_tokenizer(chat_template=CHATML)
    context = (("system", "s"), ("user", "1+1?"), ("assistant", " 2"))
    example = Example("x", "sure?", "yes", context=context, between=(("assistant", "hm"),), learnt=(2, 4))
    [tokens] = tokenize([example], tokenizer).examples
    ids, given = tokens["input_ids"], tokens["labels"] != -100
    assert tokenizer.decode(ids) == (
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n 2<|im_end|>\n"
        "<|im_start|>user\nsure?<|im_end|>\n<|im_start|>assistant\nhm<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>"
    )
    assert torch.equal(tokens["labels"][given], ids[given])
    runs = [[tokenizer.decode(ids[i]) for i in group] for group in _runs(given)]
    assert ["".join(run) for run in runs] == [" 2<|im_end|>", "hm<|im_end|>", "yes<|im_end|>"]

    reasoned = Example("y", "sure?", "yes", context=(("user", "1+1?"), ("assistant", "<think>a</think>2")), learnt=(1,))
    with pytest.raises(ModelError, match=r"changes turn 1 of y .* take the last turns alone"):
        tokenize([reasoned], tiny_tokenizer(chat_template=R1))


def _runs(given: torch.Tensor) -> list[list[int]]:
    runs: list[list[int]] = []
    for i in given.nonzero().flatten().tolist():
        if runs and runs[-1][-1] == i - 1:
            runs[-1].append(i)
        else:
            runs.append([i])
    return runs


@pytest.mark.parametrize(
    ("template", "eos", "text", "is_token"),
    [
        (None, "<eos>", "<eos>", True),
        (CHATML, "<eos>", "<|im_end|>", True),
        (CHATML, None, "<|im_end|>", True),
        (CHATML.replace("<|im_end|>", "<|end|>"), "<eos>", "<|end|>", False),
        (CHATML + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}", "<eos>", "<|im_end|>", True),
        (CHATML.replace("<|im_end|>", "<eos><|im_end|>"), "<eos>", "<eos><|im_end|>", True),
        (CHATML.replace("<|im_end|>", ""), "<eos>", "<eos>", True),
        (
            CHATML.replace(
                "'<|im_end|>\n'", "('' if loop.last and message['role'] == 'assistant' else '<|im_end|>\n')"
            ),
            "<eos>",
            "<|im_end|>",
            True,
        ),
    ],
    ids=["plain", "other-than-eos", "no-eos", "in-text", "eos-after-it", "two-tokens", "none", "left-open"],
)
def test_a_turn_ends_as_its_template_ends_it(
    tiny_tokenizer: Factory, template: str | None, eos: str | None, text: str, is_token: bool
) -> None:
    tokenizer = tiny_tokenizer(chat_template=template, eos=eos)
    end = end_of_turn(tokenizer)
    last = tokenizer.convert_tokens_to_ids("<|im_end|>" if text.endswith("<|im_end|>") else "<eos>")
    assert end == EndOfTurn(text, last if is_token else None)
    [tokens] = tokenize([Example("x", "p", "c")], tokenizer).examples
    assert tokenizer.decode(tokens["input_ids"][tokens["labels"] != -100]) == "c" + text


def test_generated_tokens_are_taken_as_they_are(tiny_tokenizer: Factory) -> None:
    tokenizer = tiny_tokenizer(chat_template=QWEN3)
    answer = tokenizer("a")["input_ids"] + tokenizer("b</think>c<|im_end|>")["input_ids"]
    question = Example("x", "1+1?", "ab</think>c", token_ids=tuple(answer))
    texts = [Example("before", "p", "c"), question, Example("after", "p", "c")]
    found = tokenize(texts, tokenizer).examples
    assert [tokens["id"] for tokens in found] == ["before", "x", "after"]
    prompt = tokenizer(render_prompt(question, tokenizer), add_special_tokens=False)["input_ids"]
    assert found[1]["input_ids"].tolist() == prompt + answer
    assert found[1]["labels"].tolist() == [-100] * len(prompt) + answer


@pytest.mark.parametrize("kind", list(TOKENIZERS))
@pytest.mark.parametrize("template", [None, CHATML], ids=["plain", "chatml"])
def test_tokens_are_those_of_the_whole_text(kind: str, template: str | None) -> None:
    tokenizer = tokenizer_for(kind, template or "")
    for example in random_examples(20, seed=len(kind)):
        if kind == "WordPiece":  # which has no tokens for bytes
            texts = {
                name: getattr(example, name).replace("é", "e").replace("你", "?") for name in ("prompt", "completion")
            }
            example = replace(example, **texts)
        [tokens] = tokenize([example], tokenizer).examples
        whole = render_prompt(example, tokenizer) + example.completion + ("<|im_end|>" if template else "</s>")
        ids, given = tokens["input_ids"], tokens["labels"] != -100
        assert ids.tolist() == tokenizer(whole, add_special_tokens=False)["input_ids"]
        if kind not in ("BPE, mark always", "byte-level BPE, prefix space"):  # which add a space after special tokens
            assert tokenizer.decode(ids, clean_up_tokenization_spaces=False).lstrip(" ") == whole.lstrip(" ")
        assert example.completion.strip() in tokenizer.decode(ids[given], clean_up_tokenization_spaces=False)


def test_no_mark_of_a_word_comes_between_prompt_and_completion() -> None:
    tokenizer = tokenizer_for("BPE, mark first", CHATML)
    [tokens] = tokenize([Example("x", "1+1?", "It is 2")], tokenizer).examples
    first = int((tokens["labels"] != -100).nonzero()[0])
    assert tokenizer.convert_ids_to_tokens([int(tokens["input_ids"][first])])[0].startswith("I")


def test_a_token_across_the_border_is_the_completions(
    tiny_tokenizer: Factory, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.name_or_path = "joins line breaks"
    tokenizer.add_tokens(["\n\n"])
    with caplog.at_level(logging.WARNING):
        [tokens] = tokenize([Example("x", "p", "\nc")], tokenizer).examples
    assert tokenizer.decode(tokens["input_ids"][tokens["labels"] != -100]) == "\n\nc<eos>"
    assert "'joins line breaks' cuts the end of a prompt otherwise" in caplog.text


def test_a_tokenizer_that_loses_characters_is_named(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = tokenizer_for("WordPiece", "")
    tokenizer.name_or_path = "loses characters"
    with caplog.at_level(logging.WARNING):
        tokenize([Example("x", "p", "plain text")], tokenizer)
        assert not caplog.text
        tokenize([Example("x", "p", "Ω")], tokenizer)
    assert "'loses characters' does not keep texts as they are" in caplog.text


def test_texts_do_not_depend_on_the_day(tiny_tokenizer: Factory, caplog: pytest.LogCaptureFixture) -> None:
    template = (
        "{% if strftime_now is defined %}{% set day = strftime_now('%d %b %Y') %}{% else %}"
        "{% set day = '?' %}{% endif %}"
        "{{ 'Today ' + day + strftime_now(' (%A, %-d. %B)') + '\n' }}" + CHATML
    )
    tokenizer = tiny_tokenizer(chat_template=template)
    tokenizer.name_or_path = "knows the day"
    with caplog.at_level(logging.WARNING):
        text = render_prompt("p", tokenizer)
    today = "Today 26 Jul 2024 (Friday, 26. July)\n"
    assert text == today + "<|im_start|>user\np<|im_end|>\n<|im_start|>assistant\n"
    assert "'knows the day' prints the day: 26 Jul 2024 in every text" in caplog.text
    assert tokenizer.chat_template == template


def test_the_tokenization_hash_tells_templates_apart(tiny_tokenizer: Factory) -> None:
    templates = (None, CHATML, QWEN3, CHATML.replace("user", "human"), R1)
    hashes = [tokenization_hash(tiny_tokenizer(chat_template=template)) for template in templates]
    assert hashes == [tokenization_hash(tiny_tokenizer(chat_template=template)) for template in templates]
    assert hashes[1] == hashes[3]  # the same text by another template
    assert len(set(hashes)) == 4


@pytest.mark.parametrize(
    ("template", "error", "parts"),
    [
        ("{% for m in messages %}[{{ m['role'] }}]{% endfor %}", ModelError, ["drops the completion of x"]),
        (
            "{% for m in messages %}[{{ m['content'] }}]{% endfor %}{% if add_generation_prompt %}assistant{% else %}"
            "{{ messages[0]['content'] }}{% endif %}",
            ModelError,
            ["renders the prompt of x otherwise"],
        ),
        ("{{ raise_exception('roles must alternate') }}", DataError, ["x: ", "roles must alternate"]),
        ("{{ 1 // 0 }}", DataError, ["x: ", "division"]),
        ("{% for m in %}", DataError, ["x: ", "refuses the conversation"]),
        ("{{ 'a' * 10 ** 11 }}", ModelError, ["memory", "set another template"]),
        ("{{ 'a' * 10 ** 8 }}", ModelError, ["100,000,000 characters"]),
    ],
    ids=["drops-all", "not-a-prefix", "refuses", "raises", "no-template", "memory", "long"],
)
def test_templates_that_do_not_fit(
    tiny_tokenizer: Factory, template: str, error: type[Exception], parts: list[str]
) -> None:
    tokenizer = tiny_tokenizer(chat_template=template)
    tokenizer.name_or_path = "some/tokenizer"
    with pytest.raises(error) as caught:
        tokenize([Example("x", "p", "<think>long</think>short")], tokenizer)
    text = str(caught.value)
    for part in ["'some/tokenizer'", *parts]:
        assert part in text
    assert "\n" not in text


def test_a_template_that_loops_is_ended(tiny_tokenizer: Factory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("influence_fast.data.template_limits.SECONDS", 1)
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% set x = i + j %}{% endfor %}{% endfor %}"
    with pytest.raises(ModelError, match="does not end within 1 s"):
        tokenize([Example("x", "p", "c")], tiny_tokenizer(chat_template=loop + CHATML))


def test_tokenizers_that_do_not_fit(tiny_tokenizer: Factory) -> None:
    with pytest.raises(ModelError, match="no EOS token and no chat template"):
        tokenize([Example("x", "p", "c")], tiny_tokenizer(eos=None))
    with pytest.raises(ModelError, match="t: a conversation of several turns needs a chat template"):
        tokenize([Example("t", "p", "c", context=(("system", "s"),))], tiny_tokenizer())


def test_empty_completions_are_named(tiny_tokenizer: Factory) -> None:
    examples = [Example("a", "p", "c"), Example("b", "p", "\n"), Example("d", "p", "")]
    with pytest.raises(DataError, match=r"empty completion in 2 example\(s\): b, d"):
        tokenize(examples, tiny_tokenizer())


def test_too_long_examples_are_left_out_or_cut(tiny_tokenizer: Factory) -> None:
    tokenizer = tiny_tokenizer()
    examples = random_examples(80, seed=3)
    whole = tokenize(examples, tokenizer)
    lengths = {e["id"]: len(e["input_ids"]) for e in whole.examples}
    prompts = {e["id"]: int((e["labels"] == -100).sum()) for e in whole.examples}
    limit = sorted(lengths.values())[30]
    long = [(i, n) for i, n in lengths.items() if n > limit]
    assert whole.too_long == whole.truncated == []

    left_out = tokenize(examples, tokenizer, max_length=limit)
    assert left_out.too_long == long
    assert left_out.truncated == []
    assert [e["id"] for e in left_out.examples] == [i for i, n in lengths.items() if n <= limit]

    cut = tokenize(examples, tokenizer, max_length=limit, truncate=True)
    assert cut.too_long == [(i, n) for i, n in long if prompts[i] >= limit]
    assert cut.truncated == [(i, n) for i, n in long if prompts[i] < limit]
    assert cut.too_long
    assert cut.truncated
    assert len(cut.examples) + len(cut.too_long) == len(examples)
    full = {e["id"]: e for e in whole.examples}
    for tokens in cut.examples:
        for name in ("input_ids", "labels"):
            assert torch.equal(tokens[name], full[tokens["id"]][name][:limit])
        assert (tokens["labels"] != -100).any()


def test_a_limit_too_small_to_learn_from(tiny_tokenizer: Factory) -> None:
    with pytest.raises(DataError, match="max_length is 1"):
        tokenize([Example("x", "p", "c")], tiny_tokenizer(), max_length=1)


def test_chunks_keep_the_order(tiny_tokenizer: Factory, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, examples = tiny_tokenizer(), random_examples(50, seed=9)
    whole = tokenize(examples, tokenizer).examples
    monkeypatch.setattr("influence_fast.data.tokens._CHUNK", 7)
    for a, b in zip(whole, tokenize(examples, tokenizer).examples, strict=True):
        assert a["id"] == b["id"]
        assert torch.equal(a["input_ids"], b["input_ids"])


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([{"prompt": "a", "completion": "b"}], r"examples\[0\] is a dict, not an Example: read .* inf\.load_examples"),
        ("train.jsonl", r"examples\[0\] is a str"),
        (None, r"examples\[0\] is a NoneType"),
    ],
)
def test_what_is_no_list_of_examples_is_named(tiny_tokenizer: Any, examples: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        inf.tokenize(examples, tiny_tokenizer())


def test_the_name_of_a_tokenizer_is_none(tiny_tokenizer: Any) -> None:
    examples = inf.load_examples([{"prompt": "a", "completion": "b"}])
    with pytest.raises(ModelError, match=r"the tokenizer is a str: give what inf\.load_tokenizer returns"):
        inf.tokenize(examples, "gpt2")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="max_length is '5'"):
        inf.tokenize(examples, tiny_tokenizer(), max_length="5")  # type: ignore[arg-type]
