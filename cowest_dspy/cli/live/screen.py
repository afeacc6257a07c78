"""The terminal that everything is printed on."""

from __future__ import annotations

import signal
from collections.abc import Iterable
from contextlib import suppress

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from cowest_dspy.utils.interrupts import Interrupted
from cowest_dspy.utils.safe_text import visible


class Printed(Console):
    """A terminal, or what stands in its place. Whatever is printed is text: no escape sequence in
    it reaches the terminal. When nobody reads on, as after ``| head``, the command ends as by a
    signal."""

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Print as Rich does, with control characters shown but for those that Rich itself puts
        there."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)

    def on_broken_pipe(self) -> None:
        """Nothing more is printed; the work is stopped cleanly, with exit code 141 as of other
        commands.

        Raises:
            Interrupted: always.
        """
        with suppress(SystemExit):
            super().on_broken_pipe()
        raise Interrupted(signal.SIGPIPE)


console = Printed(highlight=False, markup=False, emoji=False)
"""The terminal that everything is printed to."""


def drawable(console: Console) -> bool:
    """Whether lines that were printed can be drawn anew: in a terminal, and not in a dumb one."""
    return console.is_terminal and not console.is_dumb_terminal
