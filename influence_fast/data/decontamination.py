"""Find training examples that share a run of words with a test item, and so give the evaluation away."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from influence_fast.data.examples import Example
from influence_fast.data.ngrams import ngram_hashes, words

# A run in the items of more questions than this share is the wording of their format ("put your final answer ...").
COMMON_SHARE = 0.1
COMMON_COUNT = 3
_PARTS = re.compile(r"[^\W_]+|[+*/^=<>%\u00d7\u00f7]|(?<![^\W\d_])\s*-|-(?![^\W\d_])")


@dataclass(frozen=True, slots=True)
class Overlap:
    """The words `ngram` that example `id` shares with the evaluation item called `item`."""

    id: str
    item: str
    ngram: str

    @property
    def why(self) -> str:
        """Return the overlap in words: `shares 8 words with test/17`."""
        return f"shares {len(words(self.ngram)) or 'all'} words with {self.item}"


def contaminated(examples: Iterable[Example], tests: Mapping[str, Sequence[Example]], *, n: int = 8) -> list[Overlap]:
    """Find the examples that share n words in a row with an evaluation item, in the order of `examples`.

    Prompts and completions of both sides are compared, ignoring case and punctuation. The first shared run of an
    example is reported. Two details:

    - a prompt of fewer than n words has no such run; an example shares it if it has exactly that prompt, operators
      included;
    - a run in the items of more than a tenth of all questions (and of more than three) is the wording of their
      format, says nothing about any item, and is not counted.

    Args:
        examples: training examples.
        tests: evaluation sets by name; an item is called `<name>/<id>`.
        n: words in a run.
    Returns:
        An `Overlap` for each example that shares a run.
    Example:
        >>> question = "A farmer has 12 cows and buys 7 more cows today"
        >>> pool = [inf.Example("a", question, "19"), inf.Example("b", "What is 2 + 2?", "4")]
        >>> [found.why for found in contaminated(pool, {"test": [inf.Example("0", question, "It is 19.")]})]
        ['shares 8 words with test/0']
    """
    index = _Index(tests, n)
    overlaps = []
    for example in examples:
        overlap = index.first_overlap(example)
        if overlap is not None:
            overlaps.append(overlap)
    return overlaps


class _Index:
    """An index of the runs of all evaluation items by their hashes."""

    def __init__(self, tests: Mapping[str, Sequence[Example]], n: int) -> None:
        self.n = n
        # The number of each word that an item has.
        self.numbers: dict[str, int] = {}
        self.runs: dict[str, str] = {}  # words of a run -> the first item that has it
        self.short: dict[str, str] = {}  # words of a short prompt -> the first item that asks it
        hashes = [np.zeros(0, dtype=np.uint64)]
        # The number of different questions whose items contain a run.
        counts: Counter[str] = Counter()
        questions = set()
        for name, members in tests.items():
            for test in members:
                item = f"{name}/{test.id}"
                found = set()
                for text in (test.prompt, test.completion):
                    row = words(text)
                    row_numbers = [self.numbers.setdefault(word, len(self.numbers)) for word in row]
                    hashes.append(ngram_hashes(np.array(row_numbers, dtype=np.int64), n))
                    found |= {" ".join(row[i : i + n]) for i in range(len(row) - n + 1)}
                for run in found:
                    self.runs.setdefault(run, item)
                prompt = words(test.prompt)
                if len(prompt) < n and (plain := plain_prompt(test.prompt)):
                    self.short.setdefault(plain, item)
                if " ".join(prompt) not in questions:
                    questions.add(" ".join(prompt))
                    counts.update(found)
        most = max(COMMON_COUNT, COMMON_SHARE * len(questions))
        self.runs = {run: item for run, item in self.runs.items() if counts[run] <= most}
        self.hashes = np.unique(np.concatenate(hashes))

    def first_overlap(self, example: Example) -> Overlap | None:
        prompt = words(example.prompt)
        for row in (prompt, words(example.completion)) if len(self.hashes) else ():
            # a word that no item has gets a number that none of theirs is
            numbers = np.array([self.numbers.get(word, -1) for word in row], dtype=np.int64)
            hashes = ngram_hashes(numbers, self.n)
            nearest = self.hashes[np.minimum(np.searchsorted(self.hashes, hashes), len(self.hashes) - 1)]
            for i in np.flatnonzero(nearest == hashes).tolist():
                run = " ".join(row[i : i + self.n])
                # Hashes may agree by chance, so the words decide.
                if run in self.runs:
                    return Overlap(example.id, self.runs[run], run)
        whole = plain_prompt(example.prompt)
        return Overlap(example.id, self.short[whole], whole) if whole in self.short else None


def plain_prompt(prompt: str) -> str:
    """Return a prompt's words and operators, without case, spacing and other marks; a hyphen between words is none."""
    # `_PARTS` looks for a minus sign from each of a run of spaces: one is as good, and long runs took quadratic time.
    spaced = " ".join(prompt.casefold().replace("**", " ").split())
    return " ".join(part.strip() for part in _PARTS.findall(spaced))
