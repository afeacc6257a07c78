"""The shape of the house, as laws: reading order is import order, recipes stand alone, importing is
light."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from cowest_dspy.utils.extras import EXTRAS

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "cowest_dspy"

# The rooms, in the order in which they are read: a module imports only from its own room and from
# those before it. Inside a room imports are free, but never in a circle.
ROOMS = (
    "utils", "store", "lms", "program", "influence", "pairs", "tuning", "optimizers", "report", "scale", "serve",
    "experiment", "cli", "testing",
)  # fmt: skip
ROOT_MODULES = {"errors", "compat"}
HEAVY = {
    "torch", "transformers", "trl", "peft", "datasets", "openai", "xllamacpp", "mlflow", "trackio", "wandb", "vl_convert", "altair",
    "sklearn", "fastapi", "uvicorn", "starlette", "prometheus_client", "ray",
}  # fmt: skip
# Lines of 100 columns. What builds data for a test or a benchmark is longer than what decides.
LONGEST_FILE, LONGEST_FUNCTION, LONGEST_OF_DATA = 600, 64, 90


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def name_of(path: Path) -> str:
    """``cowest_dspy/lms/api.py`` -> ``cowest_dspy.lms.api``; a package's ``__init__.py`` -> the
    package."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sources("cowest_dspy")}


def imports(path: Path) -> Iterator[str]:
    """Every module that the file imports, wherever in it; ``from a import b`` gives ``a.b`` if that
    is a module."""
    package = name_of(path) if path.name == "__init__.py" else name_of(path).rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = (
                package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            )
            module = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                whole = f"{module}.{alias.name}"
                yield whole if whole in MODULES else module


def layer(module: str) -> str:
    """The room of a module. errors.py and compat.py at the root are of the ground floor, with
    utils/."""
    room = module.split(".")[1]
    return "utils" if room in ROOT_MODULES else room


def inner(path: Path) -> set[str]:
    """The modules of the library that the file imports."""
    return {name for name in imports(path) if name.split(".")[0] == "cowest_dspy"}


LAYERED = {name: path for name, path in MODULES.items() if name != "cowest_dspy"}


def test_every_module_has_its_place_in_the_order() -> None:
    assert {layer(name) for name in LAYERED} <= set(ROOMS)


def test_imports_point_up_only() -> None:
    assert [fault for module in LAYERED for fault in wrong_imports(module)] == []


def wrong_imports(module: str) -> Iterator[str]:
    allowed = set(ROOMS[: ROOMS.index(layer(module)) + 1])
    for imported in inner(LAYERED[module]):
        if imported not in MODULES:
            yield f"{module} imports {imported}, which is no module"
        elif imported == "cowest_dspy":
            # The package's front names everything, so it is for users. Its version is a constant.
            if not only_the_version(LAYERED[module]):
                yield f"{module} imports from the package's front: name the module"
        elif layer(imported) not in allowed:
            yield f"{module} imports {imported}, which comes later in the order"


def only_the_version(path: Path) -> bool:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    named = [
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "cowest_dspy"
        for alias in node.names
        if f"cowest_dspy.{alias.name}" not in MODULES
    ]
    return set(named) <= {"__version__"}


def test_no_folder_imports_in_a_circle() -> None:
    for folder in sorted({layer(name) for name in LAYERED}):
        inside = {name: path for name, path in LAYERED.items() if layer(name) == folder}
        package = f"cowest_dspy.{folder}"
        graph = {
            name: (inner(path) & set(inside)) - {name, package} for name, path in inside.items()
        }
        assert list(graphlib.TopologicalSorter(graph).static_order())


def test_the_house_is_at_most_eight_rooms_deep() -> None:
    """The ground floor, which every room stands on, is not counted."""
    below: dict[str, set[str]] = {room: set() for room in ROOMS}
    for module, path in LAYERED.items():
        below[layer(module)] |= {layer(name) for name in inner(path) if name != "cowest_dspy"}
    depth: dict[str, int] = {"utils": 0}
    for room in ROOMS[1:]:
        depth[room] = 1 + max((depth[one] for one in below[room] - {room}), default=0)
    assert max(depth.values()) <= 8, depth


def test_a_class_name_has_one_meaning() -> None:
    places: dict[str, list[str]] = {}
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(module)
    assert {name: found for name, found in places.items() if len(found) > 1} == {}


def test_a_recipe_imports_only_the_library_dspy_and_the_standard_library() -> None:
    known = {"cowest_dspy", "dspy", *sys.stdlib_module_names}
    assert foreign(sources("programs", "metrics"), known) == {}


def test_the_library_imports_no_recipe_and_nothing_that_is_not_declared() -> None:
    """What a declared package itself requires, such as numpy, comes with it and is not declared
    again."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    assert set(extras) == {*EXTRAS, "all"}
    (together,) = (Requirement(one) for one in extras["all"])
    assert together.name == project["name"] and together.extras == set(EXTRAS)
    installed = with_their_own(
        [*project["dependencies"], *(one for name in EXTRAS for one in extras[name])]
    )
    modules = {
        module
        for module, owners in metadata.packages_distributions().items()
        if any(canonicalize_name(owner) in installed for owner in owners)
    }
    modules |= {module for names in EXTRAS.values() for module in names}
    assert (
        foreign(list(MODULES.values()), {"cowest_dspy", *modules, *sys.stdlib_module_names}) == {}
    )


def with_their_own(requirements: Iterable[str]) -> set[str]:
    """The names of packages and of all that they require in turn, as far as they are installed."""
    found: set[str] = set()
    waiting = [Requirement(one) for one in requirements]
    while waiting:
        name = canonicalize_name(waiting.pop().name)
        if name in found:
            continue
        found.add(name)
        with suppress(metadata.PackageNotFoundError):
            required = map(Requirement, metadata.requires(name) or [])
            waiting += [
                one for one in required if one.marker is None or one.marker.evaluate({"extra": ""})
            ]
    return found


def test_each_extra_brings_the_modules_that_are_named_for_it() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    owners = metadata.packages_distributions()
    core = with_their_own(project["dependencies"])
    for extra, modules in EXTRAS.items():
        requirements = project["optional-dependencies"][extra]
        # dspy[optuna]: an extra of another package, which is core itself.
        brought = {
            canonicalize_name(name)
            for one in map(Requirement, requirements)
            for name in (one.extras or {one.name})
        }
        assert not brought & core, extra
        for module in modules:
            assert module not in owners or {*map(canonicalize_name, owners[module])} & brought


def foreign(paths: Iterable[Path], known: set[str]) -> dict[str, set[str]]:
    """The files that import something else than what is known, each with what that is."""
    found = {
        str(path.relative_to(ROOT)): {name.split(".")[0] for name in imports(path)} - known
        for path in paths
    }
    return {path: names for path, names in found.items() if names}


@pytest.mark.parametrize(
    "modules", [["cowest_dspy"], list(MODULES)], ids=["the front", "every module"]
)
def test_importing_loads_nothing_heavy(modules: list[str]) -> None:
    """torch, TRL and their like come when a model is loaded or tuned: their imports stand inside
    functions."""
    code = f"import sys, {', '.join(modules)}; print(*sorted(set(sys.modules) & {HEAVY!r}))"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert run.stdout.split() == []


def test_the_front_names_only_what_is_there() -> None:
    import cowest_dspy

    assert cowest_dspy.__all__
    for name in cowest_dspy.__all__:
        assert getattr(cowest_dspy, name) is not None


OURS = sources("cowest_dspy", "programs", "metrics", "demo", "docs", "benchmarks", "tests")


def test_every_file_says_what_it_is_and_stays_readable() -> None:
    assert [fault for path in OURS for fault in unreadable(path)] == []


def unreadable(path: Path) -> Iterator[str]:
    name, text = path.relative_to(ROOT), path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    if tree.body and not ast.get_docstring(tree):
        yield f"{name}: a file opens with a docstring that says what it is"
    if len(text.splitlines()) > LONGEST_FILE:
        yield (
            f"{name}: {len(text.splitlines())} lines: a long file hides a concept: name it and "
            "give it a file"
        )
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            lines -= len((ast.get_docstring(node, clean=False) or "").splitlines())
            if lines > (LONGEST_FUNCTION if name.parts[0] == "cowest_dspy" else LONGEST_OF_DATA):
                yield f"{name}: {node.name} has {lines} lines: name its parts"


def test_the_version_is_said_once_and_the_same_everywhere() -> None:
    import cowest_dspy

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert cowest_dspy.__version__ == project["version"]
    assert f"## [{project['version']}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_a_commit_is_checked_by_the_ruff_that_is_pinned() -> None:
    pinned = re.search(r"^ruff==(.+)$", (ROOT / "constraints.txt").read_text(), flags=re.M)
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    assert pinned and f"rev: v{pinned[1]}\n" in hooks


def test_the_tables_of_tests_name_tests_that_are_there_and_every_law_has_a_fast_one() -> None:
    text = (ROOT / "tests/README.md").read_text(encoding="utf-8")
    named = {(file, test) for file, test in re.findall(r"`([\w/]+\.py)::(test_\w+)`", text)}
    assert named, "the tables are not read"
    tests = {path: dict(list_tests(ROOT / "tests" / path)) for path in {file for file, _ in named}}
    assert [f"{file}::{test}" for file, test in sorted(named) if test not in tests[file]] == []
    for number in range(1, 13):
        (own,) = (ROOT / "tests/laws").glob(f"test_law_{number:02}_*.py")
        laws = {test for test, slow in list_tests(own) if not slow}
        assert laws, f"law {number} has no test in the fast tier"
        assert laws <= {test for file, test in named if file == f"laws/{own.name}"}, (
            f"law {number}: the table lacks a test"
        )


def list_tests(path: Path) -> Iterator[tuple[str, bool]]:
    """The tests of a file, each with whether it is marked slow as a whole."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    module = any(
        isinstance(node, ast.Assign) and "pytest.mark.slow" in ast.unparse(node.value)
        for node in tree.body
    )
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            yield (
                node.name,
                module
                or any(ast.unparse(mark) == "pytest.mark.slow" for mark in node.decorator_list),
            )
