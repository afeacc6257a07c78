"""The terminal that everything is printed on."""

from __future__ import annotations

import signal
from contextlib import suppress

from rich.console import Console

from cowest_dspy.interrupts import Interrupted


class Printed(Console):
    """A terminal, or what stands in its place: when nobody reads on, as after ``| head``, the command ends as by a signal."""

    def on_broken_pipe(self) -> None:
        """Nothing more is printed; the work is stopped cleanly, with exit code 141 as of other commands.

        Raises:
            Interrupted: always.
        """
        with suppress(SystemExit):
            super().on_broken_pipe()
        raise Interrupted(signal.SIGPIPE)


console = Printed(highlight=False)
"""The terminal that everything is printed to."""


def drawable(console: Console) -> bool:
    """Whether lines that were printed can be drawn anew: in a terminal, and not in a dumb one."""
    return console.is_terminal and not console.is_dumb_terminal
