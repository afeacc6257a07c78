"""What a stage looks like while it runs: bars in a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console(highlight=False)


# Rich forgets, for the time that is left, what is older than its 30 seconds; a step of training can take longer than that.
_REMEMBERED_SECONDS = 1800.0


class Live:
    """Stages as progress bars in a terminal, with what is done, of how much, and the time left; and as plain lines elsewhere."""

    def __init__(self) -> None:
        self._columns = (
            TextColumn("{task.description:<46}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )

    @contextmanager
    def stage(self, title: str) -> Iterator[Any]:
        """A bar while the stage runs; the last state of it stays."""
        if not console.is_terminal:
            yield _plain(title)
            return
        with Progress(*self._columns, console=console, speed_estimate_period=_REMEMBERED_SECONDS) as bars:
            task = bars.add_task(title, total=None)
            yield lambda done, total: bars.update(task, completed=done, total=total)

    def say(self, text: str) -> None:
        """One line."""
        console.print(text)


def _plain(title: str) -> Any:
    """Without a terminal: a line when a stage begins, and at every quarter of it."""
    console.print(f"{title} ...")
    said = {0}

    def progress(done: int, total: int) -> None:
        quarter = 4 * done // total if total else 0
        if quarter not in said:
            said.add(quarter)
            console.print(f"{title}: {done} of {total}")

    return progress
