"""The three domains of the paper on real data, with real models: every arm and control, and what
drafts did; for docs/RESULTS.md and docs/results/.

    make quality                                              # all domains and arms (hours;
        resumable)
    python benchmarks/quality.py --domains prosocial --core   # the arms that the two claims need
    python benchmarks/quality.py --domains prosocial --seeds  # drafts that are answers, a drafter
        taught on all rows, three seeds, every control
    python benchmarks/quality.py --domains handbook --runs runs   # the demo's domain, going on from
        `make demo`
    python benchmarks/quality.py --table-only                 # only write docs/ from what is done

Each domain is a run of its own (runs/quality/DOMAIN) of programs/DOMAIN.toml, with the sizes below;
a run that was stopped goes on where it stood. Rows are read from --data: a folder with one folder
for each dataset, which has train.jsonl and dev.jsonl with the fields as published. What is test
without a test.jsonl there, the recipe says. Of the texts of the data nothing is written to docs/.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from marked import put
from rich.console import Console

from cowest_dspy import Experiment, load_config
from cowest_dspy.cli.main import report_errors
from cowest_dspy.cli.progress import Progress
from cowest_dspy.experiment import Compared
from cowest_dspy.experiment.config import Config, overridden
from cowest_dspy.influence.arms import Answer
from cowest_dspy.influence.statistics import ALPHA, SMALLEST, wilson_interval
from cowest_dspy.report.compare import compute_numbers
from cowest_dspy.report.compare_view import (
    print_comparison,
    read_comparison,
    to_markdown,
    write_comparison,
)
from cowest_dspy.report.compared import ComparedArm, Comparison, paired_test
from cowest_dspy.report.facts import Arm
from cowest_dspy.report.significance import PairedTest
from cowest_dspy.report.verdict import (
    bare_p,
    explain_chance,
    format_detectable,
    format_difference,
    format_p,
)
from cowest_dspy.report.view import escape_markdown

ROOT = Path(__file__).resolve().parent.parent
BACKEND = ROOT / "programs/backends/in_process.toml"
DOCS = ROOT / "docs"
SUMMARY, SUMMARY_END = (
    "<!-- summary: written by benchmarks/quality.py -->",
    "<!-- end of summary -->",
)
BEGIN, END = "<!-- tables: written by benchmarks/quality.py -->", "<!-- end of tables -->"
DOMAINS = ("prosocial", "ifqa", "ifqa_passages", "medmcqa", "handbook")
PARTS = ("handbook", "geoquery", "prosocial", "prosocial-seeds", "ifqa_passages", "ifqa", "medmcqa")
"""The rows of the summary, in order. That of the handbook is of make evidence, GeoQuery's of
drafts_of_sql.py: both by hand."""
MADE_UP = "handbook"
"""The domain of the demo, whose rows are made up by its recipe, with the sizes of its own TOML."""
TAKEN: dict[str, Any] = {"rounds.least_gain": -1.0, "rounds.more_failures": 1.0}
"""A round is taken whatever the dev split says of it, so that the arm after tuning shows what
tuning did."""
OWN_SIZES = ("ifqa_passages",)
"""Domains with the sizes of their own TOML."""

# What two cores can do in about half an hour for each domain's core arms.
SIZES: dict[str, Any] = {
    "data.train": 48,
    "data.dev": 48,
    "data.test": 120,
    "sft.settings.max_steps": 40,
    "sft.answer_settings.max_steps": 40,
    "collect.max_errors": 0.6,  # a drafter that has learned so little does not always stop
    "dpo.num_train_epochs": 2,
}
# Texts of ProsocialDialog are short, so that more of them cost no more. Exact match is too coarse
# for IfQA here: the drafts of 45 in 48 questions had one influence. So its influence is what a
# draft does to the likelihood of the gold answer.
LARGER: dict[str, dict[str, Any]] = {
    "prosocial": {
        "data.train": 96,
        "sft.settings.max_steps": 150,
        "sft.answer_settings.max_steps": 150,
    },
    "ifqa": {"influence.metric": 0.0, "influence.likelihood": 1.0, "pairs.margin": 0.05},
}
# Drafts that are answers: few of them differ, and the same draft is refined once, so that seeds and
# controls cost little. The drafter learns from all rows of the archive, and all of test is asked.
SEEDED: dict[str, dict[str, Any]] = {
    "prosocial": {
        "draft": "direct",
        "sft.answers": None,  # the drafter answers the question itself
        "data.train": 100,
        "data.dev": 48,
        "data.test": 300,
    },
}
CONTROLS = ("shuffled", "sft_on_chosen", "by_correctness", "other_draft")
SEEDED_ARMS: dict[str, dict[str, str]] = {
    "alone": {"kind": "alone"},
    "weak": {"kind": "weak"},
    "collaboration_sft": {"kind": "collaboration"},
    "collaboration": {"kind": "collaboration", "weak": "tuned"},
    **{f"control_{name}": {"kind": "control", "control": name} for name in CONTROLS},
}
CORE = (
    "alone", "weak", "collaboration_sft", "collaboration", "direct_sft", "direct", "chain_of_thought", "oracle", "rag",
    "control_other_draft", "control_shuffled", "control_shuffled_direct", "control_other_direct",
)  # fmt: skip


def settings(domain: str, data: Path | None, seed: int, seeds: Sequence[int] = ()) -> Config:
    """The configuration of a domain, with the sizes above and rows of ``data``; without ``data``,
    the recipe's own. ``seeds``: of the part with several."""
    config = load_config([ROOT / f"programs/{domain}.toml", BACKEND], seed=seed)
    if domain == MADE_UP:
        return config
    changes = dict(TAKEN)
    if data:
        changes["data.rows"] = str(folder_of(domain, data).resolve())
    if seeds:
        changes |= {**SEEDED[domain], "compare.arms": SEEDED_ARMS, "compare.seeds": tuple(seeds)}
    elif domain not in OWN_SIZES:
        changes |= {**SIZES, **LARGER.get(domain, {})}
    return overridden(config, changes)


def folder_of(domain: str, data: Path) -> Path:
    """The folder with the rows of a domain."""
    return data / domain.partition("_")[0]


def run(config: Config, folder: Path, arms: Sequence[str] | None) -> Comparison:
    """The comparison of a configuration, kept in its run's folder; of these arms, where it declares
    them, or of all."""
    with Experiment(config, folder, progress=Progress()) as experiment:
        declared = experiment.config.compare.arms if experiment.config.compare else {}
        made = Compared(experiment).run(
            [name for name in declared if name in arms] if arms is not None else None
        )
        write_comparison(made, folder / "comparison")
    return made


# What drafts did


def effects(comparison: Comparison) -> str:
    """A Markdown table: what each collaborating arm did to the answers of the strong model alone.

    "recall" is how often the draft holds the gold answer; the two columns after it are how often
    the refined answer is right where it does and where it does not. "helped" counts wrong answers
    alone that became right, "harm rate" is the part of the right ones that became wrong, with
    Wilson's 95 % interval.
    """
    alone = _answers(comparison, comparison.against)
    golds = {answer.gold for answer in alone.values()}
    lines = [
        "| arm | recall of drafts | right with it | right without | helped | hurt | harm rate |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    several = Counter(one.arm.name for one in comparison.arms)
    for one in comparison.arms:
        arm = one.arm
        title = f"{arm.title}, seed {one.seed}" if several[arm.name] > 1 else arm.title
        found = [
            answer
            for answer in arm.answers
            if answer.draft is not None and answer.score is not None
        ]
        if not found or arm.name in ("alone", "oracle"):
            continue
        held = [answer for answer in found if holds_gold(answer, golds)]
        lacked = [answer for answer in found if not holds_gold(answer, golds)]
        both = [
            (alone[answer.example_id], answer)
            for answer in found
            if alone[answer.example_id].score is not None
        ]
        kept = [(before.score == 1, after.score == 1) for before, after in both]
        right, broken = (
            sum(before for before, _ in kept),
            sum(before and not after for before, after in kept),
        )
        span = wilson_interval(broken, right)
        lines.append(
            f"| {title} | {len(held)} of {len(found)} | {_right(held)} | {_right(lacked)} | "
            f"{sum(after and not before for before, after in kept)} of {len(kept) - right} | "
            f"{broken} of {right} | "
            f"{100 * broken / max(right, 1):.0f} % ({100 * span.low:.0f}-{100 * span.high:.0f}) |"
        )
    return "\n".join(lines)


def _right(answers: list[Answer]) -> str:
    return f"{sum(answer.score == 1 for answer in answers)} of {len(answers)}"


def _answers(comparison: Comparison, name: str) -> dict[str, Answer]:
    arm: Arm = next(one.arm for one in comparison.arms if one.arm.name == name)
    return {answer.example_id: answer for answer in arm.answers}


def holds_gold(answer: Answer, golds: Collection[str] = ()) -> bool:
    """Whether a draft says the gold answer: its text, or of one among options the option's text or
    its letter at the beginning.

    What answers with one of ``golds`` (of all examples) says that one and none that stands in it:
    "possibly needs caution" is not "needs caution".
    """
    text = CONFIDENCE.sub("", answer.draft or "").lower()
    stated = text.rpartition("answer:")[2].strip(" .\n")
    if stated in {gold.lower() for gold in golds}:
        return stated == answer.gold.lower()
    draft, gold = " ".join(text.split()), answer.gold.lower()
    options = str(answer.inputs.get("options", ""))
    if options:
        option = (
            next(
                (line[3:] for line in options.splitlines() if line.startswith(f"{answer.gold}.")),
                "",
            )
            .lower()
            .strip()
        )
        last = draft.rpartition("answer:")[2].strip()
        return bool(option and option in draft) or last[:2] in (f"{gold}.", gold)
    return gold in draft


CONFIDENCE = re.compile(r" \(confidence [\d.]+\)")
"""What SuperICL adds to the weak model's answer."""
FORMATS = (
    ("collaboration_sft", "collaboration"),
    ("direct_sft", "direct"),
    ("reasoning_sft", "reasoning"),
)
"""The arms of each format of drafts, before and after preference tuning."""


def _runs_by_name(comparison: Comparison) -> dict[str, list[ComparedArm]]:
    """The runs of each arm, one for each seed."""
    arms = defaultdict[str, list[ComparedArm]](list)
    for one in comparison.arms:
        arms[one.arm.name].append(one)
    return arms


def claims(comparison: Comparison) -> str:
    """A Markdown table: the paper's two claims in each format of drafts, as differences of an arm
    less another, in points.

    On the examples that both answered; 95 % interval and p (two-sided, of one test: not corrected
    for the number of them), and the smallest difference that could have been shown.
    """
    arms = _runs_by_name(comparison)
    asked = [
        (after, other)
        for before, after in FORMATS
        for other in (comparison.against, "weak", before)
    ]
    lines = [
        "| arm | less | points \\[95 %\\] | p | better, worse of n | could show |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for name, other in asked:
        if name not in arms or other not in arms:
            continue
        test = paired_test(arms[name], arms[other])
        told = escape_markdown(format_difference(test))
        chance, counts = (
            escape_markdown(bare_p(test.p)),
            f"{test.higher}, {test.lower} of {test.answers}",
        )
        lines.append(
            f"| {arms[name][0].arm.title} | {arms[other][0].arm.title} | {told} | {chance} | "
            f"{counts} | {format_detectable(test)} |"
        )
    return "\n".join(lines)


# The pages


def section(comparison: Comparison, command: str) -> str:
    """The tables of one part's page."""
    return "\n\n".join(
        [
            to_markdown(comparison, compute_numbers(comparison)).rstrip(),
            "### The two claims",
            claims(comparison),
            "### What drafts did",
            effects(comparison),
            f"Command: `{command}`",
        ]
    )


CLAIMS = ("better than the strong model alone", "better than the weak model alone", "tuning adds")
HEAD = (
    "| domain | claim | points \\[95 %\\] | n | seeds | could show | verdict |",
    "|---|---|---:|---:|---:|---:|---|",
)


def summary(part: str, comparison: Comparison) -> list[str]:
    """The rows of a part in the summary, one for each claim: of the first format of drafts that was
    run, after preference tuning."""
    arms = _runs_by_name(comparison)
    before, after = next((pair for pair in FORMATS if pair[1] in arms), FORMATS[0])
    tests = [one for one in compute_numbers(comparison).controls if one.target == after]
    beaten = sum(one.holm < ALPHA and (one.test.difference or 0) > 0 for one in tests)
    rows: list[str] = []
    for claim, other in zip(CLAIMS, (comparison.against, "weak", before), strict=True):
        if after not in arms or other not in arms:
            continue
        test = paired_test(arms[after], arms[other])
        found = verdict(test)
        if other == before and tests:
            found += f"; beats {beaten} of {len(tests)} controls"
        told = f"{format_difference(test)}, {format_p(test.p)}"
        n, seeds = len(arms[after][0].arm.answers), len(arms[after])
        rows.append(
            f"| [{part}](results/{part}.md) | {claim} | {escape_markdown(told)} | {n} | {seeds} | "
            f"{format_detectable(test)} | {found} |"
        )
    return rows


def verdict(test: PairedTest) -> str:
    """What a test says of a claim."""
    if test.p < ALPHA:
        return "**yes**" if (test.difference or 0) > 0 else "no: worse"
    return explain_chance(test, SMALLEST) or "not shown"


def write_results(part: str, tables: str, rows: Sequence[str], docs: Path = DOCS) -> None:
    """Write a part's tables into its page, and its rows into the summary, between their marks;
    what else stands there, and the rows of other parts, are left as they are."""
    put(docs / f"results/{part}.md", BEGIN, END, tables)
    page = docs / "RESULTS.md"
    old = page.read_text(encoding="utf-8").partition(SUMMARY)[2].partition(SUMMARY_END)[0]
    known = {
        one: [line for line in old.splitlines() if line.startswith(f"| [{one}](")] for one in PARTS
    }
    known[part] = list(rows)
    put(page, SUMMARY, SUMMARY_END, "\n".join([*HEAD, *chain.from_iterable(known.values())]))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--domains", nargs="+", choices=DOMAINS, default=list(DOMAINS))
    parser.add_argument(
        "--data",
        type=Path,
        default=ROOT.parent / "shared/data",
        help="a folder with a folder for each domain",
    )
    parser.add_argument(
        "--hub",
        action="store_true",
        help="read what the recipes read by themselves, over the network",
    )
    parser.add_argument(
        "--runs", type=Path, default=ROOT / "runs/quality", help="where the runs are kept"
    )
    parser.add_argument("--core", action="store_true", help="only the arms that the claims need")
    parser.add_argument(
        "--seeds",
        nargs="*",
        type=int,
        help="the part with several seeds (0 1 2 by default), all rows, and every control",
    )
    parser.add_argument("--arms", nargs="+", help="only these arms")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--table-only",
        action="store_true",
        help="only write docs/ from finished comparisons",
    )
    given = parser.parse_args()
    console = Console()
    arms: Sequence[str] | None = given.arms or (CORE if given.core else None)
    seeds: list[int] = [] if given.seeds is None else given.seeds or [0, 1, 2]
    for domain in [domain for domain in given.domains if not seeds or domain in SEEDED]:
        part = f"{domain}-seeds" if seeds else domain
        data: Path | None = None if given.hub or domain == MADE_UP else given.data
        missing = folder_of(domain, data) / "train.jsonl" if data else None
        if missing and not given.table_only and not missing.is_file():
            sys.exit(
                f"There is no {missing}: put the rows there, name another folder (--data), or use "
                "--hub."
            )
        if given.table_only:
            made = read_comparison(given.runs / part / "comparison")
        else:
            config = settings(domain, data, given.seed, seeds)
            made = run(config, given.runs / part, arms)
        print_comparison(made, console)
        asked = (
            f" --seeds {' '.join(map(str, seeds))}"
            if seeds
            else " --core"
            if {one.arm.name for one in made.arms} <= set(CORE)
            else ""
        )
        tables = section(
            replace(made, title=f"{part}: comparison"),
            f"python benchmarks/quality.py --domains {domain}{asked}",
        )
        write_results(part, tables, summary(part, made))


if __name__ == "__main__":
    report_errors(main)
