"""What every stage of an experiment needs: its stages, with the configuration beside them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from cowest_dspy.errors import ConfigError, masked
from cowest_dspy.experiment.config import ROLES, Config
from cowest_dspy.experiment.tracking import Tracking
from cowest_dspy.lms.api import estimate_cost
from cowest_dspy.lms.config import Api, LMSettings, read_key
from cowest_dspy.optimizers.stages import Settings, Stages
from cowest_dspy.store.pool import OnProgress


@dataclass(frozen=True)
class Desk(Stages):
    """A run folder with the store in it, who looks on, the configuration, which processes train
    together, and the trackers."""

    config: Config
    processes: int | str | Path = 1
    tracking: Tracking | None = None

    @contextmanager
    def stage(self, name: str, title: str) -> Iterator[OnProgress]:
        """As of all stages; the trackers are told first what there is so far."""
        if self.tracking is not None:
            self.tracking.update()
        with super().stage(name, title) as progress:
            yield progress

    def reporting(self, name: str, settings: Settings) -> AbstractContextManager[Settings]:
        """With a training's own logs in the trackers' run of its round, where its settings ask for
        them."""
        return (
            super().reporting(name, settings)
            if self.tracking is None
            else self.tracking.training(name, settings)
        )


def check_keys(config: Config) -> None:
    """Sees that the API keys are there which the configuration names, before hours are spent on a
    training.

    Raises:
        ConfigError: an environment variable is not set.
    """
    for role in ROLES:
        variable: str | None = getattr(getattr(config, role), "api_key_env", None)
        if variable:
            read_key(variable)


def check_prices(config: Config) -> None:
    """Sees that a budget in US dollars can be kept.

    Raises:
        ConfigError: it cannot, since the price of an API is not known.
    """
    if config.budget is None or config.budget.usd is None:
        return
    for role in ROLES:
        settings: LMSettings | None = getattr(config, role)
        if isinstance(settings, Api) and estimate_cost(settings, 1, 1) is None:
            raise ConfigError(
                f"[budget] usd = {config.budget.usd:g} cannot be kept: the price of [{role}] "
                f"{masked(settings.model)} is not "
                "known. Add price = { input = ..., output = ... } to its table, in US dollars per "
                "million tokens; or limit "
                "strong_calls, tokens or minutes instead."
            )
