"""Calls that are under way when their process is killed: run as a script, so that children are
forked from a small process that has imported everything. Prints what it found as JSON.

    python tests/support/killed_calls.py FOLDER

``FOLDER/blocked`` is a run that was killed with three calls under way, after four answers.
``FOLDER/limited`` is one that was killed again and again, and then used up its budget.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dspy.lm15 import Request, Response
from forked import child

from cowest_dspy import Budget
from cowest_dspy.errors import BudgetError
from cowest_dspy.store import serialize
from cowest_dspy.store.call_context import call_context
from cowest_dspy.store.store import Store

STRONG, WEAK, LIMIT, KILLS, THREADS = "m/strong", "m/weak", 100, 5, 4


def question(number: int, model: str = STRONG) -> Request:
    return serialize.request_from_messages(
        model, [{"role": "user", "content": f"Question {number}?"}]
    )


def answer(number: int, model: str = STRONG) -> Response:
    return serialize.make_response(model, f"Answer {number}", "stop", 10, number, usd=0.25 * number)


def limits(**values: float) -> Budget:
    return Budget.model_validate(values)


def blocked(folder: Path, ready: Path) -> None:
    """Four answers of the strong model; then two of its calls, one of them at its second attempt,
    and one of the weak model's are under way for ever."""
    under_way = threading.Barrier(4)

    def never(*, again: bool = False) -> Response:
        if again:
            paying = call_context().paying
            assert paying is not None
            paying.retry()
        under_way.wait()
        time.sleep(600)
        raise AssertionError("it was to be killed")

    with (
        Store(folder, budget=limits(strong_calls=100), strong=STRONG) as store,
        store.spending("collect"),
    ):
        for number in range(1, 5):
            store.answer(question(number), lambda number=number: answer(number))
            time.sleep(0.05)
        for asked, again in ((question(5), False), (question(6), True), (question(7, WEAK), False)):
            ask: Callable[[], Response] = lambda again=again: never(again=again)  # noqa: E731
            threading.Thread(target=store.answer, args=(asked, ask), daemon=True).start()
        under_way.wait()
        ready.touch()
        time.sleep(600)


def limited(folder: Path, log: Path) -> None:
    """Asks until the budget is used up; each request is noted as it leaves, in a way that a kill
    cannot undo."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def ask(number: int) -> Response:
        os.write(file, b"asked\n")
        time.sleep(0.02)
        return answer(number % 7)

    with (
        Store(folder, budget=limits(strong_calls=LIMIT), strong=STRONG) as store,
        store.spending("collect"),
    ):
        with ThreadPoolExecutor(THREADS) as threads:
            jobs = [
                threads.submit(store.answer, question(number), lambda number=number: ask(number))
                for number in range(10 * LIMIT)
            ]
        refused = [job.exception() for job in jobs if job.exception() is not None]
    if any(not isinstance(error, BudgetError) for error in refused):
        raise SystemExit(f"another error: {refused[0]!r}")


def killed(process: int) -> bool:
    """Kills the process, and says whether it was still there."""
    os.kill(process, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(process, 0)[1])


def asked(log: Path) -> int:
    return len(log.read_text().split()) if log.exists() else 0


def main(folder: Path) -> None:
    """Prints how often ``limited`` was killed, and how many requests left in all of its lives."""
    ready, log, generator = folder / "ready", folder / "asked.log", random.Random(3)
    process = child(lambda: blocked(folder / "blocked", ready))
    while not ready.exists():
        time.sleep(0.01)
    killed(process)
    kills = 0
    for _ in range(KILLS):
        before = asked(log)
        process = child(lambda: limited(folder / "limited", log))
        while asked(log) == before:
            time.sleep(0.002)
        time.sleep(generator.uniform(0.0, 0.03))
        kills += killed(process)
    process = child(lambda: limited(folder / "limited", log))
    found: dict[str, Any] = {"code": os.waitpid(process, 0)[1], "kills": kills, "asked": asked(log)}
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
