"""Verbs that fine-tune a model, evaluate it, and check its gradients: train, eval, check."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from influence_fast.cli import options
from influence_fast.cli.options import NewVerb
from influence_fast.errors import ConfigError


def add(verb: NewVerb) -> None:
    """Add these verbs and their options."""
    sub = verb("train", _train, "fine-tune a LoRA adapter")
    options.add_model(sub, adapter=False)
    options.add_data(sub, "--data", "training examples")
    sub.add_argument("--output", required=True, help="folder for the adapter")
    for option, kind, help in (
        ("--epochs", float, "passes over the data"),
        ("--learning-rate", float, "peak learning rate"),
        ("--batch-size", int, "examples in a batch (default 16)"),
        ("--gradient-accumulation-steps", int, "batches a step: smaller ones, and the same update (default 1)"),
        ("--max-steps", int, "optimizer steps, in place of epochs"),
        ("--packing", int, "tokens of a row that examples are packed into"),
        ("--rank", int, "LoRA rank r (default 16)"),
        ("--alpha", float, "LoRA alpha: the adapter is scaled by alpha / r (default 2 r)"),
        ("--seed", options.training_seed, "seed of initialisation and data order"),
    ):
        sub.add_argument(option, type=kind, help=help)
    sub.add_argument(
        "--target-modules",
        nargs="*",
        metavar="NAME",
        help="layers that get LoRA (default: all linears); none: no layers",
    )
    sub.add_argument(
        "--target-parameters", nargs="+", metavar="NAME", help="parameters that get LoRA, as experts.gate_up_proj"
    )
    sub.add_argument(
        "--save-checkpoints",
        nargs="?",
        const=True,
        type=int,
        metavar="STEPS",
        help="keep a checkpoint each epoch, or every STEPS steps, with the optimizer's state (for adam and less)",
    )

    sub.add_argument(
        "--gradient-checkpointing",
        action="store_true",
        default=None,
        help="keep layers' inputs alone and compute the rest again: less memory, about a third more time",
    )
    sub.add_argument("--ignore-memory", action="store_true", help="train even where memory clearly does not suffice")
    sub.add_argument(
        "--influence",
        metavar="VALIDATION",
        help="score the training examples by their influence on these along the training, which it leaves as it is; "
        "written to the folder influence in --output",
    )
    sub.add_argument(
        "--influence-every", type=int, metavar="STEPS", help="with --influence: every STEPS steps (default: each epoch)"
    )
    sub.add_argument(
        "--influence-store", metavar="FOLDER", help="with --influence: keep a gradient store of each moment there"
    )

    sub = verb("eval", _eval, "answer questions and grade the answers")
    options.add_model(sub, adapter=True, adapter_needed=False, needed=False)
    sub.add_argument("--task", help="gsm8k, math500, ... or a task's .yaml file; --data then overrides its source")
    options.add_data(sub, "--data", "questions with final answers", needed=False, lengths=False)
    # A task has a split of its own.
    sub.set_defaults(split=None)
    sub.add_argument("--output", help="transcripts, .jsonl; the same command again goes on from them")
    options.add_generation(sub)
    sub.add_argument("--samples", type=int, help="answers to each question")
    sub.add_argument("--temperature", type=float, help="0 is greedy")
    sub.add_argument("--top-p", type=float)
    sub.add_argument("--seed", type=options.seed, help="seed of the sampling")
    sub.add_argument("--pass-at", type=int, nargs="+", metavar="K", help="estimate pass@K from the samples")
    sub.add_argument("--answer-kind", help="math (default), last_number or choice")
    sub.add_argument("--engine", help="transformers, vllm, or auto (default): vllm where installed and there is a GPU")
    sub.add_argument("--export-lm-eval", metavar="FOLDER", help="write the questions as an lm-eval task, and stop")

    sub = verb("check", _check, "compare losses and gradients with the model's own plain forward, on your data")
    options.add_model(sub, adapter=True)
    options.add_data(sub, "--data", "training examples, of which a few are taken")
    sub.set_defaults(limit=256)
    sub.add_argument("--count", type=int, help="how many, of spread lengths (default: 4)")
    sub.add_argument("--max-tokens", type=int, help="tokens of an example that are used (default: 1024)")
    sub.add_argument(
        "--directions", type=int, help="directions of each kind, two forwards an example each (default: 2)"
    )
    sub.add_argument(
        "--step",
        type=float,
        help="how far the adapter is moved (default: 0.01, in 16 bits 0.1; others where that does not do)",
    )
    sub.add_argument("--backend", help="auto (default), triton or torch")
    sub.add_argument("--seed", type=options.seed, help="seed of the directions")
    sub.add_argument("--json", action="store_true", help="print the verdicts as JSON")


def _train(args: Any) -> None:
    from influence_fast.training.fine_tuning import finetune
    from influence_fast.training.settings import LoraSettings, TrainConfig

    for option in ("influence_every", "influence_store"):
        if getattr(args, option) is not None and args.influence is None:
            raise ConfigError(
                f"--{option.replace('_', '-')} goes with --influence, the validation examples: give these"
            )
    if args.influence_every is not None and args.influence_every < 1:
        raise ConfigError(f"--influence-every is {args.influence_every}; it must be at least 1 step")
    config = TrainConfig(**options.given(args, *_TRAINING))
    shape: dict[str, Any] = {} if args.rank is None else {"r": args.rank, "alpha": 2.0 * args.rank}
    shape |= options.given(args, "alpha")
    if args.target_modules is not None:
        shape["target_modules"] = tuple(args.target_modules)
    if args.target_parameters is not None:
        shape["target_parameters"] = tuple(args.target_parameters)
    lora = LoraSettings(**shape)
    model, tokenizer = options.open_model(args)
    examples = options.tokenized(args, options.read_examples(args), tokenizer)
    callbacks = [] if args.influence is None else [_influence(args, tokenizer, examples)]

    def on_memory(memory: Any) -> None:
        from influence_fast.training.memory import IGNORE, check_memory

        print(memory, flush=True)
        try:
            if not args.ignore_memory:
                check_memory(memory)
        except ConfigError as error:
            raise ConfigError(error.marked.replace(f"set {IGNORE}=1", "give --ignore-memory")) from None

    result = finetune(
        model,
        tokenizer,
        examples,
        args.output,
        config=config,
        lora=lora,
        progress=options.bars(args),
        callbacks=callbacks,
        on_memory=on_memory,
    )
    last = f", last loss {result.loss_history[-1][1]:.4f}" if result.loss_history else ""
    print(f"adapter: {result.path} ({len(examples)} examples, {result.seconds:.1f} s{last})")
    if callbacks:
        _say_influence(result, callbacks[0])


_TRAINING = (
    *("epochs", "learning_rate", "batch_size", "gradient_accumulation_steps", "gradient_checkpointing"),
    *("max_steps", "packing", "save_checkpoints", "seed"),
)


def _influence(args: Any, tokenizer: Any, trained: Sequence[Any]) -> Any:
    """Return the callback that scores the examples `trained` on by their influence on those of `--influence`."""
    from influence_fast.data.examples import load_examples, tokenize
    from influence_fast.errors import DataError
    from influence_fast.influence.callback import EPOCH, InfluenceCallback

    validation = load_examples(args.influence, format=args.format, columns=args.columns, turns=args.turns)
    found = tokenize(validation, tokenizer, max_length=args.max_length, truncate=args.truncate)
    if not found.examples:
        raise DataError(f"{args.influence}: no validation example is left: raise --max-length")
    every = EPOCH if args.influence_every is None else args.influence_every
    return InfluenceCallback(found.examples, every=every, store=args.influence_store, examples=trained)


def _say_influence(result: Any, callback: Any) -> None:
    from influence_fast.influence.callback import FOLDER

    files = sorted((result.path / FOLDER).glob("step-*.parquet"))
    if not files:
        raise ConfigError(
            f"{result.path} was trained before, without --influence, and is not trained again: give another --output"
        )
    if not callback.scores:
        callback.check_kept(result.path / FOLDER, "the training is finished, and not run again: give another --output")
    print(f"influence: {result.path / FOLDER} ({len(files)} moments, the last {files[-1].name})")


def _eval(args: Any) -> None:
    from influence_fast.evaluation.evaluate import evaluate
    from influence_fast.evaluation.generation import ModelFiles, choose_engine

    if args.output is not None:
        options.not_an_input(args.output, args.data)
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
    engine = "transformers" if args.quantize and config.engine == "auto" else choose_engine(config.engine)
    if engine == "vllm" and args.quantize:
        raise ConfigError("--engine vllm would load the weights unquantised: use --engine transformers")
    if engine == "vllm":
        from influence_fast.training.models import load_tokenizer

        model = ModelFiles(args.model, args.adapter, args.dtype)
        tokenizer = load_tokenizer(args.model, adapter=args.adapter, tokenizer=args.tokenizer)
    else:
        model, tokenizer = options.open_model(args)
    how: dict[str, Any] = {"config": config, "overwrite": False, "progress": options.bars(args)}
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


def _check(args: Any) -> int:
    """Check a model; return 0 where all agrees, 1 where something differs, is refused or cannot be judged."""
    from influence_fast.check.model_check import check_model

    model, tokenizer = options.open_model(args)
    examples = options.tokenized(args, options.read_examples(args), tokenizer)
    chosen = options.given(args, "count", "max_tokens", "directions", "step", "backend", "seed")
    found = check_model(model, examples, **chosen)
    print(json.dumps(found.to_dict(), indent=2) if args.json else found)
    return 0 if found.ok else 1


def _questions(args: Any) -> tuple[list[Any], Any]:
    """Return the questions that `eval` asks and its settings: those of a task, or of any data with answers."""
    from influence_fast.evaluation.tasks import known_tasks, load_task, task_examples

    if args.task is None:
        if args.data is None:
            raise ConfigError(f"eval needs questions: --task ({', '.join(known_tasks())}) or --data")
        args.split = args.split or "train"
        return options.read_examples(args), options.evaluation_of(args)
    if args.format != "auto" or args.trace != "first_correct" or args.turns != "last":
        raise ConfigError(
            "--format, --trace and --turns are of no use with --task, which names its own columns: leave them out"
        )
    task = load_task(args.task)
    return task_examples(task, args.limit, args.data, args.split), options.evaluation_of(args, task.evaluation)
