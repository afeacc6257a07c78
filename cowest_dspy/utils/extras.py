"""The extras of this package: what only some runs need, and the line that installs it."""

from __future__ import annotations

from importlib.util import find_spec

from cowest_dspy.errors import ConfigError, CowestError

EXTRAS: dict[str, tuple[str, ...]] = {
    "charts": ("vl_convert",),
    "gguf": ("gguf",),
    "mlflow": ("mlflow",),
    "optimizers": ("optuna",),
    "ray": ("ray",),
    "retrieval": ("bm25s",),
    "route": ("sklearn",),
    "serve": ("fastapi", "prometheus_client", "uvicorn"),
    "trackio": ("trackio",),
    "wandb": ("wandb",),
}
"""Extra -> the modules that it brings."""


def describe_missing(extra: str, feature: str) -> str:
    """Return what a feature misses and the line that installs it; "" where all of it is there.

    ``describe_missing("ray", "[ray]")`` is ``"[ray] needs ray: pip install 'cowest_dspy[ray]'"``.

    Args:
        extra: a key of :data:`EXTRAS`.
        feature: what needs the extra, as the user calls it.
    """
    missing = [name for name in EXTRAS[extra] if find_spec(name) is None]
    if not missing:
        return ""
    return f"{feature} needs {', '.join(missing)}: pip install 'cowest_dspy[{extra}]'"


def check_extra(extra: str, feature: str, error: type[CowestError] = ConfigError) -> None:
    """Check, without importing anything, that a feature has its extra.

    Args:
        extra: a key of :data:`EXTRAS`.
        feature: what needs it, as the user calls it: "[ray]", "MIPROv2".
        error: the class of the error.

    Raises:
        CowestError: it is not installed; the message ends with a line to paste.
    """
    if missing := describe_missing(extra, feature):
        raise error(missing)
