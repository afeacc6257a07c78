"""One of several processes that train together: ``python -m cowest_dspy.tuning.launched JOB``,
started by ``accelerate launch``.

JOB is the folder that launching.py has written: spec.json (what to train) and rows.jsonl (on what).
This process trains by the same functions as one process alone; PyTorch's DistributedDataParallel
averages the gradients, or FSDP also shares out the weights. The first process leaves
progress.jsonl, the adapter and results.json in JOB: what every process has to say, above all the
hash of its own copy of the adapter, so that whoever started them can see that all copies are the
same. The others write nothing there but, where they fail, error-RANK.json.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cowest_dspy.errors import CowestError, masked
from cowest_dspy.tuning.config import DPO, SFT
from cowest_dspy.tuning.training import train_dpo, train_sft
from cowest_dspy.tuning.watching import OnStep
from cowest_dspy.utils.files import write_whole

KINDS: dict[str, tuple[type[Any], Callable[..., Any]]] = {
    "sft": (SFT, train_sft),
    "preference": (DPO, train_dpo),
}
"""What ``kind`` in spec.json may be: the class of its settings, and what trains."""


def train(job: Path, rank: int, folder: Path) -> None:
    """Does this process's part, with its adapter in ``folder``. The first writes results.json: the
    ``Tuned`` of each process.

    Raises:
        TuningError, ModelError: as in ``train_sft`` and ``train_dpo``.
    """
    spec = json.loads((job / "spec.json").read_text(encoding="utf-8"))
    data = [
        json.loads(line) for line in (job / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    settings, function = KINDS[spec["kind"]]
    tuned = function(
        settings(**spec["settings"]),
        data,
        base=spec["base"],
        adapter=Path(spec["adapter"]) if spec["adapter"] else None,
        output=folder / "adapter",
        seed=spec["seed"],
        on_step=_told(job / "progress.jsonl") if rank == 0 else None,
    )
    results = _gathered({**asdict(tuned), "path": str(tuned.path)})
    if rank == 0:
        write_whole({job / "results.json": json.dumps(results)})


def main(job: Path) -> int:
    """The exit code: 0, or 1 when error-RANK.json says what was wrong."""
    from accelerate import PartialState

    spec = json.loads((job / "spec.json").read_text(encoding="utf-8"))
    rank = int(os.environ["RANK"])
    _end_with(os.getppid())
    try:
        state = PartialState(cpu=spec["cpu"])
        # A copy that is only compared stays on its own machine.
        with tempfile.TemporaryDirectory(prefix="cowest-") as own:
            train(job, rank, job if rank == 0 else Path(own))
        state.destroy_process_group()
    except Exception as error:
        said = str(error) if isinstance(error, CowestError) else traceback.format_exc()
        write_whole(
            {
                job / f"error-{rank}.json": json.dumps(
                    {"type": type(error).__name__, "text": masked(said)}
                )
            }
        )
        return 1
    return 0


def _told(file: Path) -> OnStep:
    """Writes each step as one line of JSON."""

    def on_step(step: int, total: int, logs: dict[str, float]) -> None:
        with file.open("a", encoding="utf-8") as progress:
            progress.write(json.dumps([step, total, logs]) + "\n")

    return on_step


def _gathered(result: dict[str, Any]) -> list[dict[str, Any]]:
    """What every process has, in their order; all of them have to call it."""
    from torch import distributed

    found: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, result)
    return found


def _end_with(parent: int) -> None:
    """Ends this process when the one that started it is gone: a launcher that is killed takes
    nobody with it."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, name="cowest launcher's end", daemon=True).start()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
