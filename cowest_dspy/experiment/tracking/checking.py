"""Whether a configuration's trackers can be told anything, before a run is begun."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from typing import Literal

from cowest_dspy.errors import ConfigError, masked
from cowest_dspy.experiment.config import Config

SECONDS = 5.0


@dataclass(frozen=True)
class Found:
    """How it is about one tracker, and what to do."""

    tracker: str
    level: Literal["ok", "warning", "error"]
    text: str


def check_installed(config: Config) -> None:
    """Looks for the packages without importing them.

    Raises:
        ConfigError: one is not installed.
    """
    for tracker in _trackers(config):
        if importlib.util.find_spec(tracker) is None:
            raise ConfigError(_missing(tracker))


def _trackers(config: Config) -> tuple[str, ...]:
    return config.tracking.to if config.tracking else ()


def _missing(tracker: str) -> str:
    return (
        f"[tracking] to has {tracker}, which is not installed: type pip install "
        f"'cowest_dspy[{tracker}]', or take it out."
    )


def look_at(config: Config) -> list[Found]:
    """Each tracker of the configuration: whether its package is there, and whether a server of
    MLflow's answers."""
    made: list[Found] = []
    for tracker in _trackers(config):
        if importlib.util.find_spec(tracker) is None:
            made.append(Found(tracker, "error", _missing(tracker)))
        else:
            made.append(
                _server(uri_of(config))
                if tracker == "mlflow"
                else Found(tracker, "ok", "is installed")
            )
    return made


def uri_of(config: Config) -> str | None:
    """Where MLflow is: [tracking] uri, or MLFLOW_TRACKING_URI; None is MLflow's own choice."""
    return (
        (config.tracking.uri if config.tracking else None)
        or os.environ.get("MLFLOW_TRACKING_URI")
        or None
    )


def _server(uri: str | None) -> Found:
    import httpx

    if uri is None or not uri.startswith("http"):
        return Found(
            "mlflow",
            "ok",
            f"is installed; it writes to {masked(uri) if uri else 'where MLflow does by default'}",
        )
    try:
        answer = httpx.get(f"{uri.rstrip('/')}/health", timeout=SECONDS)
        if answer.is_success:
            return Found("mlflow", "ok", f"{masked(uri)} answers")
        said = f"says {answer.status_code}"
    except httpx.HTTPError as error:
        said = f"does not answer ({type(error).__name__})"
    return Found(
        "mlflow",
        "warning",
        (
            f"{masked(uri)} {said}: a run would go on without it; start it, and cowest track RUN "
            "logs "
            "it later"
        ),
    )
