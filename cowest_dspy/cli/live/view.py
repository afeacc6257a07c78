"""A run at one moment, as lines of a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cowest_dspy.cli.live import texts
from cowest_dspy.store.progress import Snapshot, StageDone, StageNow

WIDE = 96
"""Columns from which a stage and its bar share a line."""
GAP = " · "


def view(now: Snapshot, note: str = "") -> Group:
    """What is under way: the stage and its bar, speed and spend, [budget], the best score; and a
    note."""
    lines: list[RenderableType] = []
    if now.stage is not None:
        outer = [one.title for one in now.now[:-1]]
        lines += [
            *(
                [Text(" > ".join(outer), style="dim", overflow="ellipsis", no_wrap=True)]
                if outer
                else []
            ),
            _Bar(now.stage),
        ]
    lines += [_Parts(texts.status(now), ""), _Parts(texts.budget(now.limits), "budget: ")]
    found = texts.best(now.best)
    lines += [_Parts([found] if found else [], "")]
    if note:
        lines.append(Text(note, style="bold yellow"))
    return Group(*lines)


def ended(stage: StageDone) -> Text:
    """The line that stays of a stage."""
    word, style = ("done", "green") if stage.whole else ("left", "yellow")
    if stage.earlier:
        word, style = "earlier", "dim"
    text = Text.assemble((f"{word:<8}", style), (stage.title, "" if not stage.earlier else "dim"))
    text.append(f"  {', '.join(texts.done(stage))}", style="dim")
    return text


class _Bar:
    """A stage that is under way: title, bar, how many of how many, time, and time left; on two
    lines where it is narrow."""

    def __init__(self, stage: StageNow) -> None:
        self._stage = stage

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        stage = self._stage
        title = Text(stage.title, overflow="ellipsis", no_wrap=True)
        bar = ProgressBar(
            stage.total or None, stage.done, pulse=not stage.total, animation_time=stage.seconds
        )
        counts = Text(f"{stage.done:,}/{stage.total:,}" if stage.total else "", no_wrap=True)
        times = Text(texts.duration(stage.seconds), no_wrap=True)
        if stage.left is not None and stage.total and stage.done < stage.total:
            times.append(f", left {texts.duration(stage.left)}")
        wide = options.max_width >= WIDE
        grid = Table.grid(padding=(0, 2, 0, 0), expand=wide)
        cells: list[RenderableType] = [bar, counts, times]
        if wide:
            grid.add_column(ratio=3)
            cells.insert(0, title)
        else:
            yield title
        grid.add_column(
            ratio=2 if wide else None,
            width=None if wide else min(24, max(options.max_width - 30, 4)),
        )
        # As wide as what they may come to hold, so that the bar stays where it is.
        grid.add_column(
            justify="right", min_width=len(f"{stage.total:,}") * 2 + 1 if stage.total else 0
        )
        grid.add_column(min_width=20 if wide else 0)
        grid.add_row(*cells)
        yield grid


class _Parts:
    """Parts of a line with dots between them; as many to a line as fit, a part never broken where
    it fits into one."""

    def __init__(self, parts: Sequence[str], start: str) -> None:
        self._parts, self._start = parts, start

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for line in wrapped(self._parts, options.max_width, self._start):
            yield Text(line, style="dim")


def wrapped(parts: Sequence[str], width: int, start: str = "") -> Iterator[str]:
    """
    >>> list(wrapped(["12 calls", "3 tokens", "USD 0.10"], 20))
    ['12 calls · 3 tokens', 'USD 0.10']
    """
    line = ""
    for part in parts:
        longer = f"{line}{GAP}{part}" if line else start + part
        if line and len(longer) > width:
            yield line
            line = part
        else:
            line = longer
    if line:
        yield line
