"""The terminal that everything is printed on."""

from __future__ import annotations

from rich.console import Console

console = Console(highlight=False)
"""The terminal that everything is printed to."""


def drawable(console: Console) -> bool:
    """Whether lines that were printed can be drawn anew: in a terminal, and not in a dumb one."""
    return console.is_terminal and not console.is_dumb_terminal
