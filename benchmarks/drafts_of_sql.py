"""What stands between a collaboration on GeoQuery and the best of its two models: who is right, which
drafts show that they are wrong, and how often the strong model writes the draft again.

    python benchmarks/drafts_of_sql.py runs/geoquery-*    # of runs that cowest compare has made

Runs of several folds are counted together. Of the arms "alone", "weak", "collaboration_sft" and "rule",
which keeps SQL that gives something, and asks the strong model alone for the others.
"""

from __future__ import annotations

import sys
from pathlib import Path

from cowest_dspy.influence.arms import Answer
from cowest_dspy.report.compare_view import read_comparison
from cowest_dspy.report.significance import compare_scores
from cowest_dspy.report.verdict import format_difference, format_p
from cowest_dspy.utils.importing import load_function

RECIPE = Path(__file__).resolve().parent.parent / "programs/geoquery.py"


def main(runs: list[Path]) -> None:
    """Print the counts."""
    answers: dict[str, dict[str, Answer]] = {}
    for run in runs:
        for one in read_comparison(run / "comparison" / "comparison.json").arms:
            of_arm = {answer.example_id: answer for answer in one.arm.answers}
            answers.setdefault(one.arm.name, {}).update(of_arm)
    right = {
        arm: {example: found.score or 0.0 for example, found in of_arm.items()}
        for arm, of_arm in answers.items()
    }
    weak, alone, rule = right["weak"], right["alone"], right["rule"]
    both = answers["collaboration_sft"]
    features = load_function(f"{RECIPE}:WriteAndRun")("").draft_features
    shows = {one: any(features(found.draft or "").values()) for one, found in both.items()}
    again = sum(
        (found.draft or "").partition("\n")[0] == f"Sql: {found.answer}" for found in both.values()
    )
    union = sum(max(weak[one], alone[one]) for one in both)
    print(f"questions {len(both)}; right by one of the two models: {union:.0f}")
    print(f"only weak {sum(weak[one] > alone[one] for one in both)}, ", end="")
    print(f"only strong {sum(weak[one] < alone[one] for one in both)}")
    print(f"drafts that fail or give nothing: {sum(shows.values())}", end="")
    print(f", right ones among them: {sum(weak[one] for one in both if shows[one]):.0f}")
    print(f"answers that are the draft's SQL again: {again}")
    print(f"the rule is right on {sum(rule.values()):.0f}")
    for name in ("weak", "alone"):
        test = compare_scores(rule, right[name])
        print(f"  less {name}: {format_difference(test)} points, {format_p(test.p)}")


if __name__ == "__main__":
    main([Path(run) for run in sys.argv[1:]])
