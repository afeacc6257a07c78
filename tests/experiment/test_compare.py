"""``cowest compare`` on a toy task: a tiny weak model that is really tuned, a strong model that is
a rule, every kind of arm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from compare_task import ALL_ARMS, compared, declared
from compare_task import task as task
from typer.testing import CliRunner

from cowest_dspy import Experiment, load_config
from cowest_dspy.errors import ConfigError
from cowest_dspy.experiment import Compared
from cowest_dspy.experiment.arms import answerer
from cowest_dspy.experiment.config import overridden
from cowest_dspy.report.compared import Comparison


def by_name(made: Comparison) -> dict[str, Any]:
    return {one.arm.name: one for one in made.arms}


def test_every_kind_of_arm_answers_the_same_examples_and_a_second_time_nothing_is_asked(
    task: list[Path], tmp_path: Path
) -> None:
    files = declared(task, ALL_ARMS)
    made, calls = compared(files, tmp_path / "run")
    found = by_name(made)
    assert list(found) == [
        "alone", "thought", "criticised", "voted", "weak", "bare", "rag", "grounded", "plugin", "before", "after", "mine", "oracle",
        "control_shuffled", "control_other",
    ]  # fmt: skip
    assert made.target == "after" and not made.warnings
    assert made.controls == {"after": ("control_shuffled", "control_other")}
    assert {tuple(answer.example_id for answer in one.arm.answers) for one in found.values()} == {
        tuple(f"test{i}" for i in range(6))
    }
    scores = {name: [answer.score for answer in one.arm.answers] for name, one in found.items()}
    assert scores["alone"] == scores["thought"] == scores["voted"] == [0.0] * 6
    assert scores["oracle"] == scores["rag"] == [1.0] * 6, (
        "the passages of the train questions have three vowels"
    )
    assert found["oracle"].extra == {"length": 0.5, "share": 1.0} and found[
        "oracle"
    ].extra_intervals["share"] == (1.0, 1.0)
    assert found["alone"].cost is not None and found["alone"].cost.calls == 6

    again, calls_again = compared(files, tmp_path / "run")
    assert calls_again == calls
    assert again.arms == made.arms


def test_an_arm_that_was_asked_for_alone_is_the_only_one(task: list[Path], tmp_path: Path) -> None:
    files = declared(task, ALL_ARMS)
    made, calls = compared(files, tmp_path / "run", only=["alone"])
    assert list(by_name(made)) == ["alone"] and calls == 6
    with pytest.raises(ConfigError, match=r'no arm "alon".*Did you mean "alone"'):
        compared(files, tmp_path / "run", only=["alon"])


def test_arms_of_transfer_have_another_strong_model(task: list[Path], tmp_path: Path) -> None:
    recipe = task[0].parent / "toy.py"
    recipe.write_text(
        recipe.read_text()
        + """
def other():
    return ScriptedEngine(lambda request: "yes" if "Background" not in request["messages"][-1]["content"] else "no")
"""
    )
    arms = """
[compare]
against = "alone"
[compare.arms.alone]
kind = "alone"
[compare.arms.both]
kind = "collaboration"
[compare.arms.other_alone]
kind = "alone"
transfer = true
[compare.arms.other_both]
kind = "collaboration"
transfer = true
[compare.arms.other_oracle]
kind = "oracle"
transfer = true
"""
    with pytest.raises(ConfigError, match=r"arms.other_alone has transfer = true: it needs \[comp"):
        load_config(declared(task, arms))
    table = '[compare.transfer]\nkind = "engine"\nengine = "toy.py:other"\nmodel = "engine/other"\n'
    made, _ = compared(declared(task, arms + table), tmp_path / "run")
    found = by_name(made)
    right = {name: [answer.score for answer in one.arm.answers] for name, one in found.items()}
    assert right["alone"] == right["other_oracle"] == [0.0] * 6
    assert set(right["other_both"]) <= {0.0, None}, "of a draft that was cut off there is no answer"
    assert right["other_alone"] == [1.0] * 6
    assert found["other_both"].arm.title == "collaboration, after SFT, another strong model"
    assert [answer.draft for answer in found["other_both"].arm.answers] == [
        answer.draft for answer in found["both"].arm.answers
    ]
    assert made.target == "collaboration", "an arm of transfer is not what the verdict is about"
    config = load_config(declared(task, arms + table + "concurrency = 3\n"))
    with Experiment(config, tmp_path / "other") as experiment:
        rules = config.compare.arms if config.compare else {}
        threads = {
            name: answerer(experiment, rules[name]).num_threads for name in ("alone", "other_alone")
        }
    assert threads == {"alone": config.at_once("strong"), "other_alone": 3}
    wrong = '[compare.arms.weak]\nkind = "weak"\ntransfer = true\n'
    with pytest.raises(ConfigError, match='no "transfer": it takes weak, shots'):
        load_config(declared(task, arms + table + wrong))


def test_a_module_whose_code_has_changed_is_asked_anew(task: list[Path], tmp_path: Path) -> None:
    """Before, an arm of a file that is not the task's own was taken from the run as it had once
    been."""
    other = task[0].parent / "mine.py"
    other.write_text('import dspy\n\ndef make():\n    return dspy.Predict("question -> answer")\n')
    arms = (
        '[compare]\nagainst = "mine"\n[compare.arms.mine]\nkind = "module"\nprogram = '
        '"mine.py:make"\n'
    )
    files = declared(task, arms)
    _, calls = compared(files, tmp_path / "run")
    other.write_text(other.read_text().replace('"question', '"question: str'))
    with Experiment(load_config(files), tmp_path / "run") as experiment:
        before = experiment.store.record("compared", "mine")
    compared(files, tmp_path / "run")
    with Experiment(load_config(files), tmp_path / "run") as experiment:
        after = experiment.store.record("compared", "mine")
    assert before and after and before["identity"] != after["identity"] and calls == 6


def test_arms_share_the_answers_that_they_have_in_common(task: list[Path], tmp_path: Path) -> None:
    twice = (
        '[compare]\nagainst = "one"\n[compare.arms.one]\nkind = '
        '"alone"\n[compare.arms.two]\nkind = "strong"\n'
    )
    made, calls = compared(declared(task, twice), tmp_path / "run")
    assert calls == 6, "a strong model that answers directly is the one alone"
    one, two = made.arms
    assert one.arm.answers == two.arm.answers


@pytest.mark.slow
def test_seeds_are_runs_of_their_own_that_share_what_is_greedy(
    task: list[Path], tmp_path: Path
) -> None:
    arms = (
        '[compare]\nagainst = "alone"\nseeds = [0, 1]\n[compare.arms.alone]\nkind = "alone"\n'
        '[compare.arms.after]\nkind = "collaboration"\nweak = "tuned"\n'
    )
    made, calls = compared(declared(task, arms), tmp_path / "run")
    assert [(one.arm.name, one.seed) for one in made.arms] == [
        ("alone", 0),
        ("after", 0),
        ("after", 1),
    ]
    with Experiment(load_config(declared(task, arms)), tmp_path / "run") as experiment:
        part = experiment.store.within("seed-1")
        adapters = [store.records("adapter")["dpo"]["model"] for store in (experiment.store, part)]
        assert adapters[0] != adapters[1], "another seed is another training"
        assert Compared(experiment).run().arms == made.arms
        assert experiment.store.calls() == calls


@pytest.mark.slow
def test_a_sweep_gives_a_point_for_each_combination(task: list[Path], tmp_path: Path) -> None:
    sweep = (
        '[pairs]\nleast = 2\nstrategy = "all"\n[compare]\n[compare.sweep]\n"pairs.most" = [2, 4]\n'
    )
    made, _ = compared(declared(task, sweep), tmp_path / "run")
    assert [(point.settings, point.pairs) for point in made.sweep] == [
        ({"pairs.most": 2}, 2),
        ({"pairs.most": 4}, 4),
    ]
    assert (tmp_path / "run/variants/pairs.most-2/pairs.jsonl").read_text().count("\n") == 2


def test_another_draft_format_is_a_variant_with_its_own_drafts_in_the_same_store(
    task: list[Path], tmp_path: Path
) -> None:
    arms = (
        '[compare]\nagainst = "alone"\n[compare.arms.alone]\nkind = "alone"\n'
        '[compare.arms.direct]\nkind = "collaboration"\nweak = "base"\ndraft = "direct"\n'
        '[compare.arms.knowledge]\nkind = "collaboration"\nweak = "base"\n'
    )
    made, _ = compared(declared(task, arms), tmp_path / "run")
    found = by_name(made)
    assert "draft = direct" in found["direct"].arm.title
    with Experiment(load_config(declared(task, arms)), tmp_path / "run") as experiment:
        assert set(experiment.store.within("draft-direct").records("compared")) == {"direct"}
        assert set(experiment.store.records("compared")) == {"alone", "knowledge"}


def test_an_arm_that_cannot_be_tuned_is_left_out_and_said(task: list[Path], tmp_path: Path) -> None:
    arms = (
        '[pairs]\nleast = 500\n[compare]\nagainst = "alone"\n[compare.arms.alone]\nkind = "alone"\n'
        '[compare.arms.after]\nkind = "collaboration"\nweak = "tuned"\n'
    )
    made, _ = compared(declared(task, arms), tmp_path / "run")
    assert list(by_name(made)) == ["alone"]
    assert len(made.warnings) == 1 and "left out" in made.warnings[0] and "500" in made.warnings[0]


def test_the_budget_holds_over_all_arms(task: list[Path], tmp_path: Path) -> None:
    from cowest_dspy.errors import BudgetError

    arms = (
        '[budget]\nstrong_calls = 8\n[compare]\nagainst = "alone"\n[compare.arms.alone]\nkind = '
        '"alone"\n'
        '[compare.arms.direct]\nkind = "collaboration"\nweak = "base"\ndraft = "direct"\n'
    )
    with pytest.raises(BudgetError, match="strong_calls"):
        compared(declared(task, arms), tmp_path / "run")
    with Experiment(load_config(declared(task, arms)), tmp_path / "run") as experiment:
        assert experiment.store.bill("scripted/strong").strong_calls == 8


@pytest.mark.parametrize(
    ("compare", "message"),
    [
        ('[compare]\nagainst = "x"\n[compare.arms.y]\nkind = "alone"', 'against names "x"'),
        ('[compare]\nagainst = "alone"', "nothing to compare"),
        (
            '[compare]\nagainst = "y"\n[compare.arms.y]\nkind = "alone"\nshots = 2',
            'kind "alone" has no "shots"',
        ),
        ('[compare]\nagainst = "y"\n[compare.arms.y]\nkind = "rag"', 'needs "corpus"'),
        ('[compare]\nagainst = "y"\n[compare.arms.y]\nkind = "aloan"', "compare.arms.y.kind"),
        ('[compare]\nagainst = "a/b"\n[compare.arms."a/b"]\nkind = "alone"', "letters, digits"),
        ('[compare]\n[compare.sweep]\n"pairs.most" = []', "needs a list of values"),
    ],
)
def test_what_is_wrong_in_compare_is_said_before_anything_is_asked(
    task: list[Path], compare: str, message: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        load_config(declared(task, compare))
    assert message in str(raised.value)


def test_a_configuration_without_compare_says_how_to_declare_it(
    task: list[Path], tmp_path: Path
) -> None:
    with (
        Experiment(load_config(task), tmp_path / "run") as experiment,
        pytest.raises(ConfigError, match=r"\[compare.arms.NAME\]"),
    ):
        Compared(experiment)


def test_a_sweeps_paths_are_relative_to_its_file_and_its_keys_are_checked(
    task: list[Path], tmp_path: Path
) -> None:
    files = declared(
        task, '[compare]\n[compare.sweep]\n"strong" = [{ kind = "in_process", model = "./big" }]\n'
    )
    config = load_config(files)
    assert config.compare is not None
    (value,) = config.compare.sweep["strong"]
    assert value["model"] == str(tmp_path / "big")
    assert overridden(config, {"strong": value}).strong.model == str(tmp_path / "big")
    with pytest.raises(ConfigError, match="no such key"):
        overridden(config, {"pairs.moist": 3})


def test_the_verb_prints_the_table_and_writes_the_files(task: list[Path], tmp_path: Path) -> None:
    from cowest_dspy.cli.main import app

    arms = (
        '[compare]\nagainst = "alone"\n[compare.arms.alone]\nkind = '
        '"alone"\n[compare.arms.oracle]\nkind = "oracle"\n'
    )
    files = declared(task, arms)
    result = CliRunner().invoke(app, ["compare", *map(str, files), "--run", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    assert "ceiling" in result.output and "+100.0" in result.output
    written = json.loads((tmp_path / "run/comparison/comparison.json").read_text())
    assert [one["arm"]["name"] for one in written["arms"]] == ["alone", "oracle"]
    (line,) = json.loads(CliRunner().invoke(app, ["runs", str(tmp_path / "run"), "--json"]).output)
    assert line["verdict"].startswith("Better than strong alone") or "No arm" in line["verdict"]


def test_drafts_that_are_all_one_text_are_said(task: list[Path], tmp_path: Path) -> None:
    """A drafter that says one thing of everything gains by how often that is right; nothing gave a
    sign of it before."""
    recipe = task[0].parent / "toy.py"
    recipe.write_text(
        recipe.read_text()
        .replace('"test": 6', '"test": 24')
        .replace('return [f"train {i}? a e i" for i in range(8)] + ["x", "y"]', 'return ["a e i"]')
    )
    arms = (
        '[compare]\nagainst = "alone"\n[compare.arms.alone]\nkind = "alone"\n'
        '[compare.arms.rag]\nkind = "rag"\ncorpus = "toy.py:passages"\npassages = 1\n'
    )
    made, _ = compared(declared(task, arms), tmp_path / "run")
    (said,) = made.warnings
    assert (
        "Drafts hardly depend on their inputs" in said
        and f"{by_name(made)['rag'].arm.title} (24 of 24)" in said
    )
    assert "alone" not in said.partition("same text:")[2].partition(". ")[0] and "a e i" not in said


def test_a_later_round_with_too_few_pairs_is_skipped_and_has_one_number_of_pairs(
    task: list[Path], tmp_path: Path
) -> None:
    """It was called rolled back, though nothing was tuned, had 0 pairs in its row and some in the
    sum of all."""
    rows = [
        json.dumps({"prompt": f"{i}", "chosen": "a e i", "rejected": "x"}) + "\n" for i in range(60)
    ]
    (tmp_path / "others.jsonl").write_text("".join(rows))
    changes = (
        '[pairs]\nsource = "others.jsonl"\nleast = 60\n[rounds]\ncount = 2\nleast_gain = '
        "-1\nconfidence = 0.5\n"
    )
    with Experiment(load_config(declared(task, changes)), tmp_path / "run") as experiment:
        experiment.tune()
        report = experiment.report()
    first, second = report.rounds
    assert (first.outcome, first.pairs) == ("accepted", 60)
    assert second.outcome == "skipped" and 0 <= second.pairs < 60
    assert second.reason == f"{second.pairs} pair{'' if second.pairs == 1 else 's'}, 60 needed"
    assert report.pairs is not None and report.pairs.kept == first.pairs + second.pairs


def test_costs_tell_the_stages_of_compare_from_those_of_evaluate(
    task: list[Path], tmp_path: Path
) -> None:
    """Before, "Evaluating strong alone" stood in the table of costs twice."""
    files = declared(task, ALL_ARMS)
    compared(files, tmp_path / "run", only=["alone"])
    with Experiment(load_config(files), tmp_path / "run") as experiment:
        experiment.evaluate(["strong"])
        titles = [stage["title"] for stage in experiment.store.records("stage").values()]
    assert sorted(title for title in titles if title.endswith(" strong alone")) == [
        "Comparing strong alone",
        "Evaluating strong alone",
    ]
