"""The command line. Arguments are parsed only here; each verb calls one stage and prints its result."""

from __future__ import annotations

import argparse
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from influence_fast import __version__
from influence_fast.cli import models, runs, scoring, stores
from influence_fast.cli.messages import by_flags, say_warning, unforeseen
from influence_fast.cli.parser import Parser, check_names
from influence_fast.errors import InfluenceFastError, one_line, shown


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line, and return the exit code.

    It is 0, 1 where a check disagrees, 2 for an error (reported in one line), and 130 after Ctrl-C.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    if not hasattr(args, "work"):
        parser.print_help()
        return 0
    try:
        with warnings.catch_warnings():
            warnings.showwarning = say_warning
            check_names(args)
            return args.work(args) or 0
    except InfluenceFastError as error:
        if args.debug:
            traceback.print_exc()
        print(f"error: {by_flags(error, args)}", file=sys.stderr)
        return 2
    except OSError as error:
        # a full disk, a folder that cannot be written: the system's own words name the thing
        if args.debug:
            traceback.print_exc()
        # Libraries do not always name the file that they write.
        path = error.filename or getattr(args, "output", None)
        what = f"{path}: " if path else ""
        wrong = isinstance(error, NotADirectoryError | IsADirectoryError | FileNotFoundError)
        kept = "give another path" if wrong else "finished work is kept"
        print(f"error: {what}{error.strerror or one_line(error)}; {kept}", file=sys.stderr)
        return 2
    except UnicodeEncodeError as error:
        # half a surrogate pair stands for a byte of a name that is not UTF-8
        if args.debug:
            traceback.print_exc()
        print(f"error: {shown(error.object)} is not UTF-8, and cannot be written; rename it", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        said = str(stop) or "what was finished is kept; run the same command again to go on"
        print(f"stopped: {said}", file=sys.stderr)
        # SIGTERM has an exit code of its own.
        return getattr(stop, "exit_code", 130)
    except BaseException as error:
        # Libraries written in Rust raise a PanicException, which is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if args.debug:
            traceback.print_exc()
        print(f"error: {unforeseen(error)}", file=sys.stderr)
        return 2


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all verbs and their options."""
    parser = Parser(
        prog="influence-fast",
        description="Find which chain-of-thought training examples help or harm a fine-tuned language model.",
    )
    parser.add_argument("--version", action="version", version=f"influence-fast {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB")

    def verb(name: str, work: Callable[[Any], int | None], help: str) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=help, description=help)
        # SUPPRESS: given before the verb or after it, the flag counts; absent here, it does not overwrite
        sub.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show an error's traceback")
        sub.add_argument("--quiet", action="store_true", help="no progress on the screen")
        sub.set_defaults(work=work)
        return sub

    for part in (runs, models, scoring, stores):
        part.add(verb)
    return parser
