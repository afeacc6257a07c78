"""The numbers of a run in words; the same in a terminal, in plain lines and in ``cowest watch``."""

from __future__ import annotations

from collections.abc import Mapping

from cowest_dspy.store.progress import Best, Limit, Snapshot, StageDone
from cowest_dspy.store.usage import format_usd


def duration(seconds: float) -> str:
    """
    >>> duration(4.31), duration(75), duration(3725), duration(200000)
    ('4.3 s', '1:15', '1:02:05', '55:33:20')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    hours, rest = divmod(round(seconds), 3600)
    minutes, rest = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def counted(number: int, word: str) -> str:
    """
    >>> counted(1, "call"), counted(1200, "call")
    ('1 call', '1,200 calls')
    """
    return f"{number:,} {word}" + ("" if number == 1 else "s")


def failed(failures: Mapping[str, int]) -> str:
    """By kind, the most frequent first; an empty text when nothing failed.

    >>> failed({"parse": 1, "timeout": 2})
    'failed 3: timeout 2, parse 1'
    """
    if not failures:
        return ""
    kinds = sorted(failures.items(), key=lambda item: (-item[1], item[0]))
    return f"failed {sum(failures.values()):,}: " + ", ".join(
        f"{kind} {count:,}" for kind, count in kinds
    )


def done(stage: StageDone) -> list[str]:
    """What a stage took, part by part; parts that are nothing are left out."""
    tokens = stage.tokens_in + stage.tokens_out
    return [
        duration(stage.seconds),
        *([counted(stage.calls, "call")] if stage.calls else []),
        *([f"{stage.cached:,} from the store"] if stage.cached else []),
        *([counted(tokens, "token")] if tokens else []),
        *([f"USD {format_usd(stage.usd)}"] if stage.calls and stage.usd != 0 else []),
        *([failed(stage.failures)] if stage.failures else []),
    ]


def status(now: Snapshot) -> list[str]:
    """How fast it goes and what it has cost, part by part."""
    return [
        f"{now.calls_per_second:.1f} calls/s",
        counted(now.calls, "call"),
        *([f"{now.cached:,} from the store"] if now.cached else []),
        counted(now.tokens, "token"),
        f"USD {format_usd(now.usd)}",
        *([failed(now.failures)] if now.failures else []),
    ]


def budget(limits: tuple[Limit, ...]) -> list[str]:
    """What was spent of what [budget] limits."""
    return [str(limit) for limit in limits if limit.most is not None]


def best(found: Best | None) -> str:
    """
    >>> best(Best("round 2", 0.8125, 40))
    'best on held-out examples 0.812 (round 2, n 40)'
    """
    return (
        f"best on held-out examples {found.score:.3f} ({found.name}, n {found.n})" if found else ""
    )


def state(now: Snapshot, *, alive: bool) -> str:
    """What has become of a run, in a few words."""
    where = f' in "{now.last.title}"' if now.last and not now.last.whole else ""
    if now.state == "running" and not alive:
        stage = f' in "{now.stage.title}"' if now.stage else ""
        return f"stopped{stage}: its process (id {now.pid} on {now.host}) is gone without a word"
    if now.state == "finished":
        return f"finished{f' {now.verb}' if now.verb else ''}"
    return now.state + where


def stopped(last: Snapshot | None, signal: int, command: str) -> str:
    """What was done until a signal stopped a command, and what to type to go on."""
    by = {1: "SIGHUP", 2: "Ctrl-C", 13: "SIGPIPE (nobody read what it printed)", 15: "SIGTERM"}.get(
        signal, f"signal {signal}"
    )
    if last is None:
        return f"Stopped by {by} before anything was begun. Start again with:\n  {command}"
    left = last.left
    where = ""
    if left is not None:
        far = f", at {left.done:,} of {left.total:,}" if left.total else ""
        where = f' in "{left.title}" after {duration(left.seconds)}{far}'
    done_now = [one.title for one in last.stages if one.whole and not one.earlier]
    kept = ", ".join(status(last)[1:])
    lines = [
        f"Stopped by {by}{where}. Everything that was answered is kept.",
        *([f"Done: {', '.join(done_now)}."] if done_now else []),
        f"In this session: {kept}.",
        *([f"Budget: {', '.join(budget(last.limits))}."] if budget(last.limits) else []),
        "To go on from here:",
        f"  {command}",
    ]
    return "\n".join(lines)
