"""A training that is killed again and again: run as a script, so that children are forked from a
process that has imported everything. Prints what it found as JSON.

    python tests/killed_training.py FOLDER BASE KIND SEED
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
from tuning_rows import kinds, pairs_with_one_turned_round

from cowest_dspy.tuning import Lora

KILLS, STEPS, CHECKPOINTS = 5, 48, 3
SETTINGS: dict[str, Any] = {
    "num_train_epochs": STEPS / 2,
    "learning_rate": 1e-3,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "bf16": False,
    "lora": Lora(r=4, lora_alpha=8, lora_dropout=0.2),
}


# Three pairs of eleven are held out, so that as many steps are made. The best adapter is not the
# last.
HELD: dict[str, Any] = {
    "held_out": 0.3,
    "eval_steps": 2,
    "learning_rate": 5e-3,
    "lr_scheduler_type": "constant_with_warmup",
}


def work(folder: Path, base: str, kind: str, every: int) -> None:
    """One process's whole work; notes each step as it is done."""
    torch.set_num_threads(1)
    held = HELD if kind == "held" else {}
    train, settings, data = kinds(8)["dpo" if held else kind]
    data = pairs_with_one_turned_round(11, 0.3, seed=2) if held else data
    with (folder / "steps.log").open("a") as log:

        def on_step(step: int, total: int, logs: dict[str, float]) -> None:
            log.write(f"{'step' if logs else 'begin'} {step}\n")
            log.flush()

        made = settings(**SETTINGS | held, save_steps=every)
        tuned = train(
            made, data, base=base, output=folder / "adapters" / "out", seed=2, on_step=on_step
        )
    (folder / "history.json").write_text(
        json.dumps([tuned.best_step, tuned.history], sort_keys=True)
    )


def steps(folder: Path) -> list[tuple[str, int]]:
    log = folder / "steps.log"
    lines = log.read_text().splitlines() if log.is_file() else []
    return [(line.split()[0], int(line.split()[1])) for line in lines]


def killed_until_done(folder: Path, base: str, kind: str, generator: random.Random) -> int:
    """Runs the work, and kills it at random moments after so many new steps; gives how often."""
    kills = 0
    while True:
        seen = len(steps(folder))
        process = child(lambda: work(folder, base, kind, CHECKPOINTS))
        # More steps than lie between two checkpoints, so that there is progress; few enough that
        # there is work left for all kills.
        wanted = generator.randint(CHECKPOINTS + 2, STEPS // KILLS - 2)
        while True:
            done, status = os.waitpid(process, os.WNOHANG)
            if done:
                if status:
                    raise SystemExit("a child failed")
                return kills
            if kills < KILLS and len(steps(folder)) - seen > wanted:
                time.sleep(generator.uniform(0.0, 0.01))
                os.kill(process, signal.SIGKILL)
                _, status = os.waitpid(process, 0)
                kills += os.WIFSIGNALED(status)
                break
            time.sleep(0.001)


def made(folder: Path) -> list[bytes]:
    files = (
        "adapters/out/adapter_model.safetensors",
        "adapters/out/adapter_config.json",
        "history.json",
    )
    return [(folder / name).read_bytes() for name in files]


def main(folder: Path, base: str, kind: str, seed: int) -> None:
    """Prints the number of kills, where each life began, what it left behind, and whether the
    result is the undisturbed one."""
    whole, killed = folder / "whole", folder / "killed"
    whole.mkdir()
    killed.mkdir()
    _, status = os.waitpid(child(lambda: work(whole, base, kind, 0)), 0)
    if status:
        raise SystemExit("a child failed")
    kills = killed_until_done(killed, base, kind, random.Random(seed))
    began = [step for what, step in steps(killed) if what == "begin"]
    left = [path.name for path in (killed / "adapters").iterdir() if path.name != "out"]
    best, history = json.loads((killed / "history.json").read_text())
    found = {"kills": kills, "began": began, "left": left, "same": made(whole) == made(killed)}
    print(json.dumps({**found, "best": best, "steps": history[-1]["step"]}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]))
