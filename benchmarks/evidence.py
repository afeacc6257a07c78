"""The evidence behind docs/results/handbook.md: the handbook with three seeds, all test questions, and controls
that can say no.

    make evidence                        # or: python benchmarks/evidence.py --seeds 0 1 2

Each seed is a run of its own (runs/evidence/seed-N), resumable as every run is: other LoRA weights
to start from, other drafts, another order of training. The handbook and its questions are the same
for all, so that a call which one seed has made (greedy, of the same strong model, with the same
messages) is taken over by the next instead of being made again. Seed 0 goes on from what `make
demo` has done, if it was run. At the end the table between the two marks of that page is written
anew.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from marked import put
from rich.console import Console

from cowest_dspy import Experiment, load_config
from cowest_dspy.cli.main import report_errors
from cowest_dspy.cli.progress import Progress
from cowest_dspy.experiment.config import Config
from cowest_dspy.experiment.summary import ARMS
from cowest_dspy.influence.statistics import bootstrap_mean_interval
from cowest_dspy.report import RunReport, compare_scores, read_report

ROOT = Path(__file__).resolve().parent.parent
FILES = [ROOT / "programs/handbook.toml", ROOT / "programs/backends/in_process.toml"]
CONTROLS = ("shuffled", "sft_on_chosen")
DEMO = ROOT / "runs/handbook"
PAGE = ROOT / "docs/results/handbook.md"
BEGIN, END = "<!-- evidence: written by make evidence -->", "<!-- end of evidence -->"


def settings(seed: int, test: int | None) -> Config:
    """The recipe's configuration with this seed, all test questions (or so many), and the
    controls."""
    config = load_config(FILES, seed=seed)
    changed = {
        "evaluate": config.evaluate.model_copy(update={"controls": CONTROLS}),
        "data": config.data.model_copy(update={"test": test}),
    }
    return config.model_copy(update=changed)


def run_all(seeds: list[int], folder: Path, test: int | None) -> list[RunReport]:
    """One run per seed; the reports in the order of the seeds."""
    reports: list[RunReport] = []
    for place, seed in enumerate(seeds):
        earlier = [folder / f"seed-{before}" for before in seeds[:place]]
        with Experiment(
            settings(seed, test), run_of(seed, folder), progress=Progress(), reuse=earlier
        ) as experiment:
            reports.append(experiment.cycle())
    return reports


def run_of(seed: int, folder: Path) -> Path:
    """The run of a seed; that of seed 0 begins as a copy of the demo's, if there is one."""
    run = folder / f"seed-{seed}"
    if seed == 0 and DEMO.is_dir() and not run.exists():
        shutil.copytree(DEMO, run)
    return run


def table(reports: list[RunReport]) -> str:
    """The Markdown table: per arm the correct answers of each seed, and all seeds together with a
    95 % interval.

    The interval is a bootstrap over questions, a question's answers of all seeds drawn together:
    they are not independent.
    """
    seeds = [report.seed for report in reports]
    lines = [
        "| arm | "
        + " | ".join(f"seed {seed}" for seed in seeds)
        + " | all seeds | 95 % interval |",
        "|---|" + "---:|" * (len(seeds) + 2),
    ]
    for name in [name for name in ARMS if reports[0].arm(name)]:
        right = [_right(report, name) for report in reports]
        cells = " | ".join(f"{sum(one.values()):.0f} of {len(one)}" for one in right)
        by_question = [[one[question] for one in right] for question in right[0]]
        mean = sum(map(sum, by_question)) / sum(map(len, by_question))
        interval = bootstrap_mean_interval(by_question)
        low_high = f"{100 * interval.low:.1f} to {100 * interval.high:.1f} %" if interval else ""
        lines.append(f"| {_title(reports, name)} | {cells} | {100 * mean:.1f} % | {low_high} |")
    return "\n".join([*lines, "", *_comparisons(reports)])


def _comparisons(reports: list[RunReport]) -> list[str]:
    """Paired exact tests of the collaboration after tuning against the other arms, seed by seed."""
    lines = [
        "The collaboration after preference tuning against the other arms: questions that it got "
        "right and they did not, questions "
        "that they got right and it did not, and the p of McNemar's exact test (two-sided), for "
        "each seed:",
        "",
        "| against | " + " | ".join(f"seed {report.seed}" for report in reports) + " |",
        "|---|" + "---:|" * len(reports),
    ]
    for name in [name for name in ARMS if name != "collaboration" and reports[0].arm(name)]:
        cells: list[str] = []
        for report in reports:
            test = compare_scores(_scores(report, "collaboration"), _scores(report, name))
            cells.append(
                f"+{test.higher} -{test.lower}, p "
                f"{'< 0.001' if test.p < 0.001 else f'= {test.p:.3f}'}"
            )
        lines.append(f"| {_title(reports, name)} | " + " | ".join(cells) + " |")
    return lines


def _title(reports: list[RunReport], name: str) -> str:
    arm = reports[0].arm(name)
    return arm.title if arm else name


def _scores(report: RunReport, name: str) -> dict[str, float | None]:
    arm = report.arm(name)
    return {answer.example_id: answer.score for answer in arm.answers} if arm else {}


def _right(report: RunReport, name: str) -> dict[str, float]:
    """1.0 for each question that the arm got right, 0.0 for every other that it was asked; one that
    failed counts as wrong here."""
    return {question: float(score == 1.0) for question, score in _scores(report, name).items()}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--runs", type=Path, default=ROOT / "runs/evidence", help="where the runs are kept"
    )
    parser.add_argument(
        "--test", type=int, default=None, help="ask so many test questions (default: all)"
    )
    parser.add_argument(
        "--table-only", action="store_true", help="only write the table from finished runs"
    )
    given = parser.parse_args()
    if given.table_only:
        reports = [read_report(given.runs / f"seed-{seed}") for seed in given.seeds]
    else:
        reports = run_all(given.seeds, given.runs, given.test)
    text = table(reports)
    put(PAGE, BEGIN, END, text)
    Console(highlight=False).print(text, markup=False)


if __name__ == "__main__":
    report_errors(main)
