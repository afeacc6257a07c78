"""[ray]: the cluster over which a collection's shards are spread, and what each of them takes of
it."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator, model_validator

from cowest_dspy.utils.table import TomlTable


class RayRules(TomlTable):
    """[ray]: collections run in shards on a Ray cluster; the run's store and budget stay one."""

    address: str | None = Field(
        None,
        description='of a cluster that runs: "HOST:PORT", or "auto"; without it one is started on '
        "this machine, and stopped",
    )
    num_shards: int | None = Field(
        None,
        ge=1,
        description="parts of a collection's examples, each a task; by default as many as run at "
        "once, of 1,000 examples at most",
    )
    num_cpus: float = Field(1.0, ge=0, description="of one task")
    num_gpus: float = Field(
        0.0, ge=0, description="of one task: only where its models are in_process"
    )

    @model_validator(mode="before")
    @classmethod
    def _no_pool_of_workers(cls, values: Any) -> Any:
        gone = [key for key in ("startup", "weak", "strong", "judge") if key in values]
        if isinstance(values, dict) and gone:
            raise ValueError(
                f"there is no {gone[0]} any more: a collection runs in shards. Say num_shards, "
                "num_cpus and num_gpus in [ray], and with concurrency in a model's own table how "
                "many calls each shard has under way"
            )
        return values

    @field_validator("address")
    @classmethod
    def _of_a_cluster(cls, value: str | None) -> str | None:
        if value is not None and value != "auto":
            host, _, port = value.rpartition(":")
            if value.startswith("ray://") or not (host and port.isdigit()):
                raise ValueError(
                    'give "HOST:PORT" of the head node, or "auto"; the process that runs cowest '
                    "must be on a node itself"
                )
        return value
