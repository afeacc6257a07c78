"""benchmarks/quality.py: what it says of drafts, and how it writes its page; the runs themselves
take hours."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cowest_dspy.influence.arms import Answer
from cowest_dspy.report import Arm
from cowest_dspy.report.compared import ComparedArm, Comparison
from cowest_dspy.report.significance import compare_scores
from cowest_dspy.utils.importing import load

FILE = Path(__file__).parents[2] / "benchmarks/quality.py"


def quality(name: str) -> Any:
    return load(f"{FILE}:{name}")


def answer(number: int, score: float | None, draft: str | None = None, **more: Any) -> Answer:
    given: dict[str, Any] = {"inputs": {}, "gold": "copper", "answer": "x", **more}
    return Answer(
        example_id=str(number),
        score=score,
        error=None if score is not None else "timeout: slow",
        draft=draft,
        **given,
    )


OPTIONS = {"options": "A. Iron\nB. Copper\nC. Tin\nD. Lead"}


@pytest.mark.parametrize(
    ("draft", "gold", "inputs", "holds"),
    [
        ("It is made of Copper, they say.", "copper", {}, True),
        ("It is made of tin.", "copper", {}, False),
        ("B. Copper", "B", OPTIONS, True),
        ("Reasoning: it is red.\nAnswer: B", "B", OPTIONS, True),
        ("Answer: B. tin", "B", OPTIONS, True),
        ("C. Tin", "B", OPTIONS, False),
        ("Because it conducts.", "B", OPTIONS, False),
        ("B (confidence 0.60)", "B", OPTIONS, True),
        ("A (confidence 1.00)", "B", OPTIONS, False),
        ("copper (confidence 0.20)", "copper", {}, True),
    ],
)
def test_a_draft_holds_the_gold_answer_when_it_says_its_text_or_its_letter(
    draft: str, gold: str, inputs: dict[str, str], holds: bool
) -> None:
    assert quality("holds_gold")(answer(1, 1.0, draft, gold=gold, inputs=inputs)) is holds


def test_a_label_that_stands_in_another_one_is_not_that_one() -> None:
    labels = {"needs caution", "possibly needs caution"}
    holds = quality("holds_gold")
    assert not holds(answer(1, 0.0, "possibly needs caution", gold="needs caution"), labels)
    assert holds(
        answer(1, 1.0, "Reasoning: so\nAnswer: Needs caution.", gold="needs caution"), labels
    )


def comparison() -> Comparison:
    alone = (answer(1, 1.0), answer(2, 0.0), answer(3, 1.0), answer(4, 0.0))
    both = (
        answer(1, 0.0, "tin"),
        answer(2, 1.0, "copper"),
        answer(3, 1.0, "copper"),
        answer(4, None),
    )
    arms = (Arm("alone", "strong alone", alone), Arm("both", "collaboration", both))
    return Comparison(
        "prosocial: comparison",
        "2026-01-01T00:00:00+00:00",
        "alone",
        "match",
        tuple(map(ComparedArm, arms)),
    )


def test_what_drafts_did_counts_recall_help_and_harm() -> None:
    (row,) = [
        line
        for line in quality("effects")(comparison()).splitlines()
        if line.startswith("| collaboration")
    ]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == [
        "collaboration",
        "2 of 3",
        "2 of 2",
        "0 of 1",
        "1 of 1",
        "1 of 2",
        "50 % (9-91)",
    ]


def test_the_two_claims_are_differences_in_each_format_that_was_run() -> None:
    made = comparison()
    arms = {one.arm.name: one.arm for one in made.arms}
    before = replace(arms["alone"], name="direct_sft", title="untuned")
    after = replace(arms["both"], name="direct", title="tuned")
    rows = quality("claims")(
        replace(made, arms=tuple(map(ComparedArm, (arms["alone"], before, after))))
    ).splitlines()[2:]
    # Of four questions three have both answers: one became right, one wrong. There is no weak model
    # alone, and no other format.
    assert [row.split(" | ")[1] for row in rows] == ["strong alone", "untuned"]
    assert all(
        row.startswith("| tuned | ") and "| +0.0 " in row and row.endswith("| 1 | 1, 1 of 3 | - |")
        for row in rows
    )


def test_the_pages_keep_what_was_written_by_hand_and_the_other_domains(tmp_path: Path) -> None:
    write, begin, end = quality("write_results"), quality("BEGIN"), quality("END")
    (tmp_path / "results").mkdir()
    for part in ("ifqa", "prosocial"):
        (tmp_path / f"results/{part}.md").write_text(f"# {part}\n\nBefore.\n\n{begin}\n{end}\n")
    page = tmp_path / "RESULTS.md"
    marks = f"{quality('SUMMARY')}\n{quality('SUMMARY_END')}"
    page.write_text(f"# Results\n\nBefore.\n\n{marks}\n\nAfter.\n")
    write("ifqa", "of ifqa", ["| [ifqa](results/ifqa.md) | first |"], tmp_path)
    write("prosocial", "of prosocial", ["| [prosocial](results/prosocial.md) | a |"], tmp_path)
    write("ifqa", "of ifqa, anew", ["| [ifqa](results/ifqa.md) | anew |"], tmp_path)
    text = page.read_text()
    assert text.startswith("# Results\n\nBefore.") and text.endswith("After.\n")
    assert "first" not in text and text.index("[prosocial]") < text.index("| anew |")
    assert "Before." in (own := (tmp_path / "results/ifqa.md").read_text()) and "anew" in own
    assert "of prosocial" in (tmp_path / "results/prosocial.md").read_text()


def test_the_summary_has_a_row_for_each_claim_with_what_it_could_show_and_a_verdict() -> None:
    made = comparison()
    arms = {one.arm.name: one.arm for one in made.arms}
    before = replace(arms["alone"], name="direct_sft", title="untuned")
    after = replace(arms["both"], name="direct", title="tuned, draft = direct")
    found = (arms["alone"], before, after)
    rows = quality("summary")("ifqa", replace(made, arms=tuple(map(ComparedArm, found))))
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    claims = quality("CLAIMS")
    assert [one[:2] for one in cells] == [
        ["[ifqa](results/ifqa.md)", claims[0]],
        ["[ifqa](results/ifqa.md)", claims[2]],
    ], "there is no weak model alone"
    assert all(one[2].startswith("+0.0 ") and one[2].endswith("p = 1") for one in cells)
    assert [one[3:] for one in cells] == [["4", "1", "-", "not shown"]] * 2


@pytest.mark.parametrize(
    ("right", "wrong", "said"),
    [(20, 0, "**yes**"), (0, 20, "no: worse"), (6, 5, "not enough questions for 5 points")],
)
def test_a_verdict_is_of_the_test_and_says_where_questions_were_too_few(
    right: int, wrong: int, said: str
) -> None:
    mine = {str(n): float(n < right or n >= 20 + wrong) for n in range(60)}
    other = {str(n): float(n >= 20) for n in range(60)}
    test = compare_scores(mine, other)
    assert (test.higher, test.lower) == (right, wrong)
    assert quality("verdict")(test).startswith(said)


def test_a_section_has_the_table_the_effects_and_the_command() -> None:
    text = quality("section")(comparison(), "python benchmarks/quality.py")
    assert (
        "### What drafts did" in text
        and "`python benchmarks/quality.py`" in text
        and "strong alone" in text
    )


def test_the_sizes_are_keys_of_every_domain() -> None:
    for domain in quality("DOMAINS"):
        config = quality("settings")(domain, None, 3)
        own = {"handbook": 60, "ifqa_passages": 300}  # The sizes of their own TOMLs.
        assert config.seed == 3
        assert config.data.test == own.get(domain, quality("SIZES")["data.test"])
        assert config.compare is not None and {"alone", "collaboration"} <= set(config.compare.arms)


def test_the_part_with_seeds_teaches_all_rows_and_asks_all_of_test() -> None:
    config = quality("settings")("prosocial", Path("rows"), 0, seeds=(4, 5))
    assert config.compare is not None and config.compare.seeds == (4, 5)
    assert config.draft == "direct" and config.data.test is not None and config.sft
    assert config.sft.answers is None and "max_steps" not in config.sft.settings
    assert str(config.data.rows).endswith("rows/prosocial")
    assert quality("folder_of")("ifqa_passages", Path("rows")) == Path("rows/ifqa")
