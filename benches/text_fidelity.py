"""Whether completions reach the model as they are: chat templates x tokenizers x completions, as one table.

    python -m benches.text_fidelity [--templates NAME ...] [--output docs/text-fidelity.md]

Every chat template that the installed trl ships, with tokenizers of seven kinds that are made here, completions of
six kinds, one and two turns, with and without a system turn. For each the tokens of `inf.tokenize` are taken back to
text and compared with what was given:

    kept      the completion stands in the text that is learnt, but for a tag that the prompt opened; what is learnt
              begins with the first token that reaches beyond the prompt and ends with an end of turn; all turns stand
              in the prompt; the tokens are those of the whole text
    refused   a DataError or ModelError that names the example
    altered   anything else: a silent fault

A tokenizer's own losses (no token for a character, marks between words) are not the template's: texts are compared
after one way through the tokenizer.
"""

from __future__ import annotations

import argparse
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from influence_fast.data.examples import Example, tokenize
from influence_fast.data.rendering import Renderer
from influence_fast.errors import InfluenceFastError

MARKERS = re.compile(r"<[^<>\s/]{1,40}>|\[/?[A-Z_]{3,30}\]|<[｜/][^<>\s]{1,40}>")
PLAIN_TAGS = {"<think>", "</think>"}  # which most tokenizers have as text

PROMPT = "What is 12 times 12?"
COMPLETIONS = {
    "plain": "12 times 12 is 144.",
    "reasoning": "<think>\n12 times 10 is 120, and 24 more.\n</think>\n\nIt is \\boxed{144}.",
    "tight reasoning": "<think>12 times 10 is 120</think>It is 144.",
    "lines": "First 120.\n\n  Then 24.\n\nSo 144.",
    "code": "```python\ndef f(x):\n\treturn {'a': x * 12}  # {{ x }} {% y %}\n```\n",
    "unicode": "答えは 144 です — naïve ✓ 😀",
}
CONTEXTS: dict[str, tuple[tuple[str, str], ...]] = {
    "one turn": (),
    "system": (("system", "Think first."),),
    "two turns": (("user", "What is 2 times 2?"), ("assistant", "2 times 2 is 4.")),
    "system, two turns": (
        ("system", "Think first."),
        ("user", "What is 2 times 2?"),
        ("assistant", "2 times 2 is 4."),
    ),
}


@dataclass(frozen=True)
class Case:
    """One combination, what came of it (kept, refused or altered), and why it was not kept."""

    template: str
    tokenizer: str
    completion: str
    context: str
    verdict: str
    why: str = ""


# ---- tokenizers --------------------------------------------------------------------------------------------


def _byte_level(prefix: bool) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    inner.decoder = decoders.ByteLevel()
    inner.post_processor = processors.ByteLevel(trim_offsets=prefix)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        _corpus(), trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    )
    return inner


def _sentencepiece(scheme: str) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    inner = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        + ([decoders.Strip(" ", 1, 0)] if scheme != "never" else [])
    )
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=["<unk>", *_bytes()], show_progress=False)
    inner.train_from_iterator(_corpus(), trainer)
    return inner


def _unigram() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    pieces = ["▁is", "▁12", "120", "▁times", "ing", "▁the", "▁"]
    letters = sorted(set("".join(_corpus())) | set("▁"))
    vocabulary = [("<unk>", 0.0), *((piece, -2.0 - 0.01 * i) for i, piece in enumerate(pieces))]
    vocabulary += [(letter, -5.0) for letter in letters if letter != "▁"]
    vocabulary += [(name, -9.0) for name in _bytes()]
    inner = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return inner


def _wordpiece() -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(set("".join(_corpus())))
    words = ["times", "is", "think", "First", "Then"]
    vocabulary = ["<unk>", *words, *letters, *(f"##{letter}" for letter in letters)]
    inner = Tokenizer(models.WordPiece({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    # every white space is a word of its own, so that none is lost
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s"), "isolated")
    inner.decoder = decoders.Sequence([decoders.Replace("##", ""), decoders.Fuse()])
    return inner


def _bytes() -> list[str]:
    return [f"<0x{byte:02X}>" for byte in range(256)]


def _corpus() -> list[str]:
    texts = [PROMPT, *COMPLETIONS.values(), *(text for turns in CONTEXTS.values() for _, text in turns)]
    frames = ["<|im_start|>assistant\n<|im_end|>\nuser system model User: Assistant: [INST]  [/INST] ### {}|/:,'\"_-"]
    letters = ["".join(chr(code) for code in range(32, 127)), "\n\t"]
    return [*texts, *frames, *letters, "｜▁"] * 2


TOKENIZERS: dict[str, Callable[[], Any]] = {
    "byte-level BPE": lambda: _byte_level(False),
    "byte-level BPE, prefix space": lambda: _byte_level(True),
    "BPE, mark first": lambda: _sentencepiece("first"),
    "BPE, mark always": lambda: _sentencepiece("always"),
    "BPE, no mark": lambda: _sentencepiece("never"),
    "Unigram": _unigram,
    "WordPiece": _wordpiece,
}


def tokenizer_for(kind: str, template: str, atoms: bool = True) -> Any:
    """Return a tokenizer of a kind of `TOKENIZERS` with a chat template; with `atoms`, its marks are tokens."""
    from transformers import PreTrainedTokenizerFast

    marks = sorted(set(MARKERS.findall(template)) - PLAIN_TAGS) if atoms else []
    special: dict[str, Any] = {"eos_token": "</s>", "bos_token": "<s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    made = PreTrainedTokenizerFast(
        tokenizer_object=TOKENIZERS[kind](), additional_special_tokens=[m for m in marks if m not in special.values()],
        **special,
    )  # fmt: skip
    made.chat_template = template
    made.name_or_path = kind
    return made


# ---- cases -------------------------------------------------------------------------------------------------


def templates() -> dict[str, str]:
    """Return the chat templates of the installed trl by name."""
    import trl

    folder = Path(trl.__file__).parent / "chat_templates"
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.jinja"))}


def cases(
    names: Sequence[str] | None = None,
    kinds: Sequence[str] | None = None,
    completions: Sequence[str] | None = None,
    atoms: bool = True,
) -> Iterator[Case]:
    """Try every combination of the templates, tokenizers and completions of these names (None: of all)."""
    for name, template in templates().items():
        if names is not None and name not in names:
            continue
        for kind in kinds or TOKENIZERS:
            tokenizer = tokenizer_for(kind, template, atoms)
            for completion in completions or COMPLETIONS:
                for context, turns in CONTEXTS.items():
                    example = Example(f"{name}/{completion}", PROMPT, COMPLETIONS[completion], context=turns)
                    yield Case(name, kind, completion, context, *tried(example, tokenizer))


def tried(example: Example, tokenizer: Any) -> tuple[str, str]:
    """Return what comes of an example: (kept, refused or altered) and why."""
    try:
        [tokens] = tokenize([example], tokenizer).examples
        renderer = Renderer(tokenizer)
        whole = renderer.whole(example)
    except InfluenceFastError as error:
        return "refused", str(error)
    ids = tokens["input_ids"].tolist()
    split = int((tokens["labels"] == -100).sum())
    prompt, answer = whole.text[: whole.prompt], whole.text[whole.prompt :]
    opened = [tag for tag in ("<think>\n", "<think>") if prompt.rstrip().endswith("<think>")]
    given = [example.completion, *(example.completion.removeprefix(tag) for tag in opened)]
    if not any(text in answer for text in given):
        return "altered", f"{answer!r} has not {example.completion!r}"
    if not answer.rstrip().endswith(renderer.end.text):
        return "altered", f"{answer!r} does not end with {renderer.end.text!r}"
    if example.prompt not in prompt or any(text not in prompt for _, text in example.context):
        return "altered", f"{prompt!r} has not all turns"
    if ids != tokenizer(whole.text, add_special_tokens=False)["input_ids"]:
        return "altered", "tokens are not those of the whole text"
    alone = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    if ids[:split] != alone and not _decoded(tokenizer, alone).startswith(_decoded(tokenizer, ids[:split])):
        return "altered", f"the prompt's tokens {ids[:split]} are not {alone}"
    back = _decoded(tokenizer, ids[split:])
    if not any(_once_through(tokenizer, text).strip() in back for text in given):
        return "altered", f"{back!r} has not {example.completion!r}"
    return "kept", ""


def _decoded(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def _once_through(tokenizer: Any, text: str) -> str:
    return _decoded(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"])


# ---- the table ---------------------------------------------------------------------------------------------


def table(found: Sequence[Case]) -> str:
    """Return the cases as a table in Markdown: a line a template, kept, refused and altered by completion."""
    lines = [
        "| template | " + " | ".join(COMPLETIONS) + " | refused | altered |",
        "|---" * (len(COMPLETIONS) + 3) + "|",
    ]
    for name in dict.fromkeys(case.template for case in found):
        own = [case for case in found if case.template == name]
        cells = []
        for completion in COMPLETIONS:
            verdicts = Counter(case.verdict for case in own if case.completion == completion)
            cells.append(f"{verdicts['kept']} of {verdicts.total()}")
        refused = sorted({case.context for case in own if case.verdict == "refused"})
        altered = sum(case.verdict == "altered" for case in own)
        lines.append(f"| {name} | {' | '.join(cells)} | {', '.join(refused) or '-'} | {altered} |")
    return "\n".join(lines)


def main() -> None:
    """Write the table, and print what was not kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--templates", nargs="+")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    found = [*cases(args.templates), *cases(args.templates, ["byte-level BPE"], atoms=False)]
    counts = Counter(case.verdict for case in found)
    for why, count in Counter(
        f"{c.verdict}: {c.template}, {c.tokenizer}: {c.why[:160]}" for c in found if c.why
    ).items():
        print(f"{count:4} {why}")
    said = ", ".join(f"{counts[verdict]} {verdict}" for verdict in ("kept", "refused", "altered"))
    print(f"{len(found)} cases of {len({c.template for c in found})} templates: {said}")
    if args.output is not None:
        args.output.write_text(_PAGE.format(said=said, count=len(found), table=table(found)), encoding="utf-8")


_PAGE = """# Text fidelity

Written by `python -m benches.text_fidelity --output docs/text-fidelity.md`, whose docstring says what is compared:
{count} cases, {said}. A cell counts tokenizers x conversations; "refused" names the conversations that the template
itself does not take, each with an error that says so.

{table}
"""

if __name__ == "__main__":
    main()
