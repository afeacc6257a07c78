"""A whole cycle that is killed once in each of its stages: run as a script, so that children are
forked from a process that has imported everything. Prints what it found as JSON.

    python tests/killed_cycle.py FOLDER SEED TOML...
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
import trl.trainer.dpo_trainer  # pyright: ignore[reportUnusedImport] - imported once, before any fork
import trl.trainer.sft_trainer  # noqa: F401 # pyright: ignore[reportUnusedImport]
from forked import child

from cowest_dspy import Experiment, load_config
from cowest_dspy.optimizers.run import NoProgress
from cowest_dspy.store.journal import Event
from cowest_dspy.store.progress import Snapshot

VOLATILE = ("created", "stages", "versions", "warnings")


class Noted(NoProgress):
    """Writes the title of each stage into a file as it begins."""

    def __init__(self, log: Path) -> None:
        self._log = log

    def update(self, event: Event, snapshot: Snapshot) -> None:
        """Notes the title."""
        if event == "stage_begin" and snapshot.stage is not None:
            with self._log.open("a") as file:
                file.write(f"{snapshot.stage.title}\n")


def work(folder: Path, files: list[str]) -> None:
    """One process's whole work."""
    torch.set_num_threads(1)
    with Experiment(
        load_config(files), folder / "run", progress=Noted(folder / "stages.log")
    ) as experiment:
        experiment.cycle()
        weak = experiment.final.weak.model
    (folder / "weak.txt").write_text(weak)


def begun(folder: Path) -> list[str]:
    log = folder / "stages.log"
    return log.read_text().splitlines() if log.is_file() else []


def killed_in_each_stage(
    folder: Path, files: list[str], generator: random.Random | None
) -> list[str]:
    """Runs the work, and kills it in every stage, once, at a random moment; gives the stages in
    which it was killed."""
    folder.mkdir()
    killed: list[str] = []
    while True:
        seen = len(begun(folder))
        process = child(lambda: work(folder, files))
        while True:
            done, status = os.waitpid(process, os.WNOHANG)
            if done:
                if os.WEXITSTATUS(status):
                    raise SystemExit("a child failed")
                return killed
            fresh = [title for title in begun(folder)[seen:] if title not in killed]
            if generator and fresh:
                time.sleep(generator.uniform(0.0, 0.15))
                os.kill(process, signal.SIGKILL)
                _, status = os.waitpid(process, 0)
                if not os.WIFSIGNALED(status):
                    return killed
                killed += fresh
                break
            time.sleep(0.002)


def told(folder: Path) -> dict[str, Any]:
    """What a report says, but for times, and the weak model that the cycle ended with."""
    report = json.loads((folder / "run" / "report.json").read_text())
    facts = {key: value for key, value in report.items() if key not in VOLATILE}
    facts["costs"] = {
        stage["name"]: [stage[key] for key in ("calls", "tokens_in", "tokens_out", "usd")]
        for stage in report["stages"]
    }
    facts["numbers"] = {
        key: value for key, value in facts["numbers"].items() if key != "totals"
    }  # the sums of the stages
    return {**facts, "weak": (folder / "weak.txt").read_text()}


def main(folder: Path, seed: int, files: list[str]) -> None:
    """Prints the stages in which the cycle was killed, those of one that was not, and the parts of
    the reports that differ."""
    killed_in_each_stage(folder / "whole", files, None)
    killed = killed_in_each_stage(folder / "killed", files, random.Random(seed))
    whole, resumed = told(folder / "whole"), told(folder / "killed")
    differ = [key for key in whole if whole[key] != resumed.get(key)]
    print(
        json.dumps(
            {
                "stages": begun(folder / "whole"),
                "killed": killed,
                "differ": differ,
                "weak": resumed["weak"],
            }
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
