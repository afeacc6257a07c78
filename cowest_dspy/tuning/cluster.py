"""Which processes train together, and where: a number, or a configuration file of Accelerate's.

    machines(4)                                        # four on this machine: a GPU each, or
        sharing the CPU where there is none
    machines("programs/accelerate/fsdp.yaml")          # what ``accelerate launch --config_file``
        takes

One file serves all machines of a cluster: NODE_RANK (or SLURM_NODEID), MASTER_ADDR and MASTER_PORT
in the environment come before the file's machine_rank, main_process_ip and main_process_port.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cowest_dspy.errors import TuningError

KINDS = ("NO", "MULTI_CPU", "MULTI_GPU", "FSDP")
"""What distributed_type may be: others train by other means than this library was written for."""
PASSED_ON = ("fsdp_config", "gpu_ids", "rdzv_backend", "same_network", "enable_cpu_affinity")
REFUSED = (
    "deepspeed_config",
    "megatron_lm_config",
    "parallelism_config",
    "fp8_config",
    "mpirun_config",
    "dynamo_config",
)
PORT = 29500
"""Where several machines meet when nobody says otherwise."""


@dataclass(frozen=True)
class Machines:
    """Processes that train together.

    processes: of all machines together. count: machines. rank: which of them this is, from 0 on.
        cpu: no GPU is used. address, port: where they meet, the first machine's; None: on this
        machine, at a free port. file: what said so, not a number.
    mixed: the file's mixed_precision. config: what else the file says to ``accelerate launch``.
    """

    processes: int
    count: int = 1
    rank: int = 0
    cpu: bool = True
    address: str | None = None
    port: int | None = None
    file: Path | None = None
    mixed: str = "no"
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def here(self) -> int:
        """Processes on this machine."""
        return self.processes // self.count

    @property
    def sharded(self) -> bool:
        """Whether each process holds a part of the weights only (FSDP)."""
        return bool(self.config.get("fsdp_config"))

    @property
    def alone(self) -> bool:
        """Whether it is one process: then nothing is launched."""
        return self.processes == 1


def machines(
    given: int | str | Path | Machines, environment: Mapping[str, str] = os.environ
) -> Machines:
    """What a number of processes, or a configuration file, asks for on this machine.

    Raises:
        TuningError: fewer GPUs than processes; a file that is missing, is none of Accelerate's,
            asks for GPUs on a machine without one, or for a way of training that is not known to
            work here.
    """
    if isinstance(given, Machines):
        return given
    if isinstance(given, int) or str(given).isdecimal():
        number = int(str(given))
        cards = _cards() if number != 1 else 0
        if 0 < cards < number:
            raise TuningError(
                f"{number} processes need a GPU each, and this machine has {cards}: ask for "
                f"{cards} at most."
            )
        return Machines(number, cpu=cards == 0)
    made = _of_file(Path(given), environment)
    _check_hardware(made, _cards())
    return made


def _of_file(file: Path, environment: Mapping[str, str]) -> Machines:
    said = _read(file)
    kind, shards, refused = (
        str(said["distributed_type"]),
        said.get("fsdp_config"),
        [name for name in REFUSED if said.get(name)],
    )
    if refused or kind not in KINDS:
        what = refused[0] if refused else f"distributed_type: {kind}"
        raise TuningError(
            f"{file}: {what} is not known to work here. distributed_type may be {', '.join(KINDS)}."
        )
    if (kind == "FSDP") != bool(shards):
        raise TuningError(
            f"{file}: distributed_type: FSDP and an fsdp_config belong together, and only one is "
            "there."
        )
    if shards and int(shards.get("fsdp_version", 1)) != 2:
        raise TuningError(
            f"{file}: set fsdp_version: 2 in fsdp_config. LoRA trains some parameters and freezes "
            "others, which FSDP 2 shards "
            "one by one; FSDP 1 melts them together."
        )
    processes, count = int(said.get("num_processes", 1)), int(said.get("num_machines", 1))
    if processes < 1 or count < 1 or processes % count:
        raise TuningError(
            f"{file}: num_processes: {processes} is of all machines, and no multiple of "
            f"num_machines: {count}."
        )
    if shards and processes == 1:
        raise TuningError(
            f"{file}: one process has nobody to share the weights with. Set num_processes, or "
            "take one_gpu.yaml."
        )
    rank = int(
        environment.get("NODE_RANK")
        or environment.get("SLURM_NODEID")
        or said.get("machine_rank")
        or 0
    )
    address = environment.get("MASTER_ADDR") or said.get("main_process_ip")
    port = int(environment.get("MASTER_PORT") or said.get("main_process_port") or PORT)
    if count > 1 and not address:
        raise TuningError(
            f"{file}: {count} machines meet at the first of them: set MASTER_ADDR, or "
            "main_process_ip in the file."
        )
    if not 0 <= rank < count and count > 1:
        raise TuningError(
            f"{file}: this is machine {rank} of {count}, counted from 0: set NODE_RANK, or "
            "machine_rank in the file."
        )
    meeting = (rank, str(address), port) if count > 1 else (0, None, None)
    passed = {name: said[name] for name in PASSED_ON if said.get(name)}
    cpu = bool(said.get("use_cpu")) or kind == "MULTI_CPU"
    return Machines(
        processes,
        count,
        meeting[0],
        cpu,
        meeting[1],
        meeting[2],
        file,
        said.get("mixed_precision") or "no",
        passed,
    )


def _read(file: Path) -> dict[str, Any]:
    """The file as Accelerate itself reads it: an unknown key is its error."""
    from accelerate.commands.config.config_args import load_config_from_file

    if not file.is_file():
        raise TuningError(
            f"{file} is not there: --accelerate takes a number of processes, or a configuration "
            "file of Accelerate's, such as "
            "programs/accelerate/several_gpus.yaml; `accelerate config --config_file FILE` writes "
            "one."
        )
    try:
        return load_config_from_file(str(file)).to_dict()
    except Exception as error:  # Of the YAML reader's, and of whatever Accelerate does with a text that is no mapping.
        why = " ".join(str(error).split())
        raise TuningError(
            f"{file} is no configuration of Accelerate's: {type(error).__name__}: {why}"
        ) from error


def _check_hardware(made: Machines, cards: int) -> None:
    gpus = made.config.get("gpu_ids", "all")
    if not made.cpu and not cards:
        raise TuningError(
            f"{made.file} asks for GPUs, and this machine has none that PyTorch can use. On a "
            "CPU: programs/accelerate/cpu.yaml, "
            "a number of processes, or no --accelerate."
        )
    if not made.cpu and made.here > cards:
        raise TuningError(
            f"{made.file} asks for {made.here} processes with a GPU each, and this machine has "
            f"{cards}."
        )
    if made.alone and made.cpu and cards:
        raise TuningError(
            f"{made.file} says use_cpu, and this process sees a GPU: set CUDA_VISIBLE_DEVICES= "
            "(nothing)."
        )
    if made.alone and str(gpus) not in ("all", "0"):
        raise TuningError(
            f"{made.file} names gpu_ids: {gpus}. One process takes the first GPU: set "
            f"CUDA_VISIBLE_DEVICES={gpus}."
        )


def check_precision(made: Machines, bf16: bool | None) -> None:
    """The settings of a training say how it computes; a file that says otherwise is not obeyed in
    silence.

    Raises:
        TuningError: mixed_precision of the file and ``precision`` of the settings contradict one
            another.
    """
    if made.mixed == "no" or (made.mixed == "bf16" and bf16 is not False):
        return
    raise TuningError(
        f"{made.file} says mixed_precision: {made.mixed}, and the settings say bf16 = "
        f'{bf16}, which is what counts: set mixed_precision: "no" in the file.'
    )


def _cards() -> int:
    import torch

    return torch.cuda.device_count()
