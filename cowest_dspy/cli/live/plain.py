"""Lines for where there is no terminal: a file, a pipe, a log of a server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.text import Text

from cowest_dspy.cli.live import texts
from cowest_dspy.optimizers.run import Silent
from cowest_dspy.store.pool import Progress
from cowest_dspy.store.progress import Journal


class Plain(Silent):
    """A line when a stage begins and at every quarter of it, and one at its end with what it took;
    never broken, never coloured."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._journal: Journal | None = None

    def opened(self, journal: Journal) -> None:
        """Takes the numbers from this journal."""
        self._journal = journal

    @contextmanager
    def stage(self, title: str) -> Iterator[Progress]:
        """Its lines."""
        self._print(f"{title} ...")
        said = {0}

        def progress(done: int, total: int) -> None:
            quarter = 4 * done // total if total else 0
            if quarter not in said:
                said.add(quarter)
                self._print(f"{title}: {done} of {total}")

        before = self._ended()
        try:
            yield progress
        finally:
            self._say_end(title, before)

    def say(self, text: str) -> None:
        """The line."""
        self._print(text)

    def _ended(self) -> object:
        return self._journal.snapshot().last if self._journal else None

    def _say_end(self, title: str, before: object) -> None:
        if self._journal is None:
            return
        now = self._journal.snapshot()
        last = now.last
        if last is None or last is before:
            return
        words = "done in" if last.whole else "left after"
        self._print(f"{title}: {words} {', '.join(texts.done(last))}")
        spent = texts.budget(now.limits)
        if spent and last.calls:
            self._print(f"{title}: budget {', '.join(spent)}")

    def _print(self, text: str) -> None:
        self._console.print(Text(text), soft_wrap=True)
