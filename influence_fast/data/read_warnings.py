"""Warnings about what a reader left out of the rows of one source, logged once at the end."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from influence_fast.data.cells import Cells
from influence_fast.data.conversations import Draft
from influence_fast.data.rows import Rows
from influence_fast.errors import truncated_list

logger = logging.getLogger(__name__)


# Characters; an answer may begin with a shorter prompt by chance.
_REPEATED = 16


class ReadWarnings:
    """Warnings about what a reader leaves out of the rows, collected and logged once for a source."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self.cut: list[int] = []
        self.passed_over: list[int] = []
        self.blank: list[tuple[int, int]] = []
        self.fields: dict[str, None] = {}
        self.verdicts: list[tuple[int, str]] = []
        self.repeating: list[int] = []
        self.seen = 0

    def see(self, cells: Cells, drafts: list[Draft]) -> None:
        """Record what was left out of one row."""
        if any(draft.cut for draft in drafts):
            self.cut.append(cells.index)
        if any(draft.passed_over for draft in drafts):
            self.passed_over.append(cells.index)
        self.seen += bool(drafts)
        if any(len(draft.prompt) >= _REPEATED and draft.completion.startswith(draft.prompt) for draft in drafts):
            self.repeating.append(cells.index)
        self.fields.update(dict.fromkeys(name for draft in drafts for name in draft.unread))

    def _places(self, indices: Sequence[int]) -> str:
        return truncated_list(self.rows.place(i).removeprefix(f"{self.rows.name}, ") for i in indices)

    def say(self) -> None:
        """Log what was recorded, a line for each kind."""
        name = self.rows.name
        if self.cut:
            logger.warning(
                "%s: %d conversations do not end with an assistant turn that is trained on; what comes after their "
                "last one is left out: %s", name, len(self.cut), self._places(self.cut),
            )  # fmt: skip
        if self.passed_over:
            logger.warning(
                "%s: %d conversations have earlier assistant turns with weight 1, which turns='last' puts no loss on; "
                "turns='all' does: %s", name, len(self.passed_over), self._places(self.passed_over),
            )  # fmt: skip
        # A few answers may restate their question.
        if 2 * len(self.repeating) > self.seen:
            logger.warning(
                "%s: %d completions begin with their own prompt, which is then trained on; take it off them where it "
                "is no part of the answer: %s", name, len(self.repeating), self._places(self.repeating),
            )  # fmt: skip
        if self.verdicts:
            logger.warning(
                "%s: %d labels are truths or numbers (%s), which name no kind of corruption, and are not read: %s; "
                "write 'clean' or the kind as text", name, len(self.verdicts),
                truncated_list(dict.fromkeys(label for _, label in self.verdicts)),
                self._places([index for index, _ in self.verdicts]),
            )  # fmt: skip
        if self.fields:
            logger.warning(
                "%s: messages have fields with text that is not read: %s; rename one that holds reasoning to "
                "'reasoning', or write the text into 'content'", name, truncated_list(self.fields),
            )  # fmt: skip
        if self.blank:
            place = self.rows.place
            traces = truncated_list(f"trace {j} of {place(i).removeprefix(f'{name}, ')}" for i, j in self.blank)
            logger.warning("%s: %d traces are null or blank and are left out: %s", name, len(self.blank), traces)
