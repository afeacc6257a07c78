"""Whether a configuration's cluster can be used, before a run is begun. Nothing is started for
it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cowest_dspy.errors import ClusterError
from cowest_dspy.lms.config import LMSettings
from cowest_dspy.scale import connection
from cowest_dspy.scale.config import RayRules, Shares, stays_here


@dataclass(frozen=True)
class Found:
    """How it is about the cluster, and what to do."""

    level: Literal["ok", "warning", "error"]
    text: str


def look_at_cluster(rules: RayRules, models: dict[str, LMSettings]) -> Found:
    """Whether Ray is installed, the cluster answers, and has room for the workers of all
    ``models``, which are given by role."""
    if not connection.installed():
        return Found("error", connection.MISSING)
    cpus, gpus = _wanted(rules, models)
    wanted = f"{cpus:g} CPU and {gpus:g} GPU for all workers"
    if rules.address is None:
        return Found(
            "ok",
            (
                "Ray is installed; a cluster is started on this machine for each command, with "
                f"{wanted}"
            ),
        )
    try:
        connection.join(rules.address)
    except ClusterError as error:
        return Found("error", str(error))
    try:
        has = connection.resources()
    finally:
        connection.leave()
    text = (
        f"{rules.address} answers: {has.get('CPU', 0):g} CPU and {has.get('GPU', 0):g} GPU; "
        f"wanted are {wanted}"
    )
    if cpus > has.get("CPU", 0) or gpus > has.get("GPU", 0):
        return Found(
            "warning",
            (
                f"{text}. Workers without room wait for it, and the others go on: lower workers, "
                "cpus "
                "or gpus"
            ),
        )
    return Found("ok", text)


def _wanted(rules: RayRules, models: dict[str, LMSettings]) -> tuple[float, float]:
    cpus = gpus = 0.0
    for role, settings in models.items():
        shares: Shares = getattr(rules, role)
        if not stays_here(settings):
            cpus, gpus = (
                cpus + shares.workers * shares.cpus_for(settings),
                gpus + shares.workers * shares.gpus,
            )
    return cpus, gpus
