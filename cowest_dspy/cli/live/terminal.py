"""Bars in a terminal: stages that have ended stay as lines, what is under way is drawn below them a
few times a second."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

from rich.console import Console, Group, RenderableType
from rich.live import Live as Drawing
from rich.text import Text

from cowest_dspy.cli.live.above import above
from cowest_dspy.cli.live.plain import Plain
from cowest_dspy.cli.live.screen import console, drawable
from cowest_dspy.cli.live.view import ended, view
from cowest_dspy.optimizers.run import Silent
from cowest_dspy.store.pool import Progress
from cowest_dspy.store.progress import Journal, StageDone
from cowest_dspy.utils import interrupts

DRAWN = 4
"""Times a second."""


class Terminal(Silent):
    """One drawing for all stages, also for a stage inside another. What is printed meanwhile,
    warnings too, appears above it."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._journal: Journal | None = None
        self._drawing: Drawing | None = None
        self._note = ""
        self._open: list[str] = []

    def opened(self, journal: Journal) -> None:
        """Takes the numbers from this journal."""
        self._journal = journal

    @contextmanager
    def stage(self, title: str) -> Iterator[Progress]:
        """Draws the stage while it runs; a line with what it took stays."""
        self._open.append(title)
        before = self._last()
        try:
            if self._drawing is not None:
                yield _nothing
                return
            with interrupts.telling(self._tell, self._restore):
                self._drawing = Drawing(
                    get_renderable=self._drawn,
                    console=self._console,
                    refresh_per_second=DRAWN,
                    transient=True,
                    redirect_stdout=False,
                    redirect_stderr=False,
                )
                try:
                    with self._drawing, above(self._console):
                        yield _nothing
                finally:
                    self._drawing, self._note = None, ""
        finally:
            self._open.pop()
            last = self._last()
            if last is not None and last is not before:
                self._console.print(ended(last))

    def say(self, text: str) -> None:
        """A line above the drawing."""
        self._console.print(Text(text))

    def _last(self) -> StageDone | None:
        return self._journal.snapshot().last if self._journal else None

    def _drawn(self) -> RenderableType:
        return (
            view(self._journal.snapshot(), self._note)
            if self._journal
            else Group(*map(Text, self._open))
        )

    def _tell(self, text: str) -> None:
        self._note = text

    def _restore(self) -> None:
        """The cursor, which a drawing hides."""
        with suppress(Exception):
            self._console.show_cursor(True)


def Live() -> Terminal | Plain:
    """The watch for this terminal: with bars where it can draw them, otherwise plain lines."""
    return Terminal(console) if drawable(console) else Plain(console)


def _nothing(done: int, total: int) -> None:
    """The journal was told already."""
