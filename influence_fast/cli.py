"""The command line. Only this file parses arguments; each verb calls one stage and prints what came out."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from influence_fast import __version__
from influence_fast.errors import ConfigError, InfluenceFastError

if TYPE_CHECKING:
    from influence_fast.config import GradientConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0, 2 for an error the user can mend, 130 after Ctrl-C."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if not hasattr(args, "work"):
        parser.print_help()
        return 0
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _say_warning
            args.work(args)
    except InfluenceFastError as error:
        if args.debug:
            traceback.print_exc()
        print(f"error: {_by_flags(str(error), args)}", file=sys.stderr)
        return 2
    except OSError as error:
        # a full disk, a folder that cannot be written: the system's own words name the thing
        if args.debug:
            traceback.print_exc()
        what = f"{error.filename}: " if error.filename else ""
        wrong = isinstance(error, NotADirectoryError | IsADirectoryError | FileNotFoundError)
        kept = "give another path" if wrong else "finished work is kept"
        print(f"error: {what}{error.strerror or error}; {kept}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        said = str(stop) or "what was finished is kept; run the same command again to go on"
        print(f"stopped: {said}", file=sys.stderr)
        return getattr(stop, "exit_code", 130)  # SIGTERM has its own
    return 0


def _by_flags(text: str, args: Any, of: str = "") -> str:
    """Settings by the names that they have as options of this verb; a configuration file has their own.

    of: what the names of the options for columns and format begin with ("validation-").
    """
    if hasattr(args, "config"):
        return text

    def flag(found: re.Match[str]) -> str:
        part, name = found[1], found[2]
        option = {"r": "rank"}.get(name, name)
        known = name in _settings_of(part) and hasattr(args, option)
        return "--" + option.replace("_", "-") if known else found[0]

    text = re.sub(r"(?<![\w./\\-])(\w+)\.(\w+)(?![\w/\\]|\.\w)", flag, text)  # no part of a path
    if hasattr(args, "columns"):  # {"prompt": "...", "id": None} as prompt=...,id=
        text = re.sub(
            r"columns=\{([^{}]*)\}",
            lambda m: f"--{of}columns " + re.sub(r'"(\w+)": (?:"?(\.\.\.)"?|None)(?:, )?', r"\1=\2,", m[1]).rstrip(","),
            text,
        )
        text = re.sub(r'format="(\w+)"(?: with)?', rf"--{of}format \1", text)
    return text


def _settings_of(part: str) -> set[str]:
    """The keys of one part of a configuration, of those whose names are no file's."""
    from influence_fast import config

    parts = {
        "gradients": config.GradientConfig,
        "influence": config.InfluenceConfig,
        "training": config.TrainConfig,
        "train": config.TrainConfig,
        "lora": config.LoraSettings,
        "evaluation": config.EvalConfig,
        "pruning": config.PruningConfig,
    }
    if part == "data":
        return {"max_length", "truncate", "limit"}
    return {f.name for f in dataclasses.fields(parts[part])} if part in parts else set()


def _say_warning(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
    """A line for the person at the terminal, without the place in the code."""
    print(f"warning: {message}", file=sys.stderr)


def build_parser() -> argparse.ArgumentParser:
    """All verbs and their options."""
    parser = argparse.ArgumentParser(
        prog="influence-fast",
        description="Find which chain-of-thought training examples help or harm a fine-tuned language model.",
    )
    parser.add_argument("--version", action="version", version=f"influence-fast {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB")

    def verb(name: str, work: Callable[[Any], None], help: str) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=help, description=help)
        # SUPPRESS: given before the verb or after it, the flag counts; absent here, it does not overwrite
        sub.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show an error's traceback")
        sub.add_argument("--quiet", action="store_true", help="no progress on the screen")
        sub.set_defaults(work=work)
        return sub

    sub = verb("demo", _demo, "run the whole pipeline on a small built-in world (CPU, no network)")
    sub.add_argument("--output", default="demo-run", help="folder for everything (default: demo-run)")
    sub.add_argument("--seed", type=int, default=0)

    sub = verb("run", _run, "run the whole pipeline from a configuration file")
    sub.add_argument("config", help="YAML file; see recipes/ and influence_fast/config.py")
    sub.add_argument("--output", help="overrides the configuration's output folder")
    sub.add_argument("--dry-run", action="store_true", help="print sizes, memory and time, and do nothing")
    sub.add_argument("--rows", type=int, help="dry run: examples of a pool that is not on this machine")
    sub.add_argument("--tokens-per-example", type=float, help="dry run: their mean length")
    sub.add_argument("--tokens-per-second", type=float, help="dry run: measured speed of training, for the time")

    sub = verb("train", _train, "fine-tune a LoRA adapter")
    _model(sub, adapter=False)
    _data(sub, "--data", "training examples")
    sub.add_argument("--output", required=True, help="folder for the adapter")
    for option, kind, help in (
        ("--epochs", float, "passes over the data"),
        ("--learning-rate", float, "peak learning rate"),
        ("--batch-size", int, "examples a step"),
        ("--max-steps", int, "optimizer steps, in place of epochs"),
        ("--packing", int, "tokens of a row that examples are packed into"),
        ("--rank", int, "LoRA rank r"),
        ("--seed", int, "seed of initialisation and data order"),
    ):
        sub.add_argument(option, type=kind, help=help)
    sub.add_argument("--target-modules", nargs="+", metavar="NAME", help="layers that get LoRA (default: all linears)")
    sub.add_argument(
        "--save-checkpoints",
        nargs="?",
        const=True,
        type=int,
        metavar="STEPS",
        help="keep a checkpoint each epoch, or every STEPS steps, with the optimizer's state (for adam and less)",
    )

    sub = verb("score", _score, "score training examples by their influence on validation answers")
    _model(sub, adapter=True)
    _data(sub, "--data", "training examples")
    sub.add_argument("--validation", required=True, help="validation questions: hub id, file or folder")
    sub.add_argument("--validation-split", default="train")
    sub.add_argument("--validation-format", default="auto", help="as --format, of the validation rows")
    sub.add_argument("--validation-limit", type=int)
    sub.add_argument(
        "--validation-columns", type=_columns, metavar="NAME=COLUMN,...", help="as --columns, of these rows"
    )
    sub.add_argument(
        "--output",
        required=True,
        help="score table, .parquet or .csv; own answers go to OUTPUT.answers.jsonl, those for pass rates to "
        "OUTPUT.pool.jsonl",
    )
    sub.add_argument(
        "--store",
        help="folder of the gradient store (default: OUTPUT with .store); what is fitted on lies beside it",
    )
    sub.add_argument("--queries", help="own_answers (default) or reference")
    sub.add_argument("--fallback", help="reference: let the solutions stand in where no own answer is correct")
    sub.add_argument(
        "--preconditioner",
        help="ekfac_cosine (the default; cosine where rows are sketched at random), cosine, fisher, less, none, ...",
    )
    sub.add_argument("--damping", type=_damping, help="share of the mean eigenvalue (0.1), or auto")
    sub.add_argument(
        "--fisher",
        help="model (the default): fit the preconditioner on labels that the model draws; data: on the data's own",
    )
    sub.add_argument("--fisher-examples", type=int, help="examples that labels are drawn for (1024)")
    sub.add_argument(
        "--optimizer", help="checkpoint whose Adam state 'adam' and 'less' read (default: moments of the rows)"
    )
    _gradient_flags(sub)
    sub.add_argument("--max-new-tokens", type=int, help="limit of a generated answer")
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

    sub = verb("build", _build, "build a gradient store; under torchrun and the like, on all processes together")
    _model(sub, adapter=True)
    _data(sub, "--data", "training examples")
    sub.add_argument("--output", required=True, help="folder of the store, which all processes see")
    _gradient_flags(sub)
    sub.add_argument("--damping", type=_damping, help="of a fitted sketch: as for 'score'")
    sub.add_argument("--fisher", help="labels that a sketch is fitted on: as for 'score'")
    sub.add_argument("--shard-rows", type=int, help="examples in a shard, which is what a process takes at a time")
    sub.add_argument("--max-tokens", type=int, help="tokens in one packed batch")
    sub.add_argument("--fsdp", type=int, default=1, metavar="N", help="spread each copy of the model over N processes")
    sub.add_argument("--time-limit", type=float, default=600.0, help="seconds without a batch after which one hangs")
    sub.add_argument("--peak-tflops", type=float, help="of one card, for the utilisation (default: known cards)")
    sub.add_argument("--profile", action="store_true", help="write a Chrome trace of the first batches")

    sub = verb("prune", _prune, "write the data that a strategy keeps, in the input's own format")
    _data(sub, "--data", "the data that was scored", lengths=False)
    sub.add_argument("--scores", required=True, help="score table written by 'score'")
    sub.add_argument("--strategy", required=True, help="for example combined; an unknown name lists them all")
    size = sub.add_mutually_exclusive_group(required=True)
    size.add_argument("--fraction", type=float, help="share to drop, 0 to 1")
    size.add_argument("--count", type=int, help="number of examples to drop")
    sub.add_argument("--groups", metavar="COLUMN", help="column that names groups: drop the fraction inside each")
    sub.add_argument("--max-similar", type=float, metavar="J", help="let one stay of traces with Jaccard similarity J")
    sub.add_argument(
        "--decontaminate", nargs="+", default=[], metavar="FILE", help="drop what shares 8 words with these questions"
    )
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument(
        "--output", required=True, help="file for the kept rows; the table goes to OUTPUT.table.csv and .table.parquet"
    )

    sub = verb("eval", _eval, "answer questions and grade the answers")
    _model(sub, adapter=True, adapter_needed=False, needed=False)
    sub.add_argument("--task", help="gsm8k, math500, ... or a task's .yaml file; --data then overrides its source")
    _data(sub, "--data", "questions with final answers", needed=False, lengths=False)
    sub.set_defaults(split=None)  # a task has its own
    sub.add_argument("--output", help="transcripts, .jsonl; the same command again goes on from them")
    sub.add_argument("--max-new-tokens", type=int, help="limit of a generated answer")
    sub.add_argument("--samples", type=int, help="answers to each question")
    sub.add_argument("--temperature", type=float, help="0 is greedy")
    sub.add_argument("--top-p", type=float)
    sub.add_argument("--seed", type=int, help="seed of the sampling")
    sub.add_argument("--pass-at", type=int, nargs="+", metavar="K", help="estimate pass@K from the samples")
    sub.add_argument("--answer-kind", help="math (default), last_number or choice")
    sub.add_argument("--engine", help="transformers, vllm, or auto (default): vllm where installed and there is a GPU")
    sub.add_argument("--export-lm-eval", metavar="FOLDER", help="write the questions as an lm-eval task, and stop")

    sub = verb("plan", _plan, "settings for a time or disk budget, and the fidelity measured for them")
    _model(sub, adapter=True)
    _data(sub, "--data", "the examples that are to be scored")
    sub.add_argument("--seconds", type=float, help="time for the pass over the data, on this machine")
    sub.add_argument("--gigabytes", type=float, help="disk for the gradient store")

    sub = verb("validate", _validate, "prove the scores by retraining: LDS, leave-k-out, removal, detection")
    sub.add_argument("config", help="a run's YAML file; its section 'validate' names methods and sizes")
    sub.add_argument("--output", help="another folder than the configuration's")
    sub.add_argument("--processes", type=int, help="retrainings at a time")

    sub = verb("report", _report, "write the HTML report of a run again from its results.json")
    sub.add_argument("run", help="the run's folder")

    sub = verb("inspect", _inspect, "say what a gradient store holds")
    sub.add_argument("store")
    sub = verb("verify", _verify, "check every byte of a gradient store against its checksums")
    sub.add_argument("store")
    sub = verb("merge", _merge, "join stores of the same work into one")
    sub.add_argument("stores", nargs="+")
    sub.add_argument("--output", required=True, help="folder of the joined store")
    sub = verb("import", _import, "make a store of gradients that another tool wrote")
    sub.add_argument("source", help="LESS .pt folder, TRAK memory map, bergson index, .npy or .safetensors")
    sub.add_argument("--output", required=True, help="folder of the store")
    sub.add_argument("--format", default="auto")
    sub.add_argument("--dtype", default="fp32", help="fp32 (default), bf16 or int8")
    verb("doctor", _doctor, "print versions, and which kernels and native paths are active and why not")
    return parser


def _model(sub: argparse.ArgumentParser, *, adapter: bool, adapter_needed: bool = True, needed: bool = True) -> None:
    sub.add_argument("--model", required=needed, help="base model: hub id or folder")
    if adapter:
        sub.add_argument("--adapter", required=adapter_needed, help="peft adapter: hub id or folder")
    sub.add_argument("--dtype", default="float32", help="float32 (default) or bfloat16")
    sub.add_argument("--device", default="auto")


def _gradient_flags(sub: argparse.ArgumentParser) -> None:
    """What `_gradients` reads."""
    sub.add_argument("--dim", type=int, help="projection dim p (default 64)")
    sub.add_argument("--width", type=int, help="sketch each row to this many numbers")
    sub.add_argument(
        "--sketch",
        help="how rows get to the width: random, eigen (fitted on a sample), or a store's folder (its sketch again); "
        "auto: eigen where that serves the scores",
    )
    sub.add_argument("--store-dtype", help="fp32, bf16 (default) or int8")
    sub.add_argument("--precision", help="fp8: products with the base weights in 8 bits (default: auto)")


def _data(sub: argparse.ArgumentParser, option: str, help: str, *, needed: bool = True, lengths: bool = True) -> None:
    sub.add_argument(option, required=needed, help=f"{help}: hub id, .jsonl/.json/.parquet/.csv file or saved folder")
    sub.add_argument("--split", default="train")
    sub.add_argument("--format", default="auto", help="schema of the rows (default: found from the columns)")
    sub.add_argument("--trace", default="first_correct", help="which of an OpenR1 row's traces")
    sub.add_argument("--limit", type=int)
    sub.add_argument(
        "--columns",
        type=_columns,
        metavar="NAME=COLUMN,...",
        help="the data's own names: prompt=question,completion=trace (id= numbers the rows)",
    )
    if lengths:
        sub.add_argument("--max-length", type=int, help="longer examples are left out and listed")
        sub.add_argument("--truncate", action="store_true", help="cut longer examples instead")


def _columns(text: str) -> dict[str, str | None]:
    """`prompt=question,id=` -> {"prompt": "question", "id": None}."""
    pairs = [part.partition("=") for part in text.split(",")]
    if any(not sign or not name for name, sign, _ in pairs):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=COLUMN,NAME=COLUMN")
    return {name.strip(): column.strip() or None for name, _, column in pairs}


def _damping(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text  # "auto", or a word that the preconditioners refuse by name


def _quiet_libraries() -> None:
    """On the command line the bars and the notes to developers are ours alone; a library's importer keeps them."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    if "datasets" in sys.modules:  # to import it takes a second
        sys.modules["datasets"].disable_progress_bars()
    else:
        os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"


def _bars(args: Any) -> bool:
    """Progress bars are for terminals; in a log they would be blank lines."""
    return not args.quiet and sys.stderr.isatty()


def _load_model(args: Any) -> tuple[Any, Any]:
    _quiet_libraries()
    from influence_fast.training.models import load_model, load_tokenizer

    model = load_model(args.model, adapter=getattr(args, "adapter", None), dtype=args.dtype, device=args.device)
    return model, load_tokenizer(args.model, model=model)


def _load_data(args: Any) -> list[Any]:
    from influence_fast.data.examples import load_examples

    return load_examples(
        args.data, split=args.split, format=args.format, trace=_trace(args), limit=args.limit, columns=args.columns
    )


def _load_validation(args: Any) -> list[Any]:
    from influence_fast.data.examples import load_examples
    from influence_fast.errors import DataError

    options = {name: getattr(args, f"validation_{name}") for name in ("split", "format", "limit", "columns")}
    try:
        return load_examples(args.validation, **options)
    except DataError as error:
        raise DataError(_by_flags(str(error), args, of="validation-")) from error


def _same_rows(args: Any) -> bool:
    """Whether --data and --validation are the same split of the same source; a single file has one split."""
    data, validation = (os.path.realpath(os.path.expanduser(path)) for path in (args.data, args.validation))
    return data == validation and (args.split == args.validation_split or os.path.isfile(data))


def _trace(args: Any) -> str | int:
    return int(args.trace) if args.trace.lstrip("-").isdigit() else args.trace


def _say_left_out(args: Any, too_long: Sequence[tuple[str, int]]) -> None:
    from influence_fast.errors import listing

    if too_long:
        names = listing(f"{name} ({n} tokens)" for name, n in too_long)
        print(f"left out, longer than {args.max_length} tokens: {len(too_long)} examples: {names}")


def _check_cut(args: Any) -> None:
    if args.truncate and args.max_length is None:
        raise ConfigError("--truncate cuts what is longer than --max-length: give that too")


def _tokenize(args: Any, examples: list[Any], tokenizer: Any) -> list[dict[str, Any]]:
    from influence_fast.data.examples import tokenize
    from influence_fast.errors import DataError

    _check_cut(args)
    result = tokenize(examples, tokenizer, max_length=args.max_length, truncate=args.truncate)
    _say_left_out(args, result.too_long)
    if not result.examples:
        raise DataError("no example is left: raise --max-length, or cut the examples with --truncate")
    return result.examples


def _evaluation(args: Any, settings: Any = None) -> Any:
    """`settings` (default: EvalConfig's own) with what the command line says otherwise."""
    from influence_fast.evaluation.evaluate import EvalConfig

    given = _given(args, "max_new_tokens", "samples", "temperature", "top_p", "seed", "answer_kind", "engine")
    if getattr(args, "pass_at", None) is not None:
        given["pass_at"] = tuple(args.pass_at)
    return dataclasses.replace(settings or EvalConfig(), **given)


def _questions(args: Any) -> tuple[list[Any], Any]:
    """What `eval` asks, and its settings: a task's, or those of any data with answers."""
    from influence_fast.evaluation.tasks import known_tasks, load_task, task_examples

    if args.task is None:
        if args.data is None:
            raise ConfigError(f"eval needs questions: --task ({', '.join(known_tasks())}) or --data")
        args.split = args.split or "train"
        return _load_data(args), _evaluation(args)
    if args.format != "auto" or args.trace != "first_correct":
        raise ConfigError("--format and --trace are of no use with --task, which names its own columns: leave them out")
    task = load_task(args.task)
    return task_examples(task, args.limit, args.data, args.split), _evaluation(args, task.evaluation)


def _demo(args: Any) -> None:
    import torch

    from influence_fast.run.demo import demo_config

    _quiet_libraries()
    # a second thread buys nothing on a model this small, and on a busy machine its waiting costs several times over
    torch.set_num_threads(1)
    if not args.quiet:
        print("making the world: a tokenizer, a small pre-trained model, the data (about a minute)", file=sys.stderr)
    _run_config(demo_config(args.output, seed=args.seed, progress=_bars(args)), args)


def _run(args: Any) -> None:
    from influence_fast.config import load_config
    from influence_fast.run.unread import unread_settings

    config = load_config(args.config)
    if args.output:
        config = dataclasses.replace(config, output=args.output)
    for line in unread_settings(config):
        print(f"warning: {line}", file=sys.stderr)
    assumed = {name: getattr(args, name) for name in ("rows", "tokens_per_example", "tokens_per_second")}
    if args.dry_run:
        from influence_fast.run.dry_run import describe, plan

        _quiet_libraries()
        print(describe(config, plan(config, **assumed)))
        return
    for name, value in assumed.items():
        if value is not None:
            raise ConfigError(f"--{name.replace('_', '-')} is for --dry-run only; add that, or leave it out")
    _run_config(config, args)


def _run_config(config: Any, args: Any) -> None:
    from influence_fast.run.pipeline import run

    _quiet_libraries()
    results = run(config, progress=not args.quiet)
    before = results["accuracy_before"]
    print(f"{'strategy':<20} {'dropped':>8} {'seed':>5} {'accuracy':>9}  95 % interval   harmful dropped (by chance)")
    print(f"{'base model':<20} {'':>8} {'':>5} {before['accuracy']:>9.3f}  {before['low']:.3f}-{before['high']:.3f}")
    for cell in results["cells"]:
        harmful = ""
        if "harmful_dropped" in cell:
            chance = cell["expected_by_chance"]
            harmful = f"   {cell['harmful_dropped']} of {cell['harmful_total']} ({chance:.0f})"
        share = f"{100 * cell['fraction']:.0f} %"
        print(
            f"{cell['strategy']:<20} {share:>8} {cell['seed']:>5} {cell['accuracy']:>9.3f}  "
            f"{cell['low']:.3f}-{cell['high']:.3f}{harmful}"
        )
    for c in results["comparisons"]:
        print(
            f"{c['strategy']} at {100 * c['fraction']:.0f} % less {c['against']}: {100 * c['difference']:+.1f} points "
            f"(95 % {100 * c['low']:+.1f} to {100 * c['high']:+.1f}), p {c['p']:.3f}, corrected {c['p_adjusted']:.3f}"
        )
    if results["comparisons"] and len(config.pruning.seeds) == 1:
        print("one seed: intervals and p are over the test questions only, not over training runs")
    for warning in results["warnings"]:
        print(f"warning: {warning}")
    print(f"report: {Path(config.output) / 'report.html'}")


def _train(args: Any) -> None:
    from influence_fast.training.fine_tuning import LoraSettings, TrainConfig, finetune

    model, tokenizer = _load_model(args)
    examples = _tokenize(args, _load_data(args), tokenizer)
    names = ("epochs", "learning_rate", "batch_size", "max_steps", "packing", "save_checkpoints", "seed")
    config = TrainConfig(**_given(args, *names))
    shape: dict[str, Any] = {} if args.rank is None else {"r": args.rank, "alpha": 2.0 * args.rank}
    if args.target_modules is not None:
        shape["target_modules"] = tuple(args.target_modules)
    lora = LoraSettings(**shape)
    result = finetune(model, tokenizer, examples, args.output, config=config, lora=lora, progress=_bars(args))
    last = f", last loss {result.loss_history[-1][1]:.4f}" if result.loss_history else ""
    print(f"adapter: {result.path} ({len(examples)} examples, {result.seconds:.1f} s{last})")


def _score(args: Any) -> None:
    from influence_fast.config import (
        InfluenceConfig,
        PruningConfig,
        check_influence,
        check_strategies,
        fitted_examples,
    )
    from influence_fast.data.examples import load_rows
    from influence_fast.data.grouping import row_groups
    from influence_fast.influence.queries import make_queries, own_answers, with_tasks
    from influence_fast.influence.scores import check_format
    from influence_fast.report.explain import EXPLAINED, explanations, save_explanations
    from influence_fast.run.unread import unread_influence
    from influence_fast.selection.difficulty import check_answers
    from influence_fast.selection.pool_scores import baseline_columns, score_pool
    from influence_fast.selection.strategies import PASS_RATE, needed_columns

    _not_an_input(args.output, args.data, args.validation)
    check_format(args.output)
    if args.explain < 0:
        raise ConfigError(f"--explain is {args.explain}; give a number of examples, or leave it out")
    gradients = _gradients(args)
    names = ("preconditioner", "damping", "fisher", "fisher_examples", "optimizer", "queries", "fallback")
    influence = InfluenceConfig(**_given(args, *names))
    check_influence(influence, gradients)
    check_strategies(args.strategies, influence)
    reads = fitted_examples(dataclasses.replace(influence, fisher="model"), gradients) > 0
    if args.fisher is not None and not reads:
        raise ConfigError("--fisher is read by ekfac, fisher, datainf and where a sketch is fitted: leave it out here")
    if args.fisher_examples is not None and (not reads or influence.fisher != "model"):
        raise ConfigError(
            "--fisher-examples is read by ekfac, fisher and datainf with --fisher model: leave it out here"
        )
    if unread := unread_influence(gradients, influence):
        raise ConfigError(f"{unread[0]}; leave it out")
    needs = needed_columns(args.strategies)
    if influence.queries == "reference" and args.max_new_tokens is not None and PASS_RATE not in needs:
        raise ConfigError("--max-new-tokens is of the model's own answers, which --queries reference does not ask for")
    examples = _load_data(args)
    if PASS_RATE in needs:
        check_answers(examples)
    model, tokenizer = _load_model(args)
    pool = _tokenize(args, examples, tokenizer)
    validation = _load_validation(args)
    if _same_rows(args):
        print("warning: the validation questions are the training data, which scores itself: see --validation-split")
    answers = None
    if influence.queries == "own_answers":
        kept = Path(f"{args.output}.answers.jsonl")
        answers = own_answers(model, tokenizer, validation, _evaluation(args), kept, progress=_bars(args))
    queries = make_queries(validation, answers, args.fallback, needed=("correct",))
    if args.tasks is not None:
        queries = with_tasks(queries, row_groups(load_rows(args.validation, split=args.validation_split), args.tasks))
    scored = score_pool(
        model,
        tokenizer,
        pool,
        queries,
        Path(args.store or f"{args.output}.store"),
        gradients,
        influence,
        top=args.explain,
        progress=_bars(args),
    )
    table, seconds = scored.table, scored.seconds
    tokens = {example["id"]: example for example in pool}
    by_id = {example.id: example for example in examples}
    for old in (Path(f"{args.output}.{EXPLAINED}{suffix}") for suffix in (".html", ".jsonl")):
        old.unlink(missing_ok=True)  # of other scores
    if scored.top is not None:
        for path in save_explanations(
            explanations(scored.top, table.ids, queries), by_id, f"{args.output}.{EXPLAINED}"
        ):
            print(f"answer by answer: {path}")
    table, more = baseline_columns(
        table,
        needs,
        model,
        tokenizer,
        [(by_id[name], tokens[name]) for name in table.ids],
        queries,
        PruningConfig().pass_rate_config(_evaluation(args)),
        transcripts=Path(f"{args.output}.pool.jsonl"),
        progress=_bars(args),
    )
    seconds |= more
    table.save(args.output)
    for warning in queries.warnings:
        print(f"warning: {warning}")
    sizes = ", ".join(f"{len(members)} {name}" for name, members in queries.groups.items())
    spent = ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items())
    print(f"scores: {args.output} ({len(table.ids)} examples against {sizes} answers; {spent})")


def _gradients(args: Any) -> GradientConfig:
    from influence_fast.config import GradientConfig

    return GradientConfig(**_given(args, "dim", "width", "sketch", "store_dtype", "precision", "max_tokens"))


def _given(args: Any, *names: str) -> dict[str, Any]:
    """The options that were given; what was not has its default in the settings classes."""
    return {name: value for name in names if (value := getattr(args, name, None)) is not None}


def _build(args: Any) -> None:
    from influence_fast.config import InfluenceConfig, ModelConfig, check_influence, fitted_examples
    from influence_fast.data import spooling
    from influence_fast.distributed import metrics, processes
    from influence_fast.distributed.from_source import build_from_source
    from influence_fast.gradients.fp8 import check_precision

    _quiet_libraries()
    gradients, influence = _gradients(args), InfluenceConfig(**_given(args, "damping", "fisher"))
    check_influence(influence, gradients)
    check_precision(gradients.precision, "--precision", sharded=args.fsdp != 1)
    for flag in ("damping", "fisher"):
        if getattr(args, flag) is not None and not fitted_examples(influence, gradients):
            raise ConfigError(
                f"--{flag} is that of a fitted sketch, and none is fitted here: give a --width, or leave it out"
            )

    _check_cut(args)

    def told(tokens: spooling.Tokens) -> None:
        _say_left_out(args, tokens.too_long)
        if tokens.without:
            print(f"left out, without a trace for --trace {args.trace}: {len(tokens.without)} rows")

    world = processes.World.from_environment()
    store = build_from_source(
        args.output,
        ModelConfig(args.model, adapter=args.adapter, dtype=args.dtype, device=args.device),
        spooling.TokenSource(
            args.data,
            args.split,
            args.format,
            _trace(args),
            args.limit,
            args.columns or {},
            args.max_length,
            args.truncate,
        ),
        gradients,
        influence,
        world=world,
        fsdp=args.fsdp,
        time_limit=args.time_limit,
        told=told,
        peak_flops=args.peak_tflops * 1e12 if args.peak_tflops else None,
        progress=False if args.quiet else None,
        profile=args.profile,
        shard_rows=args.shard_rows,
    )
    if world.rank == 0:
        totals = metrics.summary(metrics.folder_of(Path(args.output)))
        print(f"store: {args.output} ({len(store)} rows; {100 * totals.idle_share:.1f} % of the ranks' time idle)")


def _not_an_input(output: str, *inputs: str | None) -> None:
    """ConfigError where writing `output` would replace one of the files that are read."""
    for path in inputs:
        if path is not None and Path(path).exists() and Path(path).resolve() == Path(output).resolve():
            raise ConfigError(f"--output {output} is also read from, and would be lost: give another file")


def _prune(args: Any) -> None:
    from influence_fast.data.decontamination import contaminated
    from influence_fast.data.diversity import near_duplicates
    from influence_fast.data.examples import load_examples, load_rows, save_examples
    from influence_fast.data.grouping import row_groups
    from influence_fast.errors import listing
    from influence_fast.influence.scores import ScoreTable
    from influence_fast.selection.pruning import aligned_examples, save_selection, select

    _not_an_input(args.output, args.data, args.scores, *args.decontaminate)
    table = ScoreTable.load(args.scores)
    examples = _load_data(args)
    scored = aligned_examples(table, examples)
    rows = load_rows(args.data, split=args.split)
    groups = clusters = None
    if args.groups is not None:
        of_row = row_groups(rows, args.groups)
        groups = [of_row[example.row] for example in scored]
    if args.max_similar is not None:
        clusters = near_duplicates([example.completion for example in scored], args.max_similar)
    tests: dict[str, list[Any]] = {}
    for file in args.decontaminate:
        tests.setdefault(Path(file).stem, []).extend(load_examples(file))
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
    known = set(table.ids)
    without = [example.id for example in examples if example.id not in known]
    if without:
        print(f"warning: {len(without)} examples have no score and are not in the output: {listing(without)}")


def _eval(args: Any) -> None:
    from influence_fast.evaluation.evaluate import evaluate
    from influence_fast.evaluation.generation import ModelFiles, choose_engine

    if args.output is not None:
        _not_an_input(args.output, args.data)
    examples, config = _questions(args)
    if args.export_lm_eval:
        from influence_fast.evaluation.lm_eval_export import export_lm_eval

        name = Path(args.task or args.data).stem
        command = export_lm_eval(name, examples, config, args.export_lm_eval)
        print(f"{len(examples)} questions: {args.export_lm_eval}\nrun, where lm-eval and influence-fast are: {command}")
        return
    if args.model is None or args.output is None:
        raise ConfigError("eval needs --model and --output; only --export-lm-eval does without")
    model: Any
    if choose_engine(config.engine) == "vllm":
        from influence_fast.training.models import load_tokenizer

        model, tokenizer = ModelFiles(args.model, args.adapter, args.dtype), load_tokenizer(args.model)
    else:
        model, tokenizer = _load_model(args)
    how: dict[str, Any] = {"config": config, "overwrite": False, "progress": _bars(args)}
    result = evaluate(model, tokenizer, examples, transcripts=Path(args.output), **how)
    total = len(result.items)
    low, high = result.interval
    asked = f"n={len(examples)}" + (f", {config.samples} samples each" if config.samples > 1 else "")
    print(f"accuracy {result.accuracy:.4f} (95 % interval {low:.4f} to {high:.4f}, {asked}, {result.engine})")
    for found in result.pass_at:
        low, high = found.interval
        print(f"pass@{found.k} {found.value:.4f} (95 % interval {low:.4f} to {high:.4f}; unbiased estimator)")
    if result.majority is not None:
        print(f"maj@{config.samples} {result.majority:.4f}")
    share = 100 * result.truncated / total
    print(f"cut at {config.max_new_tokens} new tokens: {result.truncated} of {total} answers ({share:.1f} %)")
    if result.reused:
        print(f"{result.reused} of {total} answers are an earlier run's; delete {args.output} to ask anew")


def _plan(args: Any) -> None:
    from influence_fast.run.planner import describe, plan

    model, tokenizer = _load_model(args)
    examples = _tokenize(args, _load_data(args), tokenizer)
    size = None if args.gigabytes is None else int(args.gigabytes * 1e9)
    print(describe(plan(model, examples, seconds=args.seconds, bytes=size)))
    print("LDS: measured on small models, see influence_fast/fidelity.json; expect the order, not the numbers, to hold")


def _validate(args: Any) -> None:
    from influence_fast.config import load_config
    from influence_fast.proof.page import text_tables, write_page
    from influence_fast.proof.validate import validate

    config = load_config(args.config)
    if args.output:
        config = dataclasses.replace(config, output=args.output)
    if args.processes:
        config = dataclasses.replace(config, validate=dataclasses.replace(config.validate, processes=args.processes))
    _quiet_libraries()
    results = validate(config, progress=not args.quiet)
    print(text_tables(results))
    print(f"page: {write_page(results, Path(config.output) / 'validation.html')}")


def _report(args: Any) -> None:
    from influence_fast.report.page import load_results, write_report

    print(f"report: {write_report(load_results(args.run), Path(args.run) / 'report.html')}")


def _inspect(args: Any) -> None:
    from influence_fast.store.reader import open_store

    store = open_store(args.store)
    size = sum(path.stat().st_size for path in Path(args.store).iterdir())
    print(f"{store!r}\n{size / 2**20:.1f} MiB on disk, {len(store.set_aside)} examples set aside")
    for name in store.identity.__dataclass_fields__:
        value = getattr(store.identity, name)
        if value is not None:
            print(f"  {name:<20} {value}")
    if store.identity.projection_sketch is not None:
        _inspect_sketch(store)
    for name, reason in store.set_aside[:20]:
        print(f"  set aside: {name}: {reason}")


def _inspect_sketch(store: Any) -> None:
    from influence_fast.gradients.lora import layout_width

    sketch = store.projection.sketch
    numbers = layout_width(sketch.layout)
    share, made = f"{100 * sketch.share:.0f} % of the whitened rows", sketch.purpose
    print(f"  fitted sketch        {store.width:,} of {numbers:,} coordinates, {share}")
    print(f"  fitted on            {made.get('sample')}; damping {made.get('damping')}")


def _verify(args: Any) -> None:
    from influence_fast.errors import StoreError
    from influence_fast.store.reader import open_store, verify_store

    problems = verify_store(args.store)
    if problems:
        raise StoreError("; ".join(problems))
    print(f"{args.store}: {len(open_store(args.store))} rows, every checksum holds")


def _merge(args: Any) -> None:
    from influence_fast.store.merge import merge_stores

    print(repr(merge_stores(args.stores, args.output)))


def _import(args: Any) -> None:
    from influence_fast.store.importers import import_gradients

    print(repr(import_gradients(args.source, args.output, format=args.format, dtype=args.dtype)))


def _doctor(args: Any) -> None:
    from influence_fast import doctor

    for name, value in (doctor.versions() | doctor.environment()).items():
        print(f"{name:<16} {value}")
    print()
    for path, active, note in doctor.paths():
        print(f"{'active  ' if active else 'inactive'}  {path:<24} {note}")


if __name__ == "__main__":
    sys.exit(main())
