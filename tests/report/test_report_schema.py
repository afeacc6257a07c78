"""report.json has a schema, made from the classes that write it, and what is written fits it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from report_runs import HOSTILE, full_run, run
from typer.testing import CliRunner

from cowest_dspy.cli.main import app
from cowest_dspy.report import RunReport, report_schema, write_report
from cowest_dspy.report.figures import schema_text

DOCUMENT = Path(__file__).parents[2] / "docs" / "report.schema.json"


def checked(document: dict[str, Any]) -> None:
    jsonschema.Draft202012Validator(report_schema()).validate(document)


@pytest.mark.parametrize(
    "report",
    [run(), full_run(), full_run(HOSTILE), dataclasses.replace(full_run(), noise=None, pairs=None)],
)
def test_a_written_report_fits_its_schema(report: RunReport, tmp_path: Path) -> None:
    checked(json.loads(write_report(report, tmp_path).json.read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("schema_version",), 99),
        (("surprise",), 1),
        (("arms", 0, "answers", 0, "score"), "right"),
        (("arms", 0, "more"), 1),
        (("numbers", "arms", 0, "score"), "most"),
        (("numbers", "influence", "1", "helped"), None),
        (("traces", 0, "draft_index"), "first"),
    ],
)
def test_another_shape_does_not_fit(
    path: tuple[str | int, ...], value: object, tmp_path: Path
) -> None:
    document = json.loads(write_report(full_run(), tmp_path).json.read_text(encoding="utf-8"))
    inner: Any = document
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        checked(document)


def test_the_schema_is_one_itself_and_the_documentation_has_it_as_it_is() -> None:
    jsonschema.Draft202012Validator.check_schema(report_schema())
    made = "cowest report --schema > docs/report.schema.json"
    assert DOCUMENT.read_text(encoding="utf-8") == schema_text(), f"make it again: {made}"


def test_the_command_line_prints_the_schema_without_a_task() -> None:
    shown = CliRunner().invoke(app, ["report", "--schema"])
    assert shown.exit_code == 0 and json.loads(shown.stdout) == report_schema()
