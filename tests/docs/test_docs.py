"""What pages show means what they say of it: settings, arms and strategies; and a figure is drawn
from a real report."""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import sys
import tomllib
import xml.dom.minidom
from pathlib import Path
from typing import Any, get_args

import pytest
from report_runs import draft

from cowest_dspy.experiment.config import validate
from cowest_dspy.experiment.tables import ArmRules, CompareRules
from cowest_dspy.influence.arms import Answer
from cowest_dspy.influence.config import InfluenceRules
from cowest_dspy.optimizers.config import CycleRules, RoundRules
from cowest_dspy.report import Arm, PairsSummary, RunReport, write_report
from cowest_dspy.report.corpus import is_corpus_metric
from cowest_dspy.utils.extras import EXTRAS

ROOT = Path(__file__).parents[2]


def test_the_toml_of_the_page_on_influence_is_read() -> None:
    text = (ROOT / "docs/influence.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    assert blocks
    for block in blocks:
        assert (
            validate(InfluenceRules, tomllib.loads(block)["influence"], "docs/influence.md").judge
            > 0
        )


def test_the_page_on_cycles_runs_and_its_toml_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs/cycles.md").read_text(encoding="utf-8")
    code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(code) == 2
    names: dict[str, object] = {}
    exec("\n".join(code), names)
    assert vars(names["cycle"])["names"] == ("shots", "weights", "shots")
    tables = [tomllib.loads(block) for block in re.findall(r"```toml\n(.*?)```", text, re.DOTALL)]
    assert validate(RoundRules, tables[0]["rounds"], "docs/cycles.md") == RoundRules.model_validate(
        {"count": 2}
    )
    cycle = validate(CycleRules, tables[1]["cycle"], "docs/cycles.md")
    assert cycle.names == ("sft", "prompts", "weights", "prompts")


def test_the_toml_and_the_code_of_the_page_on_comparing_are_read() -> None:
    text = (ROOT / "docs/compare.md").read_text(encoding="utf-8")
    blocks = [
        tomllib.loads(block)["compare"]
        for block in re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    ]
    rules = [validate(CompareRules, block, "docs/compare.md") for block in blocks]
    assert rules[0].arms["after"].weak == "tuned" and rules[1].transfer
    assert rules[2].sweep["pairs.most"] == (16, 32, 64)
    named = set(re.findall(r"^\| (`.*?) \|", text, re.MULTILINE))
    kinds = {kind for row in named for kind in re.findall(r"`(\w+)`", row)}
    fields = ArmRules.model_fields
    assert {
        *get_args(fields["kind"].annotation),
        *get_args(get_args(fields["control"].annotation)[0]),
    } <= kinds
    names: dict[str, Any] = {}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec("\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL)), names)
    assert is_corpus_metric(names["share_of_yes"])
    lines = printed.getvalue().splitlines()
    assert len(lines) == 6 and all(line in text for line in lines)


def test_the_page_on_tuning_makes_the_settings_that_it_shows() -> None:
    text = (ROOT / "docs/tuning.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    exec("\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL)), names)
    assert (
        names["dpo"].losses == ("sigmoid", "sft") and names["careful"].early_stopping_patience == 3
    )
    for gone in ("simpo", "orpo", "cpo"):
        with pytest.raises(ValueError, match="loss"):
            names["DPO"](loss_type=gone)


def test_the_figure_is_drawn_from_a_report(tmp_path: Path) -> None:
    report = RunReport(
        title="t",
        created="2026-01-01T00:00:00+00:00",
        seed=0,
        reference="strong",
        arms=(Arm("strong", "strong", (Answer("q", {}, "a", "a", 1.0),)),),
        traces=(
            draft("q", 0, 1.0),
            draft("q", 1, -1.0),
            draft("q", 2, None, "timeout: <slow>"),
        ),
        pairs=PairsSummary(1, 1, {"tie & more": 7}),
    )
    write_report(report, tmp_path)
    command = [
        sys.executable,
        str(ROOT / "docs/figures.py"),
        str(tmp_path),
        "--out",
        str(tmp_path / "out.svg"),
    ]
    subprocess.run(command, check=True, capture_output=True)
    drawn = xml.dom.minidom.parse(str(tmp_path / "out.svg")).documentElement
    assert (
        drawn
        and drawn.getAttribute("aria-label")
        == "1 drafts helped, 0 changed nothing, 1 hurt, 1 failed"
    )
    assert "tie &amp; more" in (tmp_path / "out.svg").read_text()


def test_an_install_line_is_spelled_in_one_way_and_names_extras_that_are_there() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("programs/**/*.toml")]
    found = 0
    for page in set(pages) - {ROOT / "CHANGELOG.md"}:
        for line in re.findall(r"pip install ([^`\n]*)", page.read_text(encoding="utf-8")):
            spelled = re.search(
                r"(?:^|(?<=txt ))(?:\.|'(?:\.|cowest_dspy)\[(?P<extras>[a-z,]+)\]')(?=$|[ :)])",
                line,
            )
            assert spelled, f"{page}: pip install {line}"
            extras = (spelled["extras"] or "all").split(",")
            assert set(extras) <= set(project["optional-dependencies"]), f"{page}: {line}"
            found += 1
    assert found >= 8


def test_the_page_on_installing_has_every_extra() -> None:
    text = (ROOT / "docs/install.md").read_text(encoding="utf-8")
    named = {
        name
        for row in re.findall(r"^\| (`.*?) \|", text, re.MULTILINE)
        for name in re.findall(r"`(\w+)`", row)
    }
    assert named == {*EXTRAS, "all"}
