"""Write questions as tasks of lm-evaluation-harness, so that its runs and ours answer the same questions."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from influence_fast.atomic import write_text
from influence_fast.data.row_files import write_rows
from influence_fast.data.schemas import Example
from influence_fast.errors import DataError
from influence_fast.evaluation.evaluate import EvalConfig

GRADER = '''\
"""Grades by influence-fast, so that the figures can be compared; lm-eval finds this by the task's `!function`."""

from influence_fast.evaluation.grading import grade


def process_results(doc, results):
    return {{"exact_match": float(grade(results[0], doc["answer"], kind={kind!r}).correct)}}
'''


def export_lm_eval(name: str, examples: Sequence[Example], config: EvalConfig, folder: str | Path) -> str:
    """Write questions as a task of lm-evaluation-harness, and return the command that runs it.

    The files are `<folder>/<task>.yaml`, `.jsonl` and `<task>_grader.py`; the task is called `influence_fast_<name>`.
    Its prompts are those of `examples` and the line break that `render_prompt` puts after a prompt without a chat
    template (lm-eval's `--apply_chat_template` asks for one), its limits and sampling those of `config`, its metric
    `exact_match` by `grading.grade`. One answer a question is generated: `samples` and `pass_at` have no counterpart
    here.

    Form of the file: lm-evaluation-harness 0.4, docs/task_guide.md. The data file is named by its absolute path, since
    lm-eval would look for a relative one in the folder it is run from. Raises DataError for an example without an
    answer or with earlier turns.
    """
    import yaml

    for example in examples:
        if example.answer is None or example.context or example.between:
            why = "has no answer" if example.answer is None else "has earlier turns"
            raise DataError(f"{example.id}: {why}, which an lm-eval task cannot hold; leave it out")
    task = "influence_fast_" + re.sub(r"\W+", "_", name)
    folder = Path(folder).resolve()
    data = folder / f"{task}.jsonl"
    rows = [{"id": e.id, "prompt": e.prompt, "answer": e.answer} for e in examples]
    write_rows(rows, data)
    write_text(folder / f"{task}_grader.py", GRADER.format(kind=config.answer_kind))
    sampling: dict[str, Any] = {"do_sample": config.temperature > 0}
    if config.temperature > 0:
        sampling |= {"temperature": config.temperature, "top_p": config.top_p}
    settings = {
        "task": task,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}\n",
        "doc_to_target": "{{answer}}",
        # without an `until` lm-eval stops at the first empty line, which a chain of thought is full of
        "generation_kwargs": {"until": [], "max_gen_toks": config.max_new_tokens, **sampling},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0, "settings": dataclasses.asdict(config) | {"pass_at": list(config.pass_at)}},
    }
    # yaml.safe_dump cannot write lm-eval's own tag
    function = f"process_results: !function {task}_grader.process_results\n"
    write_text(folder / f"{task}.yaml", yaml.safe_dump(settings, sort_keys=False, allow_unicode=True) + function)
    return f"lm_eval --model hf --model_args pretrained=MODEL,peft=ADAPTER --tasks {task} --include_path {folder}"
