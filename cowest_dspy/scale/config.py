"""[ray]: the cluster over which a run's models are spread, and what each model's workers take of
it."""

from __future__ import annotations

from pydantic import Field, field_validator

from cowest_dspy.lms.config import Api, LMSettings, Server
from cowest_dspy.utils.table import Table

CALLING = 0.1
"""The part of a CPU that a worker takes which only waits for a server."""


class Shares(Table):
    """How many workers a model has, and what each of them takes of the cluster."""

    workers: int = Field(
        1,
        ge=1,
        description="processes on the cluster that answer for this model; each has up to its "
        "concurrency calls under way",
    )
    cpus: float | None = Field(
        None,
        ge=0,
        description="of one worker; by default 1 where it computes, 0.1 where it calls an API",
    )
    gpus: float = Field(0.0, ge=0, description="of one worker; 0.5: two workers share one")

    def cpus_for(self, settings: LMSettings) -> float:
        """CPUs of one worker of this model."""
        return self.cpus if self.cpus is not None else CALLING if isinstance(settings, Api) else 1.0


class RayRules(Table):
    """[ray]: the models answer on a Ray cluster; the run's store, budget and rate limits stay in
    this process."""

    address: str | None = Field(
        None,
        description='of a cluster that runs: "HOST:PORT", or "auto"; without it one is started on '
        "this machine, and stopped",
    )
    startup: float = Field(
        600.0, gt=0, description="seconds until a model's first worker must be ready"
    )
    weak: Shares = Shares()  # pyright: ignore[reportCallIssue]
    strong: Shares = Shares()  # pyright: ignore[reportCallIssue]
    judge: Shares = Shares()  # pyright: ignore[reportCallIssue]

    @field_validator("address")
    @classmethod
    def _of_a_cluster(cls, value: str | None) -> str | None:
        if value is not None and (
            value.startswith("ray://") or not (value == "auto" or _port(value))
        ):
            raise ValueError(
                'give "HOST:PORT" of the head node, or "auto"; the process that runs cowest must '
                "be on a node itself"
            )
        return value


def _port(value: str) -> bool:
    host, _, port = value.rpartition(":")
    return bool(host) and port.isdigit()


def stays_here(settings: LMSettings) -> bool:
    """Whether a model is asked by this process also where there is a cluster: a server that runs
    already is not ours to spread, and may know adapters' folders and addresses of this machine
    only."""
    return isinstance(settings, Server) and not settings.command
