"""What only some runs need may be missing: each feature says so in one line to paste, and the rest
works as before."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from report_runs import full_run

from cowest_dspy.errors import CowestError
from cowest_dspy.lms.local.weights import check_gguf
from cowest_dspy.optimizers.config import CycleRules
from cowest_dspy.optimizers.cycle import check_steps
from cowest_dspy.optimizers.router_fitting import fit_router
from cowest_dspy.pairs.texts import CANDIDATES, near_duplicates
from cowest_dspy.program.baselines import Retriever
from cowest_dspy.report import write_report
from cowest_dspy.report.charts import ChartRow, bars
from cowest_dspy.utils.extras import EXTRAS

Feature = Callable[[Path], Any]


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Takes an extra away, as far as this process can tell."""

    def block(extra: str) -> None:
        for module in EXTRAS[extra]:
            monkeypatch.setitem(sys.modules, module, None)

    return block


def name_optuna(folder: Path) -> None:
    steps = {"strategy": "prompts", "steps": {"prompts": {"optimizer": "MIPROv2"}}}
    check_steps(CycleRules.model_validate(steps))


def read_a_gguf_file(folder: Path) -> None:
    (folder / "model.gguf").write_bytes(b"GGUF")
    check_gguf(folder / "model.gguf")


def serve_a_task(folder: Path) -> None:
    from cowest_dspy.cli.serving import serve

    serve([folder / "task.toml"])


FEATURES: list[tuple[str, Feature]] = [
    ("charts", lambda _: bars([ChartRow("an arm", 0.123, "a mark")], "a chart of this test only")),
    ("gguf", read_a_gguf_file),
    ("optimizers", name_optuna),
    ("retrieval", lambda _: Retriever(["Iron melts at 1538 degrees."])),
    ("retrieval", lambda _: near_duplicates(["one"] * (CANDIDATES + 1), ["two"])),
    ("route", lambda _: fit_router([])),
    ("serve", serve_a_task),
]


@pytest.mark.parametrize(("extra", "use"), FEATURES)
def test_a_feature_without_its_extra_ends_with_a_line_to_paste(
    extra: str, use: Feature, without: Callable[[str], None], tmp_path: Path
) -> None:
    without(extra)
    with pytest.raises(CowestError) as caught:
        use(tmp_path)
    message = str(caught.value)
    assert message.endswith(f": pip install 'cowest_dspy[{extra}]'") and "\n" not in message
    assert all(module in message for module in EXTRAS[extra])


def test_a_report_without_charts_is_written_and_says_what_draws_them(
    tmp_path: Path, without: Callable[[str], None]
) -> None:
    drawn = write_report(full_run(), tmp_path / "drawn")
    without("charts")
    plain = write_report(full_run(), tmp_path / "plain")
    assert plain.json.read_bytes() == drawn.json.read_bytes()
    page, full = plain.html.read_text(), drawn.html.read_text()
    line = "Drawing the charts of this page needs vl_convert: pip install"
    assert "<svg" in full and line not in full
    assert "<svg" not in page and "<figure" not in page and line in page
    assert page.count("<table") == full.count("<table") > 0


def installed_by(target: str, folder: Path, uv: str) -> list[str]:
    """What make would install for a target in an environment that is not there yet."""
    run = subprocess.run(
        ["make", "--dry-run", target, f"VENV={folder}/venv", f"UV={uv}"],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
    )
    lines = [line for line in run.stdout.splitlines() if " pip install " in line]
    return [word for line in lines for word in shlex.split(line) if not word.startswith("-")]


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
@pytest.mark.parametrize("uv", ["", "uv"])
def test_make_demo_installs_the_core_charts_and_gguf_and_no_group(uv: str, tmp_path: Path) -> None:
    words = installed_by("demo", tmp_path, uv)
    assert [word for word in words if "[" in word] == [".[charts,gguf]"]
    assert not {"dev", "docs", "long"} & set(words) and ("uv" in words) == bool(uv)
    tested = installed_by("test", tmp_path, uv)
    assert "dev" in tested and not {"docs", "long"} & set(tested)
    assert {"docs", "long", ".[all]"} <= set(installed_by("docs", tmp_path, uv))
