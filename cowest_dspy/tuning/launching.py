"""Training by several processes at once, started by ``accelerate launch``: one for each GPU, or
some that share a CPU.

    tune(weak, pairs.rows(), "preference", DPO(), "adapters/r1", processes=2)       # or a
        configuration file (cluster.py)

Each process takes its part of every optimiser step's rows (launched.py); an optimiser step has the
rows that it has with one process, and the adapter is the same but for rounding: sums are added in
another order. Dropout draws other random numbers.

Over several machines the job's folder, beside the output, is on a file system that all of them see:
the first machine writes the job there and launches its processes; the others find it (joining.py)
and launch theirs. Only the first process writes results.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from cowest_dspy import errors
from cowest_dspy.errors import TuningError, masked
from cowest_dspy.lms.local import weights
from cowest_dspy.lms.processes import TAIL, WATCHED, end_group, free_port
from cowest_dspy.store.progress.alive import process_started
from cowest_dspy.tuning import adapters, rows
from cowest_dspy.tuning.cluster import Machines, check_precision, machines
from cowest_dspy.tuning.config import DPO, KTO, SFT
from cowest_dspy.tuning.training import Tuned
from cowest_dspy.tuning.watching import OnStep
from cowest_dspy.utils.files import replace_folder, write_whole

COMPARING = {"sft", "aot", "aot_unpaired", "bco_pair"}
"""Losses of DPO that depend on which rows are in one forward pass."""
# What the launcher says of a process that a signal has ended; SIGTERM is what it ends the others
# with itself.
_KILLED = re.compile(r"rank +: (\d+) .*\n *exitcode +: -\d+ \(pid: \d+\) +\((SIG(?!TERM)\w+)\)")
SPEC = "spec.json"
"""The file of a job's folder that says what to train; the last that is written."""
POLL = 0.1
"""Seconds between two looks at the progress."""


def launch(
    settings: SFT | DPO | KTO,
    data: Sequence[rows.Row],
    processes: int | str | Path | Machines,
    *,
    base: str,
    adapter: Path | None = None,
    output: Path,
    seed: int = 0,
    on_step: OnStep | None = None,
) -> Tuned:
    """As ``train_sft`` or ``train_dpo``, by so many processes. Nothing of them is left when it
    ends, however it ends.

    ``peak_memory_bytes`` is of all processes together; ``history`` is of all rows, as with one
    process.

    Raises:
        TuningError: KTO, held-out rows or reports elsewhere, which need one process; a batch that
            cannot be dealt out, fewer GPUs than processes, a configuration file that cannot be used
            (cluster.py), a process that dies, or what ``train_sft`` and ``train_dpo`` raise.
        ModelError: a base or an adapter that cannot be used.
    """
    started = time.monotonic()
    _check_known(settings)
    preference = isinstance(settings, DPO)
    checked = rows.preference_rows(data) if preference else rows.sft_rows(data)
    where = machines(processes)
    if where.rank:
        raise TuningError(
            f"This is machine {where.rank} of {where.count}: training is begun on the first one, "
            "and joined here."
        )
    check_precision(where, settings.bf16)
    output, dealt = Path(output), dealt_out(cast("SFT | DPO", settings), where.processes)
    spec = {
        "kind": "preference" if preference else "sft",
        "settings": dealt.model_copy(update={"save_steps": 0}).model_dump(mode="json"),
        "base": str(weights.locate(base)),
        "adapter": str(adapter) if adapter else None,
        "seed": seed,
        "cpu": where.cpu,
        "begun": time.time(),
        "by": [socket.gethostname(), os.getpid(), process_started()],
    }
    with adapters.workplace(output) as job:
        (job / "rows.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in checked), encoding="utf-8"
        )
        # Last, and whole at once: other machines begin when they see it.
        write_whole({job / SPEC: json.dumps(spec)})
        run(job, where, on_step=on_step)
        results = json.loads((job / "results.json").read_text(encoding="utf-8"))
        if len({result["adapter_hash"] for result in results}) > 1:
            raise TuningError(
                "The processes ended with different weights, so none of them can be trusted. "
                "Train with one process."
            )
        replace_folder(Path(results[0]["path"]), output)
    own = {
        "path": output,
        "seconds": time.monotonic() - started,
        "peak_memory_bytes": sum(result["peak_memory_bytes"] for result in results),
        "settings": settings.model_dump(mode="json"),
    }
    return Tuned(**{**results[0], **own})


def check_processes(settings: SFT | DPO | KTO, processes: int | str | Path | Machines) -> None:
    """Sees whether so many processes can train by these settings, before there is anything to train
    on.

    Raises:
        TuningError: KTO, held-out rows or reports elsewhere, which need one process; a batch that
            cannot be dealt out; a configuration file that cannot be used.
    """
    if processes == 1 or (not isinstance(processes, int) and machines(processes).alone):
        return
    _check_known(settings)
    number = processes if isinstance(processes, int) else machines(processes).processes
    dealt_out(cast("SFT | DPO", settings), number)
    if not isinstance(processes, int):
        check_precision(machines(processes), settings.bf16)


def _check_known(settings: object) -> None:
    """What needs all rows in one process, or has not been compared with one, is refused and not
    done somehow."""
    if not isinstance(settings, SFT | DPO):
        raise TuningError(
            f"{type(settings).__name__} compares the rows of a whole step: train with one process."
        )
    for name in ("held_out", "report_to"):
        if getattr(settings, name):
            raise TuningError(
                f"{name} works with one process only: leave it out, or train with one process."
            )


def dealt_out(settings: SFT | DPO, processes: int) -> SFT | DPO:
    """``settings`` with rows of one forward pass such that every process has equally many passes in
    each optimiser step.

    >>> dealt_out(SFT(), 2).per_device_train_batch_size
    4

    Raises:
        TuningError: there is no such number; or it is not the one of a single process, and the loss
            depends on it.
    """
    size, share = settings.step_rows, settings.step_rows // max(processes, 1)
    if processes < 1 or size % processes:
        raise TuningError(
            f"The {size} rows of a step cannot be dealt out to {processes} processes: "
            "each takes equally many rows of every optimiser step. Set "
            "gradient_accumulation_steps to a multiple of the number of processes."
        )
    if share % settings.per_device_train_batch_size:
        raise TuningError(
            f"{processes} processes have {share} rows each of the {size} of a step, which does not "
            f"go with per_device_train_batch_size = {settings.per_device_train_batch_size}: set "
            "gradient_accumulation_steps to a multiple of the number of processes."
        )
    return settings


def command(job: Path, where: Machines, own: Path) -> list[str]:
    """What starts the processes of this machine. The user's own default configuration of Accelerate
    is left out: it could ask for something else. A file that was given is followed in what
    cluster.py lets pass. ``own`` is this machine's folder."""
    # "MULTI_GPU" is what makes Accelerate start several processes by torchrun, also where there is
    # no GPU.
    config = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "FSDP" if where.sharded else "MULTI_GPU",
        "mixed_precision": "no",
        "num_machines": where.count,
        "machine_rank": where.rank,
        "num_processes": where.processes,
        "use_cpu": where.cpu,
        **where.config,
    }
    (own / "accelerate.json").write_text(json.dumps(config), encoding="utf-8")
    return [
        *(sys.executable, "-I", str(WATCHED), str(os.getpid())),
        *(
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            "--config_file",
            str(own / "accelerate.json"),
        ),
        *("--num_cpu_threads_per_process", str(threads_of_each(where.here))),
        *(
            "--main_process_ip",
            where.address or "127.0.0.1",
            "--main_process_port",
            str(where.port or free_port()),
        ),
        *("-m", "cowest_dspy.tuning.launched", str(job)),
    ]


def threads_of_each(processes: int) -> int:
    """Threads that each process computes with: together as many as this process alone would have,
    but at least one each."""
    import torch

    return max(1, torch.get_num_threads() // processes)


def run(
    job: Path,
    where: Machines,
    *,
    own: Path | None = None,
    on_step: OnStep | None = None,
    wanted: Callable[[], bool] = lambda: True,
) -> None:
    """Starts this machine's processes, tells ``on_step`` of their steps, and waits for their end;
    or ends them when they are not ``wanted`` any more. ``own``: a folder for this machine's log and
    configuration, where that is not the job's.

    Raises:
        TuningError: one ended with an error; ModelError where that is what it was.
    """
    own = own or job
    log = own / "log.txt"
    with log.open("wb") as said:
        process = subprocess.Popen(
            command(job, where, own),
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=_environment(os.environ, cpu=where.cpu),
        )
    with _ended(process):
        progress = Progress(job / "progress.jsonl", on_step)
        while process.poll() is None:
            if not wanted():
                return
            progress.tell()
            time.sleep(POLL)
        progress.tell()
    if process.returncode:
        raise _failure(job, where.processes, process.returncode, log)


def _environment(given: Mapping[str, str], *, cpu: bool) -> dict[str, str]:
    environment = {**given, "TOKENIZERS_PARALLELISM": "false"}
    # Another launcher's, in which this process may have been started.
    for name in (
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
        "ACCELERATE_MIXED_PRECISION",
        "ACCELERATE_USE_FSDP",
    ):
        environment.pop(name, None)
    return environment | ({"ACCELERATE_USE_CPU": "true"} if cpu else {})


@contextmanager
def _ended(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """A context after which the process is gone, and with it those that it has started: they look
    after their launcher."""
    try:
        yield
    finally:
        end_group(process)


class Progress:
    """The steps that the first process writes down, told to ``on_step`` in order, each once."""

    def __init__(self, file: Path, on_step: OnStep | None) -> None:
        self._file, self._on_step, self._told = file, on_step, 0

    def tell(self) -> None:
        """Tells of what is new."""
        if self._on_step is None or not self._file.is_file():
            return
        lines = self._file.read_text(encoding="utf-8").split("\n")[
            :-1
        ]  # What follows the last line's end is still written.
        for line in lines[self._told :]:
            self._told += 1
            step, total, logs = json.loads(line)
            self._on_step(step, total, logs)


def _failure(job: Path, processes: int, code: int, log: Path | None = None) -> errors.CowestError:
    """What to raise. When one process ends, the others lose their connection to it and fail, too:
    the cause is looked for first."""
    text = (log or job / "log.txt").read_text(encoding="utf-8", errors="replace")
    found = {
        rank: json.loads(file.read_text(encoding="utf-8"))
        for rank, file in _files(job, "error", processes)
    }
    for error in found.values():
        kind = getattr(errors, error["type"], None)
        if isinstance(kind, type) and issubclass(kind, errors.CowestError):
            return kind(error["text"])
    killed = _KILLED.search(text)
    if killed:
        rank, name = killed.groups()
        return TuningError(
            f"Process {rank} of {processes} was ended by {name}, and training with it. "
            "Where nobody did so by hand, memory ran out: lower micro_batch_size, or train with "
            "fewer processes."
        )
    for rank, error in found.items():
        return TuningError(f"Process {rank} of {processes} failed:" + _last(error["text"]))
    return TuningError(
        f"Training by {processes} processes ended with exit code {code}. The last that was said:"
        + _last(text)
    )


def _files(job: Path, name: str, processes: int) -> list[tuple[int, Path]]:
    """The files of that name that there are, with the number of the process that has written
    each."""
    return [
        (rank, file) for rank in range(processes) if (file := job / f"{name}-{rank}.json").is_file()
    ]


def _last(text: str) -> str:
    # Masked first: a private key is known by its first line.
    return "".join(f"\n  {line}" for line in masked(text).splitlines()[-TAIL:])
