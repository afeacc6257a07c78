"""Training by several processes at once, started by ``accelerate launch``: one for each GPU, or
some that share a CPU.

    tune(weak, pairs.rows(), DPO(), "adapters/r1", processes=2)
    tune(..., processes="programs/accelerate/fsdp.yaml")      # a configuration file of Accelerate's

Each process runs the same function as one process alone (train.py); an optimiser step has the rows
that it has with one process, and the adapter is the same but for rounding. Dropout draws other
random numbers.

``python -m cowest_dspy.tuning.launch JOB`` is what each process runs. JOB is a folder with
spec.json (what to train) and rows.jsonl (on what); the first process leaves progress.jsonl there,
one that fails error-RANK.json.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cowest_dspy import errors
from cowest_dspy.errors import CowestError, TuningError, masked
from cowest_dspy.tuning import data
from cowest_dspy.tuning.config import DPO, KTO, SFT
from cowest_dspy.tuning.train import (
    OnStep,
    Tuned,
    find_training,
    last_checkpoint,
    plan_training,
    read_record,
    train_adapter,
)
from cowest_dspy.utils.files import discard, workplace, write_whole
from cowest_dspy.utils.processes import TAIL, WATCHED, end_group, free_port

DISTRIBUTED_TYPES = ("NO", "MULTI_CPU", "MULTI_GPU", "FSDP")
"""What distributed_type of a configuration file may be."""
FORWARDED = ("fsdp_config", "gpu_ids", "enable_cpu_affinity")
"""Other keys of a configuration file that go to ``accelerate launch``."""
POLL = 0.1
"""Seconds between two looks at the progress."""


@dataclass(frozen=True)
class Processes:
    """Processes that train together on this machine.

    cpu: no GPU is used. mixed_precision: what the configuration file says. config: what else of the
    file goes to ``accelerate launch``.
    """

    count: int
    cpu: bool = True
    mixed_precision: str = "no"
    config: Mapping[str, Any] = field(default_factory=dict)


def plan_processes(given: int | str | Path | Processes) -> Processes:
    """What a number of processes, or a configuration file of Accelerate's, asks for.

    Raises:
        TuningError: fewer GPUs than processes; a file that is missing, is none of Accelerate's, or
            asks for a way of training that is not supported.
    """
    if isinstance(given, Processes):
        return given
    if not isinstance(given, int) and not str(given).isdecimal():
        return _read_config(Path(given))
    count = int(str(given))
    gpus = _count_gpus() if count != 1 else 0
    if count < 1 or 0 < gpus < count:
        raise TuningError(
            f"{count} processes cannot train here: each needs a GPU, and this machine has {gpus}."
            if count > 0
            else f"{count} processes cannot train: give 1 or more."
        )
    return Processes(count, cpu=gpus == 0)


def _read_config(file: Path) -> Processes:
    from accelerate.commands.config.config_args import load_config_from_file

    if not file.is_file():
        raise TuningError(
            f"{file} is not there: --accelerate takes a number of processes, or a configuration "
            "file of Accelerate's, such as programs/accelerate/several_gpus.yaml; `accelerate "
            "config --config_file FILE` writes one."
        )
    try:
        config = load_config_from_file(str(file)).to_dict()
    except Exception as error:  # Of the YAML reader's, and of a text that is no mapping.
        why = " ".join(str(error).split())
        raise TuningError(
            f"{file} is no configuration of Accelerate's: {type(error).__name__}: {why}"
        ) from error
    kind, shards = str(config["distributed_type"]), config.get("fsdp_config") or {}
    count, gpus = int(config.get("num_processes", 1)), _count_gpus()
    cpu = bool(config.get("use_cpu")) or kind == "MULTI_CPU"
    problem = None
    if kind not in DISTRIBUTED_TYPES:
        problem = f"distributed_type: {kind} is not supported; {', '.join(DISTRIBUTED_TYPES)} are."
    elif int(config.get("num_machines", 1)) != 1:
        problem = "num_machines must be 1: training uses the processes of one machine."
    elif (kind == "FSDP") != bool(shards):
        problem = "distributed_type: FSDP and an fsdp_config belong together."
    elif shards and int(shards.get("fsdp_version", 1)) != 2:
        problem = (
            "set fsdp_version: 2 in fsdp_config. LoRA trains some parameters and freezes others, "
            "which FSDP 2 shards one by one; FSDP 1 melts them together."
        )
    elif count < 1 or (shards and count == 1):
        problem = f"num_processes: {count} is too few."
    elif not cpu and count > gpus:
        problem = f"it asks for {count} processes with a GPU each, and this machine has {gpus}."
    if problem:
        raise TuningError(f"{file}: {problem}")
    forwarded = {name: config[name] for name in FORWARDED if config.get(name)}
    return Processes(count, cpu, config.get("mixed_precision") or "no", forwarded)


def _count_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def check_processes(
    settings: SFT | DPO | KTO,
    processes: int | str | Path | Processes,
    callbacks: Sequence[Any] = (),
) -> Processes:
    """The processes that train by these settings, with these callbacks of transformers' Trainer.

    Raises:
        TuningError: a step that cannot be shared out equally, a configuration file that cannot be
            used or that contradicts the settings; callbacks, which only one process can have.
    """
    planned = plan_processes(processes)
    if planned.count == 1:
        return planned
    if callbacks:
        raise TuningError(
            "Callbacks are objects of this process, and do not reach others that train: leave "
            "them out, or train with processes=1."
        )
    accumulation = settings.gradient_accumulation_steps
    if accumulation % planned.count:
        raise TuningError(
            f"gradient_accumulation_steps = {accumulation} cannot be shared out to "
            f"{planned.count} processes: each does equally many forward passes of every optimiser "
            "step. Set it to a multiple of the number of processes, and "
            "per_device_train_batch_size lower."
        )
    if planned.mixed_precision not in ("no", "bf16") or (
        planned.mixed_precision == "bf16" and settings.bf16 is False
    ):
        raise TuningError(
            f"The configuration file says mixed_precision: {planned.mixed_precision}, and the "
            f"settings say bf16 = {settings.bf16}, which is what counts: set mixed_precision: "
            '"no" in the file.'
        )
    return planned


def launch(
    settings: SFT | DPO | KTO,
    rows: Sequence[data.Row],
    processes: int | str | Path | Processes,
    *,
    base: str,
    adapter: Path | None = None,
    output: Path,
    seed: int = 0,
    on_step: OnStep | None = None,
    cache: Path | None = None,
) -> Tuned:
    """Run ``train_adapter`` by several processes. None of them is left when it ends, however it
    ends.

    Raises:
        TuningError: a step that cannot be shared out, fewer GPUs than processes, a configuration
            file that cannot be used, a process that dies, or what the training raises.
        ModelError: a base or an adapter that cannot be used.
    """
    started = time.monotonic()
    planned, output = check_processes(settings, processes), Path(output).absolute()
    plan = plan_training(settings, rows, base, adapter, seed)
    if done := find_training(plan, output):
        return done
    spec = {
        "kind": type(settings).__name__,
        "settings": settings.model_dump(mode="json"),
        "base": str(plan.base),
        "adapter": str(adapter) if adapter else None,
        "output": str(output),
        "cache": str(cache) if cache else None,
        "seed": seed,
        "cpu": planned.cpu,
    }
    with workplace(output.with_name(f"{output.name}.job")) as job, _without_empty_folders(output):
        lines = "".join(json.dumps(dict(row)) + "\n" for row in rows)
        write_whole({job / "rows.jsonl": lines, job / "spec.json": json.dumps(spec)})
        _run(job, planned, on_step)
    return replace(read_record(output)[1], seconds=time.monotonic() - started)


@contextmanager
def _without_empty_folders(output: Path) -> Iterator[None]:
    """A context at whose end folders without any whole checkpoint, left by ended processes, go."""
    try:
        yield
    finally:
        for path in output.parent.glob(f".{output.name}.*.checkpoints"):
            if last_checkpoint(path) is None:
                discard(path)


def launch_command(job: Path, planned: Processes) -> list[str]:
    """What starts the processes. The user's own default configuration of Accelerate is left out: it
    could ask for something else."""
    import torch

    config = {
        "compute_environment": "LOCAL_MACHINE",
        # "MULTI_GPU" has Accelerate start several processes by torchrun, also without a GPU.
        "distributed_type": "FSDP" if planned.config.get("fsdp_config") else "MULTI_GPU",
        "mixed_precision": "no",
        "num_machines": 1,
        "num_processes": planned.count,
        "use_cpu": planned.cpu,
        **planned.config,
    }
    (job / "accelerate.json").write_text(json.dumps(config), encoding="utf-8")
    return [
        *(sys.executable, "-I", str(WATCHED), str(os.getpid())),
        *(sys.executable, "-m", "accelerate.commands.launch"),
        *("--config_file", str(job / "accelerate.json")),
        *("--num_cpu_threads_per_process", str(max(1, torch.get_num_threads() // planned.count))),
        *("--main_process_ip", "127.0.0.1", "--main_process_port", str(free_port())),
        *("-m", "cowest_dspy.tuning.launch", str(job)),
    ]


def _run(job: Path, planned: Processes, on_step: OnStep | None) -> None:
    """Start the processes, report their steps, and wait for their end."""
    # Those of another launcher, in which this process may have been started.
    foreign = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in foreign and not name.startswith(("ACCELERATE_", "FSDP_"))
    }
    environment["TOKENIZERS_PARALLELISM"] = "false"
    if planned.cpu:
        environment["ACCELERATE_USE_CPU"] = "true"
    log, reported = job / "log.txt", 0
    with log.open("wb") as out:
        process = subprocess.Popen(
            launch_command(job, planned),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=environment,
        )
    try:
        running = True
        while running:
            running = process.poll() is None
            reported = _report(job / "progress.jsonl", reported, on_step)
            time.sleep(POLL if running else 0)
    finally:
        end_group(process)
    if process.returncode:
        raise _failure(job, planned.count, process.returncode)


def _report(file: Path, reported: int, on_step: OnStep | None) -> int:
    """Call ``on_step`` with the steps that are new; how many lines have been reported."""
    if on_step is None or not file.is_file():
        return reported
    # What follows the last line's end is still being written.
    lines = file.read_text(encoding="utf-8").split("\n")[:-1]
    for line in lines[reported:]:
        on_step(*json.loads(line))
    return len(lines)


def _failure(job: Path, count: int, code: int) -> CowestError:
    """What to raise. When one process ends, the others lose their connection to it and fail, too:
    an error of ours is the cause."""
    found = [
        json.loads(file.read_text(encoding="utf-8"))
        for rank in range(count)
        if (file := job / f"error-{rank}.json").is_file()
    ]
    for error in found:
        kind = getattr(errors, error["type"], None)
        if isinstance(kind, type) and issubclass(kind, CowestError):
            return kind(error["text"])
    text = (job / "log.txt").read_text(encoding="utf-8", errors="replace")
    # The launcher names the signal that ended a process; masked first, since a private key is known
    # by its first line.
    text = "\n".join([*(one["text"] for one in found), text])
    tail = "".join(f"\n  {line}" for line in masked(text).splitlines()[-TAIL:])
    return TuningError(
        f"Training by {count} processes ended with exit code {code}. Where a process was killed, "
        f"memory may have run out: lower per_device_train_batch_size. The last output:{tail}"
    )


# What each process runs


def main(job: Path) -> int:
    """Train as spec.json says, as one of several processes; the exit code: 0, or 1 when
    error-RANK.json says what was wrong."""
    from accelerate import PartialState

    rank = int(os.environ["RANK"])
    _end_with(os.getppid())
    try:
        spec = json.loads((job / "spec.json").read_text(encoding="utf-8"))
        lines = (job / "rows.jsonl").read_text(encoding="utf-8").splitlines()
        state = PartialState(cpu=spec["cpu"])
        settings = {"SFT": SFT, "DPO": DPO, "KTO": KTO}[spec["kind"]]
        train_adapter(
            settings(**spec["settings"]),
            [json.loads(line) for line in lines],
            base=spec["base"],
            adapter=Path(spec["adapter"]) if spec["adapter"] else None,
            output=Path(spec["output"]),
            seed=spec["seed"],
            on_step=_write_steps(job / "progress.jsonl") if rank == 0 else None,
            cache=Path(spec["cache"]) if spec["cache"] else None,
        )
        state.destroy_process_group()
    except Exception as error:
        text = str(error) if isinstance(error, CowestError) else traceback.format_exc()
        found = {"type": type(error).__name__, "text": masked(text)}
        write_whole({job / f"error-{rank}.json": json.dumps(found)})
        return 1
    return 0


def _write_steps(file: Path) -> OnStep:
    """Writes each step as one line of JSON."""

    def on_step(step: int, total: int, logs: dict[str, float]) -> None:
        with file.open("a", encoding="utf-8") as progress:
            progress.write(json.dumps([step, total, logs]) + "\n")

    return on_step


def _end_with(parent: int) -> None:
    """End this process when the launcher that started it is gone."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, name="cowest launcher's end", daemon=True).start()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
