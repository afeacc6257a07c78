"""A run that another process works on, followed from its folder: nothing is written there, and
nothing is locked."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live as Drawing
from rich.text import Text

from cowest_dspy.cli.live import texts
from cowest_dspy.cli.live.screen import drawable
from cowest_dspy.cli.live.view import ended, view
from cowest_dspy.report.runs import meant
from cowest_dspy.store.progress import Snapshot, StageDone, alive, read_snapshot

LOOK = 0.5
"""Seconds between two looks at the folder."""
SAID = 10.0
"""Seconds between two lines about a stage under way, where there is no terminal to draw in."""


class Following:
    """Shows a run until it ends.

    Args:
        folder: the run's; it need not be there yet.
        console: where it is shown.
        sleep, clock: for tests.
    """

    def __init__(
        self,
        folder: Path,
        console: Console,
        *,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder, self._console, self._sleep, self._clock = folder, console, sleep, clock
        self._shown: list[StageDone] = []
        self._lines, self._last_line = 0, float("-inf")
        self._now: Snapshot | None = None
        self._draws = drawable(console)
        self._waiting = f"{folder}: there is no run yet, waiting for it; Ctrl-C ends the waiting."

    def until_the_end(self) -> Snapshot:
        """Follows it, from before its beginning if need be; gives its last state, which says
        "running" where it was killed."""
        drawing = Drawing(
            get_renderable=self._drawn,
            console=self._console,
            refresh_per_second=4,
            transient=True,
            redirect_stdout=sys.stdout.isatty(),
            redirect_stderr=sys.stderr.isatty(),
        )
        if read_snapshot(self._folder) is None:
            self._waiting += meant(self._folder)
            if not self._draws:
                self._print(self._waiting)
        with drawing if self._draws else nullcontext():
            while True:
                self._now = now = read_snapshot(self._folder) or self._now
                if now is not None:
                    self._tell(now)
                    # Seen dead, and then the same once more: in between it may have ended as it
                    # should.
                    if not alive(now):
                        if (read_snapshot(self._folder) or now) == now:
                            break
                        continue
                self._sleep(LOOK)
        self.end(now)
        return now

    def once(self, now: Snapshot) -> None:
        """Shows the state as it is."""
        self._tell(now)
        if now.state == "running" and alive(now):
            self._console.print(view(now))
            self._print(f"running: process {now.pid} on {now.host}")
        else:
            self.end(now)

    def end(self, now: Snapshot) -> None:
        """Says what has become of a run that nobody works on."""
        self._print(f"{now.run}: {texts.state(now, alive=alive(now))}")
        if now.error and now.state != "running":
            self._print(now.error)
        if now.verdict:
            self._print(now.verdict)
        if now.command and now.state in ("running", "stopped"):
            self._print(f"To go on from there:\n  {now.command}")

    def _tell(self, now: Snapshot) -> None:
        """What is new: stages that have ended, lines that were said, and without a drawing now and
        then how far it is."""
        for stage in now.stages:
            if stage not in self._shown:
                self._shown.append(stage)
                self._console.print(ended(stage), soft_wrap=not self._draws)
        if now.lines < self._lines:
            self._lines = 0  # Another process has begun to work on it.
        new = min(now.lines - self._lines, len(now.said))
        for line in now.said[len(now.said) - new :]:
            self._print(line)
        self._lines = now.lines
        if (
            not self._draws
            and now.stage is not None
            and now.state == "running"
            and self._clock() - self._last_line >= SAID
        ):
            self._last_line = self._clock()
            stage = now.stage
            far = f": {stage.done:,} of {stage.total:,}" if stage.total else ""
            self._print(f"{stage.title}{far}, {', '.join(texts.status(now))}")

    def _drawn(self) -> RenderableType:
        if self._now is None:
            return Text(self._waiting, style="dim")
        return view(self._now) if self._now.state == "running" else Group()

    def _print(self, text: str) -> None:
        self._console.print(Text(text), soft_wrap=True)
