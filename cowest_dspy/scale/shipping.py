"""What travels between the run's process and the workers: an order for an engine, adapters,
recipes' files, and failures.

Nothing else does: no weights, which a node has or fetches by itself, and no API key, which stands
in each node's environment.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import TypeAdapter

from cowest_dspy.errors import ModelError
from cowest_dspy.lms.config import Engine, LMSettings
from cowest_dspy.lms.local.weights import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from cowest_dspy.utils.importing import resolve

_SETTINGS: TypeAdapter[Any] = TypeAdapter(LMSettings)
_OF_THE_LM = frozenset(
    {
        "temperature",
        "max_tokens",
        "num_retries",
        "adapter",
        "requests_per_minute",
        "tokens_per_minute",
        "price",
    }
)
# Whose classes every worker has. An error of another kind becomes a RuntimeError of the same text.
_EVERYWHERE = ("builtins", "cowest_dspy", "dspy")


@dataclass(frozen=True)
class Order:
    """What a worker makes its engine of: a table of the TOML, and the file of one's own code that
    it names."""

    settings: str
    code: str | None = None

    @classmethod
    def of(cls, settings: LMSettings) -> Order:
        """The order for a model. Two models that differ only in how they are asked have equal
        ones."""
        code = None
        if isinstance(settings, Engine) and settings.engine.rpartition(":")[0].endswith(".py"):
            path = resolve(settings.engine.rpartition(":")[0])
            settings = settings.model_copy(
                update={"engine": f"{path}:{settings.engine.rpartition(':')[2]}"}
            )
            code = path.read_text(encoding="utf-8") if path.is_file() else None
        # temperature and the like come with each request; an adapter is sent when it is asked for.
        aside = _OF_THE_LM & type(settings).model_fields.keys()
        return cls(
            json.dumps(settings.model_dump(mode="json", exclude=set(aside)), sort_keys=True), code
        )

    def table(self) -> Any:
        """The table as it is read on this node: a recipe's file that is not here, or another one,
        is the one that was sent."""
        settings = _SETTINGS.validate_json(self.settings)
        if self.code is None:
            return settings
        path, _, name = settings.engine.rpartition(":")
        return settings.model_copy(update={"engine": f"{_file_here(Path(path), self.code)}:{name}"})


def _file_here(path: Path, code: str) -> Path:
    """The file itself where this node has it, so that what it reads beside it is found; otherwise a
    copy."""
    if path.is_file() and path.read_text(encoding="utf-8") == code:
        return path
    digest = hashlib.sha256(code.encode()).hexdigest()[:12]
    folder = Path(tempfile.mkdtemp(prefix=f"cowest-recipe-{digest}-"))
    (folder / path.name).write_text(code, encoding="utf-8")
    return folder / path.name


def packed(folder: Path) -> dict[str, bytes]:
    """The files of a PEFT adapter, for Ray's object store.

    Raises:
        ModelError: the folder holds none.
    """
    missing = [name for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise ModelError(f"{folder} holds no adapter: {' and '.join(missing)} were expected.")
    return {name: (folder / name).read_bytes() for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)}


def unpacked(files: dict[str, bytes], folder: Path) -> Path:
    """Writes an adapter's files into a folder of this node, and gives it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


@dataclass(frozen=True)
class Failed:
    """An exception as a value: many cannot be pickled, and one that cannot would take its whole
    batch with it."""

    kind: type[BaseException]
    arguments: tuple[Any, ...]
    state: dict[str, Any]
    cause: Failed | None = None

    @classmethod
    def of(cls, error: BaseException) -> Failed:
        """The exception and what led to it; of a class that is not known everywhere, a RuntimeError
        of the same text."""
        cause = cls.of(error.__cause__) if error.__cause__ is not None else None
        known = (
            isinstance(error, Exception) and type(error).__module__.partition(".")[0] in _EVERYWHERE
        )
        arguments, state = (
            _plain(error.args),
            {name: _plain(value) for name, value in vars(error).items() if name != "__notes__"},
        )
        if not known or arguments is _NOT or _NOT in state.values():
            return cls(RuntimeError, (str(error) or type(error).__name__,), {}, cause)
        return cls(type(error), arguments, state, cause)

    def error(self) -> BaseException:
        """The exception again, without its traceback."""
        made = self.kind.__new__(self.kind, *self.arguments)
        for name, value in self.state.items():
            vars(made)[name] = MappingProxyType(value) if isinstance(value, dict) else value
        made.__cause__ = self.cause.error() if self.cause else None
        return made


class _Not:
    """Stands for a value that does not travel."""


_NOT: Any = _Not()


def _plain(value: Any) -> Any:
    """Texts, numbers and collections of them as they are; :data:`_NOT` for anything else."""
    if value is None or isinstance(value, str | int | float | bytes):
        return value
    if isinstance(value, list | tuple):
        made = [_plain(one) for one in value]
        return _NOT if _NOT in made else tuple(made)
    if isinstance(value, dict | MappingProxyType):
        pairs = {str(key): _plain(one) for key, one in value.items()}
        return _NOT if _NOT in pairs.values() else pairs
    return _NOT
