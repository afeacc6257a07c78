"""Bars of tqdm, as DSPy shows them, for work that is started from Python; the command line draws
its own (cli/progress.py)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


def is_displayed(display_progress: bool | None) -> bool:
    """Whether to show bars: as the caller says; None: where somebody may be looking, which is in a
    terminal (of standard error) and in a notebook."""
    if display_progress is not None:
        return display_progress
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return sys.stderr.isatty() or hasattr(shell, "kernel")


def open_bar(title: str) -> Any:
    """A bar on standard error, or of a notebook; the caller closes it."""
    from tqdm.auto import tqdm

    return tqdm(desc=title, dynamic_ncols=True)


def advance(bar: Any, done: int, total: int | None) -> None:
    """Draw a bar at ``done`` of ``total``."""
    if total != bar.total:
        bar.reset(total)
    bar.update(done - bar.n)


def print_above_bars(text: str) -> None:
    """Print a line on standard error, above the bars that are drawn there."""
    from tqdm.auto import tqdm

    tqdm.write(text, file=sys.stderr)


@contextmanager
def progress_bar(
    title: str, display_progress: bool | None, *, instead: object = None
) -> Iterator[Callable[[int, int], None] | None]:
    """A context around work that calls what it is given with (done, total). It is given None where
    no bar is displayed: as the caller says, and where ``instead`` shows the progress and nothing
    was said."""
    if not is_displayed(False if display_progress is None and instead else display_progress):
        yield None
        return
    bar = open_bar(title)
    try:
        yield lambda done, total: advance(bar, done, total)
    finally:
        bar.close()
