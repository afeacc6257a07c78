"""What stands between a collaboration on GeoQuery and the best of its two models, several folds
counted together: who is right, what their SQL gives when it is run, and what each arm is worth.

    python benchmarks/drafts_of_sql.py FOLDER/geography.sqlite runs/geoquery-?    # of cowest compare

Of the arms "alone", "weak" and "collaboration_sft", and whichever others all the runs have. Where
every draft was shown (``program``), a row "checked NAME" says what the collaboration would have been
that shows it only where the strong model's own SQL gives nothing (``checked``): its prompts are the
same, so that its answers are known. Where preference pairs were made, how many of their chosen
drafts are wrong themselves.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

from cowest_dspy.influence.arms import Answer
from cowest_dspy.influence.statistics import wilson_interval
from cowest_dspy.influence.trace import Trace, Traces
from cowest_dspy.pairs.dataset import PreferencePairs
from cowest_dspy.report.compare_view import read_comparison
from cowest_dspy.report.significance import compare_scores
from cowest_dspy.report.verdict import format_detectable, format_difference, format_p
from cowest_dspy.store.store import Store
from cowest_dspy.utils.importing import load_function
from cowest_dspy.utils.sql import run_query

RECIPE = Path(__file__).resolve().parent.parent / "programs/geoquery.py"
result_text, gives_nothing = (
    load_function(f"{RECIPE}:{name}") for name in ("result_text", "gives_nothing")
)
COLLABORATIONS = ("collaboration_sft", "collaboration")
AGAINST = (
    "alone", "alone_repaired", "weak", "weak_tuned", "collaboration_sft", "checked collaboration_sft",
)  # fmt: skip


def main(database: Path, runs: list[Path]) -> None:
    """Print the tables."""
    answers: dict[str, dict[str, Answer]] = {}
    for run in runs:
        for one in read_comparison(run / "comparison" / "comparison.json").arms:
            of_arm = {answer.example_id: answer for answer in one.arm.answers}
            answers.setdefault(one.arm.name, {}).update(of_arm)
    alone = answers["alone"]
    fails = {
        one
        for one, mine in alone.items()
        if gives_nothing(result_text(run_query(database, mine.answer or "")))
    }
    for name in COLLABORATIONS:
        if name in answers:
            answers[f"checked {name}"] = {
                example: shown if example in fails else alone[example]
                for example, shown in answers[name].items()
            }
    asked = alone.keys()
    scores = {
        arm: {example: answer.score for example, answer in of_arm.items()}
        for arm, of_arm in answers.items()
        if of_arm.keys() == asked
    }
    print("| arm | right | failed | " + " | ".join(f"less {name}" for name in AGAINST) + " |")
    print("|---|---:|---:|" + "---:|" * len(AGAINST))
    for arm, found in scores.items():
        right = sum(score or 0 for score in found.values())
        failed = sum(score is None for score in found.values())
        cells = [
            _less(found, scores[name]) if name in scores and name != arm else "-"
            for name in AGAINST
        ]
        span = wilson_interval(int(right), len(found))
        share = (
            f"{right:.0f} of {len(found)}, {100 * right / len(found):.1f} % "
            f"[{100 * span.low:.1f}, {100 * span.high:.1f}]"
        )
        print(f"| {arm} | {share} | {failed} | " + " | ".join(cells) + " |")
    _print_cells(database, answers["alone"], answers["weak"])
    both = answers["collaboration_sft"].values()
    again = sum((one.draft or "").partition("\n")[0] == f"Sql: {one.answer}" for one in both)
    print(f"\nanswers of collaboration_sft that are the draft's SQL: {again}")
    _print_wrong_chosen(runs)


def _less(found: dict[str, float | None], other: dict[str, float | None]) -> str:
    test = compare_scores(found, other)
    return (
        f"{format_difference(test)}, {format_p(test.p)} ({test.higher} better, {test.lower} worse; "
        f"could show {format_detectable(test)})"
    )


def _print_cells(database: Path, alone: dict[str, Answer], weak: dict[str, Answer]) -> None:
    """Right answers by what the SQL of the two models gives, and whether it gives the same."""
    count, right = Counter[tuple[str, ...]](), Counter[tuple[str, ...]]()
    for example, mine in alone.items():
        other = weak[example]
        results = [run_query(database, one.answer or "") for one in (mine, other)]
        gives = ["nothing" if gives_nothing(result_text(one)) else "rows" for one in results]
        cell = (*gives, "yes" if results[0].matches(results[1]) else "no")
        count[cell] += 1
        right[(*cell, "strong")] += mine.score == 1.0
        right[(*cell, "weak")] += other.score == 1.0
    print("\n| strong alone gives | weak alone gives | the same | n | strong right | weak right |")
    print("|---|---|---|---:|---:|---:|")
    for cell in sorted(count, reverse=True):
        told = [count[cell], right[(*cell, "strong")], right[(*cell, "weak")]]
        print(f"| {' | '.join([*cell, *map(str, told)])} |")


def _print_wrong_chosen(runs: list[Path]) -> None:
    """Pairs whose chosen draft is wrong as an answer, by the score of the strong model alone and
    what the two drafts gave when they were run."""
    pairs, wrong = 0, Counter[tuple[float | None, str, str]]()
    for run in runs:
        if not (run / "pairs.jsonl").is_file():
            continue
        with Store(run) as store:
            traces = {(one.example_id, one.draft_index): one for one in Traces.load(store, round=1)}
        for pair in PreferencePairs.load(run / "pairs.jsonl"):
            pairs += 1
            chosen, rejected = (
                traces[pair.example_id, index] for index in (pair.chosen_index, pair.rejected_index)
            )
            if chosen.draft_score == 0:
                wrong[chosen.alone_score, _gives(chosen), _gives(rejected)] += 1
    if pairs:
        print(f"\npairs whose chosen draft is wrong: {wrong.total()} of {pairs}")
        print("\n| strong alone | chosen gives | rejected gives | pairs |\n|---|---|---|---:|")
        for (score, *gives), count in wrong.most_common():
            print(f"| {score} | {' | '.join(gives)} | {count} |")


def _gives(trace: Trace) -> str:
    result = trace.draft.rpartition("\nResult: ")[2]
    return (
        "error" if result.startswith("error: ") else "nothing" if gives_nothing(result) else "rows"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(run) for run in sys.argv[2:]])
