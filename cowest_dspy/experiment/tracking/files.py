"""What is uploaded of a run: only what may be shown, with secrets masked.

An input that [report] hide names is not uploaded: report.html and report.json have its length, as
on the page, and what cannot be shown without it (pairs, labelled drafts, the comparison's answers,
the bundle) stays here.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from cowest_dspy.experiment.config import Config
from cowest_dspy.experiment.config_text import effective_toml
from cowest_dspy.report import RunReport, write_report
from cowest_dspy.report.facts import redact
from cowest_dspy.utils.jsonl import read_jsonl, write_jsonl
from cowest_dspy.utils.masking import mask_text

ROWS = ("pairs*.jsonl", "drafts*.jsonl")
COMPARED = ("csv", "tex", "md", "html")
"""Of a comparison, the files without inputs and answers."""


def gather(config: Config, run: Path, report: RunReport, target: Path) -> list[str]:
    """Writes what is uploaded of the run in ``run`` into the empty folder ``target``; gives the
    files' names in it, in order."""
    write_report(report, target)
    if config.report.hide:
        with_marks = write_report(redact(report), target / "marks").json
        with_marks.replace(target / "report.json")
        shutil.rmtree(target / "marks")
    (target / "config.toml").write_text(effective_toml(config), encoding="utf-8")
    compared = [run / "comparison" / f"comparison.{kind}" for kind in COMPARED]
    if not config.report.hide:
        compared.append(run / "comparison" / "comparison.json")
        for pattern in ROWS:
            for file in run.glob(pattern):
                write_jsonl(target / file.name, map(mask_text, read_jsonl(file)))
        if (run / "bundle" / "cowest.json").is_file():
            shutil.copytree(run / "bundle", target / "bundle")
    for file in compared:
        if file.is_file():
            (target / "comparison").mkdir(exist_ok=True)
            shutil.copyfile(file, target / "comparison" / file.name)
    return sorted(str(file.relative_to(target)) for file in target.rglob("*") if file.is_file())
