"""``[weak]`` and ``[strong]`` of a configuration -> ``dspy.LM``."""

from __future__ import annotations

from pathlib import Path

import dspy

from cowest_dspy.lms.api import ApiEngine
from cowest_dspy.lms.config import Engine, InProcess, LMSettings, Server, read_key
from cowest_dspy.lms.local.engine import shared_engine
from cowest_dspy.lms.server import shared_server
from cowest_dspy.utils.importing import call


def build_lm(settings: LMSettings) -> dspy.LM:
    """The LM that ``settings`` describe. In-process weights are loaded, and servers started, at the
    first call, not here.

    Raises:
        ModelError: the folder or Hub id of a model, or an adapter, cannot be used.
        ConfigError: the environment variable of an API key is not set.
        RecipeError: an engine's reference leads nowhere, or cannot be called without arguments.
    """
    if isinstance(settings, InProcess):
        engine = shared_engine(settings.model, dtype=settings.dtype, max_batch=settings.concurrency)
        model = engine.load_adapter(Path(settings.adapter)) if settings.adapter else None
        return engine.lm(model, temperature=settings.temperature, max_tokens=settings.max_tokens)
    if isinstance(settings, Engine):
        engine = call(settings.engine)
        return dspy.LM(
            settings.model,
            engine=engine,
            cache=False,
            temperature=settings.temperature,
            max_tokens=settings.max_tokens,
        )
    if isinstance(settings, Server):
        return _server_lm(settings)
    return ApiEngine(settings).lm()


def _server_lm(settings: Server) -> dspy.LM:
    if settings.api_key_env:
        read_key(settings.api_key_env)
    engine = shared_server(settings)
    model = engine.load_adapter(Path(settings.adapter)) if settings.adapter else None
    return engine.lm(
        model,
        temperature=settings.temperature,
        max_tokens=settings.max_tokens,
        num_retries=settings.num_retries,
    )
