"""References to a user's own code: what is executed is the text of the file, and what cannot be
used is one clear error."""

from __future__ import annotations

import importlib.util
import os
import py_compile
import sys
from pathlib import Path

import pytest

from cowest_dspy.errors import RecipeError
from cowest_dspy.utils import importing


def test_the_source_is_executed_and_no_bytecode_beside_it(tmp_path: Path) -> None:
    recipe, other = tmp_path / "task.py", tmp_path / "other.py"
    recipe.write_text("def program(): return 'reviewed'\n")
    other.write_text("def program(): return 'planted!'\n")
    planted = Path(importlib.util.cache_from_source(str(recipe)))
    os.utime(other, (1, 1))
    os.utime(recipe, (1, 1))
    py_compile.compile(str(other), cfile=str(planted))
    before = planted.read_bytes()
    assert importing.call(f"{recipe}:program") == "reviewed"
    assert planted.read_bytes() == before and list(planted.parent.iterdir()) == [planted], (
        "no bytecode is written either"
    )


def test_a_recipe_sees_itself_as_a_module(tmp_path: Path) -> None:
    recipe = tmp_path / "task.py"
    recipe.write_text(
        "# -*- coding: latin-1 -*-\nfrom __future__ import annotations\nimport dataclasses, "
        "inspect, sys, typing\n"
        "@dataclasses.dataclass\nclass Row:\n    text: str\n"
        "def program():\n    '\u00e9'\n    return typing.get_type_hints(Row), __file__, "
        "inspect.getsource(program)\n",
        encoding="latin-1",
    )
    hints, file, source = importing.call(f"{recipe}:program")
    assert hints == {"text": str} and file == str(recipe) and source.startswith("def program()")
    assert importing.load(f"{recipe}:program").__doc__ == "\u00e9"


BROKEN = [
    "raise SystemExit(3)",
    "import sys; sys.exit()",
    "(" * 10_000,
    "x = '\x00'",
    "# coding: nothing\n",
]


@pytest.mark.parametrize("code", BROKEN)
def test_a_file_that_cannot_be_executed_is_one_error_each_time(code: str, tmp_path: Path) -> None:
    recipe = tmp_path / "task.py"
    recipe.write_text(code)
    for _ in range(2):
        with pytest.raises(RecipeError, match=r"task\.py failed while it was loaded"):
            importing.load(f"{recipe}:program")


def test_a_file_that_is_a_folder_says_so(tmp_path: Path) -> None:
    (tmp_path / "task.py").mkdir()
    with pytest.raises(RecipeError, match=r"task\.py is a folder"):
        importing.load(f"{tmp_path / 'task.py'}:program")
    with pytest.raises(RecipeError, match=r"task\.py is a folder"):
        importing.code_of([f"{tmp_path / 'task.py'}:program"])
    with pytest.raises(RecipeError, match=r"There is no file .*gone\.py"):
        importing.code_of([f"{tmp_path / 'gone.py'}:program"])


@pytest.mark.parametrize(
    ("reference", "says"),
    [
        ("no_such_module_xyz:f", 'there is no module "no_such_module_xyz"'),
        ("json.no_such:f", 'there is no module "json.no_such"'),
        (".relative:f", "is no module's name"),
        ("..:f", "is no module's name"),
        (
            "broken_module_xyz:f",
            "broken_module_xyz failed while it was loaded: ValueError: on purpose",
        ),
        (
            "needy_module_xyz:f",
            (
                "needy_module_xyz failed while it was loaded: ModuleNotFoundError: No module named "
                "'absent_xyz'"
            ),
        ),
    ],
)
def test_a_module_that_cannot_be_imported_says_why(
    reference: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_module_xyz.py").write_text("raise ValueError('on purpose')")
    (tmp_path / "needy_module_xyz.py").write_text("import absent_xyz")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    with pytest.raises(RecipeError, match=says):
        importing.load(reference)


def test_a_call_that_cannot_be_is_one_error(tmp_path: Path) -> None:
    recipe = tmp_path / "task.py"
    recipe.write_text("ROWS = [1]\ndef rows(split): return [split]\n")
    with pytest.raises(RecipeError, match=r"ROWS\" is a list, and a function is expected"):
        importing.call(f"{recipe}:ROWS")
    with pytest.raises(RecipeError, match=r"ROWS\" is a list, and a function is expected"):
        importing.load_function(f"{recipe}:ROWS")
    with pytest.raises(
        RecipeError, match=r"rows\" cannot be called so: missing a required argument: 'split'"
    ):
        importing.call(f"{recipe}:rows")
    with pytest.raises(
        RecipeError, match=r"rows\" cannot be called so: too many positional arguments"
    ):
        importing.call(f"{recipe}:rows", "train", "dev")
    assert importing.call("builtins:dict") == {}, "whose signature is not known"
    assert not importing.takes("builtins:dict", "strong")
    assert importing.call(f"{recipe}:rows", "train") == ["train"]


def test_another_source_at_a_path_is_another_module(tmp_path: Path) -> None:
    path = tmp_path / "task.py"
    first = importing.execute(path, b"def program(): return 1\n")
    assert importing.execute(path, b"def program(): return 1\n") is first
    second = importing.execute(path, b"def program(): return 2\n")
    assert second is not first and (first.program(), second.program()) == (1, 2)
    assert importing.call(f"{path}:program") == 2, "the file itself is not looked for"
