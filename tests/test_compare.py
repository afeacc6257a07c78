"""``cowest compare`` on a toy task: a tiny weak model that is really tuned, a strong model that is a rule, every kind of arm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import toy
from typer.testing import CliRunner

from cowest_dspy import Experiment, load_config
from cowest_dspy.comparison import Comparison
from cowest_dspy.config import overridden
from cowest_dspy.errors import ConfigError, PairsError, RecipeError
from cowest_dspy.experiment import Compared
from cowest_dspy.experiment.compared_arms import depends_on_seed, title_of
from cowest_dspy.experiment.controls import by_correctness, other_draft_arm, shuffled
from cowest_dspy.recipes import call
from cowest_dspy.store import Store
from cowest_dspy.tables import ArmRules

RECIPE = (
    toy.RECIPE
    + '''
import dspy
from cowest_dspy import LineAdapter, corpus_metric

ASKED = []

def rows(split, seed=0, rows=None):
    count = {"train": 8, "dev": 3, "test": 6}[split]
    same = {"answer": "yes", "notes": "all vowels: a e i o u"}
    return [{"id": f"{split}{i}", "question": f"{split} {i}?", **same} for i in range(count)]

def sft_rows(seed=0, draft="knowledge"):
    texts = ["a e i", "b c d", "o u a", "x"]
    return [{"prompt": [{"role": "user", "content": f"Question: {i}?"}], "completion": [{"role": "assistant", "content": text}]}
            for i in range(4) for text in texts]

def answers(seed=0):
    return sft_rows()

def passages(seed=0):
    return [f"train {i}? a e i" for i in range(8)] + ["x", "y"]

def program(draft="knowledge"):
    return Collaboration("question -> answer", draft=draft, adapter=LineAdapter())

def direct():
    return dspy.Predict("question -> answer")

def length(example, prediction, trace=None):
    return 1.0 if len(prediction.answer) < 3 else 0.5

@corpus_metric
def share(examples, predictions):
    return sum(one is not None and one.answer == "yes" for one in predictions) / len(examples)

def strong():
    """Says yes to a background with at least three different vowels in it; alone it says no. Feedback and reasoning are given."""
    def answer(request):
        ASKED.append(request)
        text = request["messages"][-1]["content"]
        said = "yes" if len(set("aeiou") & set(text.partition("Background: ")[2])) >= 3 else "no"
        if "easoning" in request["messages"][0]["content"]:
            return f"Reasoning: so\\nAnswer: {said}"
        return said
    return ScriptedEngine(answer, model="scripted/strong")
'''
)

TRAINING = 'max_steps = 60\nepochs = 60\nlearning_rate = 2e-2\nprecision = "fp32"\n'
TASK = (
    toy.TASK
    + f"""
[sft]
drafts = "toy.py:sft_rows"
answers = "toy.py:answers"
[sft.settings]
{TRAINING}
[sft.answer_settings]
{TRAINING}
[collect]
drafts = 6
max_failed = 1.0
[pairs]
least = 2
[dpo]
max_steps = 2
precision = "fp32"
batch_size = 2
[rounds]
least_gain = -1
confidence = 0.5
[evaluate]
weak = "toy.py:direct"
oracle = "notes"
"""
)

ALL_ARMS = """
[compare]
against = "alone"
also = ["toy.py:length", "toy.py:share"]
[compare.arms.alone]
kind = "alone"
[compare.arms.thought]
kind = "strong"
style = "chain_of_thought"
[compare.arms.criticised]
kind = "self_refine"
[compare.arms.voted]
kind = "self_consistency"
samples = 3
[compare.arms.weak]
kind = "weak"
[compare.arms.bare]
kind = "weak"
weak = "base"
shots = 2
[compare.arms.rag]
kind = "rag"
corpus = "toy.py:passages"
passages = 1
[compare.arms.grounded]
kind = "grounded"
corpus = "toy.py:passages"
[compare.arms.plugin]
kind = "super_icl"
shots = 2
samples = 2
[compare.arms.before]
kind = "collaboration"
[compare.arms.after]
kind = "collaboration"
weak = "tuned"
[compare.arms.mine]
kind = "module"
program = "toy.py:direct"
title = "mine"
[compare.arms.oracle]
kind = "oracle"
[compare.arms.control_shuffled]
kind = "control"
control = "shuffled"
[compare.arms.control_other]
kind = "control"
control = "other_draft"
"""


@pytest.fixture
def task(tmp_path: Path, tiny_model: Path) -> list[Path]:
    """The toy task and its backend, as files; a test adds a file with [compare]."""
    (tmp_path / "toy.py").write_text(RECIPE)
    (tmp_path / "toy.toml").write_text(TASK)
    weak = f'[weak]\nkind = "in_process"\nmodel = "{tiny_model}"\nmax_tokens = 12\n'
    (tmp_path / "backend.toml").write_text(weak + toy.engine("strong"))
    return [tmp_path / "toy.toml", tmp_path / "backend.toml"]


def declared(task: list[Path], compare: str) -> list[Path]:
    file = task[0].parent / "compare.toml"
    file.write_text(compare)
    return [*task, file]


def compared(files: list[Path], run: Path, only: list[str] | None = None) -> tuple[Comparison, int]:
    with Experiment(load_config(files), run) as experiment:
        made = Compared(experiment).run(only)
        return made, experiment.store.calls()


def by_name(made: Comparison) -> dict[str, Any]:
    return {one.arm.name: one for one in made.arms}


def test_every_kind_of_arm_answers_the_same_examples_and_a_second_time_nothing_is_asked(task: list[Path], tmp_path: Path) -> None:
    files = declared(task, ALL_ARMS)
    made, calls = compared(files, tmp_path / "run")
    found = by_name(made)
    assert list(found) == [
        "alone", "thought", "criticised", "voted", "weak", "bare", "rag", "grounded", "plugin", "before", "after", "mine", "oracle",
        "control_shuffled", "control_other",
    ]  # fmt: skip
    assert made.target == "after" and not made.warnings
    assert {tuple(answer.example_id for answer in one.arm.answers) for one in found.values()} == {
        tuple(f"test{i}" for i in range(6))
    }
    scores = {name: [answer.score for answer in one.arm.answers] for name, one in found.items()}
    assert scores["alone"] == scores["thought"] == scores["voted"] == [0.0] * 6
    assert scores["oracle"] == scores["rag"] == [1.0] * 6, "the passages of the train questions have three vowels"
    assert found["oracle"].extra == {"length": 0.5, "share": 1.0} and found["oracle"].extra_intervals["share"] == (1.0, 1.0)
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


def test_arms_share_the_answers_that_they_have_in_common(task: list[Path], tmp_path: Path) -> None:
    twice = '[compare]\nagainst = "one"\n[compare.arms.one]\nkind = "alone"\n[compare.arms.two]\nkind = "strong"\n'
    made, calls = compared(declared(task, twice), tmp_path / "run")
    assert calls == 6, "a strong model that answers directly is the one alone"
    one, two = made.arms
    assert one.arm.answers == two.arm.answers


def test_seeds_are_runs_of_their_own_that_share_what_is_greedy(task: list[Path], tmp_path: Path) -> None:
    arms = (
        '[compare]\nagainst = "alone"\nseeds = [0, 1]\n[compare.arms.alone]\nkind = "alone"\n'
        '[compare.arms.after]\nkind = "collaboration"\nweak = "tuned"\n'
    )
    made, calls = compared(declared(task, arms), tmp_path / "run")
    assert [(one.arm.name, one.seed) for one in made.arms] == [("alone", 0), ("after", 0), ("after", 1)]
    with Experiment(load_config(declared(task, arms)), tmp_path / "run") as experiment:
        part = experiment.store.within("seed-1")
        adapters = [store.records("adapter")["dpo"]["model"] for store in (experiment.store, part)]
        assert adapters[0] != adapters[1], "another seed is another training"
        assert Compared(experiment).run().arms == made.arms
        assert experiment.store.calls() == calls


def test_a_sweep_gives_a_point_for_each_combination(task: list[Path], tmp_path: Path) -> None:
    sweep = '[pairs]\nleast = 2\nstrategy = "all"\n[compare]\n[compare.sweep]\n"pairs.most" = [2, 4]\n'
    made, _ = compared(declared(task, sweep), tmp_path / "run")
    assert [(point.settings, point.pairs) for point in made.sweep] == [({"pairs.most": 2}, 2), ({"pairs.most": 4}, 4)]
    assert (tmp_path / "run/variants/pairs.most-2/pairs.jsonl").read_text().count("\n") == 2


def test_another_draft_format_is_a_variant_with_its_own_drafts_in_the_same_store(task: list[Path], tmp_path: Path) -> None:
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
        '[budget]\nstrong_calls = 8\n[compare]\nagainst = "alone"\n[compare.arms.alone]\nkind = "alone"\n'
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
        ('[compare]\nagainst = "y"\n[compare.arms.y]\nkind = "alone"\nshots = 2', 'kind "alone" has no "shots"'),
        ('[compare]\nagainst = "y"\n[compare.arms.y]\nkind = "rag"', 'needs "corpus"'),
        ('[compare]\nagainst = "y"\n[compare.arms.y]\nkind = "aloan"', "compare.arms.y.kind"),
        ('[compare]\nagainst = "a/b"\n[compare.arms."a/b"]\nkind = "alone"', "letters, digits"),
        ('[compare]\n[compare.sweep]\n"pairs.most" = []', "needs a list of values"),
    ],
)
def test_what_is_wrong_in_compare_is_said_before_anything_is_asked(task: list[Path], compare: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load_config(declared(task, compare))
    assert message in str(raised.value)


def test_a_configuration_without_compare_says_how_to_declare_it(task: list[Path], tmp_path: Path) -> None:
    with Experiment(load_config(task), tmp_path / "run") as experiment, pytest.raises(ConfigError, match=r"\[compare.arms.NAME\]"):
        Compared(experiment)


def test_a_sweeps_paths_are_relative_to_its_file_and_its_keys_are_checked(task: list[Path], tmp_path: Path) -> None:
    files = declared(task, '[compare]\n[compare.sweep]\n"strong" = [{ kind = "in_process", model = "./big" }]\n')
    config = load_config(files)
    assert config.compare is not None
    (value,) = config.compare.sweep["strong"]
    assert value["model"] == str(tmp_path / "big")
    assert overridden(config, {"strong": value}).strong.model == str(tmp_path / "big")
    with pytest.raises(ConfigError, match="no such key"):
        overridden(config, {"pairs.moist": 3})


def test_the_verb_prints_the_table_and_writes_the_files(task: list[Path], tmp_path: Path) -> None:
    from cowest_dspy.cli import app

    arms = '[compare]\nagainst = "alone"\n[compare.arms.alone]\nkind = "alone"\n[compare.arms.oracle]\nkind = "oracle"\n'
    files = declared(task, arms)
    result = CliRunner().invoke(app, ["compare", *map(str, files), "--run", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    assert "ceiling" in result.output and "+100.0" in result.output
    written = json.loads((tmp_path / "run/comparison/comparison.json").read_text())
    assert [one["arm"]["name"] for one in written["arms"]] == ["alone", "oracle"]


def test_which_arms_depend_on_the_seed(task: list[Path]) -> None:
    config = load_config(task)
    rules = {
        "alone": False, "strong": False, "rag": False, "oracle": False, "self_consistency": True, "collaboration": True,
    }  # fmt: skip
    more: dict[str, Any] = {"rag": {"corpus": "toy.py:passages"}}
    for kind, depends in rules.items():
        assert depends_on_seed(ArmRules.model_validate({"kind": kind, **more.get(kind, {})}), config) is depends, kind
    assert not depends_on_seed(ArmRules.model_validate({"kind": "collaboration", "weak": "base"}), config)
    assert depends_on_seed(ArmRules.model_validate({"kind": "alone"}), overridden(config, {"strong.temperature": 0.5}))


def test_titles_say_what_an_arm_is() -> None:
    def title(**keys: Any) -> str:
        return title_of(ArmRules.model_validate(keys))

    assert title(kind="strong", style="chain_of_thought") == "strong alone, chain of thought"
    assert title(kind="weak", weak="base", shots=4) == "weak alone, as it came, 4 worked examples"
    assert title(kind="collaboration", weak="tuned", draft="direct") == "collaboration, after preference tuning, draft = direct"
    assert title(kind="control", control="other_draft").startswith("control: ")
    assert title(kind="alone", title="GPT") == "GPT"


# Its parts


def test_a_part_of_a_store_shares_calls_and_keeps_its_own_records(tmp_path: Path) -> None:
    with Store(tmp_path / "run") as store:
        part = store.within("seed-1")
        store.keep("arm", "x", {"of": "whole"})
        part.keep("arm", "x", {"of": "part"})
        assert store.record("arm", "x") == {"of": "whole"} and part.record("arm", "x") == {"of": "part"}
        assert store.records("arm") == {"x": {"of": "whole"}}
        assert dict(part.each("arm")) == part.records("arm") == {"x": {"of": "part"}} and part.count("arm") == 1
        part.within("draft-direct").keep("arm", "x", {"of": "part of the part"})
        part.forget("arm")
        assert part.record("arm", "x") is None and store.count("arm") == 1
        assert part.within("draft-direct").count("arm") == 1
        assert part.folder == tmp_path / "run/variants/seed-1"
        part.close()
        assert store.record("arm", "x"), "closing a part closes nothing"


def test_a_function_is_given_what_the_configuration_says_and_offered_what_it_asks_for(tmp_path: Path) -> None:
    (tmp_path / "recipe.py").write_text("def f(seed=0):\n    return seed\ndef g(seed=0, strong=None):\n    return strong\nx = 3\n")
    recipe = f"{tmp_path / 'recipe.py'}"
    assert call(f"{recipe}:f", given={"seed": 4, "draft": None}, offered={"strong": "lm"}) == 4
    assert call(f"{recipe}:g", given={"seed": 4}, offered={"strong": "lm"}) == "lm"
    with pytest.raises(RecipeError, match='takes no "draft"'):
        call(f"{recipe}:f", given={"draft": "direct"})
    with pytest.raises(RecipeError, match="a function is expected"):
        call(f"{recipe}:x")


def test_a_program_that_takes_no_format_says_so(task: list[Path], tmp_path: Path) -> None:
    recipe = task[0].parent / "toy.py"
    recipe.write_text(recipe.read_text().replace('def program(draft="knowledge")', 'def program(of="x", draft_="knowledge")'))
    (tmp_path / "more.toml").write_text('draft = "direct"\n')
    with (
        Experiment(load_config([*task, tmp_path / "more.toml"]), tmp_path / "run") as experiment,
        pytest.raises(RecipeError, match='takes no "draft"'),
    ):
        _ = experiment.program


def test_shuffled_labels_keep_the_texts() -> None:
    rows = [{"prompt": str(i), "chosen": f"c{i}", "rejected": f"r{i}"} for i in range(6)]
    mixed = shuffled(rows, seed=1)
    assert sum(row["chosen"].startswith("r") for row in mixed) == 3
    assert [{row["chosen"], row["rejected"]} for row in mixed] == [{f"c{i}", f"r{i}"} for i in range(6)]


def test_drafts_ranked_by_their_own_answers_need_answers() -> None:
    with pytest.raises(PairsError, match="chain_of_thought"):
        by_correctness([], {})


def test_the_draft_of_another_example_is_never_its_own(task: list[Path], tmp_path: Path) -> None:
    with Experiment(load_config(task), tmp_path / "run") as experiment:
        program = experiment.program.bind(weak=experiment.weak, strong=experiment.strong)
        examples = experiment.splits["test"]
        asked: list[str] = []
        program.drafted = lambda **inputs: asked.append(inputs["question"]) or "a e i"  # type: ignore[method-assign]
        answering = other_draft_arm(program, examples, seed=0)
        answers = [answering(example).answer for example in examples]
    assert answers == ["yes"] * 6
    assert sorted(asked) == sorted(example.question for example in examples)
    assert all(question != example.question for question, example in zip(asked, examples, strict=True))
