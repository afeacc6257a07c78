"""A process of a training whose weights FSDP shares out, on a CPU (torchrun): ``python sharded.py
BASE ADAPTER|- OUTPUT KIND``.

Accelerate turns to FSDP only where there are several GPUs. Told that processes of gloo are such, it
does on a CPU all that it does on GPUs: wrapping, sharding, gathering. What is not tried is the
hardware, and how fast it is.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from tuning_rows import LORA, kinds, quick

FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}
"""What ``accelerate launch`` makes of programs/accelerate/fsdp.yaml."""


def settings(make: Any) -> Any:
    return make(
        **quick(
            num_train_epochs=2,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=4,
            warmup_steps=0.25,
            save_steps=0,
        ),
        lora=LORA,
    )


def main(base: str, adapter: str, output: str, kind: str) -> None:
    from accelerate import PartialState
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    original = PartialState.__init__

    def as_on_gpus(self: PartialState, *given: Any, **named: Any) -> None:
        original(self, *given, **named)
        if PartialState._shared_state.get("distributed_type") == DistributedType.MULTI_CPU:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    PartialState.__init__ = as_on_gpus
    PartialState(
        cpu=True
    )  # As launch.py does: a step's rows are dealt out among the processes that there are.
    train, make, data = kinds(7)[kind]
    start = None if adapter == "-" else Path(adapter)
    tuned = train(
        settings(make),
        data,
        base=base,
        adapter=start,
        output=Path(output),
        seed=5,
    )
    said = (
        AcceleratorState().distributed_type,
        tuned.adapter_hash,
        *(record["loss"] for record in tuned.history),
    )
    # In one write: the other process writes at the same time.
    os.write(1, f"{' '.join(map(str, said))}\n".encode())
    PartialState().destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
