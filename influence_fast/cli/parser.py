"""Parse arguments with errors of one line, which name the option or verb that was probably meant."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from influence_fast.errors import ConfigError, shown

#: Options that name what is written; libraries that write there take no name that is not UTF-8.
_WRITTEN = ("output", "store", "influence_store", "export_lm_eval")


class Parser(argparse.ArgumentParser):
    """Parse arguments; an unknown option or verb is named with the nearest known one."""

    _given: Sequence[str] = ()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as argparse does, and refuse options that this parser does not know."""
        self._given = list(sys.argv[1:] if args is None else args)
        found, left = super().parse_known_args(args, namespace)
        # of a verb: the main parser knows none of its options
        if left and self._subparsers is None:
            self.error(f"unrecognized arguments: {' '.join(left)}")
        return found, left

    def error(self, message: str) -> NoReturn:
        """Print an error in one line with what was probably meant, and exit with code 2."""
        hints = [] if "invalid choice" in message or self._subparsers is not None else self._hints()
        if self._subparsers is not None and "invalid choice" in message:
            verbs = [name for action in self._subparsers._group_actions for name in action.choices or ()]
            hints = [near for word in self._given for near in _nearest(word, verbs)][:1]
        meant = f"; did you mean {' and '.join(hints)}?" if hints else ""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}{meant} (see {self.prog} --help)\n")

    def _hints(self) -> list[str]:
        """Return the known options that are nearest to the unknown ones that were given."""
        known = list(self._option_string_actions)
        words = [word.partition("=")[0] for word in self._given if word.startswith("--")]
        unknown = [word for word in words if not any(option.startswith(word) for option in known)]
        return [near for word in unknown for near in _nearest(word, known)]


def _nearest(word: str, known: Sequence[str]) -> list[str]:
    return difflib.get_close_matches(word[:100], known, n=1, cutoff=0.6)


def check_names(args: Any) -> None:
    """Raise ConfigError, before any work, for a name of what is written that is not UTF-8."""
    for option in _WRITTEN if hasattr(args, "output") else ():
        name = getattr(args, option, None)
        if isinstance(name, str) and any("\ud800" <= character <= "\udfff" for character in name):
            raise ConfigError(
                f"--{option.replace('_', '-')} is {shown(name)}, a name that is not UTF-8, where nothing is written: "
                "give another"
            )
