"""A collection that is killed again and again: run as a script, so that children are forked from a
small process that has imported everything. Prints what it found as JSON.

    python tests/killed.py FOLDER KILLS SEED
"""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import dspy
from dspy.lm15 import Request, Response
from forked import child

from cowest_dspy.influence.collection import collect
from cowest_dspy.influence.trace import Sampling
from cowest_dspy.pairs import preference_pairs
from cowest_dspy.program.collaboration import Collaboration
from cowest_dspy.store import serialize
from cowest_dspy.store.store import Store
from cowest_dspy.testing import ScriptedEngine

EXAMPLES, DRAFTS, THREADS = 30, 3, 4
LATENCY = 0.006
LONGEST_LIFE = 0.2


class Counted(ScriptedEngine):
    """Notes each answer in a file as it gives it, in a way that a kill cannot undo."""

    def __init__(self, script: Any, model: str, log: Path) -> None:
        super().__init__(script, model=model)
        self._file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def complete(self, request: Request) -> Response:
        time.sleep(LATENCY)
        response = super().complete(request)
        os.write(self._file, f"{serialize.request_key(request)}\n".encode())
        return response


def weak(request: dict[str, Any]) -> str:
    number = request["messages"][-1]["content"].split()[-1].rstrip("?")
    return (number, f"not {number}", "nothing")[request["config"]["seed"] % 3]


def strong(request: dict[str, Any]) -> str:
    lines = dict(line.split(": ", 1) for line in request["messages"][-1]["content"].splitlines())
    return lines.get("Background", "none")


def match(example: dspy.Example, prediction: Any, trace: Any = None) -> float:
    return float(prediction.answer == example.answer)


def work(folder: Path) -> None:
    """One process's whole work: collect, pair, write both down."""
    folder.mkdir(exist_ok=True)
    rows = [{"id": f"q{i}", "question": f"Number {i}?", "answer": str(i)} for i in range(EXAMPLES)]
    examples = [dspy.Example(**row).with_inputs("question") for row in rows]
    log = folder / "answered.log"
    lms = {
        "weak": Counted(weak, "scripted/weak", log).lm(),
        "strong": Counted(strong, "scripted/strong", log).lm(),
    }
    program = Collaboration("question -> answer").bind(**lms)
    with Store(folder) as store:
        traces = collect(
            program, examples, match, Sampling(DRAFTS), store=store, num_threads=THREADS
        )
        (folder / "traces.json").write_text(
            json.dumps([trace.to_dict() for trace in traces], sort_keys=True)
        )
        preference_pairs(traces).save(folder / "pairs.jsonl")


def committed(folder: Path) -> set[str]:
    path = folder / "run.sqlite"
    if not path.is_file():
        return set()
    # Only read: whoever may write would empty the log that the kill has left, which the next child
    # is to find.
    with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as db:
        try:
            if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'calls'").fetchone():
                return set()
            return {key for (key,) in db.execute("SELECT key FROM calls")}
        except sqlite3.OperationalError as error:
            # Killed while the new file was put into its mode: the next child rolls that back, and
            # nothing was in it.
            if error.sqlite_errorname == "SQLITE_READONLY_ROLLBACK":
                return set()
            raise


def answered(folder: Path) -> list[str]:
    log = folder / "answered.log"
    return log.read_text().split() if log.is_file() else []


def killed_until_done(folder: Path, generator: random.Random, most: int) -> dict[str, int]:
    """Starts the work and kills it, at random moments, until it is done or was killed ``most``
    times, then lets it finish."""
    kills = repeated = invented = 0
    lives, done = 0, False
    while not done:
        before, kept = len(answered(folder)), committed(folder)
        process = child(lambda: work(folder))
        lives += 1
        if kills < most:
            time.sleep(generator.uniform(0.0, LONGEST_LIFE))
            os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        if os.WIFSIGNALED(status):
            kills += 1
        elif os.WEXITSTATUS(status):
            raise SystemExit("a child failed")
        else:
            done = True
        now = answered(folder)
        repeated += len(kept & set(now[before:]))
        invented += len(committed(folder) - set(now)) + (not kept <= committed(folder))
    return {
        "kills": kills,
        "lives": lives,
        "repeated": repeated,
        "invented": invented,
        "answered": len(answered(folder)),
    }


def main(folder: Path, kills: int, seed: int) -> None:
    """Prints a JSON object for each run that was killed, with whether its traces and pairs are
    those of one that was not."""
    generator = random.Random(seed)
    whole = folder / "whole"
    found = [killed_until_done(whole, generator, 0)]
    while sum(one["kills"] for one in found) < kills:
        run = folder / f"run{len(found)}"
        one = killed_until_done(run, generator, kills - sum(one["kills"] for one in found))
        one["same"] = all(
            (run / name).read_bytes() == (whole / name).read_bytes()
            for name in ("traces.json", "pairs.jsonl")
        )
        one["committed"] = len(committed(run))
        found.append(one)
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
