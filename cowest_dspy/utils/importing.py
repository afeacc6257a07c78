"""References to a user's own code: ``programs/handbook.py:program`` or ``package.module:name`` ->
the object.

A path ends in ``.py`` before the colon and is taken relative to the file that names it (or the
working directory); anything else is an installed module. Recipes are plain files: they are executed
once per process under a private module name. What is executed is always the source text; bytecode
beside it is neither read nor written.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from importlib.abc import ExecutionLoader
from pathlib import Path
from types import ModuleType
from typing import Any

from cowest_dspy.errors import RecipeError, nearest
from cowest_dspy.utils.reading import expand_user, file_errors


def load(reference: str, *, relative_to: Path | None = None) -> Any:
    """The object that ``reference`` names.

    ``load("programs/handbook.py:program")`` gives the function ``program`` of that file;
    ``load("metrics/em.py")``, without a name, gives the object called like the file (``em``).

    Raises:
        RecipeError: no such file, module or name; or the file itself fails when it is executed (its
            error is the cause).
    """
    where, _, name = (
        reference.rpartition(":") if _names_an_object(reference) else (reference, "", "")
    )
    if where.endswith(".py"):
        path = resolve(where, relative_to)
        module = sys.modules.get(_module_name(path)) or execute(path, _source(path))
        return _attribute(module, name or path.stem, reference)
    if not name:
        raise RecipeError(
            f'"{reference}" names no object: write "file.py:name" or "package.module:name".'
        )
    return _attribute(_import(where, reference), name, reference)


def load_function(reference: str) -> Callable[..., Any]:
    """Load what ``reference`` names, which can be called: a function, a class, or an object such as
    a Judge.

    Raises:
        RecipeError: as :func:`load`; or it cannot be called.
    """
    function = load(reference)
    if not callable(function):
        raise RecipeError(
            f'"{reference}" is a {type(function).__name__}, and a function is expected.'
        )
    return function


def call(
    reference: str,
    *arguments: Any,
    given: Mapping[str, Any] | None = None,
    offered: Mapping[str, Any] | None = None,
) -> Any:
    """Call the function that ``reference`` names, and return its result.

    ``given`` are keyword arguments that a configuration gives: None means not given, and a function
    that has no such parameter is an error. ``offered`` ones are passed only to a function that asks
    for them by name.

    Raises:
        RecipeError: as :func:`load_function`; or it does not take what is given. What the function
            itself raises is passed on.
    """
    function = load_function(reference)
    wanted = {name: value for name, value in (given or {}).items() if value is not None}
    signature = _signature(function)
    if signature is None:
        return function(*arguments, **wanted)
    taken = signature.parameters
    anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())
    for name in wanted:
        if name not in taken and not anything:
            raise RecipeError(
                f'"{reference}" takes no "{name}", which the configuration gives: add the '
                f"parameter {name}= to that function, or "
                f"take {name} out of the configuration."
            )
    asked = {name: value for name, value in (offered or {}).items() if name in taken}
    try:
        signature.bind(*arguments, **asked, **wanted)
    except TypeError as error:
        raise RecipeError(
            f'"{reference}" cannot be called so: {error}. It takes {signature}.'
        ) from error
    return function(*arguments, **asked, **wanted)


def takes(reference: str, name: str) -> bool:
    """Whether the function that ``reference`` names has a parameter of that name. Raises
    RecipeError as :func:`load`."""
    function = load(reference)
    signature = _signature(function) if callable(function) else None
    return signature is not None and name in signature.parameters


def code_of(references: Iterable[str | None]) -> list[str]:
    """The SHA-256 of the files that these references name, each file once, sorted by path; None and
    installed modules are passed
    over: of these the version is what counts.

    Raises:
        RecipeError: a file that cannot be read.
    """
    files = {
        reference.rpartition(":")[0] or reference
        for reference in references
        if reference and ".py" in reference
    }
    return [hashlib.sha256(_source(Path(file))).hexdigest() for file in sorted(files)]


def resolve(path: str | Path, relative_to: Path | None = None) -> Path:
    """``path`` as an absolute path: ``~`` expanded, and relative paths taken from ``relative_to``
    (default: here)."""
    expanded = expand_user(path)
    return (
        expanded.resolve()
        if expanded.is_absolute()
        else ((relative_to or Path.cwd()) / expanded).resolve()
    )


def execute(path: Path, source: bytes) -> ModuleType:
    """The module that ``source`` makes as the recipe at ``path``, an absolute path; the same text
    there is executed only once.

    From then on references to that path mean this module, whatever the file itself says.

    Raises:
        RecipeError: the code fails (its error is the cause).
    """
    name = _module_name(path)
    known = sys.modules.get(name)
    if known is not None and getattr(known.__loader__, "source", None) == source:
        return known
    spec = importlib.util.spec_from_file_location(name, path, loader=_FromSource(path, source))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Registered before it runs: otherwise annotations of its classes cannot be resolved.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        # Whatever a user's own code raises. It ends the process with an interruption, and not with
        # a sys.exit() of its own.
        if isinstance(error, Exception | SystemExit):
            raise RecipeError(
                f"{path} failed while it was loaded: {type(error).__name__}: {error}"
            ) from error
        raise
    return module


class _FromSource(ExecutionLoader):
    """Python's way to execute a module, from a text that was read before."""

    def __init__(self, path: Path, source: bytes) -> None:
        self.path, self.source = path, source

    def get_filename(self, fullname: str) -> str:
        return str(self.path)

    def get_source(self, fullname: str) -> str:
        return importlib.util.decode_source(self.source)


def _module_name(path: Path) -> str:
    return f"_cowest_recipe_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"


def _source(path: Path) -> bytes:
    with file_errors(RecipeError, path):
        if path.is_dir():
            raise RecipeError(f"{path} is a folder, and a Python file is expected.")
        if not path.exists():
            raise RecipeError(f"There is no file {path}. Those in a TOML are relative to it.")
        return path.read_bytes()


def _names_an_object(reference: str) -> bool:
    head, colon, tail = reference.rpartition(":")
    return bool(colon and head) and tail.isidentifier()


def _import(name: str, reference: str) -> ModuleType:
    if not all(part.isidentifier() for part in name.split(".")):
        raise RecipeError(
            f'"{reference}": "{name}" is no module\'s name. For a file write '
            '"path/to/file.py:name".'
        )
    try:
        return importlib.import_module(name)
    except Exception as error:  # Whatever a user's own module raises.
        if (
            isinstance(error, ModuleNotFoundError)
            and error.name
            and f"{name}.".startswith(f"{error.name}.")
        ):
            raise RecipeError(
                f'"{reference}": there is no module "{name}". For a file write '
                '"path/to/file.py:name".'
            ) from error
        raise RecipeError(
            f"{name} failed while it was loaded: {type(error).__name__}: {error}"
        ) from error


def _signature(function: Callable[..., Any]) -> inspect.Signature | None:
    """The signature of a function; None of some builtins, which have none."""
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):
        return None


def _attribute(module: ModuleType, name: str, reference: str) -> Any:
    try:
        return getattr(module, name)
    except AttributeError:
        known = [known for known in vars(module) if not known.startswith("_")]
        raise RecipeError(
            f'"{reference}": nothing is called "{name}" there.{nearest(name, known)}'
        ) from None
