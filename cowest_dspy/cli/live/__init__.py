"""What a run looks like while it works: bars in a terminal, plain lines elsewhere, JSON lines for
programs.

screen.py     the terminal
texts.py      the numbers in words
view.py       a run at one moment, as lines of a terminal
following.py  a run of another process, followed from its folder: ``cowest watch``
above.py      what others print meanwhile
terminal.py   stages that have ended stay as lines, what is under way is drawn below them
plain.py      lines, where there is no terminal
machine.py    ``--log json``

    CoWest(metric, ..., watch=Live()).compile(program, trainset=train)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from cowest_dspy.cli.live.screen import console, drawable

if TYPE_CHECKING:
    from cowest_dspy.cli.live.machine import JsonLines
    from cowest_dspy.cli.live.plain import Plain
    from cowest_dspy.cli.live.terminal import Live, Terminal

__all__ = ["JsonLines", "Live", "Plain", "Terminal", "console", "drawable"]

_HOMES = {"JsonLines": "machine", "Live": "terminal", "Plain": "plain", "Terminal": "terminal"}


def __getattr__(name: str) -> Any:
    """Watches stand on the whole of a run, and are loaded when they are needed: the console is
    there at once."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
