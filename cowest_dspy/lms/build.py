"""``[weak]`` and ``[strong]`` of a configuration -> ``dspy.LM``."""

from __future__ import annotations

from pathlib import Path

import dspy

from cowest_dspy.config import Engine, InProcess, LMSettings, Server
from cowest_dspy.errors import ConfigError
from cowest_dspy.lms.api import ApiEngine
from cowest_dspy.lms.engine import shared_engine
from cowest_dspy.recipes import load


def build_lm(settings: LMSettings) -> dspy.LM:
    """The LM that ``settings`` describe. In-process weights are loaded at the first call, not here.

    Raises:
        ModelError: an in-process model's folder or Hub id cannot be used.
        ConfigError: the environment variable of an API key is not set.
        RecipeError: an engine's reference leads nowhere.
    """
    if isinstance(settings, InProcess):
        engine = shared_engine(settings.model, dtype=settings.dtype, max_batch=settings.concurrency)
        model = engine.load_adapter(Path(settings.adapter)) if settings.adapter else None
        return engine.lm(model, temperature=settings.temperature, max_tokens=settings.max_tokens)
    if isinstance(settings, Engine):
        engine = load(settings.engine)()
        return dspy.LM(settings.model, engine=engine, cache=False, temperature=settings.temperature, max_tokens=settings.max_tokens)
    if isinstance(settings, Server):
        raise ConfigError('kind = "server" is not built yet.')
    return ApiEngine(settings).lm()
