"""``[weak]`` and ``[strong]`` of a configuration -> ``dspy.LM``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import dspy

from cowest_dspy.config import Api, Engine, InProcess, LMSettings, Server
from cowest_dspy.errors import ConfigError
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
    return _api_lm(settings)


def _api_lm(settings: Api) -> dspy.LM:
    options: dict[str, Any] = {"timeout": settings.timeout}
    if settings.api_base:
        options["api_base"] = settings.api_base
    if settings.api_key_env:
        key = os.environ.get(settings.api_key_env)
        if not key:
            raise ConfigError(f"The environment variable {settings.api_key_env} is not set: export it, it holds the API key.")
        options["api_key"] = key
    return dspy.LM(
        settings.model,
        cache=False,
        temperature=settings.temperature,
        max_tokens=settings.max_tokens,
        num_retries=settings.num_retries,
        **options,
    )
