"""The command line. Only this file parses arguments; each verb calls one stage and prints what came out."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from influence_fast import __version__
from influence_fast.errors import ConfigError, InfluenceFastError


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0, 2 for an error the user can mend, 130 after Ctrl-C."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if not hasattr(args, "work"):
        parser.print_help()
        return 0
    try:
        args.work(args)
    except InfluenceFastError as error:
        if args.debug:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        # a full disk, a folder that cannot be written: the system's own words name the thing
        if args.debug:
            traceback.print_exc()
        what = f"{error.filename}: " if error.filename else ""
        print(f"error: {what}{error.strerror or error}; finished work is kept", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"stopped: {stop or 'what was finished is kept; run the same command again to go on'}", file=sys.stderr)
        return 130
    return 0


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

    sub = verb("train", _train, "fine-tune a LoRA adapter")
    _model(sub, adapter=False)
    _data(sub, "--data", "training examples")
    sub.add_argument("--output", required=True, help="folder for the adapter")
    for option, kind, help in (
        ("--epochs", float, "passes over the data"),
        ("--learning-rate", float, "peak learning rate"),
        ("--batch-size", int, "examples a step"),
        ("--rank", int, "LoRA rank r"),
        ("--seed", int, "seed of initialisation and data order"),
    ):
        sub.add_argument(option, type=kind, help=help)

    sub = verb("score", _score, "score training examples by their influence on validation answers")
    _model(sub, adapter=True)
    _data(sub, "--data", "training examples")
    sub.add_argument("--validation", required=True, help="validation questions: hub id, file or folder")
    sub.add_argument("--output", required=True, help="score table, .parquet or .csv")
    sub.add_argument("--store", help="folder of the gradient store (default: OUTPUT with .store)")
    sub.add_argument("--queries", default="own_answers", help="own_answers (default) or reference")
    sub.add_argument("--fallback", help="reference: let the solutions stand in where no own answer is correct")
    sub.add_argument(
        "--preconditioner", default="cosine", help="cosine (default), fisher, ekfac, datainf, adam or none"
    )
    sub.add_argument("--damping", type=_damping, default=0.1, help="share of the mean eigenvalue (0.1), or auto")
    sub.add_argument("--optimizer", help="checkpoint whose Adam state 'adam' reads (default: moments of the rows)")
    sub.add_argument("--dim", type=int, default=16, help="projection dim p (default 16)")
    sub.add_argument("--width", type=int, help="sketch each row to this many numbers")
    sub.add_argument("--max-new-tokens", type=int, help="limit of a generated answer")

    sub = verb("prune", _prune, "write the data that a strategy keeps, in the input's own format")
    _data(sub, "--data", "the data that was scored")
    sub.add_argument("--scores", required=True, help="score table written by 'score'")
    sub.add_argument("--strategy", required=True, help="for example combined; an unknown name lists them all")
    size = sub.add_mutually_exclusive_group(required=True)
    size.add_argument("--fraction", type=float, help="share to drop, 0 to 1")
    size.add_argument("--count", type=int, help="number of examples to drop")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--output", required=True, help="file for the kept rows; the table goes to OUTPUT.table.csv")

    sub = verb("eval", _eval, "answer questions and grade the answers")
    _model(sub, adapter=True, adapter_needed=False)
    _data(sub, "--data", "questions with final answers")
    sub.add_argument("--output", required=True, help="transcripts, .jsonl")
    sub.add_argument("--max-new-tokens", type=int, help="limit of a generated answer")

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


def _model(sub: argparse.ArgumentParser, *, adapter: bool, adapter_needed: bool = True) -> None:
    sub.add_argument("--model", required=True, help="base model: hub id or folder")
    if adapter:
        sub.add_argument("--adapter", required=adapter_needed, help="peft adapter: hub id or folder")
    sub.add_argument("--dtype", default="float32", help="float32 (default) or bfloat16")
    sub.add_argument("--device", default="auto")


def _data(sub: argparse.ArgumentParser, option: str, help: str) -> None:
    sub.add_argument(option, required=True, help=f"{help}: hub id, .jsonl/.json/.parquet/.csv file or saved folder")
    sub.add_argument("--split", default="train")
    sub.add_argument("--format", default="auto", help="schema of the rows (default: found from the columns)")
    sub.add_argument("--trace", default="first_correct", help="which of an OpenR1 row's traces")
    sub.add_argument("--limit", type=int)
    sub.add_argument("--max-length", type=int, help="longer examples are left out and listed")
    sub.add_argument("--truncate", action="store_true", help="cut longer examples instead")


def _damping(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text  # "auto", or a word that the preconditioners refuse by name


def _quiet_libraries() -> None:
    """On the command line the bars and the notes to developers are ours alone; a library's importer keeps them."""
    import warnings

    from transformers.utils import logging

    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def _bars(args: Any) -> bool:
    """Progress bars are for terminals; in a log they would be blank lines."""
    return not args.quiet and sys.stderr.isatty()


def _load_model(args: Any) -> tuple[Any, Any]:
    _quiet_libraries()
    from influence_fast.models import load_model, load_tokenizer

    model = load_model(args.model, adapter=getattr(args, "adapter", None), dtype=args.dtype, device=args.device)
    return model, load_tokenizer(args.model)


def _load_data(args: Any) -> list[Any]:
    from influence_fast.data import load_examples

    trace = int(args.trace) if args.trace.lstrip("-").isdigit() else args.trace
    return load_examples(args.data, split=args.split, format=args.format, trace=trace, limit=args.limit)


def _tokenize(args: Any, examples: list[Any], tokenizer: Any) -> list[dict[str, Any]]:
    from influence_fast.data import tokenize
    from influence_fast.errors import DataError, listing

    result = tokenize(examples, tokenizer, max_length=args.max_length, truncate=args.truncate)
    if result.too_long:
        names = listing(f"{name} ({n} tokens)" for name, n in result.too_long)
        print(f"left out, longer than {args.max_length} tokens: {len(result.too_long)} examples: {names}")
    if not result.examples:
        raise DataError("no example is left: raise --max-length, or cut the examples with --truncate")
    return result.examples


def _evaluation(args: Any) -> Any:
    from influence_fast.evaluation import EvalConfig

    return EvalConfig() if args.max_new_tokens is None else EvalConfig(max_new_tokens=args.max_new_tokens)


def _demo(args: Any) -> None:
    import torch

    from influence_fast.demo import demo_config

    _quiet_libraries()
    # a second thread buys nothing on a model this small, and on a busy machine its waiting costs several times over
    torch.set_num_threads(1)
    if not args.quiet:
        print("making the world: a tokenizer, a small pre-trained model, the data (about a minute)", file=sys.stderr)
    _run_config(demo_config(args.output, seed=args.seed, progress=_bars(args)), args)


def _run(args: Any) -> None:
    import dataclasses

    from influence_fast.config import load_config

    config = load_config(args.config)
    if args.output:
        config = dataclasses.replace(config, output=args.output)
    _run_config(config, args)


def _run_config(config: Any, args: Any) -> None:
    from influence_fast.pipeline import run

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
    for warning in results["warnings"]:
        print(f"warning: {warning}")
    print(f"report: {Path(config.output) / 'report.html'}")


def _train(args: Any) -> None:
    from influence_fast.training import LoraSettings, TrainConfig, finetune

    model, tokenizer = _load_model(args)
    examples = _tokenize(args, _load_data(args), tokenizer)
    names = ("epochs", "learning_rate", "batch_size", "seed")
    config = TrainConfig(**{name: getattr(args, name) for name in names if getattr(args, name) is not None})
    lora = LoraSettings() if args.rank is None else LoraSettings(r=args.rank, alpha=2.0 * args.rank)
    result = finetune(model, tokenizer, examples, args.output, config=config, lora=lora, progress=_bars(args))
    last = f", last loss {result.loss_history[-1][1]:.4f}" if result.loss_history else ""
    print(f"adapter: {result.path} ({len(examples)} examples, {result.seconds:.1f} s{last})")


def _score(args: Any) -> None:
    from influence_fast import pipeline
    from influence_fast.config import QUERY_KINDS, GradientConfig, InfluenceConfig, check_influence
    from influence_fast.data import load_examples
    from influence_fast.errors import did_you_mean
    from influence_fast.preconditioners import PRECONDITIONERS

    if args.queries not in QUERY_KINDS:
        raise ConfigError(f"--queries: unknown value {args.queries!r}; {did_you_mean(args.queries, QUERY_KINDS)}")
    if args.preconditioner not in PRECONDITIONERS:
        hint = did_you_mean(args.preconditioner, PRECONDITIONERS)
        raise ConfigError(f"--preconditioner: unknown value {args.preconditioner!r}; {hint}")
    gradients = GradientConfig(dim=args.dim, width=args.width)
    influence = InfluenceConfig(preconditioner=args.preconditioner, damping=args.damping, optimizer=args.optimizer)
    check_influence(influence, gradients)
    model, tokenizer = _load_model(args)
    pool = _tokenize(args, _load_data(args), tokenizer)
    validation = load_examples(args.validation)
    answers = None
    if args.queries == "own_answers":
        answers = pipeline.own_answers(model, tokenizer, validation, _evaluation(args), progress=_bars(args))
    queries = pipeline.make_queries(validation, answers, args.fallback)
    table, seconds = pipeline.score_pool(
        model,
        tokenizer,
        pool,
        queries,
        Path(args.store or f"{args.output}.store"),
        gradients,
        influence,
        progress=_bars(args),
    )
    table.save(args.output)
    for warning in queries.warnings:
        print(f"warning: {warning}")
    sizes = ", ".join(f"{len(members)} {name}" for name, members in queries.groups.items())
    spent = ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items())
    print(f"scores: {args.output} ({len(table.ids)} examples against {sizes} answers; {spent})")


def _prune(args: Any) -> None:
    from influence_fast.data import load_rows, save_examples
    from influence_fast.pruning import select, selection_table
    from influence_fast.scores import ScoreTable

    table = ScoreTable.load(args.scores)
    examples = _load_data(args)
    selection = select(table, args.strategy, fraction=args.fraction, count=args.count, seed=args.seed)
    kept = selection.kept_examples(table, examples)
    save_examples(kept, args.output, load_rows(args.data, split=args.split))
    selection_table(table, selection).save(f"{args.output}.table.csv")
    print(f"kept {len(selection.keep)} and dropped {len(selection.drop)} of {len(table.ids)} examples: {args.output}")


def _eval(args: Any) -> None:
    from influence_fast.evaluation import evaluate

    model, tokenizer = _load_model(args)
    result = evaluate(
        model,
        tokenizer,
        _load_data(args),
        config=_evaluation(args),
        transcripts=Path(args.output),
        progress=_bars(args),
    )
    low, high = result.interval
    print(f"accuracy {result.accuracy:.4f} (95 % interval {low:.4f} to {high:.4f}, n={len(result.items)})")


def _report(args: Any) -> None:
    from influence_fast.report import load_results, write_report

    print(f"report: {write_report(load_results(args.run), Path(args.run) / 'report.html')}")


def _inspect(args: Any) -> None:
    from influence_fast.store import open_store

    store = open_store(args.store)
    size = sum(path.stat().st_size for path in Path(args.store).iterdir())
    print(f"{store!r}\n{size / 2**20:.1f} MiB on disk, {len(store.set_aside)} examples set aside")
    for name in store.identity.__dataclass_fields__:
        value = getattr(store.identity, name)
        if value is not None:
            print(f"  {name:<20} {value}")
    for name, reason in store.set_aside[:20]:
        print(f"  set aside: {name}: {reason}")


def _verify(args: Any) -> None:
    from influence_fast.errors import StoreError
    from influence_fast.store import open_store, verify_store

    problems = verify_store(args.store)
    if problems:
        raise StoreError("; ".join(problems))
    print(f"{args.store}: {len(open_store(args.store))} rows, every checksum holds")


def _merge(args: Any) -> None:
    from influence_fast.store_merge import merge_stores

    print(repr(merge_stores(args.stores, args.output)))


def _import(args: Any) -> None:
    from influence_fast.importers import import_gradients

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
