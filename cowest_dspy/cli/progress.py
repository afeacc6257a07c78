"""What a run looks like while it works: bars in a terminal, plain lines, JSON for programs.

    CoWest(metric, ..., progress=Progress()).compile(program, trainset=train)

Everything is drawn from the run's :class:`~cowest_dspy.store.progress.Snapshot`: that of this
process, or, in ``cowest watch``, the one that another process writes into the run's folder.

``--log json`` writes one object a line. Each has ``schema_version``, ``event``, ``time``, ``run``,
``stage``, ``title``, ``done``, ``total``, ``calls``, ``cached``, ``tokens``, ``usd`` and
``failures``; docs/live.md says what they mean, and what each event adds.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bars
from rich.table import Column
from rich.text import Text

from cowest_dspy.cli.console import can_draw, console, printing_above
from cowest_dspy.errors import masked
from cowest_dspy.optimizers.run import NoProgress
from cowest_dspy.store.budget import Limit
from cowest_dspy.store.journal import Event
from cowest_dspy.store.progress import Best, Snapshot, StageState, is_alive, iso, read_snapshot
from cowest_dspy.store.usage import format_usd
from cowest_dspy.utils import interrupts
from cowest_dspy.utils.notebook import format_plural

SCHEMA_VERSION = 1
"""Version of the objects of ``--log json``."""
LOOK = 0.5
"""Seconds between two looks at the folder of a run that is watched."""
Log = Literal["auto", "plain", "json"]


# Numbers as text


def format_clock(seconds: float) -> str:
    """Seconds as a clock shows them; below a minute with a decimal.

    >>> format_clock(4.31), format_clock(75), format_clock(3725)
    ('4.3 s', '1:15', '1:02:05')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    hours, rest = divmod(round(seconds), 3600)
    minutes, rest = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def format_failures(failures: Mapping[str, int]) -> str:
    """Failures by kind, the most frequent first.

    >>> format_failures({"parse": 1, "timeout": 2})
    'failed 3: timeout 2, parse 1'
    """
    kinds = sorted(failures.items(), key=lambda item: (-item[1], item[0]))
    parts = ", ".join(f"{kind} {count:,}" for kind, count in kinds)
    return f"failed {sum(failures.values()):,}: {parts}"


def stage_costs(stage: StageState) -> list[str]:
    """What a stage took, part by part; parts that are nothing are left out."""
    tokens = stage.tokens_in + stage.tokens_out
    return [
        format_clock(stage.seconds),
        *([format_plural(stage.calls, "call")] if stage.calls else []),
        *([f"{stage.cached:,} from the store"] if stage.cached else []),
        *([format_plural(tokens, "token")] if tokens else []),
        *([f"USD {format_usd(stage.usd)}"] if stage.calls and stage.usd != 0 else []),
        *([format_failures(stage.failures)] if stage.failures else []),
    ]


def run_costs(now: Snapshot) -> list[str]:
    """How fast a run goes and what it has cost, part by part."""
    return [
        f"{now.calls_per_second:.1f} calls/s",
        format_plural(now.calls, "call"),
        *([f"{now.cached:,} from the store"] if now.cached else []),
        format_plural(now.tokens, "token"),
        f"USD {format_usd(now.usd)}",
        *([format_failures(now.failures)] if now.failures else []),
    ]


def format_budget(limits: tuple[Limit, ...]) -> str:
    """What was spent of what [budget] limits; an empty text where it limits nothing."""
    return ", ".join(str(limit) for limit in limits if limit.most is not None)


def format_best(best: Best) -> str:
    """The best score so far, and what gave it.

    >>> format_best(Best("round 2", 0.8125, 40))
    'best on held-out examples 0.812 (round 2, n 40)'
    """
    return f"best on held-out examples {best.score:.3f} ({best.name}, n {best.n})"


def format_state(now: Snapshot, *, alive: bool) -> str:
    """What has become of a run, in a few words."""
    if now.state == "running" and not alive:
        stage = f' in "{now.stage.title}"' if now.stage else ""
        return f"stopped{stage}: its process (id {now.pid} on {now.host}) is gone without a word"
    if now.state == "finished":
        return f"finished{f' {now.verb}' if now.verb else ''}"
    return now.state + (f' in "{now.last.title}"' if now.last and not now.last.whole else "")


def format_stop(last: Snapshot | None, signal: int, command: str) -> str:
    """What was done until a signal stopped a command, and what to type to go on."""
    names = {1: "SIGHUP", 2: "Ctrl-C", 13: "SIGPIPE (nobody read what it printed)", 15: "SIGTERM"}
    by = names.get(signal, f"signal {signal}")
    if last is None:
        return f"Stopped by {by} before anything was begun. Start again with:\n  {command}"
    where, left = "", last.left
    if left is not None:
        far = f", at {left.done:,} of {left.total:,}" if left.total else ""
        where = f' in "{left.title}" after {format_clock(left.seconds)}{far}'
    whole = [one.title for one in last.stages if one.whole and not one.earlier]
    budget = format_budget(last.limits)
    lines = [
        f"Stopped by {by}{where}. Everything that was answered is kept.",
        *([f"Done: {', '.join(whole)}."] if whole else []),
        f"In this session: {', '.join(run_costs(last)[1:])}.",
        *([f"Budget: {budget}."] if budget else []),
        "To go on from here:",
        f"  {command}",
    ]
    return "\n".join(lines)


# A run as lines of a terminal


def view(now: Snapshot, note: str = "") -> Group:
    """What is under way: stages and their bars, speed and spend, [budget], the best score; and a
    note."""
    bars = Bars(
        TextColumn(
            "{task.description}",
            markup=False,
            table_column=Column(ratio=3, no_wrap=True, overflow="ellipsis"),
        ),
        BarColumn(bar_width=None, table_column=Column(ratio=2)),
        TextColumn("{task.fields[count]}", justify="right", table_column=Column(no_wrap=True)),
        TextColumn("{task.fields[time]}", table_column=Column(no_wrap=True)),
        auto_refresh=False,
        expand=True,
    )
    for stage in now.now:
        count = f"{stage.done:,}/{stage.total:,}" if stage.total else ""
        took = format_clock(stage.seconds)
        if stage.left is not None and stage.total and stage.done < stage.total:
            took += f", left {format_clock(stage.left)}"
        bars.add_task(stage.title, total=stage.total, completed=stage.done, count=count, time=took)
    budget = format_budget(now.limits)
    lines: list[RenderableType] = [bars.make_tasks_table(bars.tasks)] if now.now else []
    lines.append(Text(" · ".join(run_costs(now)), style="dim"))
    lines += [Text(f"budget: {budget}", style="dim")] if budget else []
    lines += [Text(format_best(now.best), style="dim")] if now.best else []
    lines += [Text(note, style="bold yellow")] if note else []
    return Group(*lines)


def format_ended(stage: StageState) -> Text:
    """The line that stays of a stage."""
    word, style = ("done", "green") if stage.whole else ("left", "yellow")
    if stage.earlier:
        word, style = "earlier", "dim"
    text = Text.assemble((f"{word:<8}", style), (stage.title, "dim" if stage.earlier else ""))
    text.append(f"  {', '.join(stage_costs(stage))}", style="dim")
    return text


class Progress(NoProgress):
    """Shows a run: bars in a terminal that can draw them, plain lines elsewhere, or JSON objects.

    Args:
        log: "auto"; "plain": lines also in a terminal; "json": events on ``out``.
        screen: where bars and lines are shown.
        out: where JSON objects are written; standard output.
        run: the run's folder, for events before there is a snapshot.
    """

    def __init__(
        self,
        log: Log = "auto",
        *,
        screen: Console = console,
        out: TextIO | None = None,
        run: str = "",
    ) -> None:
        self.draws = log == "auto" and can_draw(screen)
        self._json = log == "json"
        self._console, self._out, self._run = screen, out or sys.stdout, run
        self._lock = threading.RLock()
        self._now: Snapshot | None = None
        self._drawing: ExitStack | None = None
        self._note = ""
        self._seen: Any = None

    def update(self, event: Event, snapshot: Snapshot) -> None:
        """Show an event of a run's journal."""
        with self._lock:
            self._now = snapshot
            if self._json:
                self._write_event(event, snapshot)
            elif self.draws:
                self._draw(event, snapshot)
            else:
                self._print_lines(event, snapshot)

    # Bars

    def _draw(self, event: Event, now: Snapshot) -> None:
        if event == "stage_begin" and self._drawing is None:
            with ExitStack() as stack:
                stack.enter_context(interrupts.announcing(self._set_note))
                live = Live(
                    get_renderable=self._render,
                    console=self._console,
                    refresh_per_second=4,
                    transient=True,
                    redirect_stdout=False,
                    redirect_stderr=False,
                )
                stack.enter_context(live)
                stack.enter_context(printing_above(self._console))
                self._drawing = stack.pop_all()
        elif event == "stage_end":
            if not now.now:
                self.close()
            self._console.print(format_ended(now.stages[-1]))
        elif event == "message":
            self._console.print(Text(now.said[-1]))

    def close(self) -> None:
        """Take away what is drawn."""
        drawing, self._drawing, self._note = self._drawing, None, ""
        if drawing is not None:
            drawing.close()

    def _render(self) -> RenderableType:
        return view(self._now, self._note) if self._now and self._now.now else Group()

    def _set_note(self, text: str) -> None:
        self._note = text

    # Lines

    def _print_lines(self, event: Event, now: Snapshot) -> None:
        stage = now.stage
        if event == "message":
            self._line(now.said[-1])
        elif event == "stage_end":
            last = now.stages[-1]
            words = "done in" if last.whole else "left after"
            self._line(f"{last.title}: {words} {', '.join(stage_costs(last))}")
            if last.calls and (budget := format_budget(now.limits)):
                self._line(f"{last.title}: budget {budget}")
        elif stage is not None and event == "stage_begin":
            self._seen = (stage.title, 0)
            self._line(f"{stage.title} ...")
        elif stage is not None and stage.total:
            quarter = (stage.title, 4 * stage.done // stage.total)
            if quarter != self._seen:
                self._seen = quarter
                self._line(f"{stage.title}: {stage.done:,} of {stage.total:,}")

    def _line(self, text: str) -> None:
        self._console.print(Text(text), soft_wrap=True)

    # JSON

    def _write_event(self, event: Event, now: Snapshot) -> None:
        if event == "message":
            self.event(event, now, text=now.said[-1])
        elif event == "stage_end":
            last = asdict(now.stages[-1])
            names = ("title", "done", "total", "calls", "cached", "usd", "failures", "seconds")
            facts = {name: last[name] for name in (*names, "tokens_in", "tokens_out", "whole")}
            tokens = last["tokens_in"] + last["tokens_out"]
            self.event(event, now, stage=last["name"], tokens=tokens, **facts)
        elif event == "stage_begin":
            self.event(event, now)
        elif (stage := now.stage) is not None:
            changed = (now.calls, now.cached, now.failures, stage.name, stage.done)
            if changed != self._seen:
                self._seen = changed
                self.event(
                    event,
                    now,
                    seconds=stage.seconds,
                    left=stage.left,
                    calls_per_second=now.calls_per_second,
                    budget=[asdict(limit) for limit in now.limits],
                    best=asdict(now.best) if now.best else None,
                )

    def begin(self, now: Snapshot) -> None:
        """Write the event ``start``, of ``--log json``."""
        keys = ("task", "verb", "command", "pid", "host")
        self.event("start", now, **{key: getattr(now, key) for key in keys})

    def end(
        self, now: Snapshot | None, code: int, error: BaseException | None, command: str
    ) -> None:
        """Write the last event, ``end``, of ``--log json``.

        Args:
            now: the run's last state; None when there was no run yet.
            code: the exit code.
            error: what ended the work.
            command: what goes on.
        """
        stopped = "stopped" if isinstance(error, KeyboardInterrupt) else "failed"
        facts: dict[str, Any] = {
            "state": now.state if now else stopped,
            "exit_code": code,
            "error": now.error if now else masked(f"{type(error).__name__}: {error}"),
            "continue": command if code else None,
            "verdict": now.verdict if now else None,
            "results": now.results if now else {},
        }
        if now and (left := now.left):
            facts |= {"stage": left.name, "title": left.title}
            facts |= {"done": left.done, "total": left.total}
        self.event("end", now, **facts)

    def event(self, name: str, now: Snapshot | None, **facts: Any) -> None:
        """Write one JSON object, whole and at once: the keys of all events, and these facts."""
        if not self._json:
            return
        stage = now.stage if now else None
        common: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "event": name,
            "time": now.updated if now else iso(time.time()),
            "run": (now and now.run) or self._run,
            "stage": stage.name if stage else None,
            "title": stage.title if stage else None,
            "done": stage.done if stage else 0,
            "total": stage.total if stage else None,
            "calls": now.calls if now else 0,
            "cached": now.cached if now else 0,
            "tokens": now.tokens if now else 0,
            "usd": now.usd if now else 0.0,
            "failures": now.failures if now else {},
        }
        with self._lock:
            self._out.write(json.dumps({**common, **facts}, default=str) + "\n")
            self._out.flush()


# cowest watch


def follow(
    folder: Path, progress: Progress, *, hint: str = "", sleep: Callable[[float], None] = time.sleep
) -> Snapshot:
    """Show a run that another process works on until it ends; nothing is written or locked.

    Args:
        folder: the run's; it need not be there yet.
        progress: where it is shown.
        hint: said while there is no run yet.
        sleep: for tests.

    Returns:
        Its last state, which says "running" where its process was killed.
    """
    shown: list[StageState] = []
    lines, before = 0, read_snapshot(folder)
    if before is None:
        waiting = f"{folder}: there is no run yet, waiting for it; Ctrl-C ends the waiting.{hint}"
        progress.update("message", Snapshot("running", "", 0, "", 0.0, said=(waiting,)))
    open_before: list[str] = []
    try:
        while True:
            now = before = read_snapshot(folder) or before
            if now is not None:
                if now.stage and now.stage.name not in open_before:
                    progress.update("stage_begin", now)
                show_new(now, progress, shown, lines)
                progress.update("progress", now)
                lines, open_before = now.lines, [stage.name for stage in now.now]
                # Seen dead, and then the same once more: in between it may have ended as it should.
                if not is_alive(now) and (read_snapshot(folder) or now) == now:
                    return now
            sleep(LOOK)
    finally:
        progress.close()


def show_new(now: Snapshot, progress: Progress, shown: list[StageState], lines: int) -> None:
    """Show the stages that are not among ``shown``, and the messages after the first ``lines``."""
    for stage in now.stages:
        if stage not in shown:
            shown.append(stage)
            progress.update("stage_end", replace(now, stages=(stage,)))
    # Fewer than before: another process has begun to work on it.
    new = min(now.lines - (lines if now.lines >= lines else 0), len(now.said))
    for text in now.said[len(now.said) - new :]:
        progress.update("message", replace(now, said=(text,)))


def describe_end(now: Snapshot) -> list[str]:
    """Lines about a run on which no process works any more."""
    return [
        f"{now.run}: {format_state(now, alive=is_alive(now))}",
        *([now.error] if now.error and now.state != "running" else []),
        *([now.verdict] if now.verdict else []),
        *(
            [f"To go on from there:\n  {now.command}"]
            if now.command and now.state in ("running", "stopped")
            else []
        ),
    ]
