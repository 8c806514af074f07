"""Verbs of a complete run from one configuration: demo, run, validate, report; and doctor."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

from influence_fast.cli import options
from influence_fast.cli.options import NewVerb
from influence_fast.errors import ConfigError


def add(verb: NewVerb) -> None:
    """Add these verbs and their options."""
    sub = verb("demo", _demo, "run the whole pipeline on a small built-in world (CPU, no network)")
    sub.add_argument("--output", default="demo-run", help="folder for everything (default: demo-run)")
    sub.add_argument("--seed", type=options.seed, default=0)

    sub = verb("run", _run, "run the whole pipeline from a configuration file")
    sub.add_argument("config", help="YAML file; see recipes/, and influence_fast/config.py for the keys")
    sub.add_argument(
        "--output", help="overrides the configuration's output folder; a relative one is taken from where you are"
    )
    sub.add_argument("--dry-run", action="store_true", help="print sizes, memory and time, and do nothing")
    sub.add_argument("--rows", type=int, help="dry run: examples of a pool that is not on this machine")
    sub.add_argument("--tokens-per-example", type=float, help="dry run: their mean length")
    sub.add_argument("--tokens-per-second", type=float, help="dry run: measured speed of training, for the time")

    sub = verb("validate", _validate, "prove the scores by retraining: LDS, leave-k-out, removal, detection")
    sub.add_argument("config", help="a run's YAML file; its section 'validate' names methods and sizes")
    sub.add_argument("--output", help="another folder than the configuration's")
    sub.add_argument("--processes", type=int, help="retrainings at a time")

    sub = verb("report", _report, "write the HTML report of a run again from its results.json")
    sub.add_argument("run", help="the run's folder")

    verb("doctor", _doctor, "print versions, and which kernels and native paths are active and why not")


def _demo(args: Any) -> None:
    import torch

    from influence_fast.run.demo import demo_config

    options.quiet_libraries()
    # a second thread buys nothing on a model this small, and on a busy machine its waiting costs several times over
    torch.set_num_threads(1)
    if not args.quiet:
        print("making the world: a tokenizer, a small pre-trained model, the data (about a minute)", file=sys.stderr)
    _run_config(demo_config(args.output, seed=args.seed, progress=options.bars(args)), args)


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
        from influence_fast.run.dry_run import plan
        from influence_fast.run.dry_run_text import describe

        options.quiet_libraries()
        print(describe(config, plan(config, **assumed)))
        return
    for name, value in assumed.items():
        if value is not None:
            raise ConfigError(f"--{name.replace('_', '-')} is for --dry-run only; add that, or leave it out")
    _run_config(config, args)


def _run_config(config: Any, args: Any) -> None:
    from influence_fast.report.text import p_value
    from influence_fast.run.pipeline import run

    options.quiet_libraries()
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
            f"(95 % {100 * c['low']:+.1f} to {100 * c['high']:+.1f}), p {p_value(c['p'])}, "
            f"corrected {p_value(c['p_adjusted'])}"
        )
    if results["comparisons"] and len(config.pruning.seeds) == 1:
        print("one seed: intervals and p are over the test questions only, not over training runs")
    for warning in results["warnings"]:
        print(f"warning: {warning}")
    print(f"report: {(Path(config.output) / 'report.html').absolute()}")


def _validate(args: Any) -> None:
    from influence_fast.config import load_config
    from influence_fast.validation.page import text_tables, write_page
    from influence_fast.validation.validate import validate

    config = load_config(args.config)
    if args.output:
        config = dataclasses.replace(config, output=args.output)
    if args.processes:
        config = dataclasses.replace(config, validate=dataclasses.replace(config.validate, processes=args.processes))
    options.quiet_libraries()
    results = validate(config, progress=not args.quiet)
    print(text_tables(results))
    print(f"page: {write_page(results, Path(config.output) / 'validation.html')}")


def _report(args: Any) -> None:
    from influence_fast.report.page import load_results, write_report

    print(f"report: {write_report(load_results(args.run), Path(args.run) / 'report.html')}")


def _doctor(args: Any) -> None:
    from influence_fast import doctor

    for name, value in (doctor.versions() | doctor.environment()).items():
        print(f"{name:<16} {value}")
    print()
    for path, active, note in doctor.paths():
        print(f"{'active  ' if active else 'inactive'}  {path:<24} {note}")
