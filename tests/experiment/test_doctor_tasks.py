"""What the doctor finds in a task itself: a domain as `cowest new` writes it is whole, and what is
broken in it is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from cowest_dspy import load_config
from cowest_dspy.cli.scaffold import new_domain
from cowest_dspy.experiment.doctor import Check, examine


@pytest.fixture
def domain(tmp_path: Path) -> Path:
    """A new domain's folder, whose files a test may change."""
    new_domain("loans", tmp_path)
    return tmp_path


def change(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def of_the_task(domain: Path) -> list[Check]:
    """What is found of the task, without any question; [sft] is kept, as with a backend that can be
    tuned."""
    change(domain / "loans_scripted.toml", "[sft]\n", "")
    config = load_config([domain / "loans.toml", domain / "loans_scripted.toml"])
    return [check for check in examine(config, ask=False).checks if check.role == "task"]


def test_a_new_domain_is_whole(domain: Path) -> None:
    assert [(check.level, check.text) for check in of_the_task(domain)] == [
        ("ok", "8 train examples, 4 dev examples, 6 test examples"),
        ("ok", "8 rows, 8 with the instructions that drafts are asked for with"),
    ]


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        ("loans.toml", "loans.py:direct", "loans.py:direkt", 'Did you mean "direct"?'),
        (
            "loans.toml",
            "loans.py:answer_rows",
            "loans.py:answers_rows",
            'Did you mean "answer_rows"?',
        ),
        ("loans.toml", "loans.py:draft_rows", "loans.py:drafts_rows", 'Did you mean "draft_rows"?'),
        ("loans.toml", "loans_metric.py:match", "loans_metric.py:mach", 'Did you mean "match"?'),
        ("loans.toml", 'inputs = ["question"]', 'inputs = ["query"]', '"query" is missing'),
        (
            "loans.toml",
            'oracle = "background"',
            'oracle = "backgrounds"',
            '6 of 6 test examples have no "backgrounds"',
        ),
        (
            "loans.csv",
            "question,answer,background,split",
            "question,answer,notes,split",
            "no column background",
        ),
        ("loans.csv", ",dev\n", ",def\n", "as split one of archive, train, dev, test"),
        (
            "loans.csv",
            "May I keep the ladder for 10 days?",
            "may I keep the ladder for  5 days?",
            "hold the same inputs",
        ),
        ("loans.csv", ",archive", ",train", "no SFT rows"),
        ("loans.py", "drafter = program(draft).draft", "drafter = draft.draft", "AttributeError"),
        ("loans.py", 'row["split"] == split', 'row["splits"] == split', "KeyError: 'splits'"),
    ],
)
def test_what_is_broken_is_an_error_that_names_it(
    domain: Path, file: str, old: str, new: str, said: str
) -> None:
    change(domain / file, old, new)
    wrong = [check.text for check in of_the_task(domain) if check.level == "error"]
    assert len(wrong) == 1 and said in wrong[0]


def test_a_background_that_one_example_lacks_is_an_error_too(domain: Path) -> None:
    change(
        domain / "loans.csv", "The tool library of Ostrel lends the tent for 12 days.,test", ",test"
    )
    checks = of_the_task(domain)
    assert [(check.name, check.level) for check in checks] == [
        ("task", "ok"),
        ("oracle", "error"),
        ("[sft] drafts", "ok"),
    ]
    assert '1 of 6 test examples have no "background"' in checks[1].text


@pytest.mark.parametrize("draft", ["direct", "knowledge", "chain_of_thought"])
def test_each_draft_format_is_taught_as_it_is_asked_for(domain: Path, draft: str) -> None:
    change(domain / "loans.toml", 'draft = "knowledge"', f'draft = "{draft}"')
    assert [check.level for check in of_the_task(domain)] == ["ok", "ok"]


def test_rows_of_another_format_than_drafts_are_warned_of(domain: Path) -> None:
    """A recipe that takes the format and forgets about it."""
    change(
        domain / "loans.py", "drafter = program(draft).draft", 'drafter = program("direct").draft'
    )
    last = of_the_task(domain)[-1]
    assert last.level == "warning" and "8 rows, 0 with the instructions" in last.text


def test_rows_that_the_strong_model_makes_are_not_asked_for(domain: Path) -> None:
    change(domain / "loans.py", "def draft_rows(seed", "def draft_rows(strong, seed")
    assert [check.level for check in of_the_task(domain)] == ["ok"]
