"""What preference tuning gains for each answer of the strong model: the drafts of a round of the
handbook, and parts of them, each tuned on by itself and tested on all 240 questions.

    python benchmarks/strong_calls.py                    # seed 0: after make demo some 15 minutes
    python benchmarks/strong_calls.py --seeds 0 1 2      # each further seed fine-tunes and collects, too

A part is what a collection that asks less would have made: drafts keep their order and their seeds.
The strong model is asked once alone for each question, and once for each draft of which it has not
seen the same text before. The runs are those of make evidence (runs/evidence/seed-N), resumable. At
the end the table in docs/influence.md is written anew.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import dspy
import evidence
from marked import put
from rich.console import Console

from cowest_dspy import Experiment
from cowest_dspy.cli.main import report_errors
from cowest_dspy.cli.progress import Progress
from cowest_dspy.influence.arms import ask_all, collaboration_arm
from cowest_dspy.influence.trace import Sampling, Trace
from cowest_dspy.pairs.select import preference_pairs
from cowest_dspy.report.significance import Scores, compare_seeds
from cowest_dspy.report.verdict import format_difference, format_p
from cowest_dspy.report.view import escape_markdown
from cowest_dspy.tuning.provider import tune

PAGE = evidence.ROOT / "docs/influence.md"
BEGIN, END = "<!-- calls: written by benchmarks/strong_calls.py -->", "<!-- end of calls -->"
WHOLE = "four drafts"


class Part(NamedTuple):
    """The questions of a collection with the drafts of each that are judged; those without a draft
    cost an answer alone."""

    questions: list[list[Trace]]

    @property
    def answers(self) -> int:
        """Answers of the strong model."""
        return sum(1 + len({one.completion for one in drafts}) for drafts in self.questions)


class Outcome(NamedTuple):
    """What a part cost and gave under one seed."""

    answers: int
    pairs: int
    scores: dict[str, float]


def two(whole: Part, _: Sampling) -> Part:
    """The first two drafts of each question."""
    return Part([drafts[:2] for drafts in whole.questions])


def half(whole: Part, _: Sampling) -> Part:
    """All drafts of every second question."""
    return Part(whole.questions[::2])


def adaptive(whole: Part, sampling: Sampling) -> Part:
    """As [collect] adaptive = true does: two drafts, then one at a time while it is worth while."""
    return Part(
        [
            next(
                (
                    drafts[:count]
                    for count in range(2, len(drafts))
                    if sampling.enough(drafts[:count])
                ),
                drafts,
            )
            for drafts in whole.questions
        ]
    )


def where_alone_fails(whole: Part) -> Part:
    """The drafts of the questions that the strong model gets wrong alone: elsewhere none can
    help."""
    return Part([drafts if _wrong(drafts) else [] for drafts in whole.questions])


def _wrong(drafts: list[Trace]) -> bool:
    return any(one.alone_score is not None and one.alone_score < 1 for one in drafts)


POLICIES: dict[str, Callable[[Part, Sampling], Part]] = {
    WHOLE: lambda whole, _: whole,
    "adaptive": adaptive,
    "adaptive, where the strong model alone is wrong": lambda whole, sampling: where_alone_fails(
        adaptive(whole, sampling)
    ),
    "two drafts": two,
    "four drafts, half of the questions": half,
}


def measure(seed: int, runs: Path, reuse: list[Path]) -> dict[str, Outcome]:
    """Every policy under one seed, and the collaboration before tuning as "none"."""
    folder = evidence.run_of(seed, runs)
    made: dict[str, Outcome] = {}
    config = evidence.settings(seed, None)
    with Experiment(config, folder, progress=Progress(), reuse=reuse) as experiment:
        drafter = experiment.sft()
        traces = groupby(experiment.collect(), key=lambda trace: trace.example_id)
        whole = Part([list(drafts) for _, drafts in traces])

        def scores(weak: dspy.LM) -> dict[str, float]:
            program = experiment.program.bind(weak=weak, strong=experiment.strong)
            answers = ask_all(
                collaboration_arm(program),
                experiment.splits["test"],
                experiment.metric,
                store=experiment.store,
                num_threads=config.at_once("strong"),
            )
            return {one.example_id: float(one.score == 1.0) for one in answers}

        made["none"] = Outcome(0, 0, scores(drafter))
        for name, policy in POLICIES.items():
            part = policy(whole, experiment.sampling)
            drafts = (one for drafts in part.questions for one in drafts)
            pairs = preference_pairs(drafts, **experiment.rounds.pairing)
            output = folder / "strong-calls" / name.replace(" ", "-").replace(",", "")
            weak = tune(drafter, pairs, experiment.settings.preferring, output, seed=seed)
            made[name] = Outcome(part.answers, len(pairs), scores(weak.lm))
            right = sum(made[name].scores.values())
            experiment.context.say(
                f"{name}: {part.answers} answers, {len(pairs)} pairs, {right:.0f} right"
            )
    return made


def table(outcomes: dict[int, dict[str, Outcome]]) -> str:
    """The Markdown table, all seeds together."""
    seeds = list(outcomes)
    lines = [
        "| which drafts are judged | answers of the strong model | of all | pairs | right on test | "
        "less before tuning, points | less all drafts, points |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    whole = sum(outcomes[seed][WHOLE].answers for seed in seeds)
    for name in ("none", *POLICIES):
        found = [(seed, outcomes[seed][name]) for seed in seeds]
        answers = sum(one.answers for _, one in found)
        right = sum(sum(one.scores.values()) for _, one in found)
        asked = sum(len(one.scores) for _, one in found)
        mine = [(seed, one.scores) for seed, one in found]
        cells = [
            "-" if name in (other, "none") else _less(mine, outcomes, other)
            for other in ("none", WHOLE)
        ]
        pairs = sum(one.pairs for _, one in found)
        lines.append(
            f"| {'none: before tuning' if name == 'none' else name} | {answers} | "
            f"{100 * answers / whole:.0f} % | {pairs} | {right:.0f} of {asked} | "
            + " | ".join(cells)
            + " |"
        )
    return "\n".join(lines)


def _less(
    mine: Sequence[tuple[int, Scores]], outcomes: dict[int, dict[str, Outcome]], other: str
) -> str:
    test = compare_seeds(mine, [(seed, outcomes[seed][other].scores) for seed, _ in mine])
    return escape_markdown(f"{format_difference(test)}, {format_p(test.p)}")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--runs",
        type=Path,
        default=evidence.ROOT / "runs/evidence",
        help="where the runs are kept",
    )
    given = parser.parse_args()
    outcomes: dict[int, dict[str, Outcome]] = {}
    for seed in given.seeds:
        earlier = [given.runs / f"seed-{before}" for before in outcomes]
        outcomes[seed] = measure(seed, given.runs, earlier)
    text = table(outcomes)
    put(PAGE, BEGIN, END, text)
    Console(highlight=False).print(text, markup=False)


if __name__ == "__main__":
    report_errors(main)
