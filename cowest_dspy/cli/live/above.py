"""What others print while a run is shown: whole lines, above what is drawn; bars of libraries are
left out."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any, TextIO, cast

from rich.console import Console
from rich.text import Text

# "75%|####   | 9/12 [00:00<00:00, 16.00it/s]", and "4it [00:00, 3.1it/s]" where no end is known: of tqdm.
_BAR = re.compile(r"\d+%\|.*\||\d+it \[\d\d:\d\d")


class Lines:
    """A stream in the place of another: it passes on whole lines. Of what was written over itself
    (``\\r``) the last stays."""

    def __init__(self, console: Console, stream: TextIO) -> None:
        self._console, self._rest = console, ""
        self.rich_proxied_file = stream
        """Where Rich itself writes to."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rich_proxied_file, name)

    def write(self, text: str) -> int:
        """Shows the lines that are whole now."""
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._show(line)
        # A bar that is drawn over itself for hours is kept once.
        self._rest = (
            self._rest[self._rest.rfind("\r") + 1 :] if self._rest.count("\r") > 1 else self._rest
        )
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        """One after the other."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Nothing: a line is shown when it is whole."""

    def end(self) -> None:
        """Shows what has no end."""
        rest, self._rest = self._rest, ""
        if rest.strip():
            self._show(rest)

    def _show(self, line: str) -> None:
        last = line.rstrip("\r").rpartition("\r")[2]
        if not _BAR.search(last) and (last or not line):
            self._console.print(Text.from_ansi(last), soft_wrap=True)


@contextmanager
def above(console: Console) -> Iterator[None]:
    """Standard output and error through the console, where they go to the same terminal or file as
    it does."""
    streams = sys.stdout, sys.stderr
    if any(isinstance(stream, Lines) for stream in streams):
        yield
        return
    here = [stream.isatty() == console.is_terminal for stream in streams]
    out, error = (
        Lines(console, stream) if same else stream
        for stream, same in zip(streams, here, strict=True)
    )
    with redirect_stdout(cast("TextIO", out)), redirect_stderr(cast("TextIO", error)):
        try:
            yield
        finally:
            for stream in (out, error):
                if isinstance(stream, Lines):
                    stream.end()
