"""Options that several verbs share, and the objects built from them."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from influence_fast.data.conversations import TURN_CHOICES
from influence_fast.errors import ConfigError, shown
from influence_fast.settings import MAX_SEED, MAX_TRAINING_SEED, check_seed

if TYPE_CHECKING:
    from influence_fast.gradients.rows.row_spec import RowSpec

TURNS_HELP = "assistant turns of a conversation that the loss is on: the last (default) or all"

#: verb(name, work, help): the parser of a new verb, which calls `work` with its arguments; it may return an exit code.
NewVerb = Callable[[str, Callable[[Any], int | None], str], argparse.ArgumentParser]


def add_model(sub: argparse.ArgumentParser, *, adapter: bool, adapter_needed: bool = True, needed: bool = True) -> None:
    sub.add_argument("--model", required=needed, help="base model: hub id or folder")
    if adapter:
        sub.add_argument("--adapter", required=adapter_needed, help="peft adapter: hub id or folder")
    sub.add_argument(
        "--tokenizer", help="hub id or folder (default: the adapter's own where it has one, else the model's)"
    )
    sub.add_argument("--dtype", default="float32", help="float32 (default) or bfloat16")
    sub.add_argument("--quantize", help="quantise the base weights: nf4, fp4 or int8 (default: as they are)")
    sub.add_argument("--device", default="auto")


def add_gradients(sub: argparse.ArgumentParser) -> None:
    """Add the options that `gradients_of` reads."""
    sub.add_argument(
        "--target",
        nargs="+",
        metavar="NAME",
        help="for a fully fine-tuned model, without --adapter: the linears whose weights' gradients are taken, by "
        "all-linear, the ends of their names, or regular expressions",
    )
    sub.add_argument("--dim", type=int, help="projection dim p (default 64)")
    sub.add_argument("--width", type=int, help="sketch each row to this many numbers")
    sub.add_argument(
        "--sketch",
        help="how rows get to the width: random, eigen (fitted on a sample), or a store's folder (its sketch again); "
        "auto: eigen where that serves the scores",
    )
    sub.add_argument("--store-dtype", help="fp32, bf16 (default) or int8")
    sub.add_argument("--precision", help="fp8: products with the base weights in 8 bits (default: auto)")


def add_generation(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--max-new-tokens", type=int, help="limit of a generated answer")
    sub.add_argument(
        "--generation",
        help="explicit (default): answers are asked for by these options alone; model: by the model's own "
        "generation_config.json",
    )


def add_data(
    sub: argparse.ArgumentParser, option: str, help: str, *, needed: bool = True, lengths: bool = True
) -> None:
    sub.add_argument(
        option,
        required=needed,
        help=f"{help}: hub id, .jsonl/.json/.parquet/.csv/.tsv file (text also .gz, .zst) or saved folder",
    )
    sub.add_argument("--split", default="train")
    sub.add_argument("--format", default="auto", help="schema of the rows (default: found from the columns)")
    sub.add_argument("--trace", default="first_correct", help="which of an OpenR1 row's traces")
    sub.add_argument("--turns", choices=TURN_CHOICES, default="last", help=TURNS_HELP)
    sub.add_argument("--limit", type=int)
    sub.add_argument(
        "--columns",
        type=columns,
        metavar="NAME=COLUMN,...",
        help="the data's own names: prompt=question,completion=trace (id= numbers the rows)",
    )
    if lengths:
        sub.add_argument("--max-length", type=int, help="longer examples are left out and listed")
        sub.add_argument("--truncate", action="store_true", help="cut longer examples instead")


def columns(text: str) -> dict[str, str | None]:
    """Parse `prompt=question,id=` into {"prompt": "question", "id": None}."""
    pairs = [part.partition("=") for part in text.split(",")]
    if any(not sign or not name for name, sign, _ in pairs):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=COLUMN,NAME=COLUMN")
    return {name.strip(): column.strip() or None for name, _, column in pairs}


def seed(text: str) -> int:
    """Return the seed that `--seed` names, refused before anything is loaded where generators do not take it."""
    return _seed(text, MAX_SEED)


def training_seed(text: str) -> int:
    """Return the seed that `--seed` of a training names; see `seed`."""
    return _seed(text, MAX_TRAINING_SEED)


def _seed(text: str, most: int) -> int:
    try:
        number = int(text)
        check_seed("seed", number, most)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    except ValueError:
        raise argparse.ArgumentTypeError(f"{shown(text)} is no whole number") from None
    return number


def damping(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        # The preconditioners refuse any other word than "auto".
        return text


def given(args: Any, *names: str) -> dict[str, Any]:
    """Return the options that were given; the others have their defaults in the settings classes."""
    return {name: value for name in names if (value := getattr(args, name, None)) is not None}


def gradients_of(args: Any) -> RowSpec:
    from influence_fast.gradients.rows.row_spec import RowSpec
    from influence_fast.settings import from_dict

    settings = given(args, "dim", "width", "sketch", "store_dtype", "precision", "max_tokens")
    if args.target is not None:
        settings["target"] = tuple(args.target)
    if args.target is not None and args.adapter is not None:
        raise ConfigError(
            "--target is of a model without an adapter: leave out --adapter, or leave out --target to take the "
            "adapter's gradients"
        )
    if args.target is None and args.adapter is None:
        raise ConfigError(
            "give --adapter, the LoRA adapter whose gradients are taken, or --target all-linear for those of the "
            "weights of a fully fine-tuned --model"
        )
    return from_dict(RowSpec, settings, "gradients.")


def evaluation_of(args: Any, settings: Any = None) -> Any:
    """Return `settings` (default: EvalConfig's own) overridden by the options that were given."""
    from influence_fast.evaluation.evaluate import EvalConfig

    names = ("max_new_tokens", "samples", "temperature", "top_p", "seed", "answer_kind", "engine", "generation")
    changed = given(args, *names)
    # The model's own file says how to sample then, not the task's settings.
    if changed.get("generation") == "model":
        changed = {"temperature": 0.0, "top_p": 1.0} | changed
    if getattr(args, "pass_at", None) is not None:
        changed["pass_at"] = tuple(args.pass_at)
    return dataclasses.replace(settings or EvalConfig(), **changed)


def trace_of(args: Any) -> str | int:
    return int(args.trace) if args.trace.lstrip("-").isdigit() else args.trace


def quiet_libraries() -> None:
    """Silence the progress bars and developer warnings of transformers and datasets; library users keep them."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    # Importing datasets takes a second, so it is only done by what needs it.
    if "datasets" in sys.modules:
        sys.modules["datasets"].disable_progress_bars()
    else:
        os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"


def bars(args: Any) -> bool:
    """Return whether to show progress bars: on terminals only, since in a log they would be blank lines."""
    return not args.quiet and sys.stderr.isatty()


def open_model(args: Any) -> tuple[Any, Any]:
    quiet_libraries()
    from influence_fast.training.models import load_model, load_tokenizer

    adapter = getattr(args, "adapter", None)
    model = load_model(
        args.model, adapter=adapter, dtype=args.dtype, device=args.device, quantize=getattr(args, "quantize", None)
    )
    return model, load_tokenizer(args.model, adapter=adapter, tokenizer=args.tokenizer, model=model)


def read_examples(args: Any) -> list[Any]:
    from influence_fast.data.examples import load_examples

    return load_examples(
        args.data,
        split=args.split,
        format=args.format,
        trace=trace_of(args),
        limit=args.limit,
        columns=args.columns,
        turns=args.turns,
    )


def check_cut(args: Any) -> None:
    if args.truncate and args.max_length is None:
        raise ConfigError("--truncate cuts what is longer than --max-length: give that too")


def tokenized(args: Any, examples: list[Any], tokenizer: Any) -> list[dict[str, Any]]:
    from influence_fast.data.examples import tokenize
    from influence_fast.errors import DataError

    check_cut(args)
    result = tokenize(examples, tokenizer, max_length=args.max_length, truncate=args.truncate)
    say_left_out(args, result.too_long)
    if not result.examples:
        raise DataError("no example is left: raise --max-length, or cut the examples with --truncate")
    return result.examples


def say_left_out(args: Any, too_long: Sequence[tuple[str, int]]) -> None:
    from influence_fast.errors import truncated_list

    if too_long:
        names = truncated_list(f"{name} ({n} tokens)" for name, n in too_long)
        cut = ", of which a cut leaves no completion" if args.truncate else ""
        print(f"left out, longer than {args.max_length} tokens{cut}: {len(too_long)} examples: {names}")


def not_an_input(output: str, *inputs: str | None) -> None:
    """Raise ConfigError where writing `output` would replace one of the files that are read."""
    for path in inputs:
        if path is not None and Path(path).exists() and Path(path).resolve() == Path(output).resolve():
            raise ConfigError(f"--output {output} is also read from, and would be lost: give another file")
