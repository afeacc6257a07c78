"""References to a user's own code: ``programs/handbook.py:program`` or ``package.module:name`` -> the object.

A path ends in ``.py`` before the colon and is taken relative to the file that names it (or the working directory); anything
else is an installed module. Recipes are plain files: they are executed once per process under a private module name.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from cowest_dspy.errors import RecipeError, nearest
from cowest_dspy.reading import expand_user, file_errors


def load(reference: str, *, relative_to: Path | None = None) -> Any:
    """The object that ``reference`` names.

    ``load("programs/handbook.py:program")`` gives the function ``program`` of that file; ``load("metrics/em.py")``, without
    a name, gives the object called like the file (``em``).

    Raises:
        RecipeError: no such file, module or name; or the file itself fails when it is executed (its error is the cause).
    """
    where, _, name = reference.rpartition(":") if _names_an_object(reference) else (reference, "", "")
    if where.endswith(".py"):
        path = resolve(where, relative_to)
        module = _execute(path)
        return _attribute(module, name or path.stem, reference)
    if not name:
        raise RecipeError(f'"{reference}" names no object: write "file.py:name" or "package.module:name".')
    try:
        module = importlib.import_module(where)
    except ModuleNotFoundError as error:
        raise RecipeError(f'"{reference}": there is no module "{where}". For a file write "path/to/file.py:name".') from error
    return _attribute(module, name, reference)


def load_function(reference: str) -> Callable[..., Any]:
    """What ``reference`` names, which can be called: a function, a class, or an object such as a Judge.

    Raises:
        RecipeError: as :func:`load`; or it cannot be called.
    """
    function = load(reference)
    if not callable(function):
        raise RecipeError(f'"{reference}" is a {type(function).__name__}, and a function is expected.')
    return function


def call(reference: str, *arguments: Any, given: Mapping[str, Any] | None = None, offered: Mapping[str, Any] | None = None) -> Any:
    """What the function that ``reference`` names returns.

    ``given`` are keyword arguments that a configuration gives: None means not given, and a function that has no such parameter is
    an error. ``offered`` ones are passed only to a function that asks for them by name.

    Raises:
        RecipeError: as :func:`load`; nothing callable; or it does not take what is given.
    """
    function = load_function(reference)
    taken = inspect.signature(function).parameters
    anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())
    wanted = {name: value for name, value in (given or {}).items() if value is not None}
    for name in wanted:
        if name not in taken and not anything:
            raise RecipeError(
                f'"{reference}" takes no "{name}", which the configuration gives: add the parameter {name}= to that function, or '
                f"take {name} out of the configuration."
            )
    asked = {name: value for name, value in (offered or {}).items() if name in taken}
    return function(*arguments, **asked, **wanted)


def takes(reference: str, name: str) -> bool:
    """Whether the function that ``reference`` names has a parameter of that name. Raises RecipeError as :func:`load`."""
    function = load(reference)
    return callable(function) and name in inspect.signature(function).parameters


def code_of(references: Iterable[str | None]) -> list[str]:
    """The SHA-256 of the files that these references name, each file once, sorted by path; None and installed modules are passed
    over: of these the version is what counts."""
    files = {reference.rpartition(":")[0] or reference for reference in references if reference and ".py" in reference}
    return [hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in sorted(files)]


def resolve(path: str | Path, relative_to: Path | None = None) -> Path:
    """``path`` as an absolute path: ``~`` expanded, and relative paths taken from ``relative_to`` (default: here)."""
    expanded = expand_user(path)
    return expanded.resolve() if expanded.is_absolute() else ((relative_to or Path.cwd()) / expanded).resolve()


def _names_an_object(reference: str) -> bool:
    head, colon, tail = reference.rpartition(":")
    return bool(colon and head) and tail.isidentifier()


def _execute(path: Path) -> ModuleType:
    name = f"_cowest_recipe_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    with file_errors(RecipeError, path):
        spec = importlib.util.spec_from_file_location(name, path) if path.is_file() else None
    if spec is None or spec.loader is None:
        raise RecipeError(f"There is no file {path}. Paths in a TOML are relative to that TOML.")
    module = importlib.util.module_from_spec(spec)
    # Registered before it runs: otherwise annotations of its classes cannot be resolved.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise RecipeError(f"{path} failed while it was loaded: {type(error).__name__}: {error}") from error
    return module


def _attribute(module: ModuleType, name: str, reference: str) -> Any:
    try:
        return getattr(module, name)
    except AttributeError:
        known = [known for known in vars(module) if not known.startswith("_")]
        raise RecipeError(f'"{reference}": nothing is called "{name}" there.{nearest(name, known)}') from None
