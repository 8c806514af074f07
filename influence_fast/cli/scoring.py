"""Verbs from data to scores and from scores to data: score, plan, prune."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from influence_fast.cli import options
from influence_fast.cli.messages import by_flags
from influence_fast.cli.options import NewVerb
from influence_fast.data.conversations import TURN_CHOICES
from influence_fast.errors import ConfigError

if TYPE_CHECKING:
    from influence_fast.influence.queries import Queries
    from influence_fast.influence.settings import InfluenceConfig


def add(verb: NewVerb) -> None:
    """Add these verbs and their options."""
    sub = verb("score", _score, "score training examples by their influence on validation answers")
    options.add_model(sub, adapter=True, adapter_needed=False)
    options.add_data(sub, "--data", "training examples")
    sub.add_argument("--validation", required=True, help="validation questions: hub id, file or folder")
    _row_options(sub, "validation", "the validation rows")
    sub.add_argument("--validation-limit", type=int)
    sub.add_argument(
        "--output",
        required=True,
        help="score table, .parquet or .csv; own answers go to OUTPUT.answers.jsonl, those for pass rates to "
        "OUTPUT.pool.jsonl",
    )
    sub.add_argument(
        "--store",
        help="folder of the gradient store (default: OUTPUT.store, s.csv.store for s.csv); what is fitted on lies "
        "beside it",
    )
    sub.add_argument(
        "--queries",
        help="own_answers (default), reference, or contrast: right against wrong answers to the same question too",
    )
    sub.add_argument("--samples", type=int, help="answers to each validation question, sampled at --temperature (1)")
    sub.add_argument("--temperature", type=float, help="of those answers (0.7)")
    sub.add_argument(
        "--verdicts", metavar="COLUMN", help="validation column: is the row's completion right? No answer is asked for"
    )
    sub.add_argument("--fallback", help="reference: let the solutions stand in where no own answer is correct")
    sub.add_argument(
        "--preconditioner",
        help="ekfac_cosine (the default: Shampoo's eigenbasis with EK-FAC's corrected eigenvalues, between unit-norm "
        "rows; cosine where rows are sketched at random), cosine, fisher, less, none, ...",
    )
    sub.add_argument("--damping", type=options.damping, help="share of the mean eigenvalue (0.1), or auto")
    sub.add_argument(
        "--fisher",
        help="model (the default): fit the preconditioner on labels that the model draws; data: on the data's own",
    )
    sub.add_argument("--fisher-examples", type=int, help="examples that labels are drawn for (1024)")
    sub.add_argument(
        "--optimizer", help="checkpoint whose Adam state 'adam' and 'less' read (default: moments of the rows)"
    )
    options.add_gradients(sub)
    options.add_generation(sub)
    sub.add_argument("--tasks", metavar="COLUMN", help="validation column that names tasks, a score each (for less)")
    sub.add_argument(
        "--strategies", nargs="+", default=[], metavar="NAME", help="add the scores that only some strategies read"
    )
    sub.add_argument(
        "--explain",
        type=int,
        default=0,
        metavar="K",
        help="for each answer, the K examples that made it likelier and the K that made it less likely: "
        "OUTPUT.explained.html and .jsonl",
    )
    sub.add_argument(
        "--steps",
        help="lines, sentences or tokens: score each step of each example too, in OUTPUT.steps.csv (or .parquet) and "
        "OUTPUT.steps.html",
    )

    sub = verb("plan", _plan, "settings for a time or disk budget, and the fidelity measured for them")
    options.add_model(sub, adapter=True)
    options.add_data(sub, "--data", "the examples that are to be scored")
    sub.add_argument("--seconds", type=float, help="time for the pass over the data, on this machine")
    sub.add_argument("--gigabytes", type=float, help="disk for the gradient store")

    sub = verb("prune", _prune, "write the data that a strategy keeps, in the input's own format")
    options.add_data(sub, "--data", "the data that was scored", lengths=False)
    sub.add_argument("--scores", help="score table written by 'score'")
    sub.add_argument("--strategy", help="for example combined; an unknown name lists them all")
    sub.add_argument(
        "--steps",
        metavar="FILE",
        help="table of 'score --steps', in place of --scores and --strategy: cut the steps that harm most out of the "
        "traces",
    )
    size = sub.add_mutually_exclusive_group(required=True)
    size.add_argument("--fraction", type=float, help="share to drop, 0 to 1 (with --steps: of the tokens)")
    size.add_argument("--count", type=int, help="number of examples (with --steps: of steps) to drop")
    sub.add_argument("--groups", metavar="COLUMN", help="column that names groups: drop the fraction inside each")
    sub.add_argument("--max-similar", type=float, metavar="J", help="let one stay of traces with Jaccard similarity J")
    sub.add_argument(
        "--decontaminate",
        nargs="+",
        default=[],
        metavar="FILE",
        help="drop what shares 8 words with these questions (hub id, file or folder)",
    )
    _row_options(sub, "decontaminate", "these questions")
    sub.add_argument("--seed", type=options.seed, default=0)
    sub.add_argument(
        "--output", required=True, help="file for the kept rows; the table goes to OUTPUT.table.csv and .table.parquet"
    )


def _row_options(sub: argparse.ArgumentParser, of: str, whose: str) -> None:
    """Add the options that `_load_beside` reads."""
    sub.add_argument(f"--{of}-split", default="train")
    sub.add_argument(f"--{of}-format", default="auto", help=f"as --format, of {whose}")
    sub.add_argument(
        f"--{of}-columns", type=options.columns, metavar="NAME=COLUMN,...", help="as --columns, of these rows"
    )
    sub.add_argument(f"--{of}-turns", choices=TURN_CHOICES, default="last", help=f"as --turns, of {whose}")


def _score(args: Any) -> None:
    from influence_fast.config import PruningConfig, check_strategies
    from influence_fast.influence.recipe import Recipe
    from influence_fast.influence.scores import check_format
    from influence_fast.influence.settings import InfluenceConfig
    from influence_fast.report.explain import EXPLAINED
    from influence_fast.report.steps import save_steps
    from influence_fast.run.scoring import explained_scores
    from influence_fast.selection.difficulty import check_answers
    from influence_fast.selection.pool_scores import ScoredPool, baseline_columns
    from influence_fast.selection.pruning import with_fingerprints
    from influence_fast.selection.strategies import PASS_RATE, needed_columns

    options.not_an_input(args.output, args.data, args.validation)
    check_format(args.output)
    if args.explain < 0:
        raise ConfigError(f"--explain is {args.explain}; give a number of examples, or leave it out")
    gradients = options.gradients_of(args)
    names = ["preconditioner", "damping", "fisher", "fisher_examples", "optimizer", "queries", "fallback"]
    names += ["samples", "temperature", "verdicts"]
    influence = InfluenceConfig(**options.given(args, *names))
    recipe = Recipe.of(gradients, influence)
    recipe.check()
    check_strategies(args.strategies, influence)
    _check_steps(args, gradients)
    if args.fisher is not None and not recipe.reads_labels:
        raise ConfigError("--fisher is read by ekfac, fisher, datainf and where a sketch is fitted: leave it out here")
    if args.fisher_examples is not None and (not recipe.reads_labels or influence.fisher != "model"):
        raise ConfigError(
            "--fisher-examples is read by ekfac, fisher and datainf with --fisher model: leave it out here"
        )
    if unused := [setting for setting in recipe.unused() if setting.changed]:
        raise ConfigError(unused[0].said, key=unused[0].key, value=unused[0].value, remedy="leave it out")
    needs = needed_columns(args.strategies)
    if influence.queries == "reference" and args.max_new_tokens is not None and PASS_RATE not in needs:
        raise ConfigError("--max-new-tokens is of the model's own answers, which --queries reference does not ask for")
    examples = options.read_examples(args)
    if PASS_RATE in needs:
        check_answers(examples)
    model, tokenizer = options.open_model(args)
    pool = options.tokenized(args, examples, tokenizer)
    validation = _load_beside(args, "validation", args.validation, limit=args.validation_limit)
    if _same_rows(args):
        print("warning: the validation questions are the training data, which scores itself: see --validation-split")
    queries = _queries(args, influence, validation, (model, tokenizer))
    asked = ScoredPool(model, tokenizer, examples, pool, queries, args.steps)
    scored, explained = explained_scores(
        asked,
        Path(args.store or f"{args.output}.store"),
        gradients,
        influence,
        f"{args.output}.{EXPLAINED}",
        top=args.explain,
        progress=options.bars(args),
    )
    for path in explained:
        print(f"answer by answer: {path}")
    if scored.steps is not None:
        for path in save_steps(scored.steps, examples, args.output):
            print(f"step by step: {path}")
    seconds = scored.seconds
    table, more = baseline_columns(
        scored.table,
        needs,
        asked,
        PruningConfig().pass_rate_config(_evaluation(args)),
        transcripts=Path(f"{args.output}.pool.jsonl"),
        progress=options.bars(args),
    )
    seconds |= more
    with_fingerprints(table, examples).save(args.output)
    for warning in queries.warnings:
        print(f"warning: {warning}")
    spent = ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items())
    print(f"scores: {args.output} ({len(table.ids)} examples against {queries.sizes}; {spent})")


def _check_steps(args: Any, gradients: Any) -> None:
    """Raise ConfigError for steps that are of no known kind, or of a model that steps are not scored for."""
    from influence_fast.data.steps import KINDS
    from influence_fast.settings import one_of

    if args.steps is None:
        return
    one_of("steps", args.steps, KINDS)
    if gradients.target is not None:
        raise ConfigError(
            "is of LoRA adapters, and --target names weights of a fully fine-tuned model: leave one of the two out",
            key="steps",
            value=args.steps,
        )


def _evaluation(args: Any) -> Any:
    """Return how answers are asked for, but for the sampling of validation answers."""
    return options.evaluation_of(argparse.Namespace(**{**vars(args), "samples": None, "temperature": None}))


def _queries(args: Any, influence: InfluenceConfig, validation: list[Any], answering: tuple[Any, Any]) -> Queries:
    """Return what the pool is scored against: the model's own answers, those of the data, or reference solutions."""
    from influence_fast.data.examples import load_rows
    from influence_fast.data.grouping import row_groups
    from influence_fast.influence import queries as asked
    from influence_fast.influence.settings import CONTRAST, REFERENCE

    def column(name: str) -> list[str]:
        return row_groups(load_rows(args.validation, split=args.validation_split), name)

    if influence.verdicts is not None:
        found = asked.given_queries(validation, column(influence.verdicts))
    else:
        answers = None
        if influence.queries != REFERENCE:
            kept = Path(f"{args.output}.answers.jsonl")
            how = asked.answers_config(influence, _evaluation(args))
            answers = asked.own_answers(*answering, validation, how, kept, progress=options.bars(args))
        needed = ("correct", "incorrect") if influence.queries == CONTRAST else ("correct",)
        found = asked.make_queries(validation, answers, args.fallback, needed=needed)
    if args.tasks is not None:
        found = asked.with_tasks(found, column(args.tasks))
    return asked.with_contrast(found) if influence.queries == CONTRAST else found


def _load_beside(args: Any, of: str, source: str, **more: Any) -> list[Any]:
    """Return the examples of `source`, read by options of their own (`--validation-split`), which errors then name."""
    from influence_fast.data.examples import load_examples
    from influence_fast.errors import DataError

    how = {name: getattr(args, f"{of}_{name}") for name in ("split", "format", "columns", "turns")}
    try:
        return load_examples(source, **how, **more)
    except DataError as error:
        raise DataError(by_flags(error, args, of=f"{of}-")) from error


def _same_rows(args: Any) -> bool:
    """Return whether --data and --validation are the same split of the same source; a single file has one split."""
    data, validation = (os.path.realpath(os.path.expanduser(path)) for path in (args.data, args.validation))
    return data == validation and (args.split == args.validation_split or os.path.isfile(data))


def _plan(args: Any) -> None:
    from influence_fast.run.planner import describe, plan

    model, tokenizer = options.open_model(args)
    examples = options.tokenized(args, options.read_examples(args), tokenizer)
    size = None if args.gigabytes is None else int(args.gigabytes * 1e9)
    print(describe(plan(model, examples, seconds=args.seconds, bytes=size)))
    print(
        "LDS: measured on small models (influence_fast/run/fidelity.json); expect the order, not the numbers, to hold"
    )


def _prune(args: Any) -> None:
    from influence_fast.data.decontamination import contaminated
    from influence_fast.data.diversity import near_duplicates
    from influence_fast.data.examples import load_rows, save_examples
    from influence_fast.data.grouping import row_groups
    from influence_fast.errors import truncated_list
    from influence_fast.influence.scores import FINGERPRINT, ScoreTable
    from influence_fast.selection.pruning import aligned_examples, save_selection, select

    if args.steps is not None:
        return _prune_steps(args)
    if args.scores is None or args.strategy is None:
        raise ConfigError("give --scores and --strategy, or --steps")
    options.not_an_input(args.output, args.data, args.scores, *args.decontaminate)
    table = ScoreTable.load(args.scores)
    examples = options.read_examples(args)
    scored = aligned_examples(table, examples)
    if FINGERPRINT not in table.texts:
        print(
            f"warning: {args.scores} does not say which texts it is of (an older table, or one made by hand): rows are "
            "matched by id or place alone"
        )
    rows = load_rows(args.data, split=args.split)
    groups = clusters = None
    if args.groups is not None:
        of_row = row_groups(rows, args.groups)
        groups = [of_row[example.row] for example in scored]
    if args.max_similar is not None:
        clusters = near_duplicates(
            [example.completion for example in scored], args.max_similar, progress=not args.quiet
        )
    tests: dict[str, list[Any]] = {}
    for file in args.decontaminate:
        tests.setdefault(Path(file).stem, []).extend(_load_beside(args, "decontaminate", file))
    overlaps = contaminated(scored, tests)
    for found in overlaps[:20]:
        print(f"{found.id} {found.why}: {found.ngram}")
    if len(overlaps) > 20:
        print(f"and {len(overlaps) - 20} more; the table has all of them")
    selection = select(
        table,
        args.strategy,
        fraction=args.fraction,
        count=args.count,
        seed=args.seed,
        groups=groups,
        clusters=clusters,
        exclude={found.id: found.why for found in overlaps},
    )
    kept = selection.kept_examples(table, examples)
    save_examples(kept, args.output, rows, args.columns)
    save_selection(table, selection, args.output)
    print(f"kept {len(selection.keep)} and dropped {len(selection.drop)} of {len(table.ids)} examples: {args.output}")
    if selection.forced:
        chosen = len(selection.drop) - selection.forced
        print(
            f"of the dropped, {selection.forced} had to go (near-duplicates or test questions) and {chosen} are "
            f"{args.strategy}'s choice"
        )
    known = set(table.ids)
    without = [example.id for example in examples if example.id not in known]
    if without:
        print(f"warning: {len(without)} examples have no score and are not in the output: {truncated_list(without)}")


def _prune_steps(args: Any) -> None:
    """Write the data without the steps that harm most."""
    from influence_fast.data.examples import load_rows, write_rows
    from influence_fast.data.pruned_rows import with_completions
    from influence_fast.influence.step_scores import StepTable
    from influence_fast.selection.step_pruning import select_steps, without_steps

    for name in ("scores", "strategy", "groups", "max_similar"):
        if getattr(args, name) is not None:
            raise ConfigError("is of whole examples: leave it out, or --steps", key=name, value=getattr(args, name))
    if args.decontaminate:
        raise ConfigError("is of whole examples: prune these first, and steps of what is left", key="decontaminate")
    options.not_an_input(args.output, args.data, args.steps)
    table = StepTable.load(args.steps)
    examples = options.read_examples(args)
    selection = select_steps(table, fraction=args.fraction, count=args.count, seed=args.seed)
    changed = without_steps(examples, table, selection)
    rows = load_rows(args.data, split=args.split)
    write_rows(with_completions(rows, examples, changed, args.columns), args.output, schema=rows.schema)
    emptied = sum(example is None for example in changed.values())
    share = 100 * selection.dropped_tokens / selection.tokens
    print(
        f"cut {len(selection.drop)} of {len(table)} steps ({share:.1f} % of the tokens) out of {len(changed)} of "
        f"{len(examples)} examples, {emptied} of which had no other step and are left out: {args.output}"
    )
