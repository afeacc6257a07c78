"""The terminal that everything is printed on."""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any, TextIO, cast

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from cowest_dspy.utils.interrupts import Interrupted
from cowest_dspy.utils.safe_text import visible


class SafeConsole(Console):
    """A console on which whatever is printed is text: no escape sequence in it reaches the
    terminal. When the reader of a pipe is gone, as after ``| head``, the command ends as by a
    signal."""

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Render as Rich does, with control characters shown but for those of Rich itself."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)

    def on_broken_pipe(self) -> None:
        """Stop the work cleanly, with exit code 141 as of other commands.

        Raises:
            Interrupted: always.
        """
        with suppress(SystemExit):
            super().on_broken_pipe()
        raise Interrupted(signal.SIGPIPE)

    def print_line(self, text: str) -> None:
        """Print text as it is: no markup, no colours, not broken at the width of the terminal."""
        self.print(text, markup=False, highlight=False, soft_wrap=True)


console = SafeConsole(highlight=False, markup=False, emoji=False)
"""The terminal that everything is printed on."""


def can_draw(console: Console) -> bool:
    """Whether what was printed can be drawn again: in a terminal, and not in a dumb one."""
    return console.is_terminal and not console.is_dumb_terminal


# "75%|####   | 9/12 [00:00<00:00, 16.00it/s]", and "4it [00:00, 3.1it/s]" where no end is known.
_TQDM = re.compile(r"\d+%\|.*\||\d+it \[\d\d:\d\d")


class Lines:
    """A stream in the place of another: it passes whole lines on to the console, without bars of
    tqdm. Of what was written over itself (``\\r``) the last stays."""

    def __init__(self, console: Console, stream: TextIO) -> None:
        self._console, self._rest = console, ""
        self.rich_proxied_file = stream
        """The stream that Rich itself writes to."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rich_proxied_file, name)

    def write(self, text: str) -> int:
        """Show the lines that are whole now."""
        *lines, rest = (self._rest + text).split("\n")
        # A bar that is drawn over itself for hours is kept once.
        self._rest = rest[rest.rfind("\r") + 1 :] if rest.count("\r") > 1 else rest
        for line in lines:
            self._show(line)
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        """Write one after the other."""
        self.write("".join(lines))

    def flush(self) -> None:
        """Nothing: a line is shown when it is whole."""

    def end(self) -> None:
        """Show what has no end."""
        rest, self._rest = self._rest, ""
        if rest.strip():
            self._show(rest)

    def _show(self, line: str) -> None:
        last = line.rstrip("\r").rpartition("\r")[2]
        if not _TQDM.search(last) and (last or not line):
            self._console.print(Text.from_ansi(last), soft_wrap=True)


@contextmanager
def printing_above(console: Console) -> Iterator[None]:
    """Standard output and error through the console, where they go to the same terminal or file as
    it does."""
    streams = sys.stdout, sys.stderr
    if any(isinstance(stream, Lines) for stream in streams):
        yield
        return
    out, error = (
        Lines(console, stream) if stream.isatty() == console.is_terminal else stream
        for stream in streams
    )
    with redirect_stdout(cast("TextIO", out)), redirect_stderr(cast("TextIO", error)):
        try:
            yield
        finally:
            for stream in (out, error):
                if isinstance(stream, Lines):
                    stream.end()
