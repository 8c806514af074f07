"""One self-contained HTML page from the results of a run, and the same numbers as `results.json`.

`write_report(results, path)` needs nothing but the plain dictionary below; `load_results` reads it back from a run
folder. Every part but `title` is optional (absent or None), and a part that is missing is left out of the page. A
number that is None, NaN or infinite is shown as `n/a`. Accuracies, fractions and AUCs are in 0..1, times in seconds.

    title            str
    summary          str: a sentence of the user's own, shown under the title
    created          ISO time
    config           nested dict, shown flattened; `versions` {name: version}; `environment` {name: value}
    data             {"pool": int, "validation": int, "test": int, "labels": {kind: count},
                      "set_aside": [{"id": str, "why": str}]}
    accuracy_before  {"name": str, "accuracy", "low", "high", "n": int, ...}   the model before fine-tuning, as a cell
    cells            one a run: {"strategy", "fraction" (of the pool that is dropped; "full": 0), "seed", "kept",
                      "dropped", "accuracy", "low", "high" (95 % over test questions), "n", "harmful_dropped",
                      "harmful_total", "expected_by_chance", "seconds", "samples" (answers a question), "majority"
                      (maj@n), "pass_at": [{"k", "value"}]}; needed: strategy, accuracy. Several seeds of one
                      (strategy, fraction) are put together by `summary.interval`
    settings         {"strategy", "fraction", "accuracy", "low", "high"}: intervals over seeds and questions from
                      `grid_statistics`, in place of those of `summary.interval`
    comparisons      paired tests: {"strategy", "fraction", "against": other strategy, "difference", "low", "high",
                      "p", "p_adjusted", "effect", "effect_low", "effect_high", "seeds"}; where present, the headline
                      uses their interval
    detection        [{"method", "auc", "low", "high", "precision_at": {"10%": float}}]   known harmful traces
    scores           one a trace: {"id", "s_correct", "s_incorrect", "rank_correct", "rank_incorrect" (1 = lowest),
                      "label", "prompt", "completion", "loss", "dropped_by": [strategy]}; needed: id and both scores
    rank_agreement   {"methods": [name], "spearman": [[float]]}
    curves           {run name: [[step, loss], ...]}
    cost             [{"stage", "seconds", "detail"}]
    queries          {"correct": n, "incorrect": n}   validation answers the scores are means over
    references       [group]: those of `queries` that are reference solutions and not the model's answers
    explained        str: where the page of single answers is (`explain`): a relative path that leads to it from the
                      report, in its folder or below; anything else is left out, with a warning
    warnings         [str]

Tens of thousands of scores are fine: above `context.MAX_POINTS` the scatter shows all traces as a density, and only the
extremes and an even sample as points with their text.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from influence_fast.atomic import replacing
from influence_fast.errors import DataError, one_line
from influence_fast.guards import check_no_pipe, reading
from influence_fast.report import summary
from influence_fast.report.context import page_context
from influence_fast.report.svg import key_svg
from influence_fast.report.text import between, count, decimal, duration, fraction_name, p_value, percent, signed

REPORT_NAME = "report.html"
RESULTS_NAME = "results.json"


def save_results(results: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """Write `results` atomically as strict JSON; `path` is a file, or a run folder that gets `results.json`."""
    summary.check_results(results)
    target = Path(path)
    target = target / RESULTS_NAME if target.is_dir() else target
    text = json.dumps(summary.jsonable(results), ensure_ascii=True, allow_nan=False, indent=1)
    with replacing(target) as temporary:
        temporary.write_bytes(text.encode("ascii"))
    return target


def load_results(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read results back from `results.json`, or from the run folder that holds it.

    Raises `DataError` if there is no such file, it is not JSON, or a part does not follow the schema.
    """
    source = Path(path)
    source = source / RESULTS_NAME if os.path.isdir(source) else source
    check_no_pipe(source)
    try:
        results = json.loads(source.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{source}: no such file: name a run folder that holds {RESULTS_NAME}, or the file") from None
    except (OSError, ValueError, RecursionError) as error:
        why = "nested too deeply" if isinstance(error, RecursionError) else one_line(error)
        raise DataError(f"{source} cannot be read as JSON ({why}): run the pipeline again to rewrite it") from None
    with reading(source):
        summary.check_results(results)
        return dict(results)


def write_report(results: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """Write the HTML report of `results` atomically to `path`.

    Args:
        results: a dictionary as this module's docstring describes.
        path: a file, or a folder that gets `report.html`. The same results give the same bytes.
    Returns:
        The path of the file.
    Raises:
        DataError: naming the part, row and key that do not follow the schema; nothing is written then.
    Example:
        >>> import tempfile
        >>> inf.write_report({"title": "A run"}, tempfile.mkdtemp()).name
        'report.html'
    """
    target = Path(path)
    target = target / REPORT_NAME if target.is_dir() else target
    with replacing(target) as temporary:
        temporary.write_bytes(render(results).encode("utf-8", "replace"))
    return target


def render(results: Mapping[str, Any]) -> str:
    """Return the HTML report as a string; see `write_report`."""
    with reading("the results"):
        return _rendered(results)


def _rendered(results: Mapping[str, Any]) -> str:
    summary.check_results(results)
    environment = templates()
    environment.filters.update(
        percent=percent, fraction=fraction_name, count=count, signed=signed, duration=duration, p_value=p_value,
        decimal=decimal, key=key_svg,
    )  # fmt: skip
    environment.globals.update(between=between)
    return environment.get_template("report.html.j2").render(page_context(results))


def templates() -> Environment:
    """Return the template environment of the package: everything is escaped, and an undefined name is an error."""
    return Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
