"""Hostile tasks: odd keys, templates that are programs of the wrong kind, and questions that no template expects."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benches.hostile.case import Case
from benches.hostile.configs import TEXTS, no_files, with_key
from benches.hostile.values import ODD, dumped
from influence_fast.evaluation.tasks import load_task, task_examples

_BASE: dict[str, Any] = {
    "source": {"path": "q.jsonl", "split": "train"},
    "columns": {"question": "q", "answer": "a"},
    "prompt": "{{ question }}",
}
_KEYS = (
    "source",
    "source.path",
    "source.config",
    "source.split",
    "columns",
    "columns.question",
    "columns.answer",
    "columns.id",
)
_KEYS += (
    "columns.solution",
    "columns.distractors",
    "prompt",
    "answer",
    "sampling",
    "sampling.max_new_tokens",
    "citation",
    "name",
)
_KEYS += ("sampling.temperature", "sampling.top_p", "sampling.samples", "sampling.pass_at")
_ROWS = [{"q": "2+2?", "a": "4", "w": ["1", "2"], "n": 10**12}, {"q": "3+3?", "a": "6", "w": ["1"], "n": 10**12}]

TEMPLATES = (
    "{% for i in range(10**12) %}x{% endfor %}",
    "{{ 'x' * 10**11 }}",
    "{{ 9**9**9 }}",
    "{{ '%0999999999d' % 5 }}",
    "{{ question * n }}",
    "{{ row.q * row.n }}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{{ j }}{% endfor %}{% endfor %}",
    "{{ [question] * row.n }}",
    "{{ 1 / 0 }}",
    "{{ question + 5 }}",
    "{{ question.x.y }}",
    "{{ nothing }}",
    "{{ question | nothing }}",
    "{% include 'x' %}",
    "{% import 'x' as x %}",
    "{% extends 'x' %}",
    "{{ ''.__class__.__mro__ }}",
    "{{ question.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.system('exit') }}",
    "{{ lipsum(10**6) }}",
    "{{ range(10**9) | list }}",
    "{{ row.clear() }}",
    "{{ row.update({}) }}",
    "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    "{{ '{0.__class__}'.format(5) }}",
    "{{ '%s' | format }}",
    "{{ question | int(base=99) }}",
    "{{ question | batch(0) | list }}",
    "{{ options[5] }}",
    "{{ dict(a=1)['b'] }}",
    "{{ row['z'] }}",
    "{{ row[5][6] }}",
    "{% raw %}",
    "{{",
    "{% for %}",
    "{% if %}",
    "{% endfor %}",
    "{{ (" + "(" * 5000 + "1" + ")" * 5000 + ") }}",
    "{{ " + "-" * 5000 + "1 }}",
    "{{ " + "[" * 3000 + "]" * 3000 + " }}",
    "{% if a %}" * 3000,
    "{{ question | replace('', 'x' * 9999) | replace('', 'x' * 9999) | replace('', 'x') }}",
    "{{ 'x' | center(10**10) }}",
    "{{ question | indent(10**10) }}",
    "{{ question | wordwrap(0) }}",
    "{{ question | round }}",
    "{{ question | tojson | tojson | tojson }}",
    "{{ namespace(a=1).b }}",
    "{{ joiner(5)(6) }}",
    "{% set a = [] %}{% for i in range(9) %}{% set a = a + [a] %}{% endfor %}{{ a }}",
    "{{ question | sort(attribute='x') }}",
    "{{ question | groupby('x') }}",
    "{{ question | sum }}",
    "{{ 5 | length }}",
    "{{ question | xmlattr }}",
    "{{ {} | urlize }}",
    "{{ question | truncate(5, 6, 7, 8) }}",
    "{{ loop.index }}",
    "{{ self.x() }}",
    "{{ caller() }}",
    "{% call a() %}{% endcall %}",
    "{% filter x %}{% endfilter %}",
    "{{ question is divisibleby 0 }}",
    "{{ question is sameas }}",
    "{{ question[::0] }}",
    "{{ question.encode('x') }}",
    "{{ '\\ud800' }}",
    "{{ question }}" * 20_000,
    "{{ [1] | map('x') | list }}",
    "{{ question | attr('__class__') }}",
    "{{ row.q.join(row.n) }}",
    "{{ question.format(*row) }}",
    "{{ question.zfill(10**11) }}",
    "{{ question.ljust(row.n) }}",
    "{{ 2**(2**40) }}",
    "{{ (10**9) | string * 10**9 }}",
    "",
    " ",
    "{# only #}",
    "\0",
    "{% for a in question recursive %}{{ loop(question) }}{% endfor %}",
    "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
)


def _read(path: Path) -> Callable[[], Any]:
    return lambda: task_examples(load_task(path))


def _task(name: str, body: bytes, rows: str | None = None) -> Case:
    def make(folder: Path) -> Callable[[], Any]:
        (folder / "t.yaml").write_bytes(body)
        lines = "".join(dumped(dict(row)) + "\n" for row in _ROWS) if rows is None else rows
        (folder / "q.jsonl").write_bytes(lines.encode("utf-8", "surrogatepass"))
        return _read(folder / "t.yaml")

    return Case(name, make)


def cases(rng: random.Random, shared: Path) -> Iterator[Case]:
    """Yield every case of the room."""
    for number, template in enumerate(TEMPLATES):
        yield _task(f"template/{number}", dumped(_BASE | {"prompt": template}).encode("utf-8", "surrogatepass"))
        more = {"columns": {"question": "q", "answer": "a", "distractors": ["w"]}, "answer": "choice"}
        yield _task(
            f"template of a choice/{number}",
            dumped(_BASE | more | {"prompt": template}).encode("utf-8", "surrogatepass"),
        )
    for key in _KEYS:
        for number in rng.sample(range(len(ODD)), 8):
            changed = with_key(_BASE, tuple(key.split(".")), ODD[number])
            yield _task(f"key/{key}/{number}", dumped(changed).encode("utf-8", "surrogatepass"))
    for name, body in TEXTS.items():
        yield _task(f"text/{name}", body)
    for number, value in enumerate(ODD):
        for column in ("q", "a", "w"):
            rows = "".join(dumped(row | {column: value}) + "\n" for row in _ROWS)
            prompt = {"prompt": "{{ question }} {{ row.w }} {% for l, t in options %}{{ t }}{% endfor %}"}
            kind = (
                {"answer": "choice", "columns": {"question": "q", "answer": "a", "distractors": ["w"]}}
                if number % 2
                else {}
            )
            yield _task(f"row/{column}/{number}", dumped(_BASE | prompt | kind).encode(), rows)
    yield from no_files("t.yaml", _read)
